"""The networks by name, and their ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.train.export import export_onnx
from twofour.train.export_suppression import add_suppression
from twofour.train.networks import mobilenet, transformer, vit, yolo, yolov8
from twofour.train.networks.resnet import CifarResNet, ResNet
from twofour.train.networks.seeded import seeded

SETTLING_IMAGES = 4


@dataclass(frozen=True)
class Network:
    """How a network is made and written.

    Attributes:
        make: builds it, weights drawn from the random state.
        side: of its square images in pixels; None for text.
        bert: its sizes if it takes text.
        outputs: names of its outputs.
        chosen: its outputs are boxes and scores, and a third one says which boxes are left when
            those that overlap are suppressed (`export_suppression.py`).
    """

    make: Callable[[], nn.Module]
    side: int | None = None
    bert: transformer.BertConfig | None = None
    outputs: Sequence[str] = ("y",)
    chosen: bool = False


def _bert(name: str) -> Network:
    config = transformer.CONFIGS[name]
    make = partial(transformer.Bert, config)
    return Network(make, bert=config, outputs=transformer.OUTPUT_NAMES)


NETWORKS: Mapping[str, Network] = {
    "cifar_resnet20": Network(partial(CifarResNet, 20), 32),
    "resnet18": Network(partial(ResNet, 18), 224),
    "resnet34": Network(partial(ResNet, 34), 224),
    "resnet50": Network(partial(ResNet, 50), 224),
    "minilm": _bert("minilm"),
    "bert_base": _bert("bert_base"),
    "long_bert": _bert("long_bert"),
    "mobilenetv2": Network(partial(mobilenet.MobileNet, mobilenet.CONFIGS["mobilenetv2"]), 224),
    "mobilenetv3_like": Network(
        partial(mobilenet.MobileNet, mobilenet.CONFIGS["mobilenetv3_like"]), 224
    ),
    "vit_b16": Network(partial(vit.Vit, vit.CONFIGS["vit_b16"]), 224),
    "yolo": Network(yolo.Yolo, 320, outputs=yolo.OUTPUT_NAMES),
    "yolov8n": Network(
        partial(yolov8.Yolov8, yolov8.Yolov8Config(split=True)),
        640,
        outputs=yolov8.OUTPUT_NAMES,
        chosen=True,
    ),
}


def write_network(
    name: str, path: Path, length: int = 128, weights: Path | None = None, batch: int | None = None
) -> None:
    """Writes a network as an ONNX file.

    Args:
        name: a key of `NETWORKS`.
        path: of the file; replaced if it exists.
        length: tokens of a text.
        weights: a safetensors file for a network that takes text; None for seeded random weights.
        batch: None leaves the batch size open in the file.

    Raises:
        InputError: an unknown name, or weights that do not fit.
    """
    if name not in NETWORKS:
        known = ", ".join(NETWORKS)
        raise InputError(f"no network {name!r}", [f"expected one of {known}"], "check the name")
    network = NETWORKS[name]
    dynamic = ("batch",) if batch is None else ()
    if network.bert is None:
        side = network.side or 0
        model = seeded(network.make, (SETTLING_IMAGES, 3, side, side))
        if isinstance(model, yolov8.Yolov8):
            model.make_rare(yolov8.RARE)
        example: Sequence[Tensor] = [torch.zeros(batch or 1, 3, side, side)]
        export_onnx(model, example, path, ("x",), network.outputs, dynamic)
        if network.chosen:
            add_suppression(path, network.outputs)
        return
    if weights is None:
        model = seeded(network.make)
    else:
        model = transformer.load_bert(network.bert, weights)
    example = transformer.example_inputs(network.bert, batch or 1, length)
    export_onnx(model, example, path, transformer.INPUT_NAMES, network.outputs, dynamic)
