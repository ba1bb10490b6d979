"""Places of values: the arena where kernels read, plain arrays between steps, few copies."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graphs import graph
from twofour.compiler.importer import import_graph
from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Lowered, Placed, lower
from twofour.compiler.passes import pipeline
from twofour.compiler.schedule import schedule
from twofour.core.errors import UnsupportedError
from twofour.engine import TensorInfo

RANDOM = np.random.default_rng(0)
W1 = RANDOM.normal(size=(16, 16, 1, 1)).astype(np.float32)
W3 = RANDOM.normal(size=(16, 16, 3, 3)).astype(np.float32)
X = "(float[1,16,6,6] x)"
Y = "(float[1,16,6,6] y)"


def lowered(body: str, **constants: np.ndarray) -> Lowered:
    model = pipeline.run_passes(graph(body, **constants)).model
    return lower(model.graph, schedule(model.graph))


def ops(found: Lowered) -> list[str]:
    return [placed.op.op_type for section in found.sections for placed in section.ops]


def placed(found: Lowered, y: str) -> Placed:
    """The operator that computes `y`, not a copy of it."""
    every = [p for s in found.sections for p in s.ops if p.op.y == y and p.op.op_type != "Copy"]
    return every[0]


def test_quantizers_read_and_write_plain_arrays_themselves() -> None:
    found = lowered(
        "(float[1,16,6,6] x) => (float[1,16,6,6] y) <float s = {0.5}, int8 z = {0}>"
        "{ q = QuantizeLinear (x, s, z) f = DequantizeLinear (q, s, z)"
        " w = DequantizeLinear <axis = 0> (k, ks) c = Conv (f, w) p = QuantizeLinear (c, s, z)"
        " y = DequantizeLinear (p, s, z) }",
        k=np.ones((16, 16, 1, 1), np.int8),
        ks=np.ones(16, np.float32),
    )
    assert ops(found) == ["QuantizeLinear", "QConv", "DequantizeLinear"]
    first, conv, last = found.sections[0].ops
    assert first.x == TensorInfo("x", "float32", (1, 16, 6, 6))
    assert isinstance(conv.x, Tensor)
    assert isinstance(conv.y, Tensor)
    assert last.y == TensorInfo("y", "float32", (1, 16, 6, 6))


def test_a_product_writes_the_output_vector_itself() -> None:
    found = lowered("(float[1,16] x) => (float[1,4] y) { y = MatMul (x, w) }", w=W1[:, :4, 0, 0])
    assert ops(found) == ["Copy", "Gemm"]
    assert placed(found, "y").y == TensorInfo("y", "float32", (1, 4))


def test_a_value_is_copied_in_once_and_out_once() -> None:
    """x is read by three Convs, c by both kinds of steps and by the caller."""
    found = lowered(
        f"{X} => (float[1,16,6,6] y, float[1,16,6,6] c) {{ c = Conv (x, w) d = Conv (c, w)"
        " e = Conv (x, w) g = Mean (c, d, e) h = Conv (x, w) y = Mod <fmod = 1> (g, h) }",
        w=W1,
    )
    copies = [p.op for s in found.sections for p in s.ops if p.op.op_type == "Copy"]
    assert sorted(op.x for op in copies) == ["c", "d", "e", "h", "x"]
    native, fallback = found.sections
    assert native.inputs == ("x",)
    assert set(native.outputs) == {"c", "d", "e", "h"}
    assert set(fallback.inputs) == {"c", "d", "e", "h"}
    assert fallback.outputs == ("y",)


def test_native_values_stay_in_the_arena_across_a_fallback() -> None:
    found = lowered(
        f"{X} => {Y} {{ c = Conv (x, w) s = Sin (c) t = Conv (s, w) y = Add (t, c) }}", w=W1
    )
    assert [s.native for s in found.sections] == [True, False, True]
    assert [s.inputs for s in found.sections] == [("x",), ("c",), ("s",)]
    assert [s.outputs for s in found.sections] == [("c",), ("s",), ("y",)]
    last = placed(found, "y")
    assert last.op.op_type == "ConvAdd"
    assert last.r is placed(found, "c").y


def test_reshapes_share_the_tensor() -> None:
    found = lowered(
        "(float[2,16,1,1] x) => (float[2,4] y)"
        "{ c = Conv (x, k) f = Flatten (c) y = MatMul (f, w) }",
        k=W1,
        w=W1[:, :4, 0, 0],
    )
    assert ops(found) == ["Copy", "Conv", "Gemm"]
    assert placed(found, "y").x is placed(found, "c").y


def test_the_halo_serves_every_reader() -> None:
    found = lowered(
        f"{X} => {Y} {{ a = Conv (x, w) b = Conv <pads = [1,1,1,1]> (a, k)"
        " c = Conv <pads = [2,2,2,2], dilations = [2,2]> (a, k) d = Conv (a, w)"
        " e = Add (b, c) y = Add (e, d) }",
        w=W1,
        k=W3,
    )
    a = placed(found, "a").y
    assert isinstance(a, Tensor)
    assert a.halo == [2, 2, 2, 2]
    (fill,) = [f for f in found.fills if f.offset == a.offset]
    assert (fill.size_bytes, fill.value) == (10 * 10 * 16 * 4, 0)


def test_the_halo_of_integers_holds_the_zero_point() -> None:
    for kind, zero, byte in (("int8", -5, 123), ("uint8", 9, 9)):
        found = lowered(
            f"({kind}[1,16,6,6] x) => {Y} <float s = {{0.5}}, {kind} z = {{{zero}}}>"
            "{ f = DequantizeLinear (x, s, z) w = DequantizeLinear <axis = 0> (k, ks)"
            " y = Conv <pads = [1,1,1,1]> (f, w) }",
            k=np.ones((16, 16, 3, 3), np.int8),
            ks=np.ones(16, np.float32),
        )
        assert [f.value for f in found.fills] == [byte]


def test_a_residual_is_written_over() -> None:
    found = lowered(f"{X} => {Y} {{ a = Conv (x, w) b = Conv (a, w) y = Add (b, a) }}", w=W1)
    add = placed(found, "y")
    assert isinstance(add.y, Tensor)
    # Conv b has no other use of a, so y = b + a is one operator that reads a twice.
    assert add.op.op_type == "ConvAdd"
    assert add.r is add.x
    assert add.y.offset != add.x.offset, "tiles still to come read what was written over"
    found = lowered(
        f"{X} => {Y} {{ a = Conv (x, w) b = Conv (a, w) c = Conv (b, w) y = Add (c, a) }}", w=W1
    )
    add = placed(found, "y")
    assert isinstance(add.y, Tensor)
    assert isinstance(add.r, Tensor)
    assert add.y.offset == add.r.offset


def test_two_zero_points_of_one_tensor_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="two zero points") as caught:
        lowered(
            f"(int8[1,16,6,6] x) => {Y} <float s = {{0.5}}, int8 a = {{1}}, int8 b = {{2}}>"
            "{ f = DequantizeLinear (x, s, a) g = DequantizeLinear (x, s, b)"
            " w = DequantizeLinear <axis = 0> (k, ks) c = Conv <pads = [1,1,1,1]> (f, w)"
            " d = Conv <pads = [1,1,1,1]> (g, w) y = Sum (c, d) }",
            k=np.ones((16, 16, 3, 3), np.int8),
            ks=np.ones(16, np.float32),
        )
    assert "'x'" in str(caught.value)


def test_tensors_between_steps_need_a_type_and_may_lack_a_shape() -> None:
    """NonZero has a shape only while running; inside a fallback step that is nobody's business."""
    inside = "n = NonZero (c) s = Shape (n) f = Cast <to = 1> (s) m = ReduceMax (f)"
    found = lowered(f"{X} => {Y} {{ c = Conv (x, w) {inside} y = Mul (c, m) }}", w=W1)
    assert set(found.plain) == {"x", "c", "y"}
    found = lowered(f"{X} => (int64[4,k] n) {{ c = Conv (x, w) n = NonZero (c) }}", w=W1)
    assert {name for name, info in found.plain.items() if not info.known} == {"n"}
    with pytest.raises(UnsupportedError, match="an engine does not pass on 's'") as caught:
        lowered(
            "(float[1,16,6,6] x, string[2] s) => (float[1,16,6,6] y, string[2] t)"
            "{ y = Conv (x, w) t = Identity (s) }",
            w=W1,
        )
    assert "string" in str(caught.value)


def test_a_constant_output_is_copied() -> None:
    body = f"{X} => (float[1,16,6,6] y, float[16,16,1,1] w) {{ y = Conv (x, w) }}"
    fused = pipeline.run_passes(import_graph(graph(body, w=W1))).model.graph
    found = lower(fused, schedule(fused))
    assert [(s.native, s.inputs, s.outputs) for s in found.sections] == [
        (True, ("x",), ("y",)),
        (False, (), ("w",)),
    ]


def test_parts_of_a_join_lie_in_it_with_one_halo() -> None:
    found = lowered(
        f"{X} => (float[1,16,6,6] y, float[1,16,6,6] v)"
        "{ a = Conv (x, w) b = Conv (x, w) c = Concat <axis = 1> (a, b)"
        " y = Conv <pads = [1,1,1,1]> (b, k)"
        " v = Conv <pads = [2,2,2,2], dilations = [2,2]> (c, m) }",
        w=W1,
        k=W3,
        m=RANDOM.normal(size=(16, 32, 3, 3)).astype(np.float32),
    )
    assert "Concat" not in ops(found)
    a, b, c = placed(found, "a").y, placed(found, "b").y, placed(found, "v").x
    assert all(isinstance(place, Tensor) for place in (a, b, c))
    assert a.parent is b.parent is c
    assert (a.at(), b.at()) == (c.at(), c.at() + 16 * 4)
    assert a.strides == b.strides == c.strides
    assert c.halo == [2, 2, 2, 2]
    (fill,) = [f for f in found.fills if f.offset == c.offset]
    assert fill.size_bytes == 10 * 10 * 32 * 4
    assert placed(found, "y").x is b
