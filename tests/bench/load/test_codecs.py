"""Requests and answers as bytes: what the real client's messages say, and that garbage is told."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from twofour.bench.load import protobuf, rest
from twofour.bench.load.client import AnswerError, Content, Tensor
from twofour.bench.load.datatypes import DATATYPES

FEEDS = {
    "x": np.arange(6, dtype=np.float32).reshape(2, 3),
    "ids": np.array([[1, -2], [3, 1 << 40]], np.int64),
    "mask": np.array([True, False]),
}


def test_a_grpc_request_is_what_the_protobuf_library_reads() -> None:
    request = service_pb2.ModelInferRequest()
    request.ParseFromString(protobuf.infer_request("net", "3", FEEDS))
    assert (request.model_name, request.model_version) == ("net", "3")
    read = [(each.name, each.datatype, list(each.shape)) for each in request.inputs]
    assert read == [("x", "FP32", [2, 3]), ("ids", "INT64", [2, 2]), ("mask", "BOOL", [2])]
    assert list(request.raw_input_contents) == [array.tobytes() for array in FEEDS.values()]


def grpc_answer(*sizes: int) -> bytes:
    response = service_pb2.ModelInferResponse(
        model_name="net", raw_output_contents=map(bytes, sizes)
    )
    for number, size in enumerate(sizes):
        output = response.outputs.add(name=f"y{number}", datatype="FP32")
        output.shape.extend([1, size // 4])
    return bytes(response.SerializeToString())


def test_a_grpc_answer() -> None:
    tensors, content = protobuf.infer_outputs(grpc_answer(400, 8))
    assert tensors == [Tensor("y0", "FP32", (1, 100)), Tensor("y1", "FP32", (1, 2))]
    assert content == Content(408, 0)


def test_metadata_and_statistics_by_grpc() -> None:
    told = service_pb2.ModelMetadataResponse(name="net", versions=["1", "2"], platform="p")
    told.inputs.add(name="x", datatype="FP32", shape=[-1, 3])
    told.outputs.add(name="y", datatype="INT8", shape=[1, 300])
    info = protobuf.model_info(told.SerializeToString())
    assert (info.name, info.versions, info.platform) == ("net", ("1", "2"), "p")
    assert info.inputs == (Tensor("x", "FP32", (-1, 3)),)
    assert info.outputs == (Tensor("y", "INT8", (1, 300)),)
    stats = service_pb2.ModelStatisticsResponse()
    for _ in range(2):
        one = stats.model_stats.add(name="net", inference_count=7, execution_count=3)
        one.inference_stats.success.count = 5
        one.inference_stats.queue.ns = 1000
        one.inference_stats.compute_output.ns = 30
    counted = protobuf.counters(stats.SerializeToString())
    assert counted is not None
    assert counted.values() == (10, 14, 6, 2000, 0, 0, 60)
    assert protobuf.counters(b"") is None
    server = service_pb2.ServerMetadataResponse(name="s", version="2")
    assert protobuf.server_name(server.SerializeToString()) == "s 2"


@given(st.data())
def test_damaged_grpc_answers_are_told(data: st.DataObject) -> None:
    whole = bytearray(grpc_answer(40, 8))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    body = bytes(whole[: data.draw(st.integers(0, len(whole)))])
    for read in (protobuf.infer_outputs, protobuf.model_info, protobuf.counters):
        try:
            read(body)
        except AnswerError:
            pass  # the only error that may come


@pytest.mark.parametrize("name", DATATYPES)
def test_every_datatype_is_sent_as_it_lies(name: str) -> None:
    array = np.arange(3).astype(DATATYPES[name])
    head, data = rest.encode_infer({"x": array}, binary=True)
    (sent,) = orjson.loads(head)["inputs"]
    assert (sent["datatype"], sent["shape"]) == (name, [3])
    assert sent["parameters"] == {"binary_data_size": array.nbytes}
    assert data == array.tobytes()


def test_a_json_request() -> None:
    head, data = rest.encode_infer(FEEDS, binary=False)
    inputs = orjson.loads(head)["inputs"]
    assert data == b""
    assert [each["data"] for each in inputs] == [array.ravel().tolist() for array in FEEDS.values()]


def http_answer(**changes: Any) -> tuple[bytes, int]:
    output = {"name": "y", "datatype": "FP32", "shape": [1, 2]}
    output = output | {"parameters": {"binary_data_size": 8}} | changes
    head = orjson.dumps({"outputs": [output]})
    return head + bytes(8), len(head)


def test_http_answers() -> None:
    tensor = Tensor("y", "FP32", (1, 2))
    assert rest.decode_infer(*http_answer()) == ([tensor], Content(8, 0))
    for data in ([1.0, 2.0], [[1.0, 2.0]]):  # nested lists are allowed
        body = orjson.dumps(
            {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": data}]}
        )
        assert rest.decode_infer(body, -1) == ([tensor], Content(0, 2))


@pytest.mark.parametrize(
    ("body", "json_bytes"),
    [
        (b"", -1),
        (b"[]", -1),
        (b"{}", -1),
        (b'{"outputs": []}', -1),
        (b'{"outputs": [{"name": "y"}]}', -1),
        (b'{"outputs": [{"name": "y", "shape": [2], "datatype": "FP32", "data": [1]}]}', -1),
        (b"{}", 3),
        http_answer(shape=[1, 3]),
        http_answer(parameters={"binary_data_size": 4}),
        http_answer(parameters={"binary_data_size": "8"}),
    ],
)
def test_wrong_http_answers_are_told(body: bytes, json_bytes: int) -> None:
    with pytest.raises(AnswerError):
        rest.decode_infer(body, json_bytes)


@given(st.data())
def test_damaged_http_answers_are_told(data: st.DataObject) -> None:
    body, json_bytes = http_answer()
    whole = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        rest.decode_infer(bytes(whole), data.draw(st.sampled_from([json_bytes, -1, 5])))
    except AnswerError:
        pass  # the only error that may come


@pytest.mark.parametrize(
    "told",
    [{}, {"model_stats": []}, {"model_stats": 3}],
)
def test_a_server_without_statistics(told: dict[str, Any]) -> None:
    assert rest.counters(told) is None
