"""How operators are found, and what is refused of them."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.plugins.sample import LOOP, TRIPLE, Moments, Triple, moments
from twofour.cli import app
from twofour.core import plugins
from twofour.plugins import GROUP, CpuTactic, Operator, Problem, find, installed


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """packages(name=value): an installed package of that name whose entry point gives the value."""

    def put(**values: Any) -> None:
        points = []
        for name, value in values.items():
            module = types.ModuleType(f"plugin_of_{name}")
            module.OPERATORS = value  # type: ignore[attr-defined]
            monkeypatch.setitem(sys.modules, module.__name__, module)
            points.append(EntryPoint(name, f"{module.__name__}:OPERATORS", GROUP))
        monkeypatch.setattr(plugins, "BUILT_IN", ())
        monkeypatch.setattr(plugins, "entry_points", lambda group: points)
        installed.cache_clear()

    yield put
    monkeypatch.undo()
    installed.cache_clear()


def test_one_operator_or_several(packages: Any) -> None:
    packages(one=Triple, more=[Moments])
    assert find("test", "Triple") is Triple
    assert find("test", "Moments") is Moments
    assert find("test", "Nothing") is None
    assert installed().problems == ()


def test_a_package_that_gives_no_operators_takes_no_other_with_it(packages: Any) -> None:
    packages(bad=3, good=Triple, text="Triple", mixed=[Moments, 4])
    assert find("test", "Triple") is Triple
    assert find("test", "Moments") is None
    assert len(installed().problems) == 3
    assert any("expected an Operator or several, got int" in line for line in installed().problems)


def test_a_package_that_cannot_be_imported(packages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    packages(good=Triple)
    points = [*plugins.entry_points(group=GROUP), EntryPoint("gone", "no_such_module:X", GROUP)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points)
    installed.cache_clear()
    assert find("test", "Triple") is Triple
    (problem,) = installed().problems
    assert "no_such_module" in problem


def test_two_packages_with_one_operator(packages: Any) -> None:
    packages(first=Triple, second=Operator("test", "Triple", TRIPLE))
    assert find("test", "Triple") is Triple
    (problem,) = installed().problems
    assert "already defined" in problem


def test_doctor_shows_them(packages: Any) -> None:
    packages(good=[Triple, Moments], bad=3)
    result = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    found = json.loads(result.stdout)["plugins"]
    assert found["operators"][0]["tactics"] == ["cpu loop"]
    assert [each["meaning"] for each in found["operators"]] == ["function", "numpy"]
    assert len(found["problems"]) == 1
    shown = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "400"}, catch_exceptions=False)
    assert "test.Triple" in shown.stdout
    assert "plugin not used" in shown.stdout


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"domain": ""}, "a domain of its own"),
        ({"domain": "twofour"}, "a domain of its own"),
        ({"meaning": moments}, "needs a rule for shapes"),
        ({"tactics": {"tpu": []}}, "no target 'tpu'"),
        ({"tactics": {"cpu": [LOOP, LOOP]}}, "names of their own"),
    ],
)
def test_an_operator_that_could_not_work(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Operator(**{"domain": "test", "name": "Triple", "meaning": TRIPLE, **given})


def test_a_tactic_takes_everything_unless_it_says_otherwise() -> None:
    tactic = CpuTactic("plain", lambda problem, target, config: None)  # type: ignore[arg-type,return-value]
    problem = Problem("Triple", (), ())
    assert tactic.refuse(problem, None) == ""  # type: ignore[arg-type]
    assert tactic.configs(problem, None) == ("",)  # type: ignore[arg-type]
