"""What a user may ask of a profile, and what is refused with which reason."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import graph
from twofour.compiler.build import build
from twofour.compiler.requests import became_one, read_request, shapes_of_data
from twofour.core.errors import InputError
from twofour.core.sizes import Symbol

GRAPH = graph(
    """(float[N,S,8] x, float[N,S] m, float[?,4] z) => (float[N,S,8] y)
    { a = Unsqueeze(m, axes)
      b = Mul(x, a)
      c = ReduceMean<keepdims=0>(z)
      y = Add(b, c) }""",
    axes=[2],
).graph
RANGE = ((1, 1, 8), (2, 4, 8), (4, 9, 8))


def test_equal_names_are_one_symbol() -> None:
    request = read_request(GRAPH, {"x": RANGE, "m": ((1, 1), (2, 4), (4, 9))})
    assert request.symbols == (Symbol("N", 1, 2, 4), Symbol("S", 1, 4, 9))
    assert request.shapes_at((3, 5)) == {"x": (3, 5, 8), "m": (3, 5)}


def test_nameless_dimensions_are_symbols_of_their_own() -> None:
    request = read_request(GRAPH, {"x": (2, 3, 8), "z": ((1, 4), (1, 4), (3, 4))})
    assert [symbol.name for symbol in request.symbols] == ["z[0]"]
    assert request.shapes_at((2,)) == {"x": (2, 3, 8), "z": (2, 4)}


def test_a_range_of_one_shape_is_fixed() -> None:
    request = read_request(GRAPH, {"x": ((2, 3, 8),) * 3})
    assert request.symbols == ()
    assert request.shapes_at(()) == {"x": (2, 3, 8)}


REFUSED = {
    "two corners": ({"x": RANGE[:2]}, "are no range"),
    "corners of other ranks": ({"x": ((1, 1), (2, 4, 8), (4, 9, 8))}, "are no range"),
    "corners and numbers": ({"x": (1, (2, 4), 8)}, "are no range"),
    "falling": ({"x": ((3, 1, 8), (2, 4, 8), (4, 9, 8))}, "dimension 0 of input 'x'"),
    "usual beyond": ({"x": ((1, 1, 8), (2, 10, 8), (4, 9, 8))}, "dimension 1 of input 'x'"),
    "from zero": ({"x": ((0, 1, 8), (2, 4, 8), (4, 9, 8))}, "at least 1"),
    "a number opened": ({"x": ((1, 1, 4), (2, 4, 8), (4, 9, 8))}, r"x\[2\] cannot be open"),
    "another range": ({"x": RANGE, "m": ((1, 1), (2, 4), (5, 9))}, r"m\[0\] contradicts x\[0\]"),
    "a number for it": ({"x": RANGE, "m": ((1, 4), (2, 4), (4, 4))}, r"m\[1\] contradicts x\[1\]"),
}


@pytest.mark.parametrize(("shapes", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(shapes, reason) -> None:
    with pytest.raises(InputError, match=reason):
        read_request(GRAPH, shapes)


def test_more_symbols_than_there_is_room_for() -> None:
    dims = ",".join("?" * 9)
    many = graph(f"(float[{dims}] x) => (float[{dims}] y) {{ y = Relu(x) }}").graph
    with pytest.raises(InputError, match="9 dimensions are open"):
        read_request(many, {"x": ((1,) * 9, (2,) * 9, (3,) * 9)})


def test_open_sizes_that_nobody_gave_are_told() -> None:
    both = graph("(float[n,3] x, float[n,m] y, float[2] z) => (float[n,3] r) { r = Identity(x) }")
    assert became_one(both.graph, ()) == "open sizes became 1, as none were given: x[0], y[0], y[1]"
    assert became_one(both.graph, ("x",)).endswith(": y[1]"), "n is known by x"
    assert became_one(both.graph, ("x", "y")) == ""


def test_open_sizes_are_those_of_a_calibration_sample() -> None:
    """Not one, where the data shows better: with one step nothing would be left to convolve."""
    model = graph(
        "(float[n,4,t] x, float[2,n,3] s) => (float[n,5,u] y) { y = Conv (x, w) }",
        w=np.ones((5, 4, 3), np.float32),
    )
    x = np.random.default_rng(0).normal(size=(6, 1, 4, 9)).astype(np.float32)
    data = {"x": x, "s": np.ones((6, 2, 1, 3), np.float32)}
    assert shapes_of_data(model.graph, data) == {"x": (1, 4, 9), "s": (2, 1, 3)}
    assert shapes_of_data(model.graph, iter([data])) == {}, "it could not be read again"
    engine = build(model, int8=True, data=data, tuning_effort=0)
    assert [info.shape for info in engine.plan.inputs] == [(1, 4, 9), (2, 1, 3)]
    assert not any("became 1" in note for note in engine.plan.notes)


def test_an_error_at_sizes_that_became_one_asks_for_them() -> None:
    model = graph(
        "(float[n,4,t] x, float[2] s) => (float[n,5,u] y) { y = Conv (x, w) }",
        w=np.ones((5, 4, 3), np.float32),
    )
    with pytest.raises(InputError, match="nothing to compute") as caught:
        build(model, tuning_effort=0)
    assert caught.value.fix == "give the sizes: --shapes x:<n>x4x<t>"
    assert any("x[0], x[2]" in reason for reason in caught.value.reasons)
    with pytest.raises(InputError, match="nothing to compute") as caught:
        build(model, shapes={"x": (1, 4, 2)}, tuning_effort=0)
    assert "<n>" not in caught.value.fix
