"""How few operators a detector and a network of weighed channels become, without building them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch

from twofour.compiler.importer import import_graph
from twofour.compiler.join_moves import join_moves
from twofour.compiler.join_pools import join_pools
from twofour.compiler.join_walks import join_walks
from twofour.compiler.lower import Section, lower
from twofour.compiler.passes.pipeline import run_passes
from twofour.compiler.schedule import schedule
from twofour.onnx_tools.load import load_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize
from twofour.train.export import export_onnx
from twofour.train.export_suppression import add_suppression
from twofour.train.networks import yolov8
from twofour.train.networks.mobilenet import CONFIGS, MobileNet
from twofour.train.networks.seeded import seeded
from twofour.train.networks.yolo import OUTPUT_NAMES, Yolo, YoloConfig
from twofour.train.networks.yolov8 import Yolov8, Yolov8Config

SIDE = 64


def written(make, path: Path, outputs) -> ir.Model:
    model = seeded(make, (2, 3, SIDE, SIDE))
    export_onnx(model, [torch.zeros(1, 3, SIDE, SIDE)], path, ("x",), outputs)
    return load_model(path)


@pytest.fixture(scope="module")
def detector(tmp_path_factory) -> ir.Model:
    path = tmp_path_factory.mktemp("networks") / "yolo.onnx"
    return written(lambda: Yolo(YoloConfig(width=4, outputs=9)), path, OUTPUT_NAMES)


@pytest.fixture(scope="module")
def mobile(tmp_path_factory) -> ir.Model:
    path = tmp_path_factory.mktemp("networks") / "mobile.onnx"
    config = replace(CONFIGS["mobilenetv3_like"], stages=((1, 16, 1, 1), (6, 24, 2, 2)))
    return written(lambda: MobileNet(config), path, ("y",))


@pytest.fixture(scope="module")
def whole_detector(tmp_path_factory) -> ir.Model:
    """With boxes, scores, and which of the boxes are left."""
    path = tmp_path_factory.mktemp("networks") / "yolov8.onnx"
    config = Yolov8Config(width=4, classes=6, side=SIDE, split=True)
    written(lambda: Yolov8(config), path, yolov8.OUTPUT_NAMES)
    add_suppression(path, yolov8.OUTPUT_NAMES)
    return load_model(path)


def quantized(model: ir.Model) -> ir.Model:
    random = np.random.default_rng(0)
    batches = [{"x": random.normal(size=(1, 3, SIDE, SIDE)).astype(np.float32)} for _ in range(2)]
    return quantize(model, batches, QuantizeOptions(method="minmax"))


def step(model: ir.Model) -> Section:
    """The one native step."""
    graph = run_passes(import_graph(model)).model.graph
    order = join_pools(join_walks(join_moves(schedule(graph), graph), graph))
    (only,) = lower(graph, order).sections
    assert only.native
    return only


def operators(model: ir.Model) -> Counter[str]:
    """Its operators."""
    return Counter(placed.op.op_type for placed in step(model).ops)


def test_a_detector_joins_nothing_by_copying(detector) -> None:
    assert operators(detector) == {
        **{"ConvSilu": 37, "ConvSiluAdd": 4, "Conv": 3, "MaxPoolChain": 1, "Resize": 2},
        "Copy": 4,  # the image in, three maps out
    }


def test_a_quantized_detector_is_bytes_from_end_to_end(detector) -> None:
    assert operators(quantized(detector)) == {
        **{"QConvSilu": 37, "QConvSiluAdd": 4, "QConvF": 3, "QMaxPoolChain": 1, "Resize": 2},
        **{"QuantizeLinear": 1, "Copy": 3},
    }


TRUNK = 45
HEADS = 18
ENDS = {"Expectation": 1, "JoinedTranspose": 1, "JoinedSigmoid": 1, "NonMaxSuppression": 1}


def test_a_detector_is_whole_from_the_image_to_the_boxes_that_are_left(whole_detector) -> None:
    assert len(whole_detector.graph) == 233
    assert operators(whole_detector) == {
        **{"ConvSilu": TRUNK - 6 + HEADS - 6, "ConvSiluAdd": 6, "Conv": 6},
        **{"MaxPoolChain": 1, "Resize": 2},
        **ENDS,
        "Copy": 1,  # the image
    }


def test_a_detector_has_at_most_60_waves(whole_detector) -> None:
    """What threads wait for: the longest chain from the image to the boxes that are left."""
    assert len(step(whole_detector).ops) == 71
    assert step(whole_detector).waves == 55
    assert step(quantized(whole_detector)).waves == 55


def test_a_whole_detector_is_quantized_up_to_its_heads(whole_detector) -> None:
    assert operators(quantized(whole_detector)) == {
        **{"QConvSilu": TRUNK - 6 + HEADS - 6, "QConvSiluAdd": 6, "QConvF": 6},
        **{"QMaxPoolChain": 1, "Resize": 2},
        **ENDS,
        "QuantizeLinear": 1,
    }


def test_a_quantized_network_weighs_its_channels_as_bytes(mobile) -> None:
    assert operators(quantized(mobile)) == {
        **{"QConvHardSwish": 7, "QConv": 2, "QConvAdd": 1, "QGlobalAveragePool": 4},
        **{"QConvRelu": 3, "QConvHardSigmoidF": 3, "QMulFloat": 3},
        **{"QuantizeLinear": 1, "QGemmF": 1},
    }
