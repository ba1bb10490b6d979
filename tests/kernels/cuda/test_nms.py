"""Suppression of boxes on a GPU, in Triton's interpreter: the rows of the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cuda.interpret import interpret
from tests.kernels.cuda.nms_cases import check_nms, operands
from twofour.core.suppression import Suppression
from twofour.kernels.cuda.kernel import compile_kernel
from twofour.kernels.cuda.nms import NmsProblem, recipes, why_not

HOWS = st.builds(
    Suppression,
    st.sampled_from([0, 1, 3, 100]),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([None, -0.5, 0.0, 9.0]),
    st.booleans(),
)


@settings(max_examples=25, deadline=None)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 3), st.sampled_from([1, 2, 15, 40])),
    HOWS,
    st.integers(0, 99),
    st.booleans(),
)
def test_the_rows_are_those_of_the_definition(sizes: Any, how: Any, seed: int, ties: bool) -> None:
    boxes, scores = operands(sizes, seed, ties=ties, centred=how.centred)
    check_nms(boxes, scores, how, interpret, effort=0)


def test_more_places_than_a_program_looks_at_at_once() -> None:
    boxes, scores = operands((1, 1, 5000), 0, ties=False, centred=True)
    check_nms(boxes, scores, Suppression(4, 0.5, 0.5, True), interpret, effort=2)


def test_zeros_of_both_signs_are_equal() -> None:
    boxes, scores = operands((1, 1, 6), 0, ties=False, centred=False)
    scores[:] = np.float32([0.0, -0.0, 0.0, -0.0, -1.0, 0.0])
    check_nms(boxes, scores, Suppression(6, 1.0), interpret, effort=0)


@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles(capability: int) -> None:
    for how in (Suppression(100, 0.5), Suppression(100, 0.5, 0.3, True)):
        problem = NmsProblem(2, 3, 900, ("float16", 3600, 4, 1), ("float32", 2700, 900, 1), how)
        (recipe,) = recipes(problem, capability, effort=0)
        for call in recipe.calls:
            assert len(compile_kernel(call, capability).cubin) > 1000


def test_one_that_has_no_kernel_says_why() -> None:
    problem = NmsProblem(2, 3, 9, ("int8", 36, 4, 1), ("float32", 27, 9, 1), Suppression(3))
    assert "real numbers" in why_not(problem)
    assert recipes(problem, 90) == ()
    problem = NmsProblem(1, 40000, 9, ("float32", 36, 4, 1), ("float32", 27, 9, 1), Suppression(3))
    assert "at most" in why_not(problem)
