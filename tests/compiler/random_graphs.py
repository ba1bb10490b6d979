"""Random graphs of convolutions, additions, maxima and fallbacks, float or with Q and DQ."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from tests.compiler.engines import fused, random_inputs, reference

KINDS = {"conv3": (3, 1, 1), "conv1": (1, 0, 1), "dilated": (3, 2, 2), "grouped": (3, 1, 1)}
STEPS = (*KINDS, "relu", "add", "sigmoid", "max", "block", "own block", "projection")


@dataclass(frozen=True)
class Case:
    """A graph with inputs and the right answer."""

    model: ir.Model
    inputs: dict[str, np.ndarray]
    quantized: bool

    def check(self, got: dict[str, np.ndarray]) -> None:
        """Floats within their sums' rounding; few quantized values a step apart."""
        for name, want in reference(fused(self.model), self.inputs).items():
            size = max(1.0, float(np.abs(want).max()))
            off = np.abs(got[name] - want) / size
            if self.quantized:
                # Where a sum lies at half a step, the other side is a whole step away.
                assert (off > 1e-5).mean() <= 0.02, name
            else:
                # 180 products, 12 layers; values grow with each addition.
                assert off.max() <= 180 * 12 * 2.0**-24, name


@dataclass
class _Writer:
    random: np.random.Generator
    shape: tuple[int, int, int, int]
    quantized: bool
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    count: int = 0

    def constant(self, value: np.ndarray) -> str:
        self.count += 1
        self.constants.append(numpy_helper.from_array(value, f"c{self.count}"))
        return f"c{self.count}"

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        self.count += 1
        self.nodes.append(helper.make_node(op, list(inputs), [f"v{self.count}"], **attributes))
        return f"v{self.count}"

    def maybe_quantized(self, value: str, chance: float) -> str:
        """The value, or Q and DQ of it."""
        if not self.quantized or self.random.random() > chance:
            return value
        # One zero point for all: a tensor with two is refused.
        qdq = (
            self.constant(np.float32(self.random.choice([0.03, 0.07]))),
            self.constant(np.uint8(120)),
        )
        return self.node("DequantizeLinear", self.node("QuantizeLinear", value, *qdq), *qdq)

    def conv(self, value: str, kind: str) -> str:
        (size, pad, dilation), c = KINDS[kind], self.shape[1]
        groups = 4 if kind == "grouped" else 1
        w = self.random.normal(size=(c, c // groups, size, size)) / (c // groups * size**2) ** 0.5
        weight = self.constant(w.astype(np.float32))
        if self.quantized and self.random.random() < 0.9:
            scale = np.abs(w).max((1, 2, 3)) / 127
            ints = np.rint(w / scale[:, None, None, None]).astype(np.int8)
            stored = self.constant(ints), self.constant(scale.astype(np.float32))
            weight = self.node("DequantizeLinear", *stored, axis=0)
        bias = self.constant(self.random.normal(scale=0.1, size=c).astype(np.float32))
        value = self.maybe_quantized(value, 0.9)
        attributes = {"pads": [pad] * 4, "dilations": [dilation] * 2, "group": groups}
        return self.node("Conv", value, weight, bias, **attributes)

    def step(self, values: list[str]) -> str:
        """One more value, from late ones rather than early ones."""
        step = str(self.random.choice(STEPS))
        a = values[int(self.random.integers(max(0, len(values) - 4), len(values)))]
        b = values[int(self.random.integers(0, len(values)))]
        plain = str(self.random.choice(["conv3", "conv1"]))
        if step in KINDS:
            return self.conv(a, step)
        if step == "relu":
            return self.node("Relu", self.conv(a, plain))
        if step == "add":
            return self.node("Add", a, b)
        if step == "sigmoid":
            return self.node("Sigmoid", a)
        if step == "max":
            return self.node("MaxPool", a, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
        if step == "block":
            return self.node("Relu", self.node("Add", b, self.conv(a, plain)))
        if step == "own block":
            return self.node("Add", self.conv(a, plain), a)
        return self.node("Add", self.conv(a, "conv1"), self.conv(b, plain))


def random_graph(seed: int, quantized: bool) -> Case:
    """The graph of that seed."""
    random = np.random.default_rng(seed)
    batch, c, side = int(random.choice([1, 2])), int(random.choice([4, 16, 20])), 5
    writer = _Writer(random, (batch, c, side, side), quantized)
    inputs = ["x", "z"][: int(random.choice([1, 1, 2]))]
    values = list(inputs)
    for _ in range(int(random.integers(3, 12))):
        values.append(writer.maybe_quantized(writer.step(values), 0.5))
    made = values[len(inputs) :]
    outputs = dict.fromkeys([made[-1], made[int(random.integers(0, len(made)))]])

    def infos(names: object) -> list[onnx.ValueInfoProto]:
        kind = TensorProto.FLOAT
        return [helper.make_tensor_value_info(n, kind, writer.shape) for n in names]

    nodes = [*writer.nodes]
    graph = helper.make_graph(nodes, "g", infos(inputs), infos(outputs), writer.constants)
    opset = [helper.make_opsetid("", 17)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opset, ir_version=9))
    return Case(model, random_inputs(model, seed), quantized)
