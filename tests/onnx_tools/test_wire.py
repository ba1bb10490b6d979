"""The skeleton of a file is what parsing the whole file gives, without the bytes left out."""

import numpy as np
import onnx
import pytest
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from twofour.onnx_tools.wire import LARGE_BYTES, skeleton

SIZES = (LARGE_BYTES // 4 - 1, LARGE_BYTES // 4, 4 * LARGE_BYTES, 3)


def model(sizes=SIZES):
    values = np.random.default_rng(0)
    tensors = [
        numpy_helper.from_array(values.normal(size=size).astype(np.float32), f"w{i}")
        for i, size in enumerate(sizes)
    ]
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    return helper.make_model(helper.make_graph(nodes, "g", [info], [], tensors), doc_string="text")


def without_large(proto):
    """The same by parsing, and what is cut."""
    cut = {}
    for index, tensor in enumerate(proto.graph.initializer):
        if len(tensor.raw_data) >= LARGE_BYTES:
            cut[index] = tensor.raw_data
            tensor.ClearField("raw_data")
    return proto, cut


def check(data):
    found = skeleton(data)
    proto, cut = without_large(onnx.ModelProto.FromString(data))
    assert onnx.ModelProto.FromString(found.data) == proto
    assert {index: bytes(part) for index, part in found.left_out.items()} == cut
    return found


def test_large_weights_are_left_out_and_all_else_stays():
    found = check(model().SerializeToString())
    assert list(found.left_out) == [1, 2]
    assert len(found.data) < 2 * LARGE_BYTES


def test_nothing_large():
    data = model((3, 4)).SerializeToString()
    assert skeleton(data).data is data
    assert check(data).left_out == {}


def test_a_graph_in_two_parts_is_one_graph():
    first, second = model().SerializeToString(), model((5, 9000)).SerializeToString()
    assert list(check(first + second).left_out) == [1, 2, 5]


def test_bytes_that_are_there_twice_stay():
    data = onnx.TensorProto(name="w", raw_data=bytes(LARGE_BYTES)).SerializeToString()
    twice = onnx.GraphProto().SerializeToString() + b"\x2a" + varint(2 * len(data)) + data + data
    whole = b"\x3a" + varint(len(twice)) + twice
    assert check_equal(whole).left_out == {}


def check_equal(data):
    found = skeleton(data)
    assert onnx.ModelProto.FromString(found.data) == onnx.ModelProto.FromString(data)
    return found


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def test_what_protobuf_refuses_is_refused_still():
    """A damaged file is never made whole by leaving bytes out."""
    data = model().SerializeToString()
    for size in range(0, len(data), 997):
        found = skeleton(data[:size])
        try:
            onnx.ModelProto.FromString(data[:size])
        except DecodeError:
            with pytest.raises(DecodeError):
                onnx.ModelProto.FromString(found.data)
