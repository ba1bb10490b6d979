"""The kernel of the example of a plugin, in Triton's interpreter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.cuda.interpret import interpret
from twofour.core.plugins import CudaTactic, Operand, Operator, Problem, c_strides

EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "plugin"


@pytest.fixture
def tactic(monkeypatch: pytest.MonkeyPatch) -> Iterator[CudaTactic]:
    """The one that the installed package would have."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import twofour_activations

    (found,) = twofour_activations.OPERATORS[0].cuda
    yield found
    for name in [name for name in sys.modules if name.startswith("twofour_activations")]:
        del sys.modules[name]


def problem_of(dtype: str) -> Problem:
    operands = [Operand(name, (5, 300), dtype, c_strides((5, 300), dtype)) for name in "xy"]
    return Problem("SquaredRelu", (operands[0],), (operands[1],), {"scale": 0.5})


def test_it_computes_what_its_meaning_says(tactic: CudaTactic) -> None:
    problem = problem_of("float32")
    assert tactic.refuse(problem, 90) == ""
    found = tactic.recipes(problem, 90, effort=2)
    assert len(found) == 3
    x = torch.randn(5, 300)
    for recipe in found:
        y = torch.empty(5, 300)
        interpret(recipe, {"x": x, "y": y})
        torch.testing.assert_close(y, x.clamp(min=0) ** 2 * 0.5)


def test_it_refuses_integers(tactic: CudaTactic) -> None:
    assert tactic.refuse(problem_of("int32"), 90) == "it takes floats, not int32"


def test_its_module_is_imported_only_when_asked(tactic: CudaTactic) -> None:
    assert tactic.module not in sys.modules
    tactic.refuse(problem_of("float32"), 90)
    assert tactic.module in sys.modules


def test_tactics_have_names_of_their_own() -> None:
    twice = [CudaTactic("rows", "a"), CudaTactic("rows", "b")]
    with pytest.raises(ValueError, match="names of their own"):
        Operator("example", "X", "text", tactics={"cuda": twice})
