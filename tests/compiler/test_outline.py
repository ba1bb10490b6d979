"""Who reads what whom wrote, and the layers as a report shows them."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir
import pytest
from onnxruntime.quantization import quantize_dynamic as quantize_onnxruntime

from tests.compiler.test_roofline import BUSY, RATES, plan_of
from tests.compiler.test_taps import IMAGES, encoder, residual_network, weights  # noqa: F401
from tests.graphs import graph
from tests.sample_engines import sample_engine
from twofour.compiler.build import build
from twofour.compiler.outline import outline
from twofour.core.errors import InputError
from twofour.core.outcome import Edge
from twofour.engine import Candidate, Engine, Read
from twofour.onnx_tools.dynamic import quantize_dynamic
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.quantize import quantize
from twofour.train.networks import transformer

TEXT = dict.fromkeys(transformer.INPUT_NAMES, ((1, 1), (2, 16), (4, 40)))


def named(engine: Engine) -> set[tuple[str, str]]:
    """The edges by the names of layers without copies; "" for the model itself."""
    layers, edges = outline(engine.plan)
    names = [layer.name for layer in layers] + [""]
    copies = {place for place, layer in enumerate(layers) if layer.op == "Copy"}
    before = {edge.target: edge.source for edge in edges if edge.target in copies}

    def source(place: int) -> int:
        while place in copies:
            place = before[place]
        return place

    return {
        (names[source(edge.source)], names[edge.target])
        for edge in edges
        if edge.target not in copies
    }


def check(engine: Engine) -> None:
    """Every layer reads what was written before it, and what it writes is read, or is an output."""
    layers, edges = outline(engine.plan)
    assert all(edge.source < edge.target or edge.target == -1 for edge in edges)
    count = len(layers)
    assert {edge.source for edge in edges} - {-1} == set(range(count))
    assert {edge.target for edge in edges} - {-1} == set(range(count))
    names = {info.name for info in engine.plan.outputs}
    assert {edge.tensor for edge in edges if edge.target == -1} == names
    assert {edge.tensor for edge in edges if edge.source == -1} <= {
        info.name for info in engine.plan.inputs
    }


def test_residuals_and_a_concat_of_parts() -> None:
    """j = Concat(g, i) is nothing: k reads from both that wrote into it."""
    engine = build(residual_network(), tuning_effort=0)
    check(engine)
    found = named(engine)
    layer = {frozenset(each.source): each.name for each in engine.plan.layers if each.source}
    a, d, f, p, i, k, m, y = (
        layer[frozenset(nodes)] for nodes in ("ab", "cde", "fg", "p", "i", "kl", "m", "y")
    )
    assert found == {
        *(("", a), (a, d), (d, f), (f, p), (p, i), (f, k), (i, k), (k, m), (m, y), (y, ""))
    }


def test_in_int8() -> None:
    check(build(quantize(residual_network(), IMAGES), tuning_effort=0))


@pytest.mark.parametrize("form", ["row", "tensor"])
def test_rows_that_are_quantized_at_run_time(encoder, form, tmp_path) -> None:  # noqa: F811
    """For a tensor one kernel finds the range, and the next completes what it wrote."""
    if form == "row":
        model = quantize_dynamic(encoder)
    else:
        ir.save(encoder, tmp_path / "float.onnx")
        quantize_onnxruntime(tmp_path / "float.onnx", tmp_path / "dynamic.onnx")
        model = load_model(tmp_path / "dynamic.onnx")
    engine = build(model, shapes=TEXT, tuning_effort=0)
    kernels = [layer.name for layer in engine.plan.layers if layer.op == "Quantize"]
    assert {name.rpartition("/")[2] for name in kernels} == (
        {"row"} if form == "row" else {"range", "tensor"}
    )
    check(engine)


def test_a_concat_reads_only_what_it_has_to_move() -> None:
    """j is a; x, an input, is copied behind it. z reads both, s only what a wrote."""
    model = graph(
        "(float[1,16,6,6] x) => (float[1,8,6,6] y, float[1,8,6,6] z) {"
        " a = Conv (x, w1) j = Concat <axis = 1> (a, x)"
        " y = Conv (a, w2) z = Conv (j, w3) }",
        **weights(w1=(16, 16, 1, 1), w2=(8, 16, 1, 1), w3=(8, 32, 1, 1)),
    )
    engine = build(model, tuning_effort=0)
    check(engine)
    assert {pair for pair in named(engine) if all(pair)} == {("a", "y"), ("a", "z"), ("j", "z")}


def test_a_step_on_onnx_runtime_in_the_middle() -> None:
    model = graph(
        "(float[1,8,12,12] x) => (float[1,8,12,12] y, float[1,16,12,12] t) {"
        " a = Conv <pads = [1,1,1,1]> (x, w1) s = Relu (a) t = Hardmax <axis = 1> (s)"
        " y = Conv <pads = [1,1,1,1]> (t, w2) }".replace("Det0", "Hardmax <axis = 1>"),
        **weights(w1=(16, 8, 3, 3), w2=(8, 16, 3, 3)),
    )
    engine = build(model, tuning_effort=0, race=False)
    check(engine)
    assert {("a", "t"), ("t", "y"), ("t", ""), ("y", "")} <= named(engine)


def test_parts_of_a_value_come_from_who_wrote_those_channels() -> None:
    model = graph(
        "(float[1,16,6,6] x) => (float[1,16,6,6] y, float[1,16,6,6] z) {"
        " a = Conv (x, w1) b = Conv (x, w2) c = Concat <axis = 1> (a, b)"
        " p, q = Split <axis = 1, num_outputs = 2> (c) y = Conv (p, w3) z = Conv (q, w4) }",
        **weights(w1=(16, 16, 1, 1), w2=(16, 16, 1, 1), w3=(16, 16, 1, 1), w4=(16, 16, 1, 1)),
    )
    engine = build(model, tuning_effort=0)
    check(engine)
    pairs = {(a, b) for a, b in named(engine) if a and b}
    assert pairs == {("a", "y"), ("b", "z")}


def test_a_transformer_with_open_sizes(encoder) -> None:  # noqa: F811
    check(build(encoder, shapes=TEXT, tuning_effort=0))


def test_several_profiles_have_edges_of_their_own() -> None:
    model = residual_network()
    engine = build(model, profiles=[{"x": (2, 8, 12, 12)}, {"x": (2, 8, 12, 12)}], tuning_effort=0)
    first, second = outline(engine.plan, 1), outline(engine.plan, 2)
    assert first.edges == second.edges
    assert len(first.layers) == len(second.layers) < len(engine.plan.layers)
    with pytest.raises(InputError, match="no profile 3"):
        outline(engine.plan, 3)


def test_what_is_known_of_each_layer() -> None:
    plan = sample_engine().plan
    rival = Candidate("dense in float32", "8x2", 40.0)
    timed = replace(plan.layers[1], candidates=(*plan.layers[1].candidates, rival))
    read = tuple(
        replace(each, reads=(Read(place - 1, f"v{place}"),))
        for place, each in enumerate((plan.layers[0], timed, *plan.layers[2:]))
    )
    layers, edges = outline(replace(plan, layers=read))
    assert edges == tuple(Edge(k - 1, k, f"v{k}") for k in range(4))
    stem, conv, linear, softmax = layers
    assert (conv.dense_us, conv.sparse_us, conv.float_us) == (18.0, 12.5, 40.0)
    assert conv.choice == "2:4 H 28x1"
    assert conv.reason == "sparse is 1.44 times as fast as the best dense kernel"
    assert (stem.sparse_us, stem.float_us, stem.roofline) == (None, None, None)
    assert linear.reason.startswith("dense is faster")
    assert (softmax.time_us, softmax.share, softmax.reason) == (None, None, "no kernel for Softmax")
    assert sum(each.share or 0 for each in layers) == pytest.approx(1.0)


def test_an_engine_in_float32_lends_its_times() -> None:
    plan = sample_engine().plan
    floats = replace(
        plan,
        layers=tuple(replace(each, precision="float32", time_us=77.0) for each in plan.layers[:3])
        + plan.layers[3:],
    )
    layers, _ = outline(plan, floats=floats)
    assert [each.float_us for each in layers] == [77.0, 77.0, 77.0, None]


def test_the_share_of_the_roofline() -> None:
    (layer,), _ = outline(plan_of(BUSY), rates=RATES)
    assert layer.roofline == pytest.approx(BUSY.macs / 200e3 / 150)
    (layer,), _ = outline(plan_of(replace(BUSY, time_us=1.0)), rates=RATES)
    assert layer.roofline == 1.0, "a layer that beats the peaks by chance has all of it"
    (layer,), _ = outline(plan_of(replace(BUSY, time_us=None)), rates=RATES)
    assert layer.roofline is None
