"""Engines for a GPU that is not here: built, saved, read again, refused to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.compiler.cuda.test_interpreted import IMAGES, TEXTS, model_of
from twofour.compiler.build import build
from twofour.compiler.cuda import compiling
from twofour.compiler.cuda.choose import Way, choose
from twofour.compiler.cuda.graphs import network_of
from twofour.compiler.cuda.types import Types
from twofour.core.cuda_program import CudaProgram
from twofour.core.errors import InputError, UnsupportedError
from twofour.core.plan import is_sparse
from twofour.engine import Engine
from twofour.kernels.cuda.kernel import NvidiaSource, Recipe
from twofour.runtime.session import Session

SM90 = "cuda:sm90"


def test_an_engine_for_another_machine_holds_all_it_needs(tmp_path: Path) -> None:
    engine = build(model_of(IMAGES), target=SM90, fp16=True, tuning_effort=0)
    again = Engine.load(engine.save(tmp_path / "e.engine"))
    assert again.plan == engine.plan
    assert str(again.plan.target) == SM90
    (step,) = again.plan.steps
    program = CudaProgram.from_bytes(again.subgraphs[step.symbol].tobytes())
    assert {launch.code for launch in program.launches} == set(again.plan.code)
    assert [transfer.name for transfer in program.inputs] == ["x"]
    sizes = {"arena": again.plan.arena_bytes, "weights": again.weights.nbytes}
    assert not list(program.wrong(sizes, len(again.plan.layers)))
    with pytest.raises(UnsupportedError, match="cannot run on this machine"):
        Session(again)


def test_two_profiles_share_weights_and_code() -> None:
    model = model_of(TEXTS)
    one = build(model, target=SM90, tuning_effort=0)
    two = build(model, target=SM90, tuning_effort=0, profiles=[{}, {}])
    assert len(two.plan.profiles) == 2
    assert two.plan.code == one.plan.code
    assert two.weights.nbytes == one.weights.nbytes


def test_layers_of_one_shape_keep_weights_of_their_own() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    net (float[4, 32] x) => (float[4, 32] y) <float[32, 32] w1, float[32, 32] w2>
    {
      a = MatMul (x, w1)
      y = MatMul (a, w2)
    }
    """
    engine = build(model_of(text), target=SM90, tuning_effort=0)
    program = CudaProgram.from_bytes(engine.subgraphs[engine.plan.steps[0].symbol].tobytes())
    first, second = program.launches
    assert first.code == second.code
    weights = [
        {place.offset for place in launch.places if place.block == "weights"}
        for launch in (first, second)
    ]
    assert weights[0] != weights[1]


def test_layers_say_which_nodes_they_compute() -> None:
    engine = build(model_of(IMAGES), target=SM90, tuning_effort=0)
    named = {name for layer in engine.plan.layers for name in layer.source}
    assert {"Conv:a", "Relu:ra", "Add:s"} <= named
    product = next(layer for layer in engine.plan.layers if layer.op == "ConvAddRelu")
    assert product.macs == 2 * 25 * 8 * 72
    assert product.precision == "float32"
    assert product.writes[0].tensor.shape == (2, 8, 5, 5)
    assert product.notes[0].startswith("the weight is not 2:4")


def test_open_sizes_are_refused() -> None:
    model = model_of(IMAGES.replace("float[2, 3, 9, 9] x", "float[N, 3, 9, 9] x"))
    ranges = {"x": ((1, 3, 9, 9), (2, 3, 9, 9), (4, 3, 9, 9))}
    with pytest.raises(InputError, match="fixed shapes"):
        build(model, target=SM90, shapes=ranges)


def test_float8_needs_a_gpu_that_has_it() -> None:
    with pytest.raises(UnsupportedError, match="does not multiply float8"):
        build(model_of(IMAGES), target="cuda:sm80", fp16=True, fp8=True)


def _pruned() -> ir.Model:
    """A product whose weight is 2:4."""
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    net (float[64, 64] x) => (float[64, 32] y) <float[64, 32] w> { y = MatMul (x, w) }
    """
    model = model_of(text)
    w = model.graph.initializers["w"]
    assert w.const_value is not None
    kept = w.const_value.numpy() * (np.arange(64) % 4 < 2)[:, None]
    w.const_value = ir.tensor(kept.astype(np.float32))
    return model


def test_without_a_gpu_a_pattern_is_used_and_one_guess_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counted: list[int] = []
    real = compiling.compile_all

    def compile_all(kernels: Any, capability: int, tell: Any = None) -> list[compiling.Code]:
        counted.append(len(kernels))
        return real(kernels, capability, tell)

    monkeypatch.setattr(compiling, "compile_all", compile_all)
    layer = build(_pruned(), target=SM90, fp16=True).plan.layers[-1]
    assert layer.tactic == "2:4 wgmma.sp"
    assert counted[0] == 2  # the conversion of x and the product
    layer = build(_pruned(), target=SM90, fp16=True, sparsity="disable").plan.layers[-1]
    assert layer.tactic == "conv"
    assert any("--sparsity disable" in each.reason for each in layer.candidates)


def test_what_cannot_be_compiled_is_followed_by_the_next_guess(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = compiling.compile_all

    def compile_all(kernels: Any, capability: int, tell: Any = None) -> list[compiling.Code]:
        made = real(kernels, capability, tell)
        pairs = zip(kernels, made, strict=True)
        return ["it cannot" if isinstance(k, NvidiaSource) else code for k, code in pairs]

    monkeypatch.setattr(compiling, "compile_all", compile_all)
    layer = build(_pruned(), target=SM90, fp16=True).plan.layers[-1]
    assert layer.tactic == "conv"
    refused = [each for each in layer.candidates if each.reason == "cannot be compiled: it cannot"]
    assert len(refused) > 1
    assert all(is_sparse(each.tactic) for each in refused)


def test_without_a_gpu_one_has_to_be_named() -> None:
    with pytest.raises(UnsupportedError, match="no GPU to build for"):
        build(model_of(IMAGES), target="cuda")


def test_what_no_kernel_takes_runs_on_the_host() -> None:
    text = IMAGES.replace("f = Flatten (m)", "d = Round (m)\n  f = Flatten (d)")
    engine = build(model_of(text), target=SM90, tuning_effort=0)
    assert [step.kind for step in engine.plan.steps] == ["cuda", "onnxruntime", "cuda"]
    assert all(info.name for info in engine.plan.profiles[0].boundary)


def test_a_model_that_a_gpu_can_run_nothing_of_is_refused() -> None:
    text = """
    <ir_version: 10, opset_import: ["" : 18]>
    net (float[3, 2, 2] x) => (float[3] y) { y = Det (x) }
    """
    with pytest.raises(UnsupportedError, match="nothing of the model can run on the GPU"):
        build(model_of(text), target=SM90)


def _turn() -> Any:
    network = network_of(model_of(IMAGES), {}, Types(), forced=False, dump=None)
    assert network.parts[0].gpu is not None
    return network.parts[0].gpu.turns[1]


def _way(tactic: str) -> Way:
    return Way(Recipe(tactic, "c", ()), ())


def test_the_fastest_way_is_taken_and_all_are_told() -> None:
    times = {"a": 3.0, "2:4 b": 2.0, "c": 4.0}
    ways = [_way(name) for name in times]
    chosen = choose(_turn(), ways, lambda _, way: times[way.recipe.tactic], "enable")
    assert (chosen.way.recipe.tactic, chosen.time_us) == ("2:4 b", 2.0)
    assert [c.tactic for c in chosen.candidates] == ["2:4 b", "a", "c"]


def test_force_takes_a_sparse_way_though_it_is_slower() -> None:
    times = {"a": 1.0, "2:4 b": 2.0}
    ways = [_way(name) for name in times]
    chosen = choose(_turn(), ways, lambda _, way: times[way.recipe.tactic], "force")
    assert chosen.way.recipe.tactic == "2:4 b"
    assert "ruled out" in next(c.reason for c in chosen.candidates if c.tactic == "a")


def test_a_way_that_fails_is_told_and_not_taken() -> None:
    def timer(_: Any, way: Way) -> float:
        if way.recipe.tactic == "a":
            raise UnsupportedError("CUDA refuses", ["a reason"])
        return 5.0

    chosen = choose(_turn(), [_way("a"), _way("b")], timer, "enable")
    assert chosen.way.recipe.tactic == "b"
    assert "a reason" in next(c.reason for c in chosen.candidates if c.tactic == "a")
    with pytest.raises(UnsupportedError, match="no kernel can run"):
        choose(_turn(), [_way("a")], timer, "enable")
