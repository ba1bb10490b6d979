"""What the channels of some values hold on samples: rows of them, and each channel's peak.

Rows are taken evenly from all that the value ever holds, in bounded memory: once there are too many
every third is kept, and from then on a third of what comes. So neither the batch size nor how the
samples are given changes which rows are taken. Of more than a thousand samples whole batches are
left out, evenly.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from twofour.core.feeds import runs
from twofour.core.progress import Report, silent
from twofour.onnx_tools.capture import Samples
from twofour.onnx_tools.reference import input_form
from twofour.onnx_tools.runner import Runner, batch_size, not_finite

ROWS = 768
"""At least so many of a value are kept, if it has as many, and fewer than three times that."""
_SAMPLES = 512
"""About so many are run, if there are more than twice as many: channels show what they are soon."""
_THINNED = 3  # no power of two, which most widths of images share

Channel = tuple[str, int]
"""Name of a value, and the axis that counts its channels."""


@dataclass
class Watched:
    """What was seen of one value.

    Attributes:
        peak: float64 [C], the largest magnitude of each channel.
    """

    peak: NDArray[np.float64]
    _parts: list[NDArray[np.float32]] = field(default_factory=list)
    _held: int = 0
    _every: int = 1
    _seen: int = 0

    @property
    def rows(self) -> NDArray[np.float32]:
        """float32 [rows, C]."""
        return np.concatenate(self._parts) if self._parts else np.zeros((0, len(self.peak)), "f4")

    def add(self, x: NDArray[Any]) -> None:
        """Takes some of the rows of x, float [rows, C]."""
        if len(x):
            np.maximum(self.peak, np.abs(x).max(axis=0), out=self.peak)
        part = x[-self._seen % self._every :: self._every]
        self._seen += len(x)
        self._parts.append(part.astype(np.float32))
        self._held += len(part)
        while self._held >= _THINNED * ROWS:
            self._parts = [self.rows[::_THINNED]]
            self._held, self._every = len(self._parts[0]), self._every * _THINNED


def watch(
    model: ir.Model, channels: Iterable[Channel], samples: Samples, progress: Report = silent
) -> dict[Channel, Watched]:
    """Runs the model on samples.

    Args:
        model: with the types of its values known; it stays as it is.
        channels: of float values of the main graph.
        samples: to run it on; of many batches some, evenly spread.
        progress: called after each batch with the samples done.

    Raises:
        InputError: the data is empty or does not fit the model's inputs, or it or a value is not
            finite.
        UnsupportedError: ONNX Runtime cannot run the model.
    """
    wanted, data, found = tuple(dict.fromkeys(channels)), samples.data, dict[Channel, Watched]()
    names = tuple(dict.fromkeys(name for name, _ in wanted))
    runner = Runner(model, names, samples.threads)
    forms = [input_form(value) for value in model.graph.inputs]
    total = data.count if data.count is None else min(data.count, samples.limit or data.count)
    every = max(1, (total or 0) // _SAMPLES)
    for index, run in enumerate(runs(data, forms, batch_size(model, names), samples.limit)):
        if index % every:
            continue
        arrays = runner.run(run.feeds)
        for name, axis in wanted:
            last = np.moveaxis(arrays[name], axis, -1)
            x = last.reshape(-1, last.shape[-1])
            if not np.isfinite(x).all():
                raise not_finite(name, data, run.batch)
            found.setdefault((name, axis), Watched(np.zeros(x.shape[1]))).add(x)
        progress(run.batch.start + len(run.batch), total, "watching channels")
    return found
