"""Small operators through build and Session, against ONNX Runtime: kinds, ranks, layouts."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import pytest

from tests.compiler.engines import reference, run_twice
from tests.graphs import graph
from twofour.compiler.build import build

RANDOM = np.random.default_rng(0)
# Whole numbers, so that sums are exact in any order and comparisons and casts do not tip over.
K1 = RANDOM.integers(-1, 2, (16, 16, 1, 1)).astype(np.float32)
K3 = RANDOM.integers(-1, 2, (8, 16, 3, 3)).astype(np.float32)
W = RANDOM.integers(-1, 2, (16, 16)).astype(np.float32)

# a4 lies channels-last with a halo, a3 and a2 as rows; x4 is a plain array; a5, a1, a0 are results
# of small operators.
INPUTS = "(float[2,16,4,6] x4, float[2,5,16] x3, float[3,16] x2, int64[2,3] at, bool[2,1,4,6] on)"
SOURCES = """
 k4 = Conv (x4, k1) a4 = Mul (k4, f) halo = Conv <pads = [1,1,1,1]> (a4, k3)
 k3_ = MatMul (x3, w) a3 = Mul (k3_, f) k2 = MatMul (x2, w) a2 = Mul (k2, f)
 a5 = Reshape (a4, to5) a1 = ReduceSum <keepdims = 0> (a2, zero) a0 = ReduceMax <keepdims = 0> (a3)
 i4 = Cast <to = 7> (k4) j3 = Cast <to = 6> (k3_) b4 = Greater (k4, a0) b2 = Less (k2, a1)
 q4 = QuantizeLinear (a4, half, z8) b3 = Greater (k3_, a1) u3 = Cast <to = 2> (b3)
"""
CONSTANTS = {
    "k1": K1,
    "k3": K3,
    "w": W,
    "f": np.float32(0.37),
    "half": np.float32(0.5),
    "z8": np.int8(3),
    "zero": np.array([0]),
    "to5": np.array([2, 4, 4, 4, 6]),
}


@dataclass(frozen=True)
class Group:
    """Operators that are built together.

    Attributes:
        lines: one result each.
        constants: what they read besides the sources.
        slack: relative and absolute difference that is allowed; functions come within 2e-6.
    """

    lines: tuple[str, ...]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    slack: float = 0.0


def lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


EVERY = ("a4", "a3", "a2", "a5", "a1", "a0", "x4", "x3")
GROUPS = {
    "functions": Group(
        tuple(
            f"{op} ({x})"
            for op, x in zip(
                ["Exp", "Log", "Erf", "Tanh", "Sigmoid", "HardSwish", "Gelu",
                 'Gelu <approximate = "tanh">', "HardSigmoid <alpha = 0.3>"] * 2,
                EVERY + EVERY[3:] + EVERY[:3] + ("a4", "x4"), strict=True)
        ),
        slack=2e-6,
    ),
    "further functions": Group(
        tuple(
            f"{op} ({x})"
            for op in ("Softplus", "Softsign", "Elu <alpha = 0.7>", "Selu", "Celu")
            for x in ("a4", "x3", "a1")
        )
        + lines("""
            PRelu (a4, column)
            PRelu (x3, single)
        """),
        {"column": RANDOM.normal(size=(16, 1, 1)).astype(np.float32),
         "single": np.array([0.25], np.float32)},
        slack=2e-6,
    ),
    "unary": Group(
        tuple(f"{op} ({x})" for op in ("Neg", "Abs", "Sign") for x in (*EVERY[:4], "i4"))
        + tuple(f"Relu ({x})" for x in EVERY)
        + tuple(f"{op} ({x})" for op in ("Floor", "Ceil", "IsNaN", "LeakyRelu <alpha = 0.3>")
                for x in ("a4", "x3", "a1"))
        + lines("""
            Reciprocal (a3)
            Sqrt (x4)
            Pow (a4, two)
            Pow (x3, root)
            Pow (a5, minus)
            Pow (a2, one)
            Clip (a4, low, high)
            Clip (a3, , high)
            Clip (i4, low7)
            Not (b4)
            Not (on)
        """),
        {"two": np.array([2.0], np.float32), "root": np.float32(0.5), "minus": np.float32(-1),
         "one": np.int64(1), "low": np.float32(-0.5), "high": np.float32(0.7),
         "low7": np.int64(-1)},
        slack=1e-7,
    ),
    "binary": Group(
        tuple(f"{op} ({a}, {b})" for op in ("Add", "Sub", "Mul", "Div", "Max", "Min")
              for a, b in (("a4", "x4"), ("a3", "row"), ("i4", "seven"), ("a0", "a5")))
        + lines("""
            Add (a4, column)
            Sub (column, a4)
            Mul (a3, a0)
            Div (i4, at0)
            Add (a2, a2)
            Mul (a1, a3)
            Max (a4, x4, column)
            Sum (a3, row, a1, a3)
            Min (a2)
        """),
        {"row": RANDOM.normal(size=(5, 1)).astype(np.float32), "seven": np.array([-7]),
         "at0": np.array([-3, 5, 1, -1, 2**40, 7]),
         "column": RANDOM.normal(size=(16, 1, 6)).astype(np.float32)},
    ),
    "choices": Group(
        tuple(f"{op} ({a}, {b})"
              for op in ("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual")
              for a, b in (("k4", "x4"), ("i4", "one"), ("j3", "one6"), ("a3", "a1")))
        + lines("""
            And (b4, on)
            Or (b4, on)
            Xor (b3, b2n)
            Equal (b4, on)
            Where (on, a4, x4)
            Where (b4, a0, column)
            Where (b3, nothing, a3)
            Where (b4, i4, one)
            Where (b3, u3, u3)
            Where (on, q4, q4)
        """),
        {"one": np.int64(1), "one6": np.int32(1), "nothing": np.float32(-np.inf),
         "b2n": np.array([[True], [False], [True], [False], [True]]),
         "column": RANDOM.normal(size=(16, 1, 6)).astype(np.float32)},
    ),
    "casts": Group(
        tuple(f"Cast <to = {to}> ({x})" for to in (1, 2, 3, 6, 7, 9)
              for x in ("k4", "i4", "j3", "b4", "u3", "at", "q4", "on")),
    ),
    "moves": Group(
        tuple(f"Transpose <perm = {p}> ({x})" for p in ("[0,2,3,1]", "[3,1,0,2]", "[0,1,3,2]")
              for x in ("a4", "i4", "b4", "q4", "x4"))
        + lines("""
            Transpose (a3)
            Transpose <perm = [0,2,1]> (u3)
            Transpose <perm = [0,2,1,3,4]> (a5)
            Transpose (a1)
            Expand (a1, e3)
            Expand (a0, e3)
            Expand (b2, e3b)
            Expand (on, e4)
            Tile (a4, r4)
            Tile (j3, r3)
            Reshape (a4, s2)
            Reshape (q4, s2)
            Reshape (a3, s4)
            Reshape (a2, s6)
            Reshape (a0, s1)
            Flatten (i4)
            Squeeze (on)
            Unsqueeze (a2, zero)
            Unsqueeze (a1, s1)
            DepthToSpace <blocksize = 2> (a4)
            DepthToSpace <blocksize = 2, mode = "CRD"> (q4)
            SpaceToDepth <blocksize = 2> (x4)
            Identity (b3)
            Identity (at)
        """),
        {"e3": np.array([2, 3, 16]), "e3b": np.array([2, 3, 16]), "e4": np.array([2, 3, 4, 6]),
         "r4": np.array([1, 2, 1, 3]), "r3": np.array([2, 1, 2]), "s2": np.array([2, -1]),
         "s4": np.array([2, 5, 4, 4]), "s6": np.array([1, 3, 2, 2, 2, 2]), "s1": np.array([1])},
    ),
    "parts": Group(
        lines("""
            Slice (a4, s1111, e4, axes4, steps)
            Slice (q4, s1111, e4, axes4, steps)
            Slice (a3, back, lowest, axis1, minus)
            Slice (x3, one, far, last)
            Slice (i4, two, minus, axis1)
            Slice (a5, two, far, axis4, two)
            Concat <axis = 1> (a4, x4, a4)
            Concat <axis = -1> (a4, part)
            Concat <axis = 0> (a1, a1, vector)
            Concat <axis = 2> (j3, j3)
            Concat <axis = 1> (q4, q4)
            Concat <axis = 3> (b4, b4)
            Concat <axis = 1> (b3, b3)
            Pad (a4, pads, value)
            Pad (a3, cut)
            Pad (q4, pads, byte)
            Pad (x2, pads1, value, minus)
            Pad (b4, pads)
            Gather <axis = 1> (a4, at)
            Gather <axis = 3> (q4, at)
            Gather (table, at)
            Gather <axis = 1> (table, at)
            Gather (long, at)
            Gather <axis = 1> (a3, picks)
            Gather <axis = 1> (a3, zero0)
            Gather <axis = -1> (b4, last0)
            Gather <axis = 2> (x4, reverse)
            Gather (a1, last0)
            GatherElements <axis = 1> (a2, at32)
            GatherElements <axis = 1> (j3, at3)
        """),
        {"s1111": np.array([0, 15, 1, -1]), "e4": np.array([2, -17, 4, 0]),
         "axes4": np.arange(4), "steps": np.array([1, -3, 2, -2]), "back": np.array([-1]),
         "far": np.array([2**31 - 1]), "lowest": np.array([-(2**63)]),
         "axis1": np.array([1]), "minus": np.array([-1]),
         "one": np.array([1]), "two": np.array([2]), "last": np.array([2]),
         "axis4": np.array([4]), "vector": np.arange(3, dtype=np.float32),
         "part": RANDOM.normal(size=(2, 16, 4, 3)).astype(np.float32),
         "pads": np.array([0, 1, 2, 0, 1, 0, 1, 3]), "value": np.float32(-2.5),
         "cut": np.array([0, -2, 3, 1, -1, -4]), "pads1": np.array([2, 1]), "byte": np.int8(-9),
         "table": RANDOM.normal(size=(9, 9, 8)).astype(np.float32), "long": np.arange(9) ** 9,
         "picks": np.array([[4, -5], [0, -1]], np.int32), "zero0": np.int64(0),
         "last0": np.int64(-1), "reverse": np.array([3, 1, -3]),
         "at32": np.array([[0, -1], [15, 3], [-16, 2]], np.int32),
         "at3": RANDOM.integers(-5, 5, (2, 3, 16))},
    ),
    "resizes": Group(
        lines("""
            Resize <mode = "nearest"> (a4, , twice)
            Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (x4, , twice)
            Resize <mode = "nearest", coordinate_transformation_mode = "pytorch_half_pixel"> (q4, , thrice)
            Resize <mode = "nearest", axes = [3]> (a4, , , sizes)
            Resize <mode = "nearest", coordinate_transformation_mode = "asymmetric", nearest_mode = "floor"> (a4, , halved)
        """),  # noqa: E501
        {"twice": np.array([1, 1, 2, 2], np.float32), "thrice": np.array([1, 1, 3, 2], np.float32),
         "sizes": np.array([12]), "halved": np.array([1, 1, 0.5, 0.5], np.float32)},
    ),
    "reductions": Group(
        tuple(f"{op} <keepdims = {keep}> ({x}, {axes})"
              for op in ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2")
              for x, axes, keep in (("a4", "c", 1), ("a4", "wide", 0), ("a3", "last", 0),
                                    ("a5", "odd", 1), ("x4", "c", 0)))
        + lines("""
            ReduceSum (i4, c)
            ReduceMax (j3, last)
            ReduceMin (i4, wide)
            ReduceProd (a2, last)
            ReduceL1 (a3, last)
            ReduceSumSquare (a2, c)
            ReduceSum <noop_with_empty_axes = 1> (a3)
            ReduceMean (a4)
            ReduceMean <keepdims = 0> (a2)
            GlobalMaxPool (a4)
            Softmax (a3)
            Softmax <axis = 1> (a4)
            Softmax <axis = 2> (a4)
            Softmax (a4)
            Softmax <axis = 0> (a2)
            Softmax (a1)
            Softmax (x4)
        """),
        {"c": np.array([1]), "wide": np.array([0, 2, 3]), "last": np.array([-1]),
         "odd": np.array([1, 3])},
        slack=3e-6,
    ),
}  # fmt: skip


def model_of(group: Group) -> ir.Model:
    names = [f"y{i}" for i in range(len(group.lines))]
    results = " ".join(f"{n} = {line}" for n, line in zip(names, group.lines, strict=True))
    body = f"{INPUTS} => (halo, {', '.join(names)}) {{ {SOURCES} {results} }}"
    return graph(body, opset=20, **CONSTANTS, **group.constants)


def feeds() -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    found = {
        name: random.integers(-3, 4, shape).astype(np.float32)
        for name, shape in (("x4", (2, 16, 4, 6)), ("x3", (2, 5, 16)), ("x2", (3, 16)))
    }
    found["at"] = np.array([[0, -1, 2], [3, -4, 1]])
    found["on"] = random.integers(0, 2, (2, 1, 4, 6)).astype(bool)
    return found


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_equal_to_onnxruntime(group, timing_cache) -> None:
    model = model_of(group)
    want = reference(model, feeds())
    engine = build(model, timing_cache=timing_cache)
    fallbacks = [layer for layer in engine.plan.layers if layer.tactic == "onnxruntime"]
    assert not fallbacks
    got = run_twice(engine, feeds())
    for i, line in enumerate(group.lines):
        a, b = got[f"y{i}"], want[f"y{i}"]
        assert (a.dtype, a.shape) == (b.dtype, b.shape), line
        size = np.abs(b[np.isfinite(b)]).max(initial=1.0) if group.slack else 1.0
        assert np.allclose(a, b, rtol=group.slack, atol=group.slack * size, equal_nan=True), line
