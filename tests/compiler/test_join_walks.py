"""Chains of small operators: one walk each, with the numbers that ONNX Runtime finds."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.engines import native_operators, steps
from tests.graphs import graph
from twofour.compiler.build import build

RANDOM = np.random.default_rng(0)
PLACES = 24
HEAD = "(float[1,8,6,4] x) => "
FLAT = "c = Conv (x, w) f = Reshape (c, flat)"


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


CONSTANTS = {
    "w": RANDOM.normal(size=(8, 8, 1, 1)).astype(np.float32),
    "flat": int64(1, 8, PLACES),
    "places": RANDOM.random((2, PLACES), np.float32),
    "steps": RANDOM.random((1, PLACES), np.float32),
    "two": np.array(2, np.float32),
    "halves": int64(2, 2, 4),
}


def operators(model: ir.Model) -> list[str]:
    """Those of the engine, all native; its outputs are those of ONNX Runtime."""
    return native_operators(model, {"x": RANDOM.normal(size=(1, 8, 6, 4)).astype(np.float32)})


def test_boxes_of_distances_are_one_walk_from_the_map_to_the_result() -> None:
    model = graph(
        f"""{HEAD} (float[n,m,p] y) {{ {FLAT}
        before, behind, rest = Split <axis = 1> (f, halves)
        low = Sub (places, before) high = Add (places, behind)
        both = Add (low, high) middle = Div (both, two) size = Sub (high, low)
        corners = Concat <axis = 1> (middle, size) pixels = Mul (corners, steps)
        sure = Sigmoid (rest) y = Concat <axis = 1> (pixels, sure) }}""",
        **CONSTANTS,
    )
    assert operators(model) == ["Conv", "JoinedConcat"]


def test_maps_of_several_levels_are_read_where_they_lie() -> None:
    model = graph(
        f"""{HEAD} (float[n,p,c] y) {{
        c = Conv (x, w) d = MaxPool <kernel_shape = [2,2], strides = [2,2]> (c)
        e = Reshape (c, flat) f = Reshape (d, few) g = Concat <axis = 2> (e, f)
        h = Sigmoid (g) y = Transpose <perm = [0,2,1]> (h) }}""",
        **CONSTANTS,
        few=int64(1, 8, 6),
    )
    assert operators(model) == ["Conv", "MaxPool", "JoinedTranspose"]


def test_the_expectation_of_a_softmax_is_one_walk() -> None:
    constants = CONSTANTS | {
        "w": RANDOM.normal(size=(32, 8, 1, 1)).astype(np.float32),
        "split": int64(1, 2, 16, PLACES),
        "bins": np.arange(16, dtype=np.float32).reshape(1, 16, 1, 1),
    }
    model = graph(
        f"""{HEAD} (float[a,b,c,d] y) {{ c = Conv (x, w) f = Reshape (c, split)
        t = Transpose <perm = [0,2,1,3]> (f) s = Softmax <axis = 1> (t) y = Conv (s, bins) }}""",
        **constants,
    )
    assert operators(model) == ["Conv", "Expectation"]


def test_a_function_that_two_read_is_computed_once() -> None:
    model = graph(
        f"""{HEAD} (float[n,c,p] y) {{ {FLAT}
        s = Sigmoid (f) t = Transpose <perm = [0,2,1]> (s)
        u = Transpose <perm = [0,2,1]> (t) y = Mul (u, s) }}""",
        **CONSTANTS,
    )
    assert operators(model) == ["Conv", "JoinedSigmoid", "JoinedMul"]


def test_what_is_an_output_is_written() -> None:
    model = graph(
        f"""{HEAD} (float[n,c,p] y, float[n,c,p] s) {{ {FLAT}
        s = Sigmoid (f) y = Mul (s, steps) }}""",
        **CONSTANTS,
    )
    assert operators(model) == ["Conv", "JoinedSigmoid", "Mul"]


MOVES = {
    "Transpose <perm = [0,2,1]> (V)": lambda a, b: (b, a),
    "Slice (V, one, last, two_)": lambda a, b: (a, b - 2),
    "Concat <axis = 1> (V, V)": lambda a, b: (2 * a, b),
    "Concat <axis = 2> (V, V)": lambda a, b: (a, 2 * b),
}
NUMBERS = ("Add (V, two)", "Mul (V, V)", "Sigmoid (V)", "Relu (V)", "Sub (two, V)", "Abs (V)")


@settings(max_examples=12, deadline=None)
@given(st.lists(st.sampled_from((*MOVES, *NUMBERS)), min_size=2, max_size=6))
def test_any_chain_computes_what_its_operators_do(chain: list[str]) -> None:
    lines, name, size = [], "f", (8, PLACES)
    for index, text in enumerate(chain):
        size = MOVES.get(text, lambda a, b: (a, b))(*size)
        if size[1] < 1 or size[0] * size[1] > 4096:
            continue
        lines.append(f"v{index} = {text.replace('V', name)}")
        name = f"v{index}"
    constants = CONSTANTS | {"one": int64(1), "last": int64(-1), "two_": int64(2)}
    model = graph(
        f"{HEAD} (float[a,b,c] y) {{ {FLAT} {' '.join(lines)} y = Identity ({name}) }}", **constants
    )
    assert operators(model)[0] == "Conv"


@pytest.mark.parametrize("level", ["float[1,8,6,4] x", "float[2,8,6,4] x"])
def test_a_join_that_costs_nothing_stays_one(level: str) -> None:
    model = graph(
        f"""({level}) => (float[n,c,h,w] y) {{ c = Conv (x, w) d = Conv (c, w)
        e = Concat <axis = 1> (c, d) y = Conv (e, wide) }}""",
        **CONSTANTS,
        wide=RANDOM.normal(size=(4, 16, 1, 1)).astype(np.float32),
    )
    ((_, found),) = steps(build(model, tuning_effort=0))
    assert found == ["Conv", "Conv", "Conv"]
