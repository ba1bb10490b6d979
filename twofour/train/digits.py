"""A small residual CNN for scikit-learn's handwritten digits: real scans that come with a package.

1,797 scans of 8x8 pixels; 500 of them, always the same, are kept for testing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits as load_scans
from torch import Tensor, nn
from torch.nn import functional

from twofour.train.checkpoint import Progress
from twofour.train.recover import finetune
from twofour.train.schedule import Schedule, Sgd
from twofour.train.sparsify import Sparsifier

TEST_SCANS = 500
CALIBRATION_SCANS = 256
BATCH_SIZE = 64
TRAINING = Schedule(epochs=12, lr=0.1, optimizer=Sgd(weight_decay=5e-4))
RECOVERY = Schedule(epochs=5, lr=0.02, optimizer=Sgd(weight_decay=5e-4))


@dataclass(frozen=True)
class Digits:
    """The scans, split.

    Args:
        train_x: float32 [1297, 1, 8, 8], 0 to 1.
        train_y: int64 [1297], 0 to 9.
        test_x: float32 [500, 1, 8, 8].
        test_y: int64 [500].
    """

    train_x: NDArray[np.float32]
    train_y: NDArray[np.int64]
    test_x: NDArray[np.float32]
    test_y: NDArray[np.int64]

    @property
    def calibration_x(self) -> NDArray[np.float32]:
        """256 of the training scans: float32 [256, 1, 8, 8]."""
        return self.train_x[:CALIBRATION_SCANS]


class Block(nn.Module):
    """relu(conv-bn-relu-conv-bn(x) + shortcut(x)); where shapes change, that is a 1x1 conv-bn."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        """Makes the layers; `stride` is that of the first convolution."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels, H/stride, W/stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        return functional.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsNet(nn.Module):
    """Stem, three residual blocks of 32, 64 and 128 channels, mean over the image, linear.

    Source: He et al. 2015, arXiv:1512.03385 (residual blocks).
    """

    def __init__(self) -> None:
        """Makes the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.layer1 = Block(32, 32, 1)
        self.layer2 = Block(32, 64, 1)
        self.layer3 = Block(64, 128, 2)
        self.linear = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, 1, 8, 8] -> logits [B, 10]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


class ShiftedEpoch:
    """One pass over the training scans, shuffled, each shifted by up to one pixel.

    Args:
        digits: the data.
        seed: decides order and shifts.
    """

    def __init__(self, digits: Digits, seed: int) -> None:
        """Draws the randomness of the whole epoch."""
        random = torch.Generator().manual_seed(seed)
        count = len(digits.train_x)
        self.order = torch.randperm(count, generator=random)
        self.shift = torch.randint(0, 3, (2, count), generator=random)
        self.padded = functional.pad(torch.from_numpy(digits.train_x), (1, 1, 1, 1))[:, 0]
        self.labels = torch.from_numpy(digits.train_y)

    def __len__(self) -> int:
        """How many batches there are; all have 64 scans."""
        return len(self.order) // BATCH_SIZE

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields (x float32 [64, 1, 8, 8], labels int64 [64])."""
        along = torch.arange(self.padded.shape[-1] - 2)
        for chosen in self.order[: len(self) * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            rows = self.shift[0, chosen, None] + along
            columns = self.shift[1, chosen, None] + along
            x = self.padded[chosen[:, None, None], rows[:, :, None], columns[:, None, :]]
            yield x[:, None], self.labels[chosen]


def load_digits() -> Digits:
    """Reads the scans from scikit-learn and splits them; the split is always the same."""
    scans, labels = load_scans(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(scans))
    x = (scans[order] / 16.0).astype(np.float32).reshape(-1, 1, 8, 8)
    y = labels[order].astype(np.int64)
    return Digits(x[TEST_SCANS:], y[TEST_SCANS:], x[:TEST_SCANS], y[:TEST_SCANS])


def train_digits(
    digits: Digits, seed: int = 0, progress: Callable[[Progress], None] | None = None
) -> DigitsNet:
    """Trains a dense network from scratch.

    Args:
        digits: the data.
        seed: of initial weights, order and shifts.
        progress: called after each batch.

    Returns:
        The network in eval mode.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DigitsNet()
    finetune(
        model,
        lambda epoch: ShiftedEpoch(digits, seed * 1000 + epoch),
        TRAINING,
        progress=progress,
    )
    return model


def finetune_digits(
    model: DigitsNet,
    digits: Digits,
    pattern: str = "2:4",
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> tuple[DigitsNet, Sparsifier]:
    """Prunes a copy of the network and fine-tunes it with the masks held.

    The first convolution (one input channel) and the last layer stay dense.

    Args:
        model: trained; not changed.
        digits: the data.
        pattern: such as `2:4` or `2:4/pair`.
        seed: of order and shifts.
        progress: called after each batch.

    Returns:
        The sparse network in eval mode, and its sparsifier.
    """
    sparse = copy.deepcopy(model)
    sparsifier = Sparsifier(sparse, pattern, exclude=["linear"]).prune()
    first = seed * 1000 + TRAINING.epochs
    finetune(
        sparse,
        lambda epoch: ShiftedEpoch(digits, first + epoch),
        RECOVERY,
        method=sparsifier,
        progress=progress,
    )
    return sparse, sparsifier
