"""The engine against ONNX Runtime on the whole model, at the end of a build.

Kernels are compared layer by layer; what that cannot see is a model whose operators ONNX Runtime
runs faster together: short convolutions between many small steps, or fallbacks between which
tensors change hands. So whole runs are timed, in turns, and a model that ONNX Runtime runs clearly
faster becomes one step of it, which the plan says. The least time of each counts: what disturbs
the machine only adds to it. Times are kept in the timing cache.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twofour.compiler.profile import LONGEST_S, with_times
from twofour.compiler.timing_cache import TimingCache
from twofour.core.errors import EngineError, InputError, UnsupportedError
from twofour.engine import Engine
from twofour.runtime.session import Session

CLEARLY = 1.04
"""ONNX Runtime has to be so many times as fast: the engine keeps what `explain` can say."""

_ROUNDS = (3, 9)  # where the outcome is plain, and where it is not
_PLAIN = 1.3
_ROUND_US = 300.0
_MS_US = 1000.0

Feeds = Mapping[str, NDArray[Any]]
Refused = (EngineError, InputError, UnsupportedError)


def faster(engine: Engine, whole: Callable[[str], Engine], cache: TimingCache) -> Engine:
    """The engine, or the whole model on ONNX Runtime where that is clearly faster.

    Args:
        engine: as built, with times.
        whole: makes the engine of one step, given the reason that it will show.
        cache: times already known; new ones are added.

    Returns:
        One of the two; its plan has a note on how both did.
    """
    keys = _keys(engine)
    if not all(key in cache.times_us for key in keys):
        try:
            times_us = _raced(engine, whole("to be timed"))
        except Refused:  # it takes no inputs of ones, or not this model: there is nothing to race
            return engine
        cache.times_us |= dict(zip(keys, times_us, strict=True))
    ours_us, theirs_us = (cache.times_us[key] for key in keys)
    said = f"{_time(ours_us)} with kernels, {_time(theirs_us)} for the same file on ONNX Runtime"
    if theirs_us * CLEARLY >= ours_us:
        note = f"whole runs: {said} ({theirs_us / ours_us:.2f} times as fast)"
        plan = replace(engine.plan, notes=(*engine.plan.notes, note))
        return replace(engine, plan=plan)
    return with_times(whole(f"a run takes {said}"), (), cache)


def _keys(engine: Engine) -> tuple[str, str]:
    """All that the times of both depend on: code and subgraphs tell the network and its weights."""
    plan = engine.plan
    held = hashlib.sha256()
    for data in (*engine.code.values(), *engine.subgraphs.values()):
        held.update(data.tobytes())
    parts = [
        held.hexdigest(),
        [list(info.usual_shape) for info in plan.inputs],
        plan.target.to_json(),
        plan.threads,
        version("onnxruntime"),
    ]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
    return f"{key}-kernels", f"{key}-whole"


def _raced(ours: Engine, theirs: Engine) -> tuple[float, float]:
    """Microseconds of a run of each on ones, in turns; zeros could be divisors."""
    feeds = {t.name: np.ones(t.usual_shape, t.dtype) for t in ours.plan.inputs}
    with (
        Session(ours) as first,
        Session(theirs) as second,
        first.within(LONGEST_S),
        second.within(LONGEST_S),
    ):
        calls = [_slice(session, feeds) for session in (first, second)]
        best = [call() for call in calls]
        for done in range(1, _ROUNDS[1]):
            if done >= _ROUNDS[0] and max(best) > _PLAIN * min(best):
                break
            best = [min(held, call()) for held, call in zip(best, calls, strict=True)]
    return best[0], best[1]


def _slice(session: Session, feeds: Feeds) -> Callable[[], float]:
    """Times runs of a session: as many as take some hundred microseconds, at least one."""
    session.run(feeds)
    once_us = _microseconds(session, feeds, 1)
    count = max(1, int(_ROUND_US / max(once_us, 0.1)))
    return lambda: _microseconds(session, feeds, count)


def _microseconds(session: Session, feeds: Feeds, count: int) -> float:
    """The least of several runs."""
    least = float("inf")
    for _ in range(count):
        start = time.perf_counter_ns()
        session.run(feeds)
        least = min(least, (time.perf_counter_ns() - start) / 1e3)
    return least


def _time(us: float) -> str:
    return f"{us / 1e3:.3g} ms" if us >= _MS_US else f"{us:.3g} us"
