"""CIFAR-10 and the published ResNets, from the folder that TWOFOUR_DATA names."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from twofour.core.errors import InputError
from twofour.demo.side_by_side import Samples

INPUT = "x"
SHORT_TRAIN, SHORT_TEST = 256, 300
_PAD = 4
_DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "data"
_NEEDED = ("load_cifar10.py", "resnet_cifar.py", "cifar10_train.tar", "cifar10_test.tar")


@dataclass(frozen=True)
class Images:
    """CIFAR-10 as uint8 [S, 32, 32, 3] with labels [S], and what the checkpoints expect."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    mean: Tensor
    std: Tensor

    def to(self, device: str) -> Images:
        """All of it on a device."""
        return Images(*(getattr(self, field.name).to(device) for field in fields(self)))

    def normalised(self, x: Tensor) -> Tensor:
        """uint8 [B, 32, 32, 3] -> float32 [B, 3, 32, 32] in channels-last memory."""
        return ((x.float() / 255.0 - self.mean) / self.std).permute(0, 3, 1, 2)

    def calibration(self, count: int) -> NDArray[np.float32]:
        """The first training images as a network takes them: float32 [count, 3, 32, 32]."""
        return _array(self.normalised(self.train_x[:count]))

    def samples(self) -> Samples:
        """The test images as a network takes them, with their labels."""
        return Samples(INPUT, _array(self.normalised(self.test_x)), self.test_y.numpy())


class AugmentedEpoch:
    """One pass over the training images: shuffled, shifted by up to 4 pixels, half mirrored.

    Args:
        images: the data.
        batch_size: images in a batch; the last batch may be smaller.
        seed: decides order, shifts and mirrors; equal seeds give equal batches on every device.
    """

    def __init__(self, images: Images, batch_size: int, seed: int) -> None:
        """Draws the randomness of the whole epoch."""
        self.images = images
        self.batch_size = batch_size
        count = len(images.train_x)
        random = torch.Generator().manual_seed(seed)
        device = images.train_x.device
        self.order = torch.randperm(count, generator=random).to(device)
        self.shift = torch.randint(0, 2 * _PAD + 1, (2, count), generator=random).to(device)
        self.mirror = (torch.rand(count, generator=random) < 0.5).to(device)
        self.padded = nn.functional.pad(images.train_x, (0, 0, _PAD, _PAD, _PAD, _PAD))

    def __len__(self) -> int:
        """How many batches there are."""
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (x float32 [B, 3, 32, 32], labels int64 [B])."""
        size = self.images.train_x.shape[1]
        along = torch.arange(size, device=self.order.device)
        for chosen in self.order.split(self.batch_size):
            rows = self.shift[0, chosen, None] + along
            columns = torch.where(self.mirror[chosen, None], along.flip(0), along)
            columns = columns + self.shift[1, chosen, None]
            x = self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield self.images.normalised(x), self.images.train_y[chosen]


def load_images(short: bool) -> Images:
    """Reads the dataset.

    Args:
        short: train on 256 test images and evaluate on 300 others, which takes no time to read.

    Raises:
        InputError: the data is not there.
    """
    loader = _imported(data_folder() / "load_cifar10.py")
    test_x, test_y = (torch.from_numpy(a) for a in loader.load("test"))
    if short:
        train_x, train_y = test_x[:SHORT_TRAIN], test_y[:SHORT_TRAIN]
        end = SHORT_TRAIN + SHORT_TEST
        test_x, test_y = test_x[SHORT_TRAIN:end], test_y[SHORT_TRAIN:end]
    else:
        train_x, train_y = (torch.from_numpy(a) for a in loader.load("train"))
    mean, std = torch.tensor(loader.MEAN), torch.tensor(loader.STD)
    return Images(train_x, train_y.long(), test_x, test_y.long(), mean, std)


def load_model(depth: int) -> nn.Module:
    """The published ResNet, in eval mode and channels-last memory.

    Raises:
        InputError: there is no checkpoint of this depth, or it does not fit.
    """
    folder = data_folder()
    weights = folder / f"resnet{depth}.safetensors"
    if not weights.is_file():
        raise InputError(f"no checkpoint {weights}", fix="choose --depth 20 or 56")
    model: nn.Module = _imported(folder / "resnet_cifar.py").build(depth)
    missing, unexpected = model.load_state_dict(load_file(weights), strict=False)
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    if missing or unexpected:
        raise InputError(f"{weights} does not fit the model", [f"{missing} {unexpected}"])
    return model.eval().to(memory_format=torch.channels_last)


def data_folder() -> Path:
    """The folder with the dataset and the checkpoints.

    Raises:
        InputError: it is not there.
    """
    folder = Path(os.environ.get("TWOFOUR_DATA", _DEFAULT)) / "cifar10"
    missing = [name for name in _NEEDED if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"no CIFAR-10 data in {folder}",
            ["missing: " + ", ".join(missing)],
            "set TWOFOUR_DATA to the folder that holds cifar10/",
        )
    return folder


def _imported(path: Path) -> ModuleType:
    """The Python file at this path as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _array(x: Tensor) -> NDArray[Any]:
    return np.ascontiguousarray(x.numpy())
