"""Nodes with random attributes, run alone on operands of any place, against ONNX Runtime."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from tests.compiler.engines import reference
from twofour.compiler.emit_nd import nd_nests, nd_table
from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Place, Placed
from twofour.compiler.native import extent
from twofour.compiler.native_nd import READERS as MATHS
from twofour.compiler.native_nd import NdOp, NdValue
from twofour.compiler.native_nd_moves import READERS as MOVES
from twofour.core.abi import ARENA, BINDINGS, WEIGHTS
from twofour.core.target import host_target
from twofour.engine import TensorInfo
from twofour.kernels.cpu.llvm import Source, compile_object
from twofour.kernels.cpu.nd import emit_nd, nd_pieces
from twofour.runtime.cpu import Code, address

EXAMPLES = settings(max_examples=12, deadline=None)
GUARD = 0xA5
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=5).map(tuple)
kinds = st.sampled_from(["float32", "int64", "int32", "bool", "uint8", "int8"])
Values = dict[str, np.ndarray]


class Memory:
    """An arena of garbage with some operands in it, plain arrays for the others."""

    def __init__(self, data, values: dict[str, NdValue]) -> None:
        self._data = data
        self.plain: Values = {}
        self._end = 64
        self.places = {n: self._place(n, v.dims, v.kind) for n, v in values.items()}
        self.arena = np.full(self._end, GUARD, np.uint8)

    def _place(self, name: str, dims: tuple[int, ...], kind: str) -> Place:
        """In the arena, channels-last with a halo where the rank is 4, or plain."""
        if self._data.draw(st.booleans()):
            self.plain[name] = np.zeros(dims, kind)
            return TensorInfo(name, kind, dims)
        tensor = Tensor(name, *extent(dims), "u8" if kind in ("int8", "uint8") else kind)
        if len(dims) == 4:
            tensor.halo = list(self._data.draw(st.tuples(*[st.integers(0, 2)] * 4)))
        tensor.offset = self._end
        self._end += -(-tensor.size_bytes // 64) * 64 + 64
        return tensor

    def view(self, place: Place, dims: tuple[int, ...], arena: np.ndarray) -> np.ndarray:
        """The operand in its memory, with the shape it has in the graph."""
        if isinstance(place, TensorInfo):
            return self.plain[place.name]
        dtype, step = np.dtype("u1" if place.kind == "u8" else place.kind), place.strides
        strides = step.image, step.row, step.pixel, dtype.itemsize
        images = np.ndarray(extent(dims), dtype, arena.data, place.at(), strides)
        return images.transpose(0, 3, 1, 2) if len(dims) == 4 else images.reshape(dims)


def stored(values: np.ndarray, place: Place) -> np.ndarray:
    """As the arena holds it: int8 plus 128."""
    flip = values.dtype == np.int8 and isinstance(place, Tensor)
    return values.view(np.uint8) ^ 128 if flip else values


def run_alone(op: NdOp, feeds: Values, data) -> Values:
    """The outputs of one operator; nothing else may change in the arena."""
    known = {value.name: value for value in op.values if value.name}
    memory = Memory(data, known)
    places = memory.places
    for name in op.reads:
        memory.view(places[name], known[name].dims, memory.arena)[...] = stored(
            feeds[name], places[name]
        )
    before = memory.arena.copy()
    _call(op, memory)
    found = {}
    for name in op.writes:
        place, value = places[name], known[name]
        got = memory.view(place, value.dims, memory.arena)
        found[name] = got.copy()
        if value.kind == "int8" and isinstance(place, Tensor):
            found[name] = (got ^ 128).view(np.int8)
        if isinstance(place, Tensor):
            got[...] = memory.view(place, value.dims, before)
    assert (memory.arena == before).all(), "bytes around an output changed"
    return found


def _call(op: NdOp, memory: Memory) -> None:
    x, *more = (memory.places[name] for name in op.reads)
    y, *also = (memory.places[name] for name in op.writes)
    placed = Placed(op, x, y, None, tuple(more), tuple(also))
    constants = bytearray()

    def keep(constant: np.ndarray) -> int:
        constants.extend(bytes(-len(constants) % 64) + constant.tobytes())
        return len(constants) - constant.nbytes

    bindings = {name: BINDINGS + i for i, name in enumerate(memory.plain)}
    nests, table = nd_nests(op, placed), nd_table(op, placed, bindings, keep)
    held = np.frombuffer(bytes(constants) or bytes(8), np.uint8)
    bases = {ARENA: address(memory.arena), WEIGHTS: address(held)}
    bases |= {bindings[name]: address(array) for name, array in memory.plain.items()}
    pointers = (ctypes.c_int64 * len(table))(*(bases[o.index] + o.offset for o in table))
    code = Code([compile_object([Source(emit_nd("nd_", nests), True)], host_target())])
    code.kernel("nd_")(ctypes.addressof(pointers), None, None, None, 0, nd_pieces(nests), 0, 1)


def check(data, op_type: str, feeds: Values, *constants: Any, outputs: int = 1, **attributes):
    """One node: its computed inputs, then its constant ones (None: left out)."""
    names = [f"c{i}" if c is not None else "" for i, c in enumerate(constants)]
    results = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op_type, [*feeds, *names], results, **attributes)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in feeds.items()
    ]
    held = [
        numpy_helper.from_array(np.asarray(c), name)
        for name, c in zip(names, constants, strict=True) if c is not None
    ]  # fmt: skip
    outs = [helper.make_empty_tensor_value_info(name) for name in results]
    graph = helper.make_graph([node], "g", inputs, outs, held)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    proto = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    model = ir.from_proto(proto)
    assume(all(0 not in value.shape.numpy() for value in model.graph.outputs))
    want = reference(model, feeds)
    got = run_alone((MOVES | MATHS)[op_type](next(iter(model.graph))), feeds, data)
    for name, value in want.items():
        assert got[name].dtype == value.dtype
        assert np.array_equal(got[name], value), (op_type, name)


def array(data, dims: tuple[int, ...], kind: str) -> np.ndarray:
    random = np.random.default_rng(data.draw(st.integers(0, 9)))
    if kind == "bool":
        return random.integers(0, 2, dims).astype(bool)
    if kind == "float32":
        return random.integers(-99, 99, dims).astype(np.float32)
    return random.integers(0 if kind == "uint8" else -99, 99, dims).astype(kind)


def ints(data, count: int, low: int, high: int) -> np.ndarray:
    return np.array(data.draw(st.tuples(*[st.integers(low, high)] * count)), np.int64)


@EXAMPLES
@given(st.data(), shapes, kinds)
def test_slice(data, dims, kind) -> None:
    axes = data.draw(st.lists(st.sampled_from(range(-len(dims), 0)), unique=True, min_size=1))
    cuts = []
    for axis in axes:
        count, step = dims[axis], data.draw(st.sampled_from([1, 1, 2, 3, -1, -2]))
        first, last = sorted(data.draw(st.tuples(*[st.integers(0, count - 1)] * 2)))
        begin, end = (first, last + 1) if step > 0 else (last, first - 1)
        far = 2**62 if step > 0 else -(2**62)
        from_end = [begin - count, begin]  # both name the element
        ends = [far, *([end] if end >= 0 else []), *([end - count] if -1 < end < count else [])]
        cuts.append((data.draw(st.sampled_from(from_end)), data.draw(st.sampled_from(ends)), step))
    starts, ends, steps = (np.array(v, np.int64) for v in zip(*cuts, strict=True))
    check(data, "Slice", {"x": array(data, dims, kind)}, starts, ends, np.array(axes), steps)


@EXAMPLES
@given(st.data(), shapes, kinds)
def test_pad(data, dims, kind) -> None:
    pads = ints(data, 2 * len(dims), -2, 3).reshape(2, -1)
    inside = np.array(dims) + np.minimum(pads, 0).sum(0)
    pads = np.where(inside > 0, pads, 1).reshape(-1)
    check(data, "Pad", {"x": array(data, dims, kind)}, pads, array(data, (), kind))


@EXAMPLES
@given(st.data(), shapes, st.sampled_from(["reflect", "edge", "wrap"]))
def test_pad_with_what_is_inside(data, dims, mode) -> None:
    dims = tuple(dim + 1 for dim in dims[:3])
    most = [dim - (mode == "reflect") for dim in dims]
    pads = np.array([data.draw(st.integers(0, limit)) for limit in (*most, *most)])
    check(data, "Pad", {"x": array(data, dims, "float32")}, pads, mode=mode)


@EXAMPLES
@given(st.data(), shapes, kinds)
def test_transpose_and_expand_and_tile(data, dims, kind) -> None:
    x = {"x": array(data, dims, kind)}
    check(data, "Transpose", x, perm=data.draw(st.permutations(range(len(dims)))))
    check(data, "Tile", x, ints(data, len(dims), 1, 3))
    ones = [data.draw(st.booleans()) for _ in dims]
    small = tuple(1 if one else n for one, n in zip(ones, dims, strict=True))
    check(data, "Expand", {"x": array(data, small, kind)}, np.array((2, *dims)))


@EXAMPLES
@given(st.data(), shapes, kinds)
def test_concat_and_split(data, dims, kind) -> None:
    axis = data.draw(st.integers(-len(dims), len(dims) - 1))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    parts = {}
    for i, size in enumerate(sizes):
        shape = list(dims)
        shape[axis] = size
        parts[f"x{i}"] = array(data, tuple(shape), kind)
    check(data, "Concat", parts, axis=axis)
    whole = np.concatenate([*parts.values()], axis)
    check(data, "Split", {"x": whole}, np.array(sizes), axis=axis, outputs=len(sizes))


@EXAMPLES
@given(st.data(), shapes, kinds, st.lists(st.integers(1, 3), max_size=2).map(tuple))
def test_gather(data, dims, kind, chosen) -> None:
    axis = data.draw(st.integers(-len(dims), len(dims) - 1))
    x, count = array(data, dims, kind), dims[axis]
    at = ints(data, int(np.prod(chosen)), -count, count - 1).reshape(chosen)
    at = at.astype(data.draw(st.sampled_from([np.int64, np.int32])))
    check(data, "Gather", {"x": x, "at": at}, axis=axis)
    check(data, "Gather", {"x": x}, at, axis=axis)
    shape = tuple(data.draw(st.integers(1, n)) for n in dims)
    every = ints(data, int(np.prod(shape)), -count, count - 1).reshape(shape)
    check(data, "GatherElements", {"x": x, "at": every}, axis=axis)


@EXAMPLES
@given(st.data(), st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=1, max_size=5), kinds)
def test_reshape(data, factors, kind) -> None:
    def grouped() -> tuple[int, ...]:
        cuts = [data.draw(st.booleans()) for _ in factors]
        dims = [1]
        for factor, cut in zip(factors, cuts, strict=True):
            if cut:
                dims.append(factor)
            else:
                dims[-1] *= factor
        return tuple(dims)

    check(data, "Reshape", {"x": array(data, grouped(), kind)}, np.array(grouped()))


@EXAMPLES
@given(st.data(), st.tuples(*[st.integers(1, 4)] * 4), kinds)
def test_resize_and_blocks(data, dims, kind) -> None:
    size = data.draw(st.integers(1, 3))
    batch, channels, height, width = dims
    deep = array(data, (batch, channels * size * size, height, width), "float32")
    check(data, "DepthToSpace", {"x": deep}, blocksize=size,
          mode=data.draw(st.sampled_from(["DCR", "CRD"])))  # fmt: skip
    wide = array(data, (batch, channels, height * size, width * size), "float32")
    check(data, "SpaceToDepth", {"x": wide}, blocksize=size)
    scales = ints(data, 4, 1, 3).astype(np.float32)
    scales[:2] = 1  # ONNX Runtime resizes images
    pairs = [
        ("asymmetric", "floor"),
        *(("half_pixel", f"round_prefer_{to}") for to in ("floor", "ceil")),
    ]
    modes = data.draw(st.sampled_from(pairs))
    x = array(data, dims, data.draw(st.sampled_from(["float32", "uint8", "int8", "int32"])))
    check(data, "Resize", {"x": x}, None, scales, coordinate_transformation_mode=modes[0],
          nearest_mode=modes[1], mode="nearest")  # fmt: skip


@EXAMPLES
@given(st.data(), shapes)
def test_broadcasts_of_two_and_three(data, dims) -> None:
    def part(kind: str) -> np.ndarray:
        keep = data.draw(st.integers(0, len(dims)))
        ones = [data.draw(st.booleans()) for _ in dims]
        small = [1 if one else n for one, n in zip(ones, dims, strict=True)]
        return array(data, tuple(small[len(dims) - keep :]), kind)

    kind = data.draw(st.sampled_from(["float32", "int64", "int32"]))
    op = data.draw(st.sampled_from(["Add", "Sub", "Mul", "Less", "Equal", "Max"]))
    check(data, op, {"a": part(kind), "b": part(kind)})
    check(data, op, {"a": part(kind)}, part(kind))
    check(data, "Where", {"on": part("bool"), "a": part(kind), "b": part(kind)})


@EXAMPLES
@given(st.data(), shapes)
def test_reductions_that_are_exact(data, dims) -> None:
    axes = data.draw(st.lists(st.sampled_from(range(-len(dims), 0)), unique=True))
    op = data.draw(st.sampled_from(["ReduceSum", "ReduceMax", "ReduceMin"]))
    kind = data.draw(st.sampled_from(["float32", "int64", "int32"]))
    keep, empty = data.draw(st.tuples(st.integers(0, 1), st.integers(0, 1)))
    check(data, op, {"x": array(data, dims, kind)}, np.array(axes, np.int64),
          keepdims=keep, noop_with_empty_axes=empty)  # fmt: skip
