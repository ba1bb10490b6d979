"""The order of execution: valid, in as few stretches as it takes, each refusal kept."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.graphs import graph
from twofour.compiler.passes import pipeline
from twofour.compiler.schedule import Schedule, reads, schedule

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
    assert kinds(order) == [(False, ["Sin"]), (True, ["Conv"]), (False, ["Mean", "Neg"])]


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
        "(float[1,16,6,6] x, bool b) => (float[1,16,6,6] y) { p = Sin (x) c = Conv (x, w)"
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
