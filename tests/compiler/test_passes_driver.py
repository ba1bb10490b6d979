"""The driver: rules come to rest, graphs stay valid, dumps are written, names are unique."""

import numpy as np
import onnx_ir as ir
import pytest

from tests.graphs import apply, graph, run
from twofour.compiler.passes import pipeline, reading, rewrite, text
from twofour.core.errors import Error

SIMPLE = """(float[4] x) => (float[4] y) {
    a = Neg (x)
    y = Relu (a) }"""


def swap(node):
    """Neg -> Abs, Abs -> Neg: never comes to rest."""
    if node.op_type not in ("Neg", "Abs"):
        return None
    new = ir.node("Abs" if node.op_type == "Neg" else "Neg", node.inputs, name=node.name)
    return rewrite.Replacement(node.outputs[0], new.outputs[0], (new,))


def once(op_type, make):
    """A rule that replaces nodes of one type by what `make` gives."""

    def rule(node):
        return make(node) if node.op_type == op_type else None

    return rule


def test_a_rule_that_does_not_come_to_rest_is_named():
    with pytest.raises(Error, match="pass swap does not come to rest: 81 rewrites, the last at"):
        rewrite.apply("swap", swap, graph(SIMPLE).graph)


def test_a_value_cannot_replace_itself():
    same = once("Neg", lambda node: rewrite.Replacement(node.outputs[0], node.outputs[0]))
    with pytest.raises(ValueError, match="'a' cannot be replaced"):
        rewrite.apply("same", same, graph(SIMPLE).graph)


def test_what_nobody_reads_is_removed_with_its_constants():
    model = graph("""(float[4] x) => (float[4] y) <float c = {1}, float d = {2}> {
        a = Add (x, c)
        b = Add (a, d)
        y = Relu (b) }""")
    keep = once("Relu", lambda n: rewrite.Replacement(n.outputs[0], model.graph.inputs[0]))
    rewrite.apply("keep", keep, model.graph)
    assert [node.op_type for node in model.graph] == ["Identity"]
    assert not model.graph.initializers
    assert model.graph.outputs[0].name == "y"


def test_a_constant_can_become_an_output():
    model = graph(SIMPLE)
    five = once(
        "Relu",
        lambda n: rewrite.Replacement(
            n.outputs[0], reading.constant("x", np.full(4, 5, np.float32))
        ),
    )
    rewrite.apply("five", five, model.graph)
    assert list(model.graph.initializers) == ["x_1"], "a constant must not take an input's name"
    assert run(model)[0].tolist() == [5, 5, 5, 5]


def test_an_output_can_move_to_an_existing_value():
    model = graph(SIMPLE)
    drop = once("Relu", lambda n: rewrite.Replacement(n.outputs[0], n.inputs[0]))
    rewrite.apply("drop", drop, model.graph)
    assert [node.op_type for node in model.graph] == ["Neg"]
    assert model.graph.outputs[0].name == "y"


def test_a_value_that_is_an_output_is_not_renamed():
    model = graph("""(float[4] x) => (float[4] a, float[4] y) {
        a = Neg (x)
        y = Relu (a) }""")
    drop = once("Relu", lambda n: rewrite.Replacement(n.outputs[0], n.inputs[0]))
    rewrite.apply("drop", drop, model.graph)
    assert [value.name for value in model.graph.outputs] == ["a", "y"]
    a, y = run(model)
    assert np.array_equal(a, y)


def test_one_node_can_take_the_place_of_several():
    """Its results get their names; the nodes that computed them are removed."""
    model = graph("""(float[4] x) => (float[2] y, float[2] b)
        <int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4}> {
        a = Slice (x, zero, two)
        b = Slice (x, two, four)
        y = Relu (a) }""")
    before = run(model)

    def make(node):
        other = next(n for n in model.graph if n.op_type == "Slice" and n is not node)
        sizes = reading.constant("sizes", np.array([2, 2]))
        new = ir.node("Split", [node.inputs[0], sizes], num_outputs=2)
        pair = (other.outputs[0], new.outputs[1])
        return rewrite.Replacement(node.outputs[0], new.outputs[0], (new,), more=(pair,))

    rewrite.apply("halves", once("Slice", make), model.graph)
    assert [node.op_type for node in model.graph] == ["Split", "Relu"]
    assert [value.name for value in model.graph[0].outputs] == ["a", "b"]
    assert list(model.graph.initializers) == ["sizes"]
    for want, got in zip(before, run(model), strict=True):
        assert np.array_equal(want, got)


def test_new_names_are_unique():
    model = graph("""(float[4] x, float[4] y_Abs) => (float[4] y) {
        y = Neg (x) }""")

    def make(node):
        first = ir.node("Abs", node.inputs)
        second = ir.node("Abs", first.outputs)
        for new in (first, second):
            new.outputs[0].shape, new.outputs[0].type = node.inputs[0].shape, node.inputs[0].type
        return rewrite.Replacement(node.outputs[0], second.outputs[0], (first, second))

    rewrite.apply("twice", once("Neg", make), model.graph)
    assert [node.outputs[0].name for node in model.graph] == ["y_Abs_1", "y"]
    assert len({node.name for node in model.graph}) == 2


def test_a_removed_node_is_not_looked_at():
    model = graph(SIMPLE)
    seen = []

    def swallow(node):
        """Neg and its Relu -> Abs."""
        seen.append((node.op_type, node.graph is model.graph))
        if node.op_type != "Neg":
            return None
        relu = next(iter(node.outputs[0].uses())).node
        new = ir.node("Abs", node.inputs)
        return rewrite.Replacement(relu.outputs[0], new.outputs[0], (new,))

    rewrite.apply("swallow", swallow, model.graph)
    assert seen == [("Neg", True), ("Abs", True)]


def broken(make):
    return (pipeline.Pass("broken", once("Relu", make), ""),)


def test_an_invalid_graph_is_an_error_of_the_pass():
    def make(node):
        new = ir.node("Relu9", node.inputs)
        return rewrite.Replacement(node.outputs[0], new.outputs[0], (new,))

    with pytest.raises(Error, match=r"pass broken left an invalid graph\n.*Relu9"):
        pipeline.run_passes(graph(SIMPLE), passes=broken(make))


def test_a_fused_node_that_cannot_be_read_is_an_error_of_the_pass():
    def make(node):
        new = ir.node("QMaxPool", node.inputs, domain="twofour")
        return rewrite.Replacement(node.outputs[0], new.outputs[0], (new,))

    with pytest.raises(
        Error, match=r"pass broken left an invalid graph\n.*expected the attributes"
    ):
        pipeline.run_passes(graph(SIMPLE), passes=broken(make))


def test_a_changed_output_is_an_error_of_the_pass():
    def make(node):
        new = ir.node("Cast", node.inputs, {"to": 11})
        new.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
        return rewrite.Replacement(node.outputs[0], new.outputs[0], (new,))

    with pytest.raises(Error, match="pass broken changed the inputs or outputs"):
        pipeline.run_passes(graph(SIMPLE), passes=broken(make))


def test_dumps_and_the_given_model(tmp_path):
    model = graph("(float[2,3] x) => (float[2,2] y) <float[3,2] w = {1,2,3,4,5,6}> {"
                  " y = MatMul (x, w) }")  # fmt: skip
    before = text.graph_text(model)
    fused = pipeline.run_passes(model, dump=tmp_path / "dump")
    assert text.graph_text(model) == before, "the given model must not change"
    files = sorted(path.name for path in (tmp_path / "dump").iterdir())
    assert files[:2] == ["00_imported.txt", "01_unfuse_conv.txt"]
    assert len(files) == 1 + len(pipeline.PIPELINE)
    assert (tmp_path / "dump" / files[0]).read_text() == before
    assert (tmp_path / "dump" / files[-1]).read_text() == text.graph_text(fused.model)


def test_each_refusal_is_kept_once():
    model = graph("(float[2,3] x, float[3,2] w) => (float[2,2] y) { y = MatMul (x, w) }")
    fused = pipeline.run_passes(model)
    reason = "its right operand 'w' is not a constant matrix"
    assert fused.refusals == (rewrite.Refusal("y", "canonical_gemm", reason),)


def test_every_pass_is_in_the_list_once_and_says_why():
    names = [entry.name for entry in pipeline.PIPELINE]
    assert len(set(names)) == len(names)
    assert all(entry.why for entry in pipeline.PIPELINE)


def test_large_constants_are_shown_by_shape():
    model = graph(
        "(float[9] x) => (float[9] y) <float[9] c> { y = Add (x, c) }", c=np.ones(9, "f4")
    )
    assert "<float[9] c>" in text.graph_text(model)


def test_missing_inputs_are_errors():
    node = ir.node("Conv", [ir.val("x"), None], name="conv")
    with pytest.raises(ValueError, match="Conv 'conv' lacks input 1"):
        reading.data(node, 1)
    with pytest.raises(ValueError, match="'conv' is in no graph"):
        reading.precedes(node, node)


def test_apply_of_nothing_changes_nothing():
    model = graph(SIMPLE)

    class Nothing:
        NAME = "nothing"

        @staticmethod
        def rule(node):
            return None

    after, refusals = apply(Nothing, model)
    assert not refusals
    assert text.graph_text(after) == text.graph_text(model)


def test_readers_inside_a_branch_are_left_alone():
    """Conv and Add feed quantizers in the body of If: neither is fused with what is inside."""
    body = """g1 () => (int8[1,2,4,4] e) {{ e = QuantizeLinear ({0}, s, z) }}"""
    model = graph(
        f"""(int8[1,2,4,4] x, bool c) => (int8[1,2,4,4] y, int8[1,2,4,4] q)
        <float s = {{0.1}}, int8 z = {{0}}, int8[2,2,1,1] k = {{1, 2, 3, 4}}> {{
        f = DequantizeLinear (x, s, z)
        w = DequantizeLinear (k, s, z)
        a = Conv (f, w)
        b = Add (f, f)
        y = If (c) <then_branch = {body.format("a")}, else_branch = {body.format("b")}>
        r = Relu (f)
        q = QuantizeLinear (r, s, z)
        }}"""
    )
    fused = pipeline.run_passes(model)
    assert [node.op_type for node in fused.model.graph if node.op_type[0] == "Q"] == [
        "QConvF",
        "QActivationRelu",
    ]
    reasons = {refusal.node: refusal.reason for refusal in fused.refusals}
    assert reasons["b"].startswith("its result is read inside the body of a branch or loop")
    x = np.arange(-16, 16, dtype=np.int8).reshape(1, 2, 4, 4)
    for branch in (True, False):
        feeds = {"x": x, "c": np.array(branch)}
        for want, got in zip(run(model, feeds=feeds), run(fused.model, feeds=feeds), strict=True):
            assert np.array_equal(want, got)
