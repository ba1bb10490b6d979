"""A model in pieces computes what it computes whole, and each piece within the budget."""

from __future__ import annotations

import weakref

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.graphs import graph
from tests.onnx_tools.networks import option_a, samples
from twofour.core.errors import InputError
from twofour.onnx_tools import runner, segments
from twofour.onnx_tools.runner import Runner
from twofour.onnx_tools.segments import Segments

TENSORS = ["y", "x", "r1", "a4", "r2", "p4", "c3"]
SAMPLE = 4 * 8 * 8 * 8  # bytes of r1


def pieces(model: ir.Model, tensors: list[str], feeds: dict[str, np.ndarray], count: int):
    found = Segments(model, tensors, 1, count)
    parts = [dict(part) for part in found.run(feeds)]
    whole = Runner(model, tensors, 1).run(feeds)
    joined = {name: array for part in parts for name, array in part.items()}
    assert joined.keys() == whole.keys()
    for name in tensors:
        # Fused or not, float32 sums differ by rounding.
        np.testing.assert_allclose(joined[name], whole[name], rtol=1e-4, atol=1e-5)
    assert sum(map(len, parts)) == len(tensors)
    return found, parts


@pytest.mark.parametrize(("budget", "count"), [(1 << 27, 1), (9 * SAMPLE, 2), (1, 6)])
def test_pieces_give_what_the_whole_gives(monkeypatch, budget, count):
    monkeypatch.setattr(segments, "BATCH_BYTES", budget)
    found, parts = pieces(option_a(), TENSORS, {"x": samples(4)}, 4)
    assert len(found) == count
    if budget > 1:
        assert all(sum(array.nbytes for array in part.values()) <= budget for part in parts)


def test_nothing_is_computed_twice_and_no_weight_is_held_twice(monkeypatch):
    monkeypatch.setattr(segments, "BATCH_BYTES", 1)
    loaded = []
    original = runner._session

    def spy(content: bytes, threads: int):
        loaded.append(onnx.load_from_string(content).graph)
        return original(content, threads)

    monkeypatch.setattr(runner, "_session", spy)
    Segments(option_a(), TENSORS, 1, 4)
    assert len(loaded) == 6
    nodes = [node.output[0] for piece in loaded for node in piece.node]
    convs = [node.input[1] for piece in loaded for node in piece.node if node.op_type == "Conv"]
    weights = [t.name for piece in loaded for t in piece.initializer if t.name in convs]
    assert len(nodes) == len(set(nodes)) > 10
    assert sorted(weights) == sorted(convs) == ["w1", "w2", "w3", "w4"]


def test_a_piece_is_forgotten_before_the_next_is_run(monkeypatch):
    monkeypatch.setattr(segments, "BATCH_BYTES", 8 * SAMPLE)
    made, alive = [], []
    original = Runner.run

    def spy(self, inputs):
        gone = [ref for ref in made if ref() is None]
        alive.append(len(made) - len(gone))
        arrays = original(self, inputs)
        made.extend(weakref.ref(array) for array in arrays.values())
        return arrays

    monkeypatch.setattr(Runner, "run", spy)
    found = Segments(option_a(), ["c1", "r1", "c2", "a2", "r2", "c3"], 1, 4)
    for part in found.run({"x": samples(4)}):
        assert len(part) <= 2
    left = [{*piece.inputs} - {"x"} for piece in found._pieces]
    before = [{*piece.wanted, *piece.kept} for piece in found._pieces]
    # Nothing but what earlier pieces computed and this or a later one reads.
    needed = [set().union(*left[i:]) & set().union(*before[:i]) for i in range(len(left))]
    assert alive == [len(names) for names in needed]
    assert max(alive) < len(made)


def test_bodies_read_what_earlier_pieces_computed(monkeypatch):
    monkeypatch.setattr(segments, "BATCH_BYTES", 1)
    body = """(float[n,4] x) => (float[n,4] y) <float zero = {0}> {
        a = Relu (x)
        b = Exp (x)
        s = ReduceSum <keepdims = 0> (x)
        c = Greater (s, zero)
        d = If (c) <then_branch = g () => (float[n,4] t) { t = Mul (a, b) },
                    else_branch = h () => (float[n,4] e) { e = Sub (a, b) }>
        y = Neg (d)
    }"""
    model = graph(body, opset=17)
    for sign in (1, -1):
        feeds = {"x": sign * np.abs(samples(3, (4,)))}
        assert len(pieces(model, ["a", "b", "d", "y"], feeds, 3)[0]) == 4


def test_no_cut_where_something_else_than_a_tensor_would_cross(monkeypatch):
    monkeypatch.setattr(segments, "BATCH_BYTES", 1)
    body = """(float[n,4] x) => (float[m,4] y) {
        a = Relu (x)
        s = SequenceConstruct (a, x)
        b = Exp (x)
        y = ConcatFromSequence <axis = 0> (s)
    }"""
    model = graph(body, opset=17)
    found, _ = pieces(model, ["a", "b", "y"], {"x": samples(3, (4,))}, 3)
    assert 1 <= len(found) <= 3


OPEN = "(float[n,m] x) => (float[n,m] y) { a = Relu (x) y = Exp (a) }"


@pytest.mark.parametrize(
    ("length", "parts"), [(1, [16]), (8, [16]), (9, [8, 8]), (64, [2] * 8), (999, [1] * 16)]
)
def test_open_sizes_decide_how_a_run_is_cut(monkeypatch, length, parts):
    monkeypatch.setattr(segments, "BATCH_BYTES", 4 * 2 * 8 * 16)  # a and y, 16 samples, 8 long
    x = samples(16, (length,))
    found = list(Segments(graph(OPEN), ["a", "y"], 1, 16).parts({"x": x}, 16))
    assert [len(part["x"]) for part in found] == parts
    np.testing.assert_array_equal(np.concatenate([part["x"] for part in found]), x)


def test_runs_of_known_sizes_are_not_cut():
    found = list(Segments(option_a(), TENSORS, 1, 16).parts({"x": samples(16)}, 16))
    assert [len(part["x"]) for part in found] == [16]


def test_tensor_that_is_not_there():
    with pytest.raises(InputError, match="no tensor 'z'"):
        Segments(option_a(), ["r1", "z"], 1, 1)
