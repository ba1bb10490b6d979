"""Suppression of overlapping boxes: kernel, definition and ONNX Runtime give the same rows."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from twofour.core.suppression import Suppression, suppress
from twofour.core.target import Target, host_target
from twofour.kernels.cpu.llvm import Source, compile_object
from twofour.kernels.cpu.nms import NmsProblem, emit_nms
from twofour.runtime.cpu import Code, address

HOST = host_target()
ISAS = dict.fromkeys((HOST.isa, "avx2", "vector") if HOST.arch == "x86_64" else (HOST.isa,))
TARGETS = [replace(HOST, isa=isa) for isa in ISAS]
GUARD = -77


def run(
    boxes: np.ndarray, scores: np.ndarray, how: Suppression, target: Target = HOST
) -> np.ndarray:
    """The kernel's rows; fails if it writes more than it says."""
    images, classes, places = scores.shape
    problem = NmsProblem(images, classes, places, boxes.strides, scores.strides, how)
    code = Code([compile_object([Source(emit_nms("nms_", problem), True)], target)])
    most = images * classes * problem.most
    results, count = np.full((most + 1, 3), GUARD), np.full(3, GUARD)
    room = np.full(problem.scratch_bytes + 192, 0xA5, np.uint8)
    begin = -address(room) % 64 + 64
    scratch = room[begin : begin + problem.scratch_bytes]
    arrays = (boxes, scores, results, count[1:], scratch)
    table = (ctypes.c_int64 * 5)(*(array.ctypes.data for array in arrays))
    code.kernel("nms_")(ctypes.addressof(table), None, None, None, 0, 1, 0, 1)
    number = int(count[1])
    assert (results[number:] == GUARD).all()
    assert count[0] == count[2] == GUARD
    assert (room[:begin] == 0xA5).all()
    assert (room[begin + problem.scratch_bytes :] == 0xA5).all()
    return results[:number]


def by_onnxruntime(boxes: np.ndarray, scores: np.ndarray, how: Suppression) -> np.ndarray:
    limits = [np.array([how.most]), np.array([how.overlap], np.float32)]
    if how.score is not None:
        limits.append(np.array([how.score], np.float32))
    names = ["most", "overlap", "score"][: len(limits)]
    node = helper.make_node(
        "NonMaxSuppression", ["boxes", "scores", *names], ["y"], center_point_box=int(how.centred)
    )
    graph = helper.make_graph(
        [node],
        "nms",
        [
            helper.make_tensor_value_info("boxes", TensorProto.FLOAT, boxes.shape),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, scores.shape),
        ],
        [helper.make_tensor_value_info("y", TensorProto.INT64, [None, 3])],
        [onnx.numpy_helper.from_array(a, n) for a, n in zip(limits, names, strict=True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {"boxes": np.ascontiguousarray(boxes), "scores": np.ascontiguousarray(scores)}
    (rows,) = session.run(None, feeds)
    return rows


def cases(seed: int, ties: bool, centred: bool) -> tuple[np.ndarray, np.ndarray]:
    """Boxes and scores; with ties, of few different values, some boxes without an area."""
    random = np.random.default_rng(seed)
    images, classes = random.integers(1, 3), random.integers(1, 4)
    places = int(random.choice([1, 2, 15, 16, 17, 31, 32, 33, 64, 90]))
    if ties:
        boxes = random.integers(-2, 4, (images, places, 4)).astype(np.float32)
        scores = random.integers(-2, 3, (images, classes, places)).astype(np.float32) / 4
        scores[scores == 0] *= random.choice([-1, 1])
        return boxes, scores
    boxes = random.random((images, places, 4), np.float32)
    boxes[..., 2:] *= 0.5 if centred else 1.0
    return boxes, random.standard_normal((images, classes, places)).astype(np.float32)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    ties=st.booleans(),
    centred=st.booleans(),
    most=st.sampled_from([0, 1, 2, 15, 16, 17, 40, 2**62]),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]),
    score=st.sampled_from([None, -1.0, 0.0, 0.25, 9.0]),
)
def test_the_kernel_the_definition_and_onnxruntime_choose_the_same_boxes(
    seed, ties, centred, most, overlap, score
) -> None:
    boxes, scores = cases(seed, ties, centred)
    how = Suppression(most, overlap, score, centred)
    want = by_onnxruntime(boxes, scores, how)
    assert np.array_equal(suppress(boxes, scores, how), want)
    assert np.array_equal(run(boxes, scores, how), want)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.isa)
def test_operands_may_lie_in_any_way_on_every_vector_unit(target) -> None:
    boxes, scores = cases(3, False, False)
    how = Suppression(20, 0.4, -0.5)
    want = suppress(boxes, scores, how)
    assert len(want)
    transposed = np.ascontiguousarray(boxes.transpose(0, 2, 1)).transpose(0, 2, 1)
    apart = np.ascontiguousarray(scores.transpose(2, 0, 1)).transpose(1, 2, 0)
    assert np.array_equal(run(transposed, apart, how, target), want)
    assert np.array_equal(run(boxes, scores, how, target), want)


def test_more_boxes_than_one_vector_are_compared_with_all_before() -> None:
    places = 400
    grid = np.arange(places, dtype=np.float32)
    boxes = np.stack([grid, grid * 0, grid + 3, grid * 0 + 1], 1)[None]
    scores = np.random.default_rng(0).permutation(places).astype(np.float32)[None, None]
    how = Suppression(places, 0.4)
    rows = run(boxes, scores, how)
    assert 16 < len(rows) < places
    assert np.array_equal(rows, suppress(boxes, scores, how))
    assert np.array_equal(rows, by_onnxruntime(boxes, scores, how))
