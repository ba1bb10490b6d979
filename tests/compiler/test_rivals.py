"""Products in bfloat16 beside their float32 forms: what is timed, what stays float32, and why."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.compiler.engines import random_inputs, reference, run_twice
from tests.compiler.test_passes_bf16 import weights
from tests.graphs import graph
from tests.kernels.bf16 import needs_bf16
from tests.sample_engines import sample_engine
from twofour.compiler import build as building
from twofour.compiler import rivals
from twofour.compiler.build import build
from twofour.compiler.explain import explain
from twofour.compiler.importer import import_graph
from twofour.compiler.passes.pipeline import run_passes
from twofour.compiler.precision import passes_for
from twofour.compiler.rivals import Rival, Rivals
from twofour.core.bfloat16 import ROUNDING
from twofour.core.target import host_target
from twofour.engine import Candidate, Engine, Layer

CHAIN = (
    "(float[1,8,9,9] x) => (float[1,8,9,9] y) {"
    " a = Conv <pads = [1, 1, 1, 1]> (x, u) b = Relu (a)"
    " c = Conv (b, v) d = Relu (c)"
    " e = Conv <pads = [1, 1, 1, 1]> (d, w) y = Add (e, b) }"
)
CHAIN_WEIGHTS = {"u": (8, 8, 3, 3), "v": (8, 8, 1, 1), "w": (8, 8, 3, 3)}


def section(*ops: tuple[str, str], outputs: tuple[str, ...] = ()) -> SimpleNamespace:
    """Of operators (name, value it reads)."""
    placed = [SimpleNamespace(op=SimpleNamespace(name=n, reads=(x,))) for n, x in ops]
    return SimpleNamespace(ops=placed, outputs=outputs)


def verdicts(found: list[Rival], casts: dict[str, list[int]], *sections) -> dict[str, str]:
    """What should stay float32, where layer 0 is a Cast of 10 us."""
    layers = (Layer("cast", "Cast", "pointwise", time_us=10.0),)
    return Rivals(None, found, casts).faster_in_float(layers, sections)


def test_the_rounding_of_its_input_counts_for_a_product_alone() -> None:
    found = [Rival("p", "x", 20.0, 25.0)]
    reasons = verdicts(found, {"x": [0]}, section(("p", "x")))
    assert reasons == {
        "p": "float32 takes 25.00 us, bfloat16 30.00, 10.00 of it to round its input"
    }
    assert not verdicts(found, {"x": []}, section(("p", "x")))
    assert not verdicts([Rival("p", "x", 20.0, 29.5)], {"x": [0]}, section(("p", "x")))


def test_a_rounding_that_others_read_stays() -> None:
    found = [Rival("p", "x", 20.0, 25.0)]
    assert not verdicts(found, {"x": [0]}, section(("p", "x"), ("attention", "x")))
    assert not verdicts(found, {"x": [0]}, section(("p", "x"), outputs=("x",)))


def test_products_of_one_input_are_weighed_together() -> None:
    found = [Rival("p", "x", 20.0, 23.0), Rival("q", "x", 5.0, 9.0)]
    both = section(("p", "x"), ("q", "x"))
    assert set(verdicts(found, {"x": [0]}, both)) == {"p", "q"}
    found = [Rival("p", "x", 20.0, 15.0), Rival("q", "x", 5.0, 30.0)]
    assert set(verdicts(found, {"x": [0]}, both)) == {"p"}


def test_times_of_all_profiles_count() -> None:
    found = [Rival("p", "h", 20.0, 15.0), Rival("p", "h", 20.0, 30.0)]
    assert not verdicts(found, {}, section(("p", "h")))
    found = [Rival("p", "h", 20.0, 15.0), Rival("p", "h", 20.0, 20.0)]
    assert verdicts(found, {}, section(("p", "h"))) == {
        "p": "float32 takes 35.00 us, bfloat16 40.00"
    }


def mixed(monkeypatch, names: tuple[str, ...], model, **options) -> Engine:
    """The engine where these products are said to be faster in float32."""
    answers = [dict.fromkeys(names, "float32 takes 1.00 us, bfloat16 2.00"), {}]
    monkeypatch.setattr(Rivals, "faster_in_float", lambda *_: answers.pop(0))
    times = iter([1.0, 2.0])  # of the second engine, then of the first
    monkeypatch.setattr(building, "_whole_us", lambda _: next(times))
    return build(model, bf16=True, **options)


@needs_bf16
@pytest.mark.parametrize("names", [("a",), ("c",), ("e",), ("a", "e"), ("a", "c", "e")])
def test_a_network_of_both(names, monkeypatch, tmp_path) -> None:
    """One native step, what each layer runs as, why, and the graph that was dumped."""
    model = graph(CHAIN, **weights(**CHAIN_WEIGHTS))
    for node in model.graph:
        node.name = node.outputs[0].name
    engine = mixed(monkeypatch, names, model, dump=tmp_path)
    assert [step.kind for step in engine.plan.steps] == ["native"]
    products = {layer.name: layer for layer in engine.plan.layers if layer.pattern}
    assert set(products) == {"a", "c", "e"}
    for name, layer in products.items():
        assert layer.precision == ("float32" if name in names else "bfloat16")
        noted = [note for note in layer.notes if "not bfloat16: float32 takes 1.00 us" in note]
        assert bool(noted) == (name in names)
    assert engine.plan.target.bf16 == (len(names) < 3)
    inputs = random_inputs(model)
    passes = passes_for(host_target(), True, dict.fromkeys(names, "because"))
    fused = run_passes(import_graph(model), None, passes).model
    assert sum(n.op_type.startswith("BConv") for n in fused.graph) >= 3 - len(names)
    want = reference(fused, inputs)["y"]
    got = run_twice(engine, inputs)["y"]
    assert np.abs(got - want).max() <= 4 * ROUNDING * np.abs(want).max()
    dumped = sorted(tmp_path.iterdir())[-1].read_text()
    assert ("BConv" in dumped) == (len(names) < 3)


@needs_bf16
def test_a_slower_whole_is_dropped(monkeypatch) -> None:
    model = graph(CHAIN, **weights(**CHAIN_WEIGHTS))
    monkeypatch.setattr(rivals, "WORTH", np.inf)
    monkeypatch.setattr(building, "_whole_us", lambda _: 1.0)
    engine = build(model, bf16=True)
    assert {layer.precision for layer in engine.plan.layers if layer.pattern} == {"bfloat16"}


@needs_bf16
def test_both_times_are_in_the_plan_and_a_second_build_is_the_same(tmp_path) -> None:
    model = graph(CHAIN, **weights(**CHAIN_WEIGHTS))
    cache = tmp_path / "m.timings"
    first = build(model, bf16=True, timing_cache=cache)
    for layer in first.plan.layers:
        if layer.precision == "bfloat16" and layer.pattern:
            timed = {c.tactic for c in layer.candidates if c.time_us}
            assert {"dense", "dense in float32"} <= timed
        elif layer.pattern:
            assert any("not bfloat16: float32 takes" in note for note in layer.notes)
    first.save(tmp_path / "first.engine")
    build(model, bf16=True, timing_cache=cache).save(tmp_path / "second.engine")
    assert (tmp_path / "first.engine").read_bytes() == (tmp_path / "second.engine").read_bytes()


def test_float32_forms_are_not_what_sparse_kernels_are_compared_with() -> None:
    candidates = (
        Candidate("4:8", "28x1x16", 4.0),
        Candidate("dense", "", None, "dense kernels were ruled out: --sparsity force"),
        Candidate("dense in float32", "28x1x16", 9.0),
        Candidate("2:4 in float32", "28x1x16", 3.0),
    )
    plan = sample_engine().plan
    first = replace(plan.layers[0], candidates=candidates)
    row = explain(replace(plan, layers=(first, *plan.layers[1:])))[0]
    assert (row.best_dense_us, row.best_sparse_us, row.gain) == (None, 4.0, None)


@needs_bf16
def test_nothing_is_timed_without_effort() -> None:
    model = graph(CHAIN, **weights(**CHAIN_WEIGHTS))
    engine = build(model, bf16=True, tuning_effort=0)
    products = [layer for layer in engine.plan.layers if layer.pattern]
    assert {layer.precision for layer in products} == {"bfloat16"}
    assert not any("float32" in c.tactic for layer in products for c in layer.candidates)


@needs_bf16
def test_making_a_held_input_float32_counts(monkeypatch) -> None:
    """Where float32 is ahead by itself, the conversion is timed and added."""
    model = graph(CHAIN, **weights(**CHAIN_WEIGHTS))
    found: list[Rival] = []

    def seen(self: Rivals, *_: object) -> dict[str, str]:
        found.extend(self.found)
        return {}

    monkeypatch.setattr(Rivals, "faster_in_float", seen)
    monkeypatch.setattr(Rivals, "_conversion_us", lambda *_: 1000.0)
    real = Rivals.time
    monkeypatch.setattr(
        Rivals, "time", lambda self, form, us, wanted: real(self, form, us * 1e6, wanted)
    )
    build(model, bf16=True)
    assert [rival.float_us > 1000 for rival in found] == [False, True, True]
