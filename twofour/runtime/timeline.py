"""When each layer of one run was computed, by which thread."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from twofour.core.abi import STAMPS
from twofour.engine import Profile
from twofour.runtime.cpu import Stamps

_BEGIN, _END, _MET = (STAMPS[name] // 8 for name in ("begin", "end", "met"))


@dataclass(frozen=True)
class Span:
    """A layer on a thread, or a whole step.

    Attributes:
        step: index within the profile.
        layers: indices into `Plan.layers`: one; all of a step on ONNX Runtime.
        thread: which one; 0 is the caller's.
        begin_ns: on the clock of `now_ns`.
        end_ns: likewise.
        met_ns: when all threads had ended; `end_ns` for a step.
    """

    step: int
    layers: tuple[int, ...]
    thread: int
    begin_ns: int
    end_ns: int
    met_ns: int


@dataclass(frozen=True)
class Timeline:
    """One run.

    Attributes:
        steps: each whole step, on thread 0.
        layers: each layer on each thread; steps on ONNX Runtime as one.
    """

    steps: tuple[Span, ...]
    layers: tuple[Span, ...]

    @property
    def run_us(self) -> float:
        """From the first step's begin to the last one's end."""
        return (self.steps[-1].end_ns - self.steps[0].begin_ns) / 1e3 if self.steps else 0.0

    @property
    def layers_us(self) -> float:
        """What the layers take of it, waiting for each other included."""
        own = [span for span in self.layers if span.thread == 0]
        return sum(span.met_ns - span.begin_ns for span in own) / 1e3


def now_ns() -> int:
    """The clock that programs read, see kernels/cpu/program.py."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def timeline(
    profile: Profile, times: Sequence[tuple[int, int]], stamps: Sequence[Stamps]
) -> Timeline:
    """What a run left behind.

    Args:
        profile: that was run.
        times: begin and end of each step.
        stamps: int64 [layers, threads, 8] of each step; zeros of one on ONNX Runtime.
    """
    steps, layers = [], []
    for index, (step, (begin, end), taken) in enumerate(
        zip(profile.steps, times, stamps, strict=True)
    ):
        whole = Span(index, step.layers, 0, begin, end, end)
        steps.append(whole)
        if step.kind != "native":
            layers.append(whole)
            continue
        for call, layer in enumerate(step.layers):
            met = int(taken[call, 0, _MET])
            for thread in range(taken.shape[1]):
                first, last = (int(taken[call, thread, place]) for place in (_BEGIN, _END))
                layers.append(Span(index, (layer,), thread, first, last, met))
    return Timeline(tuple(steps), tuple(layers))
