"""Networks in bfloat16 through build and Session: one native step, close to the fused graph."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from tests.compiler.engines import random_inputs, reference, run_twice
from tests.compiler.test_passes_bf16 import (
    ATTENTION,
    HEADS,
    JOINED,
    JOINING,
    NORM,
    SCALES,
    weights,
)
from tests.graphs import graph
from tests.kernels.bf16 import needs_bf16
from tests.networks import ResNet18, export, images, with_statistics
from twofour.compiler import rivals
from twofour.compiler.build import build
from twofour.compiler.importer import import_graph
from twofour.compiler.passes.pipeline import BF16, PIPELINE, run_passes
from twofour.core import target
from twofour.core.bfloat16 import ROUNDING
from twofour.core.plan import is_sparse
from twofour.core.target import host_target, missing_features
from twofour.engine import Engine
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize


@pytest.fixture(autouse=True)
def all_that_may_be(monkeypatch) -> None:
    """No product stays float32 because it is faster so: layers this small often are."""
    monkeypatch.setattr(rivals, "WORTH", 0.0)


def layers(engine: Engine) -> dict[str, str]:
    """The precision of each product, by name."""
    return {layer.name: layer.precision for layer in engine.plan.layers if layer.pattern}


def check(model: ir.Model, engine: Engine, inputs, roundings: int) -> None:
    """One native step; within so many roundings of the fused graph on ONNX Runtime.

    Both round the same values to bfloat16, after sums in another order: one rounding to another
    side, and what it does to all that follows.
    """
    (profile,) = engine.plan.profiles
    assert [step.kind for step in profile.steps] == ["native"]
    want = reference(run_passes(import_graph(model), None, (*PIPELINE, *BF16)).model, inputs)
    plain = reference(model, inputs)
    for name, got in run_twice(engine, inputs).items():
        largest = np.abs(want[name]).max()
        assert np.abs(got - want[name]).max() <= roundings * ROUNDING * largest
        assert np.abs(got - plain[name]).max() > 0


@needs_bf16
@pytest.mark.parametrize("pattern", ["", "2:4", "4:8", "2:4/pair"])
def test_a_residual_network(pattern) -> None:
    model = export(with_statistics(ResNet18()), images(1))
    if pattern:
        model, _ = prune(model, pattern)
    engine = build(model, bf16=True, sparsity="force" if pattern else "enable")
    check(model, engine, random_inputs(model), 4)
    assert set(layers(engine).values()) == {"bfloat16"}
    kinds = {layer.op for layer in engine.plan.layers}
    assert {"BMaxPool", "BGlobalAveragePool", "BConvAddRelu", "BGemmF"} <= kinds
    pruned = [layer for layer in engine.plan.layers if layer.pattern not in ("", "dense")]
    assert bool(pruned) == bool(pattern)
    assert all(is_sparse(layer.tactic) for layer in pruned)
    if pattern == "4:8":
        assert {(layer.pattern, layer.tactic) for layer in pruned} == {("4:8", "4:8")}
        refused = {c.tactic for layer in pruned for c in layer.candidates if c.reason}
        assert refused == {"dense", "2:4 H", "2:4 pair"}


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2])
def test_a_pyramid_moves_no_float(threads) -> None:
    """Split, joined, pooled, repeated: all in bfloat16, and all but the repeating in place."""
    pool = "MaxPool <kernel_shape = [5, 5], pads = [2, 2, 2, 2]>"
    body = f"{JOINED} l = {pool} (k)\n n = {pool} (l)\n o = Concat <axis = 1> (k, l, n)"
    model = graph(
        f"(float[1,4,8,8] x, float[1,4,16,24] t) => (float[1,4,16,24] y)"
        f" {{ r = Conv (t, z)\n {body}\n y = Conv (o, m) }}",
        **weights(**JOINING, m=(4, 24, 1, 1)),
        **SCALES,
    )
    engine = build(model, bf16=True, threads=threads)
    check(model, engine, random_inputs(model), 8)
    found = sorted(layer.op for layer in engine.plan.layers if layer.op != "Cast")
    assert found == [
        *("BConv", "BConv", "BConv", "BConvF", "BConvSiluAdd", "BMaxPoolChain", "Copy", "Resize"),
    ]


BLOCK = f"""n = {NORM} (x, g, h)
 e = MatMul (n, we)
 {ATTENTION.replace("(x,", "(n,")}
 f = MatMul (joined, w)
 i = Add (f, x)
 j = {NORM} (i, g, h)
 l = MatMul (j, wl)
 m = Mul (l, l)
 u = MatMul (m, wu)
 y = Add (u, i)"""
BLOCK_WEIGHTS = weights(
    **dict.fromkeys(("we", "wq", "wk", "wv", "w"), (8, 8)), g=(8,), h=(8,), wl=(8, 12), wu=(12, 8)
)


@needs_bf16
def test_layers_that_are_chosen_stay_float32() -> None:
    """By the names of nodes, whatever the passes make of those."""
    model = export(with_statistics(ResNet18()), images(1))
    names = [str(node.name) for node in model.graph if node.op_type in ("Conv", "Gemm")]
    chosen = {names[0], names[3], names[-1]}
    engine = build(model, bf16=True, stay_float32=chosen, tuning_effort=0, race=False)
    computed = {name: each for each in engine.plan.layers for name in each.source}
    for name in names:
        wanted = "float32" if name in chosen else "bfloat16"
        assert computed[name].precision == wanted, name
        reason = "not bfloat16: it was chosen to be float32"
        assert (reason in computed[name].notes) == (name in chosen)


@needs_bf16
@pytest.mark.parametrize("threads", [1, 2])
def test_a_transformer(threads) -> None:
    model = graph(f"(float[1,6,8] x) => (float[1,6,8] y) <{HEADS}> {{ {BLOCK} }}", **BLOCK_WEIGHTS)
    if threads > target.detect_host().cores:
        pytest.skip("one core")
    engine = build(model, bf16=True, threads=threads)
    check(model, engine, random_inputs(model), 8)
    found = [layer.op for layer in engine.plan.layers]
    assert "BAttention" in found
    assert set(layers(engine).values()) == {"bfloat16"}


@needs_bf16
def test_integer_layers_stay_integer() -> None:
    """A file with Q/DQ around one of two layers."""
    nodes = """q = QuantizeLinear (x, s, z)
 d = DequantizeLinear (q, s, z)
 wd = DequantizeLinear (wq, s)
 a = Conv <pads = [1, 1, 1, 1]> (d, wd)
 b = Relu (a)
 y = Conv <pads = [1, 1, 1, 1]> (b, w)"""
    random = np.random.default_rng(0)
    model = graph(
        "(float[1,4,8,8] x) => (float[1,4,8,8] y) <float s = {0.03}, int8 z = {3}>"
        f" {{ {nodes} }}",
        wq=random.integers(-127, 127, (4, 4, 3, 3)).astype(np.int8),
        **weights(w=(4, 4, 3, 3)),
    )
    engine = build(model, bf16=True)
    assert sorted(layers(engine).values()) == ["bfloat16", "int8"]
    check(model, engine, random_inputs(model), 4)


@needs_bf16
def test_a_quantized_network_has_no_bfloat16_and_needs_none() -> None:
    model = export(with_statistics(ResNet18()), images(1))
    options = QuantizeOptions(method="minmax")
    quantized = quantize(model, random_inputs(model), options)
    engine = build(quantized, bf16=True)
    assert set(layers(engine).values()) == {"int8"}
    assert not engine.plan.target.bf16
    assert "avx512bf16" not in engine.plan.target.features


@needs_bf16
def test_the_engine_names_the_feature_it_needs(tmp_path, monkeypatch) -> None:
    model = graph("(float[2,4] x) => (float[2,6] y) { y = MatMul (x, w) }", **weights(w=(4, 6)))
    build(model, bf16=True).save(tmp_path / "m.engine")
    engine = Engine.load(tmp_path / "m.engine")
    assert engine.plan.target.bf16
    assert missing_features(engine.plan.target) == ()
    here = target.detect_host()
    lacking = replace(here, features=here.features - {"avx512bf16"})
    monkeypatch.setattr(target, "detect_host", lambda: lacking)
    assert missing_features(engine.plan.target) == ("avx512bf16",)
    assert missing_features(build(model, bf16=True).plan.target) == ()


@needs_bf16
def test_open_sizes() -> None:
    model = graph("(float[N,4] x) => (float[N,6] y) { y = MatMul (x, w) }", **weights(w=(4, 6)))
    engine = build(model, bf16=True, shapes={"x": ((1, 4), (3, 4), (9, 4))})
    assert set(layers(engine).values()) == {"bfloat16"}
    for rows in (1, 2, 9):
        x = np.random.default_rng(rows).normal(size=(rows, 4)).astype(np.float32)
        want = reference(model, {"x": x})["y"]
        got = run_twice(engine, {"x": x})["y"]
        assert np.abs(got - want).max() <= 4 * ROUNDING * np.abs(want).max()


def test_elsewhere_layers_stay_float32_and_say_why(monkeypatch) -> None:
    model = graph("(float[2,4] x) => (float[2,6] y) { y = MatMul (x, w) }", **weights(w=(4, 6)))
    here = target.detect_host()
    lacking = replace(here, features=here.features - {"avx512bf16"})
    monkeypatch.setattr(target, "detect_host", lambda: lacking)
    for isa in ("avx2", None):
        engine = build(model, bf16=True, target=host_target(isa))
        assert set(layers(engine).values()) == {"float32"}
        (layer,) = [layer for layer in engine.plan.layers if layer.pattern]
        assert any("not bfloat16: bfloat16 needs" in note for note in layer.notes)
        assert not engine.plan.target.bf16
        plain = build(model, target=host_target(isa))
        said = {n for layer in plain.plan.layers for n in layer.notes if "bfloat16" in n}
        assert said == {"not bfloat16: not asked for (--bf16)"}


@needs_bf16
def test_a_layer_that_stays_float32_says_why() -> None:
    model = graph(
        "(float[1,4,6,6] x) => (float[1,4,6,6] y) {"
        " a = Conv <group = 4, pads = [1, 1, 1, 1]> (x, w) b = Conv (a, v)"
        " y = Conv <group = 4, pads = [1, 1, 1, 1]> (b, w) }",
        **weights(v=(4, 4, 1, 1), w=(4, 1, 3, 3)),
    )
    engine = build(model, bf16=True)
    assert sorted(layers(engine).values()) == ["bfloat16", "bfloat16", "float32"]
    (notes,) = [n.notes for n in engine.plan.layers if n.precision == "float32" and n.pattern]
    assert any("one input channel a group" in note for note in notes)
    check(model, engine, random_inputs(model), 4)
