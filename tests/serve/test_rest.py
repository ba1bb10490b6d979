"""The REST codec: what it reads and writes; damaged bodies are refused and nothing else."""

from __future__ import annotations

import gzip
import json
import math
import random
import zlib
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from twofour.serve.errors import MalformedError, ServeError, TooLargeError
from twofour.serve.limits import Limits
from twofour.serve.protocol import content_encoding, json_text, rest
from twofour.serve.protocol.messages import DTYPES, NAMES, InferRequest, InferResponse, Wanted

LIMITS = Limits()


def body_of(
    inputs: dict[str, np.ndarray], binary: bool, nested: bool = False, **more: Any
) -> tuple[bytes, int | None]:
    """A request as a client writes it, and its Inference-Header-Content-Length."""
    entries: list[dict[str, Any]] = []
    raws = []
    for name, array in inputs.items():
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape)}
        entry["datatype"] = NAMES[array.dtype]
        if binary:
            raws.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": len(raws[-1])}
        else:
            entry["data"] = array.tolist() if nested else array.reshape(-1).tolist()
        entries.append(entry)
    head = json.dumps({"inputs": entries, **more}).encode()
    return head + b"".join(raws), len(head) if binary else None


def decode(body: bytes, length: int | None = None, limits: Limits = LIMITS) -> InferRequest:
    return rest.decode(body, length, "m", "1", limits)


def one(**entry: Any) -> bytes:
    return orjson.dumps({"inputs": [{"name": "x", "shape": [2], "datatype": "FP32"} | entry]})


@st.composite
def tensors(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=4))
    elements = None
    if dtype.kind == "f":
        width = 8 * dtype.itemsize
        elements = st.floats(width=width, allow_nan=False, allow_infinity=False)
    return draw(hnp.arrays(dtype, shape, elements=elements))


@given(
    st.dictionaries(st.text(min_size=1, max_size=8), tensors(), min_size=1, max_size=3),
    st.sampled_from(["binary", "flat", "nested"]),
)
@settings(max_examples=150, deadline=None)
def test_what_is_decoded_is_what_was_encoded(inputs: dict[str, np.ndarray], kind: str) -> None:
    body, length = body_of(inputs, kind == "binary", kind == "nested", id="a")
    request = decode(body, length)
    assert (request.model, request.version, request.id) == ("m", "1", "a")
    assert list(request.inputs) == list(inputs)
    for name, array in inputs.items():
        got = request.inputs[name]
        assert got.dtype == array.dtype
        assert got.flags.c_contiguous
        assert got.flags.aligned
        assert not got.flags.writeable
        assert kind != "binary" or got.tobytes() == array.tobytes()
        np.testing.assert_array_equal(got, array)


@given(
    st.dictionaries(st.text("abcé", min_size=1, max_size=8), tensors(), min_size=1, max_size=3),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_a_reply_holds_the_outputs(outputs: dict[str, np.ndarray], binary: bool) -> None:
    asked = InferRequest("m", "", "7", {}, binary=binary)
    head, buffers = rest.encode(InferResponse("m", "3", "7", outputs), asked)
    document = json.loads(head)
    assert (document["model_name"], document["model_version"]) == ("m", "3")
    assert document["id"] == "7"
    raw = b"".join(buffers)
    for entry in document["outputs"]:
        array = outputs[entry["name"]]
        assert entry["shape"] == list(array.shape)
        if binary:
            size = entry["parameters"]["binary_data_size"]
            got, raw = np.frombuffer(raw[:size], array.dtype), raw[size:]
        else:
            got = np.array(entry["data"], DTYPES[entry["datatype"]])
        np.testing.assert_array_equal(got.reshape(array.shape), array)
    assert raw == b""


def test_what_lies_aligned_is_read_where_it_lies() -> None:
    array = np.arange(64, dtype=np.float32)
    seen = set()
    for pad in range(4):
        body, length = body_of({"x": array}, True, id="-" * pad)
        buffer = np.frombuffer(body, np.uint8)
        got = decode(body, length).inputs["x"]
        np.testing.assert_array_equal(got, array)
        seen.add(np.shares_memory(buffer, got))
    assert seen == {True, False}


def test_outputs_lie_where_they_were_computed() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    _, (buffer,) = rest.encode(
        InferResponse("m", "1", "", {"y": array}), InferRequest("m", "", "", {}, binary=True)
    )
    assert np.shares_memory(np.frombuffer(buffer, np.uint8), array)


def test_wanted_outputs_and_parameters() -> None:
    body, length = body_of(
        {"x": np.zeros(1, np.int8)},
        True,
        outputs=[
            {"name": "a"},
            {"name": "b", "parameters": {"binary_data": False}},
            {"name": "c", "parameters": {"classification": 3, "binary_data": True}},
        ],
        parameters={"binary_data_output": True, "priority": 2, "note": "n", "share": 0.5},
    )
    request = decode(body, length)
    assert request.outputs == (
        Wanted("a", True),
        Wanted("b", False),
        Wanted("c", True, 3),
    )
    assert request.binary
    assert request.parameters["priority"] == 2


def test_classes_are_texts() -> None:
    texts = np.array([[b"0.9:1", "0.1:0:né".encode()]], object)
    response = InferResponse("m", "1", "", {"y": texts})
    head, buffers = rest.encode(response, InferRequest("m", "1", "", {}))
    (output,) = json.loads(head)["outputs"]
    assert output == {
        "name": "y",
        "datatype": "BYTES",
        "shape": [1, 2],
        "data": ["0.9:1", "0.1:0:né"],
    }
    head, buffers = rest.encode(response, InferRequest("m", "1", "", {}, binary=True))
    raw = b"".join(buffers)
    assert raw == b"\5\0\0\0" + b"0.9:1" + b"\x09\0\0\0" + "0.1:0:né".encode()
    assert json.loads(head)["outputs"][0]["parameters"] == {"binary_data_size": len(raw)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_nan(value: float) -> None:
    response = InferResponse("m", "1", "", {"y": np.array([1, value], np.float32)})
    with pytest.raises(MalformedError, match="as binary data"):
        rest.encode(response, InferRequest("m", "1", "", {}))
    _, (raw,) = rest.encode(response, InferRequest("m", "1", "", {}, binary=True))
    np.testing.assert_array_equal(np.frombuffer(raw, np.float32), response.outputs["y"])
    with pytest.raises(MalformedError, match="JSON has no NaN"):
        decode(one(data=[1.0, 0.0]).replace(b"0.0", b"NaN"))


REFUSALS: list[tuple[bytes, int | None, str]] = [
    (b"", None, "is not JSON"),
    (b"[]", None, "no object"),
    (b"{}", None, "'inputs' is unusable"),
    (b'{"inputs":[1]}', None, "'inputs' is unusable"),
    (b'{"inputs":[],"id":5}', None, "unusable 'id'"),
    (b'{"inputs":[],"parameters":[]}', None, "parameters of the request are unusable"),
    (b'{"inputs":[],"parameters":{"a":[]}}', None, "parameter 'a' of the request"),
    (b'{"inputs":[],"parameters":{"binary_data_output":1}}', None, "'binary_data_output'"),
    (b'{"inputs":[],"outputs":[{"name":"y"},{"name":"y"}]}', None, "asked for twice"),
    (b'{"inputs":[]}', 99, "does not fit the body"),
    (b'{"inputs":[]}', 0, "does not fit the body"),
    (b'{"inputs":[]}1', 13, "belong to no input"),
    (one(), None, "has no data"),
    (one(data=[1, 2], parameters={"binary_data_size": 8}), None, "has two values"),
    (one(parameters={"binary_data_size": 8}), None, "the body ends early"),
    (one(parameters={"binary_data_size": 7}), None, "expected 8 for shape"),
    (one(parameters={"binary_data_size": -8}), None, "expected 8 for shape"),
    (one(parameters={"shared_memory_region": "r"}), None, "shared memory"),
    (one(data=[1, 2], datatype="BYTES"), None, "unusable datatype"),
    (one(data=[1, 2], datatype="BF16"), None, "unusable datatype"),
    (one(data=[1, 2], shape=[-1]), None, "unusable shape"),
    (one(data=[1, 2], shape=[2.0]), None, "unusable shape"),
    (one(data=[1, 2], shape=2), None, "unusable shape"),
    (one(data=[1, 2], name=""), None, "unusable 'name'"),
    (one(data=[1]), None, "expected 2 elements"),
    (one(data="ab"), None, "to be a list"),
    (one(data=[[1], [2]]), None, "expected values that are"),
    (one(data=[1, [2]], shape=[2, 1]), None, "expected values"),
    (one(data=[[1], 2], shape=[2, 1]), None, "expected lists along axis 1"),
    (one(data=[[1, 2], [3]], shape=[2, 2]), None, "lists of 2 elements along axis 1"),
    (one(data=[[1, 2]], shape=[2, 1]), None, "expected 2 rows"),
    (one(data=[1, True]), None, "got True"),
    (one(data=[1, None]), None, "got None"),
    (one(data=["1", 2]), None, "got '1'"),
    (one(data=[1, 1e39]), None, "float32 can hold"),
    (one(data=[1, 70000], datatype="FP16"), None, "float16 can hold"),
    (one(data=[1, 1.0], datatype="INT32"), None, "got 1.0"),
    (one(data=[1, 128], datatype="INT8"), None, "from -128 to 127"),
    (one(data=[-1, 0], datatype="UINT8"), None, "from 0 to 255"),
    (one(data=[2**63, 0], datatype="INT64"), None, "got 9223372036854775808"),
    (one(data=[0, 1], datatype="BOOL"), None, "true and false"),
]


@pytest.mark.parametrize(("body", "length", "message"), REFUSALS)
def test_refusals(body: bytes, length: int | None, message: str) -> None:
    with pytest.raises(MalformedError, match=message) as caught:
        decode(body, length)
    assert caught.value.reasons
    assert caught.value.fix


def test_twice_the_same_input() -> None:
    entry = {"name": "x", "shape": [1], "datatype": "INT8", "data": [1]}
    with pytest.raises(MalformedError, match="twice"):
        decode(orjson.dumps({"inputs": [entry, entry]}))


def test_raw_booleans_are_0_or_1() -> None:
    body, length = body_of({"x": np.array([True, False])}, True)
    assert decode(body, length).inputs["x"].tolist() == [True, False]
    with pytest.raises(MalformedError, match="byte 0 or 1"):
        decode(body[:-1] + b"\2", length)


def test_the_ends_of_integers_are_exact() -> None:
    for name, dtype in DTYPES.items():
        if dtype.kind in "iu":
            ends = [int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)]
            got = decode(one(data=ends, datatype=name)).inputs["x"]
            assert got.tolist() == ends


@pytest.mark.parametrize(
    ("body", "limits"),
    [
        (one(data=[1, 2]), Limits(body_bytes=20)),
        (one(data=[1, 2]), Limits(json_bytes=20)),
        (one(data=[[[1], [2]]]), Limits(json_depth=4)),
        (one(data=[1, 2], shape=[1, 2]), Limits(rank=1)),
        (one(data=[1, 2]), Limits(tensor_bytes=7)),
        (one(data=[], shape=[0, 1 << 62]), Limits()),
        (one(data=[1, 2], name="x" * 9), Limits(name_length=8)),
        (one(data=[1, 2], parameters={"a": 1, "b": 2}), Limits(parameters=1)),
        (one(data=[1, 2], parameters={"a": "b" * 9}), Limits(name_length=8)),
        (orjson.dumps({"inputs": [{}, {}]}), Limits(tensors=1)),
        (b'{"inputs":' + b"[" * 900 + b"]" * 900 + b"}", Limits()),
        (b'{"inputs":' + b"[" * 10_000_000, Limits()),
    ],
)
def test_limits(body: bytes, limits: Limits) -> None:
    with pytest.raises(TooLargeError) as caught:
        decode(body, limits=limits)
    assert caught.value.reasons


@given(st.recursive(st.integers() | st.text('[]{}"\\a'), lambda v: st.lists(v, max_size=3)))
@settings(max_examples=200, deadline=None)
def test_depth_is_the_nesting_of_lists_and_objects(value: Any) -> None:
    def levels(value: Any) -> int:
        return 1 + max(map(levels, value), default=0) if isinstance(value, list) else 0

    assert json_text.depth(json.dumps(value).encode()) == levels(value)
    assert json_text.depth(json.dumps({"a": value}).encode()) == 1 + levels(value)


@pytest.mark.parametrize("text", [b'"', b'"\\', b'"\\"', b'\\"', b'""'])
def test_depth_takes_linear_time(text: bytes) -> None:
    json_text.depth(text * (1 << 20))


def test_encodings() -> None:
    plain = b"ab" * 1000
    for encoding, packed in (
        ("gzip", gzip.compress(plain)),
        ("Deflate ", zlib.compress(plain)),
        ("identity", plain),
    ):
        assert content_encoding.inflate(packed, encoding, len(plain)) == plain
    for encoding in ("gzip", "deflate"):
        packed = content_encoding.deflate([plain[:999], memoryview(plain)[999:]], encoding)
        assert content_encoding.inflate(packed, encoding, len(plain)) == plain
        with pytest.raises(TooLargeError):
            content_encoding.inflate(packed, encoding, len(plain) - 1)
        for damaged in (packed[:-1], packed[1:], packed + b"a", b""):
            with pytest.raises(MalformedError):
                content_encoding.inflate(damaged, encoding, 1 << 20)
    large = np.random.default_rng(0).bytes(3 * content_encoding.STEP_BYTES + 5)
    for plain in (large, bytes(len(large)), large[: content_encoding.STEP_BYTES]):
        for packed, encoding in (
            (gzip.compress(plain, 1), "gzip"),
            (zlib.compress(plain), "deflate"),
        ):
            took: list[int] = []
            found = content_encoding.inflate(packed, encoding, len(plain), took.append)
            assert found == plain
            assert sum(took) == len(plain)
            assert max(took) <= content_encoding.STEP_BYTES
            for damaged in (packed[:-1], packed + b"a", packed + large):
                with pytest.raises(MalformedError):
                    content_encoding.inflate(damaged, encoding, 1 << 30)
    with pytest.raises(MalformedError, match="'br'"):
        content_encoding.inflate(b"", "br", 1)
    with pytest.raises(TooLargeError):
        content_encoding.inflate(gzip.compress(bytes(1 << 24)), "gzip", 1 << 16)


def test_only_a_wish_is_compressed() -> None:
    assert content_encoding.asked("gzip") == "gzip"
    assert content_encoding.asked("deflate") == "deflate"
    assert content_encoding.asked("gzip, deflate, br") == ""
    assert content_encoding.asked("") == ""


TOKENS = [b'"', b"[", b"]", b"{", b"}", b",", b":", b"-1", b"1e999", b"null", b"true", b"\\u0000"]
TOKENS += [b"\\ud800", b"9" * 30, b'"data"', b'"shape"', b"\xff", b"\0", b"[]", b"FP16", b"INT8"]


def mutated(body: bytes, source: random.Random) -> bytes:
    """The body with a few bytes changed, cut, doubled, or replaced by what JSON is made of."""
    data = bytearray(body)
    for _ in range(source.randint(1, 4)):
        at = source.randrange(len(data) + 1)
        end = min(len(data), at + source.choice([0, 1, 1, 2, 8]))
        kind = source.randrange(4)
        if kind == 0:
            data[at:end] = source.choice(TOKENS)
        elif kind == 1:
            data[at:end] = bytes(source.randrange(256) for _ in range(end - at))
        elif kind == 2:
            data[at:end] = b""
        else:
            data[at:at] = data[at : at + 20]
    return bytes(data)


@pytest.mark.parametrize("kind", ["binary", "flat", "nested"])
def test_damaged_bodies_are_refused_and_nothing_else(kind: str) -> None:
    source = random.Random(kind)
    inputs = {"x": np.ones((2, 3), np.float32), "m": np.ones((1, 4), np.int64)}
    body, length = body_of(
        inputs, kind == "binary", kind == "nested", id="i", outputs=[{"name": "y"}], parameters={}
    )
    refused: list[ServeError] = []
    for _ in range(4000):
        damaged = mutated(body, source)
        given_length = length
        if length is not None and source.random() < 0.5:
            given_length = length + source.randint(-4, 4)
        try:
            request = decode(damaged, given_length)
        except ServeError as error:
            refused.append(error)
        else:
            for array in request.inputs.values():
                array.tobytes()
    assert 500 < len(refused) < 4000
    assert {error.status for error in refused} <= {400, 413}
    assert max(len(str(error)) for error in refused) < 4000
