"""Choosing a plugin's kernels by time: refused or built, compared with the meaning, timed.

As for layers with kernels of our own (tune.py), a wrong result is an error, and times are kept in
the timing cache by all that they depend on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from twofour.compiler.native_plugin import PluginOp, asked
from twofour.compiler.plugin_code import Planned, plan_code
from twofour.compiler.plugin_trial import Built, PluginTrial
from twofour.compiler.trial import interleaved
from twofour.compiler.tune import Tuner, rounded, rounds_of
from twofour.core.errors import UnsupportedError
from twofour.core.plugins import Operator, Problem
from twofour.core.target import Target
from twofour.engine import Candidate
from twofour.kernels.cpu.llvm import TOOLS

_STAGE_ROUNDS = 5


@dataclass(frozen=True)
class PluginChoice:
    """The kernels that were taken.

    Attributes:
        planned: the kernels.
        times_us: of each of them; none where nothing was timed.
        candidates: all that were considered.
    """

    planned: Planned
    times_us: tuple[float, ...]
    candidates: tuple[Candidate, ...]


def choose(op: PluginOp, problem: Problem, tuner: Tuner) -> PluginChoice:
    """The fastest candidate.

    Args:
        op: the operator.
        problem: as its operands lie in the engine.
        tuner: knows the target, the effort and times already known; gets new ones.

    Raises:
        UnsupportedError: no tactic takes the operands as they lie, or the plugin fails.
        WrongResult: a candidate differs from the meaning.
    """
    plans, refused = _plans(op.operator, problem, tuner)
    if not plans:
        raise UnsupportedError(
            f"no tactic of the plugin operator {op.operator} takes {op.name!r}",
            [f"{each.tactic}: {each.reason}" for each in refused],
            "mend the plugin: for operands in C order it has one",
        )
    keys = [_key(plan, problem, tuner) for plan in plans]
    if tuner.effort == 0 or tuner.target.cpu:
        if not tuner.target.cpu and keys[0] not in tuner.checked:
            trial = PluginTrial(op, problem, tuner.target, tuner.threads)
            about = f"the code of {plans[0].tactic.name} {plans[0].config}"
            trial.check(plans[0], asked(op.operator, about, trial.build, plans[0]))
            tuner.checked.add(keys[0])
        first = Candidate(plans[0].tactic.name, plans[0].config, None, "")
        return PluginChoice(plans[0], (), (first, *refused))
    if any(key not in tuner.cache.times_us for key in keys):
        _measure(op, problem, tuner, dict(zip(keys, plans, strict=True)))
    times = [tuner.cache.times_us[key] for key in keys]
    order = sorted(range(len(plans)), key=lambda i: times[i])
    best = order[0]
    stages = [tuner.cache.times_us[f"{keys[best]}:{i}"] for i in range(len(plans[best].parts))]
    timed = [Candidate(plans[i].tactic.name, plans[i].config, rounded(times[i])) for i in order]
    return PluginChoice(plans[best], tuple(stages), (*timed, *refused))


def _plans(
    operator: Operator, problem: Problem, tuner: Tuner
) -> tuple[list[Planned], list[Candidate]]:
    """What is worth trying, and what is refused."""
    plans, refused = [], []
    for tactic in operator.cpu:
        reason = asked(operator, f"refuse of {tactic.name}", tactic.refuse, problem, tuner.target)
        if reason:
            refused.append(Candidate(tactic.name, "", None, reason))
            continue
        about = f"configs of {tactic.name}"
        configs = list(asked(operator, about, tactic.configs, problem, tuner.target))
        for config in configs[:1] if tuner.effort < 2 else configs:
            about = f"emit of {tactic.name} {config}"
            plan = asked(operator, about, plan_code, tactic, problem, tuner.target, config)
            plans.append(plan)
    return plans[:1] if tuner.effort == 0 else plans, refused


def _measure(op: PluginOp, problem: Problem, tuner: Tuner, plans: dict[str, Planned]) -> None:
    """Checks and times all candidates; the cache has their times then."""
    trial = PluginTrial(op, problem, tuner.target, tuner.threads)
    built: dict[str, Built] = {}
    for key, plan in plans.items():
        about = f"the code of {plan.tactic.name} {plan.config}"
        built[key] = asked(op.operator, about, trial.build, plan)
        trial.check(plan, built[key])
    timers = {key: one.timer for key, one in built.items()}
    tuner.cache.times_us |= interleaved(timers, rounds_of(tuner.effort))
    for key, plan in plans.items():
        stages = built[key].stage_times_us(len(plan.parts), _STAGE_ROUNDS)
        tuner.cache.times_us |= {f"{key}:{i}": max(t, 1e-3) for i, t in enumerate(stages)}


def _key(plan: Planned, problem: Problem, tuner: Tuner) -> str:
    """All that the times of a candidate depend on."""
    operands = [(o.name, o.shape, o.dtype, o.strides, o.biased) for o in problem.operands]
    parts = [
        [(asdict(part.stage), [asdict(entry) for entry in part.table]) for part in plan.parts],
        operands,
        sorted((name, str(value)) for name, value in problem.attributes.items()),
        hashlib.sha256(plan.constants.tobytes()).hexdigest(),
        _target(tuner.target),
        tuner.threads,
        tuner.effort,
        TOOLS,
    ]
    return "plugin:" + hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _target(target: Target) -> Sequence[object]:
    return sorted(target.to_json().items())
