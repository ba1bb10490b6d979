"""Requests and answers as protobuf bytes, against the client's generated modules."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.grpc import InferInput, InferRequestedOutput, InferResult, service_pb2
from tritonclient.grpc._utils import _get_inference_request

from twofour.serve.errors import MalformedError, ServeError, TooLargeError
from twofour.serve.limits import Limits
from twofour.serve.protocol import protobuf
from twofour.serve.protocol.messages import DTYPES, InferRequest, InferResponse, Wanted
from twofour.serve.protocol.protobuf import Reader, encode, encode_refusal, encode_streamed
from twofour.serve.protocol.wire import field_head, split

LIMITS = Limits()
READER = Reader(LIMITS)
CONTENTS = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
sizes = st.integers(0, 9)
names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12)
parameters = st.dictionaries(
    names,
    st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"), max_size=12),
    max_size=3,
)


def decode(body: bytes, limits: Limits) -> InferRequest:
    """Reads a message twice, the second time with its head known: both are the same."""
    reader = Reader(limits)
    first, second = reader.read(body), reader.read(body)
    assert all(same(x, second.inputs[name]) for name, x in first.inputs.items())
    assert replace(first, inputs={}) == replace(second, inputs={})
    return second


def arrays(kinds: Any = tuple(DTYPES)) -> Any:
    return st.sampled_from(sorted(kinds)).flatmap(
        lambda name: hnp.arrays(DTYPES[name], hnp.array_shapes(min_dims=0, min_side=0, max_side=4))
    )


def put(into: Any, given: dict[str, Any]) -> None:
    for name, value in given.items():
        if isinstance(value, bool):
            into[name].bool_param = value
        elif isinstance(value, int):
            setattr(into[name], "int64_param" if value < 1 << 63 else "uint64_param", value)
        elif isinstance(value, float):
            into[name].double_param = value
        else:
            into[name].string_param = value


def message(inputs: dict[str, Any], raw: bool = True, **fields: Any) -> Any:
    """A ModelInferRequest of the client's."""
    request = service_pb2.ModelInferRequest(model_name="m", **fields)
    for name, x in inputs.items():
        kind = next(each for each, dtype in DTYPES.items() if dtype == x.dtype)
        tensor = request.inputs.add(name=name, datatype=kind, shape=x.shape)
        if raw:
            request.raw_input_contents.append(x.tobytes())
        elif x.size:
            getattr(tensor.contents, CONTENTS[kind]).extend(x.reshape(-1).tolist())
    return request


X = np.arange(6, dtype=np.float32).reshape(2, 3)


def same(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


@given(
    st.dictionaries(names, arrays(), max_size=3),
    parameters,
    st.dictionaries(names, sizes),
)
def test_what_a_client_writes_is_read(
    inputs: dict[str, Any], given: dict[str, Any], outputs: dict[str, int]
) -> None:
    theirs = message(inputs, id="é7", model_version="3")
    put(theirs.parameters, given)
    for name, classes in outputs.items():
        wanted = theirs.outputs.add(name=name)
        if classes:
            wanted.parameters["classification"].int64_param = classes
    request = decode(theirs.SerializeToString(), LIMITS)
    assert (request.model, request.version, request.id) == ("m", "3", "é7")
    assert list(request.inputs) == list(inputs)
    for name, x in inputs.items():
        assert same(request.inputs[name], x)
        assert request.inputs[name].flags.c_contiguous
        assert request.inputs[name].flags.aligned
        assert not request.inputs[name].flags.writeable
    assert request.parameters == given
    assert request.outputs == tuple(Wanted(n, True, classes) for n, classes in outputs.items())


@given(st.dictionaries(names, arrays(CONTENTS), max_size=3))
def test_typed_contents_are_read(inputs: dict[str, Any]) -> None:
    request = decode(message(inputs, raw=False).SerializeToString(), LIMITS)
    for name, x in inputs.items():
        got = request.inputs[name]
        assert got.dtype == x.dtype
        assert got.shape == x.shape
        np.testing.assert_array_equal(got, x)


@given(st.dictionaries(names, arrays(), max_size=3), parameters)
def test_a_client_reads_what_is_written(outputs: dict[str, Any], given: dict[str, Any]) -> None:
    response = InferResponse("m", "3", "é7", outputs, given)
    theirs = service_pb2.ModelInferResponse.FromString(encode(response))
    streamed = service_pb2.ModelStreamInferResponse.FromString(encode_streamed(response))
    assert (theirs.model_name, theirs.model_version, theirs.id) == ("m", "3", "é7")
    result = InferResult(theirs)
    for name, y in outputs.items():
        assert same(result.as_numpy(name), y)
    expected = service_pb2.ModelInferResponse()
    put(expected.parameters, given)
    assert theirs.parameters == expected.parameters
    assert streamed.infer_response.parameters["triton_final_response"].bool_param
    if "triton_final_response" not in given:
        del streamed.infer_response.parameters["triton_final_response"]
        assert streamed.infer_response == theirs
    assert not streamed.error_message


def test_classes_are_texts() -> None:
    texts = np.array([[b"0.5:1:cat", b""], [b"0.1:0", "é".encode()]], object)
    answer = encode(InferResponse("m", "1", "", {"y": texts, "z": X}))
    result = InferResult(service_pb2.ModelInferResponse.FromString(answer))
    assert result.as_numpy("y").tolist() == texts.tolist()
    assert same(result.as_numpy("z"), X)


def test_an_output_that_is_cut_out_of_a_larger_one_is_written() -> None:
    y = np.arange(24, dtype=np.int16).reshape(2, 3, 4)[:, :, 1:3]
    answer = encode(InferResponse("m", "1", "", {"y": y}))
    result = InferResult(service_pb2.ModelInferResponse.FromString(answer))
    assert result.as_numpy("y").tolist() == y.tolist()


def test_an_aligned_input_is_a_view_of_the_message() -> None:
    copied = 0
    for pad in range(4):
        body = message({"x": X}, id="i" * (pad + 1)).SerializeToString()
        x = decode(body, LIMITS).inputs["x"]
        assert same(x, X)
        ((begin, _),) = split(body, LIMITS).raws
        copied += not np.shares_memory(x, np.frombuffer(body, np.uint8))
        assert np.shares_memory(x, np.frombuffer(body, np.uint8)) == (
            np.frombuffer(body, np.float32, 6, begin).flags.aligned
        )
    assert copied == 3


def test_the_clients_own_message_is_read() -> None:
    given = InferInput("x", [2, 3], "FP32").set_data_from_numpy(X)
    theirs = _get_inference_request(
        model_name="m",
        inputs=[given],
        model_version="",
        request_id="1",
        outputs=[InferRequestedOutput("y", class_count=3)],
        sequence_id=0,
        sequence_start=False,
        sequence_end=False,
        priority=2,
        timeout=500,
        parameters={"a": 1.5},
    )
    request = decode(theirs.SerializeToString(), LIMITS)
    assert request.parameters == {"priority": 2, "timeout": 500, "a": 1.5}
    assert request.outputs == (Wanted("y", True, 3),)


def merge(tensor: Any = None, contents: Any = None, **fields: Any) -> Callable[[Any], None]:
    """A change of a request: of its first input, of that one's contents, and of its own fields."""

    def change(request: Any) -> None:
        one = request.inputs[0]
        for name, value in (tensor or {}).items():
            one.ClearField(name)
            one.MergeFrom(type(one)(**{name: value}))
        if contents:
            del request.raw_input_contents[:]
            one.contents.MergeFrom(service_pb2.InferTensorContents(**contents))
        for name, value in fields.items():
            request.ClearField(name)
            request.MergeFrom(type(request)(**{name: value}))

    return change


REGION = {"shared_memory_region": service_pb2.InferParameter(string_param="r")}
CLASSES = {"classification": service_pb2.InferParameter(string_param="3")}
BREAKS = {
    "shape": merge({"shape": [3, 3]}),
    "negative": merge({"shape": [-2, -3]}),
    "datatype": merge({"datatype": "FP31"}),
    "texts": merge({"datatype": "BYTES"}),
    "twice": merge({"name": "y"}),
    "less": merge(raw_input_contents=[X.tobytes()]),
    "more": merge(raw_input_contents=[X.tobytes()] * 3),
    "both": merge({"contents": {"fp32_contents": [1]}}),
    "bool": merge({"datatype": "BOOL"}, raw_input_contents=[b"\1\0\1\0\1\2", X.tobytes()]),
    "shared": merge({"parameters": REGION}),
    "shared output": merge(outputs=[{"name": "o", "parameters": REGION}]),
    "no value": merge(parameters={"p": service_pb2.InferParameter()}),
    "classes": merge(outputs=[{"name": "o", "parameters": CLASSES}]),
    "output twice": merge(outputs=[{"name": "o"}, {"name": "o"}]),
    "other field": merge(contents={"int_contents": range(6)}),
    "too few": merge(contents={"fp32_contents": [1, 2]}),
    "range": merge({"datatype": "UINT8"}, {"uint_contents": [1, 2, 3, 4, 5, 256]}),
    "half": merge({"datatype": "FP16"}, {"fp32_contents": range(6)}),
    "none": merge(raw_input_contents=[]),
}


@pytest.mark.parametrize(
    ("change", "what", "got"),
    [
        ("shape", "input 'x' has raw bytes of another size", "got 24"),
        ("negative", "input 'x' has an unusable shape", "got [-2, -3]"),
        ("datatype", "input 'x' has an unusable datatype", "got 'FP31'"),
        ("texts", "input 'x' has an unusable datatype", "got 'BYTES'"),
        ("twice", "input 'y' is there twice", "got it again"),
        ("less", "raw bytes do not fit the inputs", "got 1"),
        ("more", "raw bytes do not fit the inputs", "got 3"),
        ("both", "input 'x' has two values", "got both"),
        ("bool", "input 'x' has unusable data", "got another byte"),
        ("shared", "input 'x' is in shared memory", "shared memory"),
        ("shared output", "output 'o' is in shared memory", "shared memory"),
        ("no value", "parameter 'p' of the request is unusable", "got nothing"),
        ("classes", "output 'o' has an unusable number of classes", "got '3'"),
        ("output twice", "output 'o' is asked for twice", "got it again"),
        ("other field", "input 'x' has unusable contents", "got int_contents"),
        ("too few", "input 'x' has unusable contents", "got 2"),
        ("range", "input 'x' has values that its datatype cannot hold", "got 1 to 256"),
        ("half", "input 'x' has no such contents", "got fp32_contents"),
        ("none", "input 'x' has unusable contents", "got 0"),
    ],
)
def test_each_rule_has_its_refusal(change: str, what: str, got: str) -> None:
    request = message({"x": X, "y": X})
    decode(request.SerializeToString(), LIMITS)
    BREAKS[change](request)
    with pytest.raises(MalformedError) as refused:
        decode(request.SerializeToString(), LIMITS)
    assert refused.value.what == what
    assert got in refused.value.reasons[1]
    assert refused.value.fix


@pytest.mark.parametrize(
    "fields",
    [
        {"tensors": 1},
        {"rank": 1},
        {"tensor_bytes": 23},
        {"name_length": 3},
        {"parameters": 1},
        {"json_bytes": 20},
    ],
)
def test_each_limit_is_kept(fields: dict[str, int]) -> None:
    r = message({"x": X, "y": X}, id="1234")
    put(r.parameters, {"a": 1, "b": 2})
    body = r.SerializeToString()
    decode(body, LIMITS)
    with pytest.raises(TooLargeError) as refused:
        decode(body, Limits(**fields))
    assert str(*fields.values()) in refused.value.reasons[0]


def test_sizes_are_multiplied_before_anything_is_allocated() -> None:
    r = message({"x": X})
    for shape in ([1 << 62, 1 << 62], [0, 1 << 40, 1 << 40], [1 << 25, 1]):
        r.inputs[0].shape[:] = shape
        with pytest.raises(TooLargeError, match="input 'x' is too large"):
            decode(r.SerializeToString(), LIMITS)


def test_many_small_fields_are_refused_early() -> None:
    with pytest.raises(TooLargeError, match="too many fields"):
        decode(b"\x3a\x00" * 1_000_000, LIMITS)


def test_an_answer_beyond_what_protobuf_holds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protobuf, "MOST_BYTES", 1000)
    with pytest.raises(TooLargeError, match="the answer is too large"):
        encode(InferResponse("m", "1", "", {"y": np.zeros(251, np.float32)}))


def test_a_refusal_names_its_request() -> None:
    answer = service_pb2.ModelStreamInferResponse.FromString(encode_refusal("no", "7"))
    assert (answer.error_message, answer.infer_response.id) == ("no", "7")
    body = message({"x": X}, id="7", raw_input_contents=[b""]).SerializeToString()
    assert READER.id(body) == "7"
    assert READER.id(b"\x0b") == ""


def mutated(body: bytes, seed: int) -> bytes:
    """A message with a few bytes changed, left out, doubled, or its end cut."""
    random_ = random.Random(seed)
    changed = bytearray(body)
    for _ in range(random_.randint(1, 4)):
        at = random_.randrange(len(changed) + 1)
        kind = random_.randrange(5)
        if kind == 0 and at < len(changed):
            changed[at] = random_.randrange(256)
        elif kind == 1:
            del changed[at : at + random_.randint(1, 8)]
        elif kind == 2:
            changed[at:at] = changed[at : at + random_.randint(1, 30)]
        elif kind == 3:
            changed[at:at] = random_.randbytes(random_.randint(1, 4))
        elif random_.random() < 0.2:
            del changed[at:]
    return bytes(changed)


def judge(body: bytes) -> str:
    """Only a ServeError comes out, and what is read is what protobuf itself reads."""
    try:
        request = READER.read(body)
    except ServeError as e:
        return type(e).__name__
    theirs = service_pb2.ModelInferRequest.FromString(body)
    assert [t.name for t in theirs.inputs] == list(request.inputs)
    assert (theirs.model_name, theirs.id) == (request.model, request.id)
    if theirs.raw_input_contents:
        for raw, x in zip(theirs.raw_input_contents, request.inputs.values(), strict=True):
            assert raw == x.tobytes()
    return "read"


def test_damaged_messages_get_refusals_alone() -> None:
    raw, typed = message({"x": X, "y": X}, id="1"), message({"x": X}, raw=False)
    for r in (raw, typed):
        put(r.parameters, {"a": 1, "b": "two", "c": 2.5})
        r.outputs.add(name="o").parameters["classification"].int64_param = 3
    bodies = [raw.SerializeToString(), typed.SerializeToString()]
    seen = [judge(mutated(body, seed)) for seed in range(10_000) for body in bodies]
    assert {"read", "MalformedError"} <= set(seen)
    assert seen.count("read") > 500


@given(st.binary(max_size=60))
@settings(max_examples=300)
def test_any_bytes_get_refusals_alone(body: bytes) -> None:
    judge(body)
    READER.id(body)


@given(st.integers(0, 1 << 40), st.integers(1, 15))
def test_the_head_of_a_field_is_read_back(length: int, number: int) -> None:
    head = field_head(number, length)
    assert head[0] >> 3 == number
    assert sum((byte & 127) << 7 * i for i, byte in enumerate(head[1:])) == length


@pytest.mark.parametrize(
    "body", [b"\x3a", b"\x3a\x05abc", b"\x3b", b"\x0a\xff", b"\xff" * 11, b"\x09123", b"\x08"]
)
def test_bytes_that_are_no_fields_are_refused(body: bytes) -> None:
    with pytest.raises(MalformedError, match="damaged"):
        split(body, LIMITS)
    with pytest.raises(DecodeError):
        service_pb2.ModelInferRequest.FromString(body)
