"""The networks of the table, their inputs, and the ONNX files that engines are built from.

    python -m benchmarks.cuda.cases FOLDER resnet50 bert      # writes their files ahead of time

Weights are drawn from a seed and pruned to 2:4 by magnitude: what is timed are zeros where they
would be, not what they do to a trained network. Everybody runs the same pruned weights.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.quantize import quantize
from twofour.train import Sparsifier, export_onnx
from twofour.train.networks.resnet import CifarResNet, ResNet
from twofour.train.networks.seeded import seeded
from twofour.train.networks.transformer import CONFIGS, INPUT_NAMES, Bert, BertConfig

Array = NDArray[Any]
Feeds = dict[str, Array]

LENGTH = 128
CALIBRATION = 8
F32, INT8, WEIGHTS = "f32.onnx", "int8.onnx", "weights.pt"


class SwiGlu(nn.Module):
    """down(silu(gate(x)) * up(x)), the feed-forward block of LLaMA: no biases.

    Args:
        hidden: channels of the input and the output.
        inner: channels between.

    Source: Touvron et al. 2023, arXiv:2302.13971.
    """

    def __init__(self, hidden: int, inner: int) -> None:
        """Makes the layers."""
        super().__init__()
        self.gate = nn.Linear(hidden, inner, bias=False)
        self.up = nn.Linear(hidden, inner, bias=False)
        self.down = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        y: Tensor = self.down(functional.silu(self.gate(x)) * self.up(x))
        return y


@dataclass(frozen=True)
class Work:
    """A network.

    Attributes:
        make: the model, weights from a seed, in eval mode.
        feeds: (batch, seed) -> inputs by name.
        batches: what is measured by default, the most telling first.
        images: whether it takes images, which PyTorch gets in channels-last memory.
        classes: whether its outputs are of classes, so that they have a first.
        unit: what a batch counts.
    """

    make: Callable[[], nn.Module]
    feeds: Callable[[int, int], Feeds]
    batches: tuple[int, ...]
    images: bool = False
    classes: bool = False
    unit: str = "images"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Their names, in the order of forward's arguments."""
        return tuple(self.feeds(1, 0))


def _images(side: int, batch: int, seed: int) -> Feeds:
    random = np.random.default_rng(seed)
    return {"x": random.standard_normal((batch, 3, side, side), np.float32)}


def _tokens(config: BertConfig, length: int, batch: int, seed: int) -> Feeds:
    ids = np.random.default_rng(seed).integers(0, config.vocabulary, (batch, length))
    return dict(zip(INPUT_NAMES, (ids, np.ones_like(ids), np.zeros_like(ids)), strict=True))


def _vectors(hidden: int, batch: int, seed: int) -> Feeds:
    return {"x": np.random.default_rng(seed).standard_normal((batch, hidden), np.float32)}


def _resnet(depth: int) -> Work:
    make = partial(seeded, partial(ResNet, depth), (4, 3, 224, 224))
    return Work(make, partial(_images, 224), (32, 256, 1), images=True, classes=True)


def _bert(config: BertConfig, length: int) -> Work:
    make = partial(seeded, partial(Bert, config))
    feeds = partial(_tokens, config, length)
    return Work(make, feeds, (32, 256, 1), unit=f"texts of {length} tokens")


def _swiglu(hidden: int, inner: int, batches: tuple[int, ...]) -> Work:
    make = partial(seeded, partial(SwiGlu, hidden, inner))
    return Work(make, partial(_vectors, hidden), batches, unit="tokens")


WORKS = {
    "bert": _bert(CONFIGS["bert_base"], LENGTH),
    "resnet50": _resnet(50),
    "llama_mlp": _swiglu(4096, 11008, (2048, 128, 1, 512, 16)),
    "resnet34": _resnet(34),
    # Small ones, for trying the table out.
    "cifar_resnet20": Work(
        partial(seeded, partial(CifarResNet, 20), (4, 3, 32, 32)),
        partial(_images, 32),
        (1,),
        images=True,
        classes=True,
    ),
    "small_bert": _bert(BertConfig(1, 64, 2, 128, vocabulary=100), 16),
    "small_mlp": _swiglu(64, 160, (4,)),
}
DEFAULT = ("bert", "resnet50", "llama_mlp", "resnet34")


def pruned_model(work: Work, folder: Path | None = None) -> nn.Module:
    """The network with its 2:4 weights, on the CPU.

    Args:
        work: the network.
        folder: of its files, where the weights may be.
    """
    model = work.make()
    weights = None if folder is None else folder / WEIGHTS
    if weights is not None and weights.is_file():
        model.load_state_dict(torch.load(weights, weights_only=True))
    else:
        Sparsifier(model).prune().remove()
    return model.eval()


def write_files(work: Work, folder: Path) -> None:
    """Writes the weights, the float32 file and the INT8 one, where they are not there yet.

    Args:
        work: the network.
        folder: made if need be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    floats, integers = folder / F32, folder / INT8
    if not floats.is_file():
        example = [torch.from_numpy(x) for x in work.feeds(2, 0).values()]
        model = pruned_model(work)
        export_onnx(model, example, floats, work.inputs)
        temporary = folder / f"{WEIGHTS}.part"
        torch.save(model.state_dict(), temporary)
        temporary.replace(folder / WEIGHTS)
    if not integers.is_file():
        options = QuantizeOptions(activation="int8", recipe="fast")
        save_model(quantize(load_model(floats), work.feeds(CALIBRATION, 1), options), integers)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        write_files(WORKS[name], Path(sys.argv[1]) / name)
