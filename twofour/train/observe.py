"""What calibration in PyTorch remembers of a tensor: counts as of `core/histogram.py`, on a device.

The bins, and so the counts, are those of the numpy version, bit for bit. Nothing waits for the
device before `histogram` is asked for: the limit is a tensor too, and so is its doubling.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from twofour.core.errors import InputError
from twofour.core.histogram import AVERAGING, HALF, SMALLEST_LIMIT, Histogram
from twofour.train.ranks import max_over_ranks, several, sum_over_ranks

_NOTHING = -1000  # the exponent of no limit at all
_LEAST_EXPONENT = math.frexp(SMALLEST_LIMIT)[1] - 1
_HALF_EXPONENT = HALF.bit_length() - 1
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}


class Observer:
    """Counts the values of one tensor over many batches, in memory that does not grow.

    Each call of `add` is a batch of the moving average of the least and the largest value; several
    processes have the mean of their averages.

    Args:
        device: of the values.
    """

    def __init__(self, device: torch.device) -> None:
        """Starts empty."""
        self._counts = torch.zeros(2 * HALF + 1, dtype=torch.int64, device=device)  # last: zeros
        self._exponent = torch.full((), _NOTHING, dtype=torch.int64, device=device)
        # [-low, high, whether a value was NaN or infinite]: one maximum merges them.
        self._ends = torch.tensor([-math.inf, -math.inf, 0.0], device=device)
        # [low, high, whether there is one]: as `Histogram.average`.
        self._average = torch.zeros(3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Counts the values of x, of any shape and float type; waits for nothing."""
        flat = x.detach().float().reshape(-1)
        if not flat.numel():
            return
        low, high = torch.aminmax(flat)
        broken = ~(low.isfinite() & high.isfinite())
        ends = torch.stack([-low, high, broken.to(low.dtype)])
        # Once a value was not finite nothing is counted: `histogram` refuses the tensor.
        self._ends = torch.maximum(self._ends, torch.nan_to_num(ends, nan=math.inf))
        self._move_average(torch.stack([low, high, torch.ones_like(low)]).double())
        peak = torch.where(broken, torch.zeros_like(low), torch.maximum(-low, high))
        exponent = torch.frexp(peak).exponent.to(torch.int64).clamp(min=_LEAST_EXPONENT)
        self._grow(torch.where(peak > 0, exponent, _NOTHING))
        for chunk in torch.split(flat, _CHUNK.get(flat.device.type, 1 << 20)):
            self._count(torch.where(broken, torch.zeros_like(chunk), chunk))

    def histogram(self) -> Histogram:
        """What was seen by all processes of `torch.distributed`; waits for the device.

        Raises:
            InputError: a value was NaN or infinite.
        """
        counts, ends, average = self._counts, self._ends.double(), self._average.clone()
        if several():
            exponent = self._exponent.clone()
            max_over_ranks([ends, exponent])
            self._grow(exponent)
            counts = self._counts.clone()
            sum_over_ranks([counts, average])
        found = Histogram()
        found.low, found.high = -float(ends[0]), float(ends[1])
        if ends[2]:
            raise InputError(
                "calibration met values that are NaN or infinite",
                fix="look for NaN in the calibration batches and in the weights before this layer",
            )
        every = counts.cpu().numpy()
        found.counts, found.zeros = every[:-1].copy(), int(every[-1])
        low, high, processes = average.tolist()
        if processes:
            found.average = low / processes, high / processes
        exponent_found = int(self._exponent)
        found.limit = 0.0 if exponent_found == _NOTHING else math.ldexp(1.0, exponent_found)
        return found

    def _move_average(self, batch: Tensor) -> None:
        first = 1 - self._average[2]
        self._average = self._average + (batch - self._average) * (first + (1 - first) * AVERAGING)

    def _count(self, chunk: Tensor) -> None:
        # A power of two, by its bits: the float64 product is exact, and less than HALF.
        factor = ((1023 + _HALF_EXPONENT - self._exponent) << 52).view(torch.float64)
        bins = torch.floor(chunk.double() * factor).to(torch.int64) + HALF
        bins = torch.where(chunk == 0, 2 * HALF, bins)
        self._counts.index_add_(0, bins, torch.ones_like(bins))

    def _grow(self, exponent: Tensor) -> None:
        """Merges bins where the new limit, 2 ** exponent, is larger."""
        larger = torch.maximum(self._exponent, exponent)
        doublings = (larger - self._exponent).clamp(max=32)
        places = torch.arange(-HALF, HALF, device=exponent.device)
        # A right shift rounds down, as the bins of both sides of zero do.
        merged = torch.zeros_like(self._counts)
        merged.index_add_(0, (places >> doublings) + HALF, self._counts[:-1])
        merged[-1] = self._counts[-1]
        self._counts, self._exponent = merged, larger
