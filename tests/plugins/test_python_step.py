"""Operators whose meaning is numpy: steps of an engine that need their plugin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import twofour
from tests.plugins.conftest import Install
from tests.plugins.sample import HEAD, Moments, changed, model
from twofour.compiler.survey import survey
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.engine import Engine

Array = NDArray[Any]
RNG = np.random.default_rng(7)
W1 = RNG.standard_normal((16, 24)).astype(np.float32)
W2 = RNG.standard_normal((24, 8)).astype(np.float32)
SHARES = RNG.uniform(0.5, 1, 24).astype(np.float32)
X = RNG.standard_normal((6, 16)).astype(np.float32)
TEXT = f"""{HEAD} net (float[6,16] x) => (float[6,8] z, int64[6] n) {{
    a = MatMul (x, w1)
    m, n = test.Moments <power = 2> (a, shares)
    column = Unsqueeze (m, last)
    b = Mul (a, column)
    z = MatMul (b, w2) }}"""
NUMBERS = {"w1": W1, "w2": W2, "shares": SHARES, "last": np.array([1], np.int64)}


def engine_of(text: str = TEXT, **numbers: Array) -> Engine:
    return twofour.build(model(text, **(numbers or NUMBERS)), race=False, tuning_effort=1)


def wanted() -> Array:
    a = X @ W1
    m = (a**2 * SHARES).sum(-1) / SHARES.sum()
    found: Array = (a * m[:, None]) @ W2
    return found


def test_it_runs_between_kernels_with_its_constants(install: Install, tmp_path: Path) -> None:
    install(Moments)
    path = engine_of().save(tmp_path / "m.engine")
    with twofour.load(path) as session:
        got = session.run({"x": X})
        assert [step.kind for step in session.engine.plan.steps] == ["native", "python", "native"]
        (call,) = session.engine.plan.plugins
        taps = {tap.name: tap.value for tap in session.walk({"x": X})}
        spans = session.timeline({"x": X}).steps
    assert np.allclose(got["z"], wanted(), rtol=1e-4, atol=1e-3)
    assert (got["n"] == 24).all()
    assert (call.domain, call.name, call.version, call.package) == (
        "test", "Moments", 3, "its-package",
    )  # fmt: skip
    assert np.allclose(taps["m"], (X @ W1) ** 2 @ SHARES / SHARES.sum(), rtol=1e-4)
    assert len(spans) == 3


def test_an_input_left_out(install: Install) -> None:
    install(Moments)
    text = TEXT.replace("(a, shares)", "(a)")
    numbers = {k: v for k, v in NUMBERS.items() if k != "shares"}
    with twofour.Session(engine_of(text, **numbers)) as session:
        assert (session.run({"x": X})["n"] == 24).all()


def test_its_layer_says_where_it_runs(install: Install) -> None:
    install(Moments)
    plan = engine_of().plan
    (layer,) = [layer for layer in plan.layers if layer.op == "Moments"]
    assert layer.tactic == "python"
    assert "it runs in Python, by the meaning that its-package gives it" in layer.notes
    assert (layer.time_us or 0) > 0


def test_an_engine_without_its_plugin_says_how_to_get_it(install: Install) -> None:
    install(Moments)
    engine = engine_of()
    install()
    with pytest.raises(UnsupportedError, match=r"needs the operator test\.Moments") as error:
        twofour.Session(engine)
    assert error.value.fix == "pip install its-package"


def test_an_engine_with_its_plugin_in_another_version(install: Install) -> None:
    install(Moments)
    engine = engine_of()
    install(changed(Moments, version=4))
    with pytest.raises(UnsupportedError, match="in version 3") as error:
        twofour.Session(engine)
    assert "version 4 is installed" in str(error.value)


def test_a_plugin_that_raises(install: Install) -> None:
    install(Moments)
    engine = engine_of()

    def fails(*args: Any, **attributes: Any) -> Any:
        raise ZeroDivisionError("no rows")

    install(changed(Moments, meaning=fails))
    with twofour.Session(engine) as session, pytest.raises(InputError, match="no rows"):
        session.run({"x": X})


@pytest.mark.parametrize("give", [lambda x, *a, **k: x, lambda x, *a, **k: (x, x)])
def test_a_plugin_that_gives_something_else_than_it_said(install: Install, give: Any) -> None:
    install(Moments)
    engine = engine_of()
    install(changed(Moments, meaning=give))
    with twofour.Session(engine) as session, pytest.raises(EngineError, match="something else"):
        session.run({"x": X})


def test_a_rule_for_shapes_that_refuses(install: Install) -> None:
    def none(inputs: Any, attributes: Any) -> Any:
        raise ValueError("expected three rows")

    install(changed(Moments, shapes=none))
    with pytest.raises(InputError, match="does not take what it reads") as error:
        engine_of()
    assert "expected three rows" in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": "elsewhere"}, "calls no plugin"),
        ({"operands": (5, -1)}, "reads operands"),
        ({"operands": (0, -1, -1)}, "has 1 constants"),
        ({"constants": ()}, "has 0 constants"),
    ],
)
def test_a_hostile_plan(install: Install, tmp_path: Path, change: Any, said: str) -> None:
    install(Moments)
    engine = engine_of()
    calls = tuple(replace(call, **change) for call in engine.plan.plugins)
    path = replace(engine, plan=replace(engine.plan, plugins=calls)).save(tmp_path / "h.engine")
    with pytest.raises(EngineError, match=said):
        twofour.load(path)


def test_constants_cut_short(install: Install, tmp_path: Path) -> None:
    install(Moments)
    engine = engine_of()
    short = {name: data[:8] for name, data in engine.subgraphs.items()}
    path = replace(engine, subgraphs=short).save(tmp_path / "h.engine")
    with pytest.raises(EngineError, match=r"constants of .* are missing"):
        twofour.load(path)


def test_inspect_tells_where_it_would_run(install: Install) -> None:
    install(Moments)
    found = survey(model(TEXT, **NUMBERS)).to_json()
    assert (found["python"], found["onnxruntime"]) == (1, 0)
    (own,) = [each for each in found["operators"] if each["runs"] == "python"]
    assert own["op_type"] == "test.Moments"
