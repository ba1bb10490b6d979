"""Chains of moves: one walk each, with the elements that ONNX Runtime finds."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compiler.engines import native_operators
from tests.graphs import graph

RANDOM = np.random.default_rng(0)
X = "(float[2,8,6,4] x) => (float[n,c,h,w] y)"
SHUFFLE = (
    "a = Conv (x, w) b = Reshape (a, s1) t = Transpose <perm = [0,2,1,3,4]> (b) c = Reshape (t, s2)"
)
DEEP = "b = Reshape (e, s1) t = Transpose <perm = [0,1,4,2,5,3]> (b) y = Reshape (t, s2)"


def weights(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {n: RANDOM.normal(size=shape).astype(np.float32) for n, shape in shapes.items()}


def images() -> dict[str, np.ndarray]:
    return {"x": RANDOM.normal(size=(2, 8, 6, 4)).astype(np.float32)}


def int64(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def operators(model: ir.Model) -> list[str]:
    """Those of the engine, all native; its outputs are those of ONNX Runtime."""
    return native_operators(model, images())


def test_a_channel_shuffle_is_one_walk_and_its_half_a_view() -> None:
    half = "h = Slice (c, zero, four, one) d = Conv (h, u) y = Relu (d)"
    constants = weights(w=(8, 8, 1, 1), u=(4, 4, 1, 1)) | {
        "zero": int64(0),
        "four": int64(4),
        "one": int64(1),
    }
    constants |= {"s1": int64(2, 2, 4, 6, 4), "s2": int64(2, 8, 6, 4)}
    model = graph(f"{X} {{ {SHUFFLE} {half} }}", **constants)
    assert operators(model) == ["Conv", "ReshapeTransposeReshape", "ConvRelu"], "half is a view"


def test_a_pixel_shuffle_is_one_walk() -> None:
    constants = weights(w=(8, 8, 1, 1))
    constants |= {"s1": int64(2, 2, 2, 2, 6, 4), "s2": int64(2, 2, 12, 8)}
    model = graph(f"{X} {{ e = Conv (x, w) {DEEP} }}", **constants)
    assert operators(model) == ["Conv", "ReshapeTransposeReshape"]


def test_what_others_read_stays() -> None:
    """The middle of a chain is an output too."""
    constants = weights(w=(8, 8, 1, 1))
    constants |= {"s1": int64(2, 2, 2, 2, 6, 4), "s2": int64(2, 2, 12, 8)}
    results = "(float[n,c,h,w] y, float[a,b,d,e,f,g] t)"
    model = graph(f"(float[2,8,6,4] x) => {results} {{ e = Conv (x, w) {DEEP} }}", **constants)
    assert operators(model) == ["Conv", "ReshapeTranspose", "ReshapeTransposeReshape"]


def test_a_walk_along_two_axes_at_once_stays_two() -> None:
    """Every fifth element of a row of images is no even step along one axis of an image."""
    constants = weights(w=(8, 8, 1, 1)) | {"s1": int64(2, 192), "b": int64(0), "z": int64(192)}
    constants |= {"one": int64(1), "five": int64(5), "s2": int64(2, 1, 39, 1)}
    moves = "m = Reshape (e, s1) k = Slice (m, b, z, one, five) y = Reshape (k, s2)"
    model = graph(f"{X} {{ e = Conv (x, w) {moves} }}", **constants)
    assert operators(model) == ["Conv", "Reshape", "SliceReshape"]


@st.composite
def chains(draw: st.DrawFn) -> tuple[str, dict[str, np.ndarray]]:
    """Two to five moves of a value `v0` [2, 8, 6, 4], the last one writing `y`."""
    shape, lines, constants = [2, 8, 6, 4], [], {}
    count = draw(st.integers(2, 5))
    for i in range(count):
        x, y = f"v{i}", "y" if i == count - 1 else f"v{i + 1}"
        kind = draw(st.sampled_from(["reshape", "transpose", "slice", "gather"]))
        if kind == "transpose":
            perm = draw(st.permutations(range(len(shape))))
            shape = [shape[axis] for axis in perm]
            lines.append(f"{y} = Transpose <perm = {list(perm)}> ({x})")
            continue
        if kind == "reshape":
            shape = draw(st.sampled_from(_regroupings(shape)))
            constants[f"c{i}"] = int64(*shape)
            lines.append(f"{y} = Reshape ({x}, c{i})")
            continue
        axis = draw(st.integers(0, len(shape) - 1))
        if kind == "gather" and len(shape) > 1:
            constants[f"c{i}"] = np.array(draw(st.integers(0, shape[axis] - 1)), np.int64)
            del shape[axis]
            lines.append(f"{y} = Gather <axis = {axis}> ({x}, c{i})")
            continue
        first, step = draw(st.integers(0, shape[axis] - 1)), draw(st.integers(1, 3))
        for name, number in {"b": first, "z": shape[axis], "a": axis, "s": step}.items():
            constants[f"{name}{i}"] = int64(number)
        shape[axis] = -(-(shape[axis] - first) // step)
        lines.append(f"{y} = Slice ({x}, b{i}, z{i}, a{i}, s{i})")
    declared = ",".join(map(str, shape))
    return (
        f"(float[2,8,6,4] x) => (float[{declared}] y) {{ v0 = Conv (x, w) {' '.join(lines)} }}",
        constants,
    )


def _regroupings(shape: list[int]) -> list[list[int]]:
    """Some shapes of as many elements."""
    flat = [math.prod(shape)]
    found = [flat, [*shape[:-2], math.prod(shape[-2:])], [math.prod(shape[:2]), *shape[2:]]]
    for axis, size in enumerate(shape):
        for factor in (2, 3):
            if size % factor == 0:
                found.append([*shape[:axis], factor, size // factor, *shape[axis + 1 :]])
    return found


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(chains())
def test_any_chain_moves_what_onnx_says(chain: tuple[str, dict[str, np.ndarray]]) -> None:
    text, constants = chain
    operators(graph(text, **constants, **weights(w=(8, 8, 1, 1))))
