"""Boxes chosen within an engine: as many rows as there are, as ONNX Runtime has them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.compiler.engines import reference, run_twice, steps
from tests.graphs import graph
from twofour.compiler.build import build
from twofour.core.errors import EngineError
from twofour.engine import Engine
from twofour.runtime.session import Session

RANDOM = np.random.default_rng(0)
PLACES = 48
TEXT = """(float[1,4,8,6] x) => (OUT) {
    c = Conv (x, w) f = Reshape (c, flat) b, scores = Split <axis = 1> (f, sizes)
    boxes = Transpose <perm = [0,2,1]> (b)
    chosen = NonMaxSuppression (boxes, scores, most, overlap, least) REST }"""


def detector(
    out: str = "int64[n,3] chosen", rest: str = "", most: int = 20, least: float = 1.5
) -> ir.Model:
    weights = RANDOM.normal(size=(7, 4, 1, 1)).astype(np.float32)
    return graph(
        TEXT.replace("OUT", out).replace("REST", rest),
        w=weights,
        flat=np.array([1, 7, PLACES]),
        sizes=np.array([4, 3]),
        most=np.array([most]),
        overlap=np.array([0.3], np.float32),
        least=np.array([least], np.float32),
        column=np.array(2),
    )


def image(seed: int = 1) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(seed).normal(size=(1, 4, 8, 6)).astype(np.float32)}


def test_a_detector_gives_as_many_rows_as_there_are() -> None:
    model = detector()
    engine = build(model, tuning_effort=0)
    ((kind, found),) = steps(engine)
    assert kind == "native"
    assert found[-1] == "NonMaxSuppression"
    counts = set()
    for seed in range(4):
        rows = run_twice(engine, image(seed))["chosen"]
        assert np.array_equal(rows, reference(model, image(seed))["chosen"])
        counts.add(len(rows))
    assert len(counts) > 1


@pytest.mark.parametrize(("most", "least"), [(10, 100.0), (0, 0.1)])
def test_no_box_at_all_is_an_array_without_rows(most, least) -> None:
    engine = build(detector(most=most, least=least), tuning_effort=0)
    rows = run_twice(engine, image())["chosen"]
    assert rows.shape == (0, 3)
    assert rows.dtype == np.int64


def test_the_rows_may_be_read_by_what_has_no_kernel() -> None:
    """It goes on with the rows that there are on ONNX Runtime."""
    model = detector("int64[n] places", "places = Gather <axis = 1> (chosen, column)")
    engine = build(model, tuning_effort=0)
    assert [kind for kind, _ in steps(engine)] == ["native", "onnxruntime"]
    places = run_twice(engine, image())["places"]
    assert np.array_equal(places, reference(model, image())["places"])


def test_a_walk_and_a_timeline_see_the_rows(tmp_path: Path) -> None:
    engine = build(detector(), tuning_effort=0)
    loaded = Engine.load(engine.save(tmp_path / "e.engine"))
    with Session(loaded) as session:
        rows = session.run(image())["chosen"]
        taps = {tap.name: tap.value for tap in session.walk(image())}
        assert np.array_equal(taps["chosen"], rows)
        session.timeline(image())


def test_limits_that_are_no_numbers_run_on_onnxruntime() -> None:
    """A threshold that is an input is none of the kernel's."""
    text = TEXT.replace("(float[1,4,8,6] x)", "(float[1,4,8,6] x, float[1] least)")
    model = graph(
        text.replace("OUT", "int64[n,3] chosen").replace("REST", ""),
        w=RANDOM.normal(size=(7, 4, 1, 1)).astype(np.float32),
        flat=np.array([1, 7, PLACES]),
        sizes=np.array([4, 3]),
        most=np.array([10]),
        overlap=np.array([0.3], np.float32),
    )
    engine = build(model, tuning_effort=0, race=False)
    (outside,) = [layer for layer in engine.plan.layers if layer.op == "NonMaxSuppression"]
    assert outside.tactic == "onnxruntime"
    assert "is not a constant" in " ".join(outside.notes)
    inputs = image() | {"least": np.array([0.2], np.float32)}
    rows = run_twice(engine, inputs)["chosen"]
    assert np.array_equal(rows, reference(model, inputs)["chosen"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": "y"}, "is counted by 'y'"),
        ({"count": ""}, "has a largest one"),
        ({"most": (1 << 40, 3)}, "has the largest shape"),
        ({"known": True}, "has a largest one"),
    ],
)
def test_a_plan_whose_count_is_none_is_refused(tmp_path, change, said) -> None:
    engine = build(detector(), tuning_effort=0)
    (profile,) = engine.plan.profiles
    outputs = tuple(replace(info, **change) for info in profile.outputs)
    plan = replace(engine.plan, profiles=(replace(profile, outputs=outputs),))
    with pytest.raises(EngineError, match=said):
        Engine.load(replace(engine, plan=plan).save(tmp_path / "e.engine"))
