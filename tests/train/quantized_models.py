"""Small models that round in their forward, and what of it is in an exported file."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from twofour.core.ranges import RangeOptions
from twofour.train.fake_quant import FakeQuant


class Quantized(nn.Module):
    """A model with quantizers, which are made where forward first names them."""

    def __init__(self, activation: str = "int8", learned: bool = False) -> None:
        super().__init__()
        self.learned = learned
        self.options = RangeOptions("mse", activation)  # type: ignore[arg-type]
        self.quantizers = nn.ModuleDict()

    def act(self, name: str, x: Tensor) -> Tensor:
        if name not in self.quantizers:
            self.quantizers[name] = FakeQuant(self.options, None, self.learned)
        return self.quantizers[name](x)

    def weight(self, layer: nn.Module, name: str = "weight") -> Tensor:
        key = f"{next(n for n, m in self.named_modules() if m is layer)}_{name}"
        if key not in self.quantizers:
            self.quantizers[key] = FakeQuant(self.options, 0, self.learned)
        return self.quantizers[key](getattr(layer, name))

    def calibrate(self, *batches: Tensor) -> Quantized:
        self.eval()
        with torch.no_grad():
            self(batches[0])
            for quant in self.quantizers.values():
                quant.mode = "collect"
            for batch in batches:
                self(batch)
        for quant in self.quantizers.values():
            quant.compute()
        return self


class Residual(Quantized):
    """Conv-BatchNorm with factors of both signs and zero, a residual, a pooling, Linear on BN."""

    def __init__(self, activation: str = "int8", learned: bool = False) -> None:
        super().__init__(activation, learned)
        self.conv = nn.Conv2d(4, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.bn3 = nn.BatchNorm2d(16)
        self.linear = nn.Linear(16, 32)
        self.bn4 = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 8)
        for norm in (self.bn, self.bn2, self.bn3, self.bn4):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            norm.weight.data[3] = 0

    def forward(self, x: Tensor) -> Tensor:
        conv = functional.conv2d
        x = self.act("x", x)
        x = self.act("a", torch.relu(self.bn(conv(x, self.weight(self.conv), padding=1))))
        y = self.bn2(conv(x, self.weight(self.conv2), self.conv2.bias, padding=1))
        x = functional.max_pool2d(self.act("b", torch.relu(x + y)), 2)
        y = self.bn3(conv(x, self.weight(self.depthwise), padding=1, groups=16))
        x = self.act("c", functional.relu6(y))
        x = self.act("d", x.mean((2, 3)))
        y = self.bn4(functional.linear(x, self.weight(self.linear), self.linear.bias))
        x = self.act("e", torch.relu(y))
        return functional.linear(x, self.weight(self.head), self.head.bias)


class Tokens(Quantized):
    """A weight read by two layers, one cut in three, and one that BatchNorms scale twice."""

    def __init__(self, activation: str = "int8", learned: bool = False) -> None:
        super().__init__(activation, learned)
        self.shared = nn.Linear(8, 8, bias=False)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 1)
        self.bn = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)])
        nn.init.normal_(self.bn[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act("x", x)
        x = self.act("s", self.shared_twice(x))
        packed = self.weight(self.attention, "in_proj_weight")
        q, k, v = packed.split(8)
        scores = functional.linear(x, q) @ functional.linear(x, k).transpose(1, 2)
        x = self.act("y", torch.softmax(scores, -1) @ functional.linear(x, v))
        x = x.transpose(1, 2)
        a = self.bn[0](functional.conv1d(x, self.weight(self.conv)))
        return a + 2 * self.bn[1](functional.conv1d(x + 1, self.weight(self.conv)))

    def shared_twice(self, x: Tensor) -> Tensor:
        y = torch.relu(functional.linear(x, self.weight(self.shared)))
        return y + functional.linear(x[:, :1], self.weight(self.shared))


def run_with_integers(path: Path, x: Tensor) -> tuple[Tensor, dict[str, NDArray[np.int64]]]:
    """The file's first output, and what each QuantizeLinear of activations gives, by scale's name.

    ONNX Runtime leaves the graph as it is.
    """
    model = onnx.load(path)
    constants = {i.name for i in model.graph.initializer}
    rounded = [
        node
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants
    ]
    model.graph.output.extend(onnx.ValueInfoProto(name=node.output[0]) for node in rounded)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    first, *others = session.run(None, {model.graph.input[0].name: x.numpy()})
    return torch.from_numpy(first), {
        node.output[0]: array.astype(np.int64) for node, array in zip(rounded, others, strict=True)
    }


def torch_integers(model: nn.Module, x: Tensor) -> tuple[Tensor, list[NDArray[np.int64]]]:
    """The model's output, and the integers of each activation in the order they are rounded."""
    found: list[NDArray[np.int64]] = []
    handles = [
        module.register_forward_hook(
            lambda quant, given, y: found.append(quant.integers(given[0]).numpy().astype(np.int64))
        )
        for module in model.modules()
        if isinstance(module, FakeQuant) and module.axis is None
    ]
    with torch.no_grad():
        y = model(x)
    for handle in handles:
        handle.remove()
    return y, found


def run_layer_by_layer(
    path: Path, model: nn.Module, x: Tensor
) -> tuple[tuple[Tensor, Tensor], dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """The file with the model's integers as what each of its layers reads.

    So what one layer rounds otherwise is not read by the next. Tensors are told by their scales,
    and of one scale by their order.

    Returns:
        What the file gives and what the model does; and so for each rounded tensor of the file.
    """
    file, held, of_scale = onnx.load(path), stored(path), defaultdict(list)
    handles = [
        module.register_forward_hook(
            lambda q, given, y: of_scale[float(q.scale)].append(q.integers(given[0]).numpy())
        )
        for module in model.modules()
        if isinstance(module, FakeQuant) and module.axis is None
    ]
    with torch.no_grad():
        expected = model(x)
    for handle in handles:
        handle.remove()
    feeds, wanted = {file.graph.input[0].name: x.numpy()}, {}
    for node in file.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] in held:
            continue
        name, kind = node.output[0], held[node.input[2]].dtype
        wanted[name] = of_scale[float(held[node.input[1]])].pop(0).astype(np.int64)
        feeds[name] = wanted[name].astype(kind)
        node.output[0] = f"{name}_found"
        file.graph.output.append(onnx.ValueInfoProto(name=f"{name}_found"))
        element = onnx.helper.np_dtype_to_tensor_dtype(kind)
        file.graph.input.append(onnx.helper.make_tensor_value_info(name, element, None))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(file.SerializeToString(), options)
    first, *others = session.run(None, feeds)
    found = {n: (a.astype(np.int64), wanted[n]) for n, a in zip(wanted, others, strict=True)}
    return (torch.from_numpy(first), expected), found


def stored(path: Path) -> dict[str, NDArray[np.generic]]:
    """The file's initializers."""
    return {i.name: numpy_helper.to_array(i) for i in onnx.load(path).graph.initializer}
