"""A cheap guess of which layers cost most: the energy of the errors that each of them adds.

That is of what the layer reads, rounded against unrounded, on a few samples, and of its weight;
each over the energy of what it is an error of. It only decides which layers are judged first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twofour.compiler.prunable import Network
from twofour.core.progress import Report
from twofour.evaluate.differences import Sums
from twofour.evaluate.judge import Task
from twofour.onnx_tools.reference import Reference
from twofour.onnx_tools.revert import Switch

_SAMPLES = 16
_TENSORS = 16  # at a time


def guess_errors(
    model: Network, switches: Sequence[Switch], task: Task, report: Report
) -> dict[Switch, float]:
    """The energy of each layer's errors over that of what they are errors of.

    Args:
        model: that the layers are switched back in.
        switches: the layers.
        task: the first samples of its data are run.
        report: told the tensors done.
    """
    pairs = list(dict.fromkeys(pair for switch in switches for pair in switch.roundings))
    names = list(dict.fromkeys(name for pair in pairs for name in pair))
    reference = Reference(model, names)
    sums = {pair: Sums(pair[0]) for pair in pairs}
    total = len(pairs)
    for run in task.runs(_SAMPLES):
        for start in range(0, total, _TENSORS):
            part = pairs[start : start + _TENSORS]
            wanted = [name for pair in part for name in pair if name in reference.tensors]
            values = reference.run(run.feeds, wanted) | run.feeds
            for pair in part:
                before, after = (np.atleast_1d(values[name]) for name in pair)
                sums[pair].add(before, after, 0)
            report(min(start + _TENSORS, total), total, "guessing")
    noise = {pair: 10 ** (-each.result().sqnr_db / 10) for pair, each in sums.items()}
    return {
        switch: switch.weight_noise + sum(noise[pair] for pair in switch.roundings)
        for switch in switches
    }
