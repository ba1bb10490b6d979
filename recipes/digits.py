"""The code that `digits.yaml` names: scikit-learn's handwritten digits, and a small residual CNN.

A recipe names functions; these are all it needs. `cifar10.py` has the same ones for CIFAR-10.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twofour.train.digits import DigitsNet, ShiftedEpoch, load_digits, train_digits

SEED = 0


def model(pretrained: bool = True) -> nn.Module:
    """The network; trained, which takes some seconds, unless other weights follow."""
    return train_digits(load_digits(), SEED) if pretrained else DigitsNet()


def example() -> Tensor:
    """Two scans, float32 [2, 1, 8, 8]."""
    return torch.from_numpy(load_digits().train_x[:2])


def train(epoch: int) -> ShiftedEpoch:
    """The training scans of an epoch, shuffled and shifted: batches of (scans, labels)."""
    return ShiftedEpoch(load_digits(), 1000 + epoch)


def calibrate() -> Iterator[dict[str, NDArray[np.float32]]]:
    """256 of the training scans, as they are."""
    yield {"x": load_digits().calibration_x}


def evaluate() -> Iterator[dict[str, NDArray[np.generic]]]:
    """The 500 test scans with their labels."""
    digits = load_digits()
    yield {"x": digits.test_x, "labels": digits.test_y}
