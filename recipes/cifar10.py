"""The code that `cifar10_resnet.yaml` names: CIFAR-10 and its published ResNets.

Needs the folder that TWOFOUR_DATA names, with `cifar10/` in it. The functions are those of
`digits.py`; `resnet20` and `resnet56` are two models.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.train.networks.resnet import CifarResNet

BATCH_SIZE = 128
CALIBRATION_IMAGES = 1024
PAD = 4
_DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data"


def resnet20(pretrained: bool = True) -> nn.Module:
    """ResNet-20, with the published weights unless others follow."""
    return _resnet(20, pretrained)


def resnet56(pretrained: bool = True) -> nn.Module:
    """ResNet-56, likewise."""
    return _resnet(56, pretrained)


def example() -> Tensor:
    """Two images, float32 [2, 3, 32, 32]."""
    images, _ = _images("test")
    return torch.from_numpy(normalised(images[:2]))


def train(epoch: int) -> Epoch:
    """The training images of an epoch, shuffled, shifted and mirrored: (images, labels)."""
    return Epoch(1000 + epoch)


def calibrate() -> Iterator[dict[str, NDArray[Any]]]:
    """The first training images, as they are."""
    images, _ = _images("train")
    yield {"x": normalised(images[:CALIBRATION_IMAGES])}


def evaluate() -> Iterator[dict[str, NDArray[Any]]]:
    """The 10,000 test images with their labels, 500 at a time."""
    images, labels = _images("test")
    for start in range(0, len(images), 500):
        rows = slice(start, start + 500)
        yield {"x": normalised(images[rows]), "labels": labels[rows].astype(np.int64)}


class Epoch:
    """One pass over the training images: shifted by up to 4 pixels, half of them mirrored.

    Args:
        seed: decides order, shifts and mirrors.
    """

    def __init__(self, seed: int) -> None:
        """Draws the randomness of the whole epoch."""
        images, labels = _images("train")
        random = torch.Generator().manual_seed(seed)
        count = len(images)
        self.order = torch.randperm(count, generator=random)
        self.shift = torch.randint(0, 2 * PAD + 1, (2, count), generator=random)
        self.mirror = torch.rand(count, generator=random) < 0.5
        whole = torch.from_numpy(images)
        self.padded = nn.functional.pad(whole, (0, 0, PAD, PAD, PAD, PAD))
        self.labels = torch.from_numpy(labels).long()

    def __len__(self) -> int:
        """How many batches there are."""
        return len(self.order) // BATCH_SIZE

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (x float32 [128, 3, 32, 32], labels int64 [128])."""
        along = torch.arange(32)
        for chosen in self.order[: len(self) * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            rows = self.shift[0, chosen, None] + along
            columns = torch.where(self.mirror[chosen, None], along.flip(0), along)
            columns = columns + self.shift[1, chosen, None]
            x = self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield torch.from_numpy(normalised(x.numpy())), self.labels[chosen]


def normalised(images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """uint8 [B, 32, 32, 3] -> float32 [B, 3, 32, 32], as the published weights want them."""
    loader = _loader()
    mean, std = np.float32(loader.MEAN), np.float32(loader.STD)
    x = (images.astype(np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def _resnet(depth: int, pretrained: bool) -> nn.Module:
    model = CifarResNet(depth)
    if pretrained:
        weights = load_file(_folder() / f"resnet{depth}.safetensors")
        counters = {n: v for n, v in model.state_dict().items() if n.endswith("batches_tracked")}
        model.load_state_dict({**counters, **weights})
    return model


@functools.cache
def _images(split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """uint8 [S, 32, 32, 3] and labels [S]."""
    images, labels = _loader().load(split)
    return images, labels


@functools.cache
def _loader() -> ModuleType:
    """The data's own reader."""
    path = _folder() / "load_cifar10.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _folder() -> Path:
    folder = Path(os.environ.get("TWOFOUR_DATA", _DEFAULT)) / "cifar10"
    if not (folder / "load_cifar10.py").is_file():
        raise InputError(
            f"no CIFAR-10 in {folder}",
            ["expected load_cifar10.py, cifar10_train.tar, cifar10_test.tar, resnet20.safetensors"],
            "set TWOFOUR_DATA to the folder that holds cifar10/",
        )
    return folder
