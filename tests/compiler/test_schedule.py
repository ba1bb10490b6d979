"""The order of execution: valid, in as few stretches as it takes, each refusal kept."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.graphs import graph
from twofour.compiler.passes import pipeline
from twofour.compiler.schedule import Schedule, schedule
from twofour.onnx_tools.edit import reads

W = np.random.default_rng(0).normal(size=(16, 16, 1, 1)).astype(np.float32)
X = "(float[1,16,6,6] x) => (float[1,16,6,6] y)"


def scheduled(body: str, **constants: np.ndarray) -> tuple[ir.Model, Schedule]:
    model = pipeline.run_passes(graph(body, **constants)).model
    order = schedule(model.graph)
    _require_valid(model.graph, order)
    return model, order


def _require_valid(graph: ir.Graph, order: Schedule) -> None:
    """Every node once, after all it reads; native stretches of native nodes only."""
    nodes = [node for stretch in order.stretches for node in stretch.nodes]
    assert set(nodes) == set(graph)
    assert len(nodes) == len(graph)
    done = {value for value in graph.inputs} | set(graph.initializers.values())
    for node in nodes:
        assert done.issuperset(reads(node)), node
        done.update(node.outputs)
    for stretch in order.stretches:
        assert all((node in order.ops) == stretch.native for node in stretch.nodes)
    assert order.ops.keys().isdisjoint(order.reasons)
    assert order.ops.keys() | order.reasons.keys() == set(graph)


def kinds(order: Schedule) -> list[tuple[bool, list[str]]]:
    return [(s.native, [n.op_type for n in s.nodes]) for s in order.stretches]


def test_native_operators_stay_together() -> None:
    """The Sin is ready early and runs late: two steps, not four."""
    _, order = scheduled(
        f"{X} {{ a = Conv (x, w) s = Sin (a) b = Conv (a, w) t = Cos (s) c = Conv (b, w)"
        " y = Mean (c, t) }",
        w=W,
    )
    assert kinds(order) == [(True, ["Conv"] * 3), (False, ["Sin", "Cos", "Mean"])]


def test_a_graph_that_begins_with_a_fallback() -> None:
    _, order = scheduled(f"{X} {{ s = Sin (x) b = Conv (x, w) c = Mean (s, b) y = Neg (c) }}", w=W)
    assert kinds(order) == [(True, ["Conv"]), (False, ["Sin", "Mean", "Neg"])]


def test_native_operators_without_a_convolution_join_the_fallback() -> None:
    _, order = scheduled(
        f"{X} {{ a = Conv (x, w) s = Sin (a) r = Relu (s) t = Cos (r) y = Conv (t, w) }}", w=W
    )
    assert kinds(order) == [
        (True, ["Conv"]),
        (False, ["Sin", "Relu", "Cos"]),
        (True, ["Conv"]),
    ]
    (relu,) = [node for node in order.reasons if node.op_type == "Relu"]
    assert "no convolution or matrix product" in order.reasons[relu]


def test_a_graph_without_native_operators_is_one_fallback() -> None:
    _, order = scheduled(
        f"{X} {{ r = Relu (x) s = Sigmoid (r) y = MaxPool <kernel_shape=[1,1]> (s) }}"
    )
    assert kinds(order) == [(False, ["Relu", "Sigmoid", "MaxPool"])]


def test_bodies_wait_for_what_they_read_however_deep() -> None:
    """The If is among the first nodes that are no kernels, but an inner body reads the Conv."""
    body = (
        "(float[1,16,6,6] x, bool b) => (float[1,16,6,6] y) { p = Sin (x) c = Conv (p, w)"
        " y = If <then_branch = g1 () => (float[1,16,6,6] t) {"
        "   t = If <then_branch = g2 () => (float[1,16,6,6] t2) { t2 = Sigmoid (c) },"
        "           else_branch = g3 () => (float[1,16,6,6] t3) { t3 = Neg (p) }> (b) },"
        " else_branch = g4 () => (float[1,16,6,6] e) { e = Neg (x) }> (b) }"
    )
    model, order = scheduled(body, w=W)
    assert kinds(order) == [(False, ["Sin"]), (True, ["Conv"]), (False, ["If"])]
    (node,) = [n for n in model.graph if n.op_type == "If"]
    assert {v.name for v in reads(node)} == {"b", "c", "p", "x"}


def test_an_empty_graph() -> None:
    model = graph("(float[1] x) => (float[1] y) { y = Identity (x) }")
    for node in list(model.graph):
        model.graph.remove(node)
    assert schedule(model.graph).stretches == ()


PARTS = "p = SplitToSequence <axis = 1> (a, n) "


def test_what_no_engine_passes_on_stays_in_one_step() -> None:
    """The convolution needs the sequence, and the second reader of the sequence needs it."""
    _, found = scheduled(
        "(float[1,16,6,6] x) => (float[1,16,6,6] y, float[1,16,6,6] z)"
        f"<int64 n = {{16}}, int64 i = {{0}}> {{ a = Conv (x, w) {PARTS} q = SequenceAt (p, i)"
        " c = Reshape (q, s) d = Conv (c, w) r = SequenceInsert (p, d) y = SequenceAt (r, i)"
        " e = Reshape (y, s) z = Conv (e, w) }",
        w=W,
        s=np.array([1, 16, 6, 6]),
    )
    assert [(native, len(ops)) for native, ops in kinds(found)] == [
        (True, 1),
        (False, 6),
        (True, 2),
    ]
    (reason,) = [text for node, text in found.reasons.items() if node.outputs[0].name == "d"]
    assert "between nodes whose values no engine passes on" in reason


def test_sequences_that_need_each_other_are_one_step() -> None:
    _, found = scheduled(
        "(float[1,16,6,6] x) => (float[1,16,6,6] y)"
        f"<int64 n = {{8}}, int64 i = {{0}}> {{ a = Conv (x, w) {PARTS}"
        " g = SequenceAt (p, i) h = Concat <axis = 1> (g, g) s = SequenceConstruct (h, a)"
        " b = SequenceAt (s, i) t = SequenceInsert (p, b) e = SequenceAt (t, i)"
        " y = Concat <axis = 1> (e, e) }",
        w=W,
    )
    assert [native for native, _ in kinds(found)] == [True, False]


def test_the_kind_to_begin_with_is_what_gives_fewer_steps() -> None:
    _, found = scheduled(
        "(float[1,16,6,6] x, float[1,16,6,6] u) => (float[1,16,6,6] y, float[1,16,6,6] z)"
        "{ a = Conv (x, w) s = Sin (u) y = Conv (s, w) z = Add (a, y) }",
        w=W,
    )
    assert [native for native, _ in kinds(found)] == [False, True]
