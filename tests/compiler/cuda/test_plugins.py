"""Operators of plugins through the compiler for GPUs, their kernels run in the interpreter."""

from __future__ import annotations

import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from tests.compiler.cuda.execute import run
from tests.kernels.cuda.interpret import interpret
from twofour.compiler.build import build
from twofour.compiler.cuda.check import WrongError, typed
from twofour.compiler.cuda.graphs import Network, network_of
from twofour.compiler.cuda.lower import Turn
from twofour.compiler.cuda.plugin_check import Sampled
from twofour.compiler.cuda.plugins import PluginProblem
from twofour.compiler.cuda.tactics import offered
from twofour.compiler.cuda.types import Types
from twofour.compiler.native_plugin import PluginOp
from twofour.core.cuda import Cuda
from twofour.core.experts import Experts, mixture
from twofour.core.plugins import Operator
from twofour.core.sparse_attention import NO_BLOCKS
from twofour.core.target import CUDA, Target
from twofour.kernels.cuda.kernel import Recipe
from twofour.onnx_tools import plugins as installed
from twofour.onnx_tools.plugins import attach_meanings
from twofour.onnx_tools.quantize import quantize
from twofour.operators.sparse_attention import reference

H200 = Target(CUDA, "x86_64", "", cuda=Cuda("sm90"))
DOMAIN = "twofour.plugins"
NUMBERS = {"heads": 2, "window": 4, "global_tokens": 1, "causal": 0, "block": 64, "scale": 0.0}


def model_of(nodes, inputs, y, constants) -> ir.Model:
    """A model with the functions of its plugins."""
    kinds = {np.dtype(bool): TensorProto.BOOL, np.dtype(np.float32): TensorProto.FLOAT}
    given = [helper.make_tensor_value_info(n, kinds[a.dtype], a.shape) for n, a in inputs.items()]
    graph = helper.make_graph(
        nodes,
        "net",
        given,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
    attach_meanings(model)
    return model


def long_text() -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A projection, sparse attention to its thirds, with a mask of keys, and another one."""
    random = np.random.default_rng(0)
    constants = {
        "w": (random.standard_normal((32, 96)) / 6).astype(np.float32),
        "o": (random.standard_normal((32, 32)) / 6).astype(np.float32),
        "blocks": NO_BLOCKS,
    }
    feeds = {
        "x": random.standard_normal((2, 40, 32)).astype(np.float32),
        "keep": random.random((2, 40)) < 0.8,
    }
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["qkv"]),
        helper.make_node("Split", ["qkv"], ["q", "k", "v"], axis=2, num_outputs=3),
        helper.make_node(
            "SparseAttention", ["q", "k", "v", "keep", "blocks"], ["a"], domain=DOMAIN, **NUMBERS
        ),
        helper.make_node("MatMul", ["a", "o"], ["y"]),
    ]
    return model_of(nodes, feeds, (2, 40, 32), constants), feeds


def wanted_text(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    held = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    q, k, v = np.split(feeds["x"] @ held["w"], 3, axis=2)
    return reference(q, k, v, feeds["keep"], NO_BLOCKS, **NUMBERS) @ held["o"]


def lowered(model: ir.Model, types: Types) -> Network:
    return network_of(model, {}, types, forced=False, dump=None, target=H200)


def of_plugins(network: Network) -> list[str]:
    """What plugins do, on the GPU."""
    turns = [turn for part in network.parts if part.gpu for turn in part.gpu.turns]
    return [turn.op.op_type for turn in turns if isinstance(turn.problem, PluginProblem)]


@pytest.mark.parametrize(
    ("types", "bound"), [(Types(), 1e-5), (Types("float16"), 5e-3)], ids=["f32", "f16"]
)
def test_sparse_attention(types: Types, bound: float) -> None:
    model, feeds = long_text()
    network = lowered(model, types)
    assert of_plugins(network) == ["SparseAttention"]
    got = run(network, feeds, 0)["y"]
    wanted = wanted_text(model, feeds)
    assert np.abs(got - wanted).max() <= bound * np.abs(wanted).max()


def test_quantized_sparse_attention() -> None:
    model, feeds = long_text()
    quantized = quantize(model, [feeds])
    network = lowered(quantized, Types("float16"))
    assert of_plugins(network)[0].startswith("Quantized")
    got = run(network, feeds, 0)["y"]
    wanted = wanted_text(model, feeds)
    assert np.linalg.norm(got - wanted) <= 0.05 * np.linalg.norm(wanted)


def experts() -> tuple[ir.Model, dict[str, np.ndarray], np.ndarray]:
    """A layer of experts with its router, and what it gives."""
    random = np.random.default_rng(3)
    sizes = {"w1": (4, 24, 16), "b1": (4, 24), "w2": (4, 16, 24), "b2": (4, 16), "r": (16, 4)}
    constants = {
        name: (random.standard_normal(size) / math.sqrt(size[-1])).astype(np.float32)
        for name, size in sizes.items()
    }
    feeds = {"x": random.standard_normal((2, 5, 16)).astype(np.float32)}
    nodes = [
        helper.make_node("MatMul", ["x", "r"], ["logits"]),
        helper.make_node(
            "MixtureOfExpertsGelu",
            ["x", "logits", "w1", "b1", "w2", "b2"],
            ["y"],
            domain=DOMAIN,
            k=2,
        ),
    ]
    c = constants
    layer = Experts(c["w1"], c["b1"], c["w2"], c["b2"], "Gelu")
    wanted = mixture(feeds["x"], feeds["x"] @ constants["r"], layer, 2)
    return model_of(nodes, feeds, (2, 5, 16), constants), feeds, wanted


@pytest.mark.parametrize(
    ("types", "bound"), [(Types(), 1e-5), (Types("float16"), 1e-2)], ids=["f32", "f16"]
)
def test_experts(types: Types, bound: float) -> None:
    model, feeds, wanted = experts()
    network = lowered(model, types)
    assert of_plugins(network) == ["MixtureOfExpertsGelu"]
    got = run(network, feeds, 0)["y"]
    assert np.abs(got - wanted).max() <= bound * np.abs(wanted).max()


def test_a_node_that_no_tactic_takes_is_inlined() -> None:
    """The table of blocks is an input: no list can be made of it."""
    model, feeds = long_text()
    blocks = model.graph.initializers.pop("blocks")
    model.graph.inputs.append(blocks)
    blocks.const_value = None
    network = lowered(model, Types())
    assert of_plugins(network) == []
    assert "SparseAttention" not in {node.op_type for node in network.fused.model.graph}
    assert onnx.checker.check_model(ir.to_proto(network.fused.model)) is None
    assert feeds


def plugin_turn(model: ir.Model, types: Types) -> Turn:
    """The only turn of a plugin."""
    turns = lowered(model, types).parts[0].gpu.turns
    (turn,) = [turn for turn in turns if isinstance(turn.problem, PluginProblem)]
    return turn


def started(turn: Turn, recipe: Recipe, sampled: Sampled) -> dict[str, np.ndarray]:
    """Bytes of the results of a recipe on the samples."""
    tensors = {role: torch.from_numpy(held.copy()) for role, held in sampled.inputs.items()}
    for role in turn.writes:
        tensors[role] = torch.full((turn.operands[role].span_bytes,), 0x5A, dtype=torch.uint8)
    interpret(recipe, {role: tensor.view(torch.uint8) for role, tensor in tensors.items()})
    return {role: tensors[role].numpy() for role in turn.writes}


@pytest.mark.parametrize("case", ["text", "text int8", "text float8", "experts", "experts half"])
def test_results_are_compared_with_the_meaning(case: str) -> None:
    """As the build does it on a GPU: right ones pass, one element that is wrong does not."""
    model = experts()[0]
    if case.startswith("text"):
        model, feeds = long_text()
        model = quantize(model, [feeds]) if "8" in case else model
    quantized = "float8e4m3fn" if "float8" in case else "int8"
    types = Types("float16" if case != "text" and case != "experts" else "float32", quantized)
    turn = plugin_turn(model, types)
    (recipe, *_) = offered(turn.problem, turn.constants, 90, 0)
    assert isinstance(turn.op, PluginOp)
    sampled = Sampled(turn, turn.op)
    results = started(turn, recipe, sampled)
    sampled.compare(recipe, lambda role: results[role])
    (role,) = turn.writes
    tensor = turn.operands[role]
    elements = typed(results[role], tensor.dtype)
    if elements.dtype == np.uint8:  # bits of float8: 288 or -288
        elements[-1] = 0x7A if elements[-1] & 0x80 else 0xFA
    else:
        elements[-1] = 99 if elements[-1] < 0 else -99
    with pytest.raises(WrongError, match="wrongly"):
        sampled.compare(recipe, lambda role: results[role])


def test_an_engine_has_the_layer_and_says_what_was_inlined() -> None:
    model, _ = long_text()
    engine = build(model, target="cuda:sm90", tuning_effort=0)
    assert ("SparseAttention", "sparse attention") in [(e.op, e.tactic) for e in engine.plan.layers]
    model.graph.inputs.append(blocks := model.graph.initializers.pop("blocks"))
    blocks.const_value = None
    engine = build(model, target="cuda:sm90", tuning_effort=0)
    assert any("the table of blocks is computed" in note for note in engine.plan.notes)


def test_kernels_that_take_float32_alone_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, feeds = long_text()
    operator = installed.plugin_of(model.graph[2])
    assert isinstance(operator, Operator)
    tactic = type(operator.cuda[0])
    asked = tactic.refuse

    def picky(self, problem, capability: int) -> str:
        q = problem.inputs[0]
        return "only float32" if q.dtype != "float32" else asked(self, problem, capability)

    monkeypatch.setattr(tactic, "refuse", picky)
    network = lowered(model, Types("float16"))
    (turn,) = [
        turn for turn in network.parts[0].gpu.turns if isinstance(turn.problem, PluginProblem)
    ]
    assert turn.operands["q"].dtype == turn.operands["y"].dtype == "float32"
    got = run(network, feeds, 0)["y"]
    wanted = wanted_text(model, feeds)
    assert np.abs(got - wanted).max() <= 5e-3 * np.abs(wanted).max()
