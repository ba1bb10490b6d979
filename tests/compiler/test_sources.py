"""Every node of the source model belongs to a layer, or to what no layer has to compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.compiler.test_build_open import tokens
from tests.compiler.test_taps import IMAGES, encoder, residual_network, weights  # noqa: F401
from tests.graphs import graph
from tests.kernels.bf16 import needs_bf16
from twofour.compiler import rivals
from twofour.compiler.build import build
from twofour.compiler.explain import DENSE, FALLBACK, explain
from twofour.compiler.reasons import NO_BF16, NO_Q
from twofour.compiler.summary import advice, conversions, parts
from twofour.compiler.writes import SourceNames
from twofour.engine import Engine
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.train.networks import transformer

# What may cost nothing: constants, shapes, other names for a value, a Concat written in place.
FREE = set(
    "Constant Identity Dropout Shape Slice Gather Concat Unsqueeze Squeeze Reshape Flatten Split"
    " Transpose Cast ConstantOfShape Expand Where Equal Div QuantizeLinear DequantizeLinear".split()
)


def check_nodes(engine: Engine, model: ir.Model) -> dict[str, tuple[str, ...]]:
    """The source nodes of each layer; every node is somewhere, none is made up."""
    names = SourceNames.of(model.graph)
    types = {names.nodes[v.name]: n.op_type for n in model.graph for v in n.outputs if v.name}
    used = [name for layer in engine.plan.layers for name in layer.source]
    assert set(used) | set(engine.plan.free) == set(types)
    assert not set(used) & set(engine.plan.free)
    assert {types[name] for name in engine.plan.free} <= FREE
    for layer in engine.plan.layers:
        assert bool(layer.source) or bool(layer.cause), layer.name
    return {layer.name: layer.source for layer in engine.plan.layers}


def check_reasons(engine: Engine) -> None:
    """No layer that is dense, float or on ONNX Runtime goes without a reason."""
    for row in explain(engine.plan):
        if row.kind in (DENSE, FALLBACK) or row.precision in ("float32", "bfloat16"):
            assert row.why or row.cause, row.name


def test_a_residual_network() -> None:
    model = residual_network()
    engine = build(model, tuning_effort=0)
    found = check_nodes(engine, model)
    check_reasons(engine)
    sets = {frozenset(names) for names in found.values()}
    assert {frozenset(names) for names in ("ab", "cde", "fg", "kl", "p", "i", "m", "y")} <= sets
    assert set(engine.plan.free) == {"j", "n"}
    notes = {note for layer in engine.plan.layers for note in layer.notes}
    assert {NO_Q, NO_BF16} <= notes


def test_a_residual_network_in_int8() -> None:
    model = quantize(prune(residual_network())[0], IMAGES)
    engine = build(model, tuning_effort=0)
    check_nodes(engine, model)
    check_reasons(engine)
    notes = [note for layer in engine.plan.layers for note in layer.notes]
    assert not any("INT8" in note or "bfloat16" in note for note in notes)
    (entry,) = [c for c in conversions(engine.plan) if "input 'x'" in c.cause]
    assert (entry.op, entry.moved_bytes) == ("QuantizeLinear", 5 * IMAGES["x"].size)
    assert "is NCHW float32; " in entry.cause


@needs_bf16
def test_a_residual_network_in_bfloat16(monkeypatch) -> None:
    monkeypatch.setattr(rivals, "WORTH", 0.0)
    model = residual_network()
    engine = build(model, tuning_effort=0, bf16=True)
    check_nodes(engine, model)
    check_reasons(engine)
    causes = [c.cause for c in conversions(engine.plan) if c.op == "Cast"]
    assert any("the model's input 'x' is NCHW float32" in cause for cause in causes)
    assert any("reads bfloat16" in cause or "read bfloat16" in cause for cause in causes)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_encoder(encoder, precision) -> None:  # noqa: F811
    model = quantize(encoder, tokens(4, 24)) if precision == "int8" else encoder
    shapes = dict.fromkeys(transformer.INPUT_NAMES, ((1, 1), (2, 16), (4, 40)))
    engine = build(model, shapes=shapes, tuning_effort=0)
    found = check_nodes(engine, model)
    check_reasons(engine)
    block = "encoder.layer.0.attention.self"
    whole = {f"{block}/MatMul", f"{block}/Softmax", f"{block}/MatMul_1"}
    assert whole <= set(found[f"{block}/MatMul/attention"])


def test_a_partly_quantized_network_says_which_input_is_not() -> None:
    model = graph(
        "(float[1,8,6,6] x) => (float[1,8,6,6] y) <float s = {0.05}, int8 z = {0}> {"
        " q = QuantizeLinear (x, s, z) f = DequantizeLinear (q, s, z)"
        " w = DequantizeLinear <axis = 0> (k, ks)"
        " a = Conv <pads = [1,1,1,1]> (f, w) y = Conv <pads = [1,1,1,1]> (a, w2) }",
        k=np.ones((8, 8, 3, 3), np.int8), ks=np.full(8, 0.01, np.float32),
        **weights(w2=(8, 8, 3, 3)),
    )  # fmt: skip
    engine = build(model, tuning_effort=0)
    check_reasons(engine)
    (note,) = [n for layer in engine.plan.layers for n in layer.notes if n.startswith("not INT8")]
    assert "'a'" in note


def test_conversions_name_who_caused_them() -> None:
    model = graph(
        "(float[1,8,6,6] x) => (float[1,8,6,6] y) {"
        " a = Conv <pads = [1,1,1,1]> (x, w1) d = Det (a) u = Unsqueeze (d, last)"
        " v = Unsqueeze (u, last) c = Add (a, v) y = Conv <pads = [1,1,1,1]> (c, w2) }",
        last=np.array([-1]),
        **weights(w1=(8, 8, 3, 3), w2=(8, 8, 3, 3)),
    )
    engine = build(model, tuning_effort=0)
    check_nodes(engine, model)
    check_reasons(engine)
    causes = {each.name: each.cause for each in conversions(engine.plan)}
    assert "ONNX Runtime step with Det reads float32" in causes["a/plain"]
    assert causes["x/native"].startswith("the model's input 'x' is NCHW float32; a reads float32")
    assert "output 'y' of the model is float32" in causes["y/plain"]
    shares = {part.kind: part.share for part in parts(engine.plan)}
    assert sum(shares.values()) == pytest.approx(1.0)
    assert {"dense", "conversion", "onnxruntime"} <= set(shares)
    assert any("runs on ONNX Runtime (Det" in text for text in advice(engine.plan))


def test_real_files(data_folder: Path) -> None:
    """Of another exporter, and with nodes that a newer opset made."""
    for name in ("ultraface_slim_320", "mlperftiny_resnet8", "har_cnn"):
        model = load_model(data_folder / "onnx" / f"{name}.onnx")
        engine = build(model, tuning_effort=0)
        check_nodes(engine, model)
        check_reasons(engine)
