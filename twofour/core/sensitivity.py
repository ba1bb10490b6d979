"""What pruning each layer alone costs, beside what it gains: the layers to leave dense.

    cost    drop of the metric when this layer alone is pruned (measured)
    gain    microseconds that its sparse kernel saves (measured by `twofour forecast`)

Layers are pruned in the order of cost per gain. What k of them cost together is **estimated** by
the sum of what each costs alone, those that cost nothing (or, by chance, less) counted as 0. The
order is a greedy solution of the knapsack problem: the best for each gain that is a whole number
of its steps, as far as costs add up.

Source: Dantzig 1957, "Discrete-variable extremum problems" (the order by ratio).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twofour.core.records import to_plain
from twofour.core.scan import Result


@dataclass(frozen=True)
class Case:
    """One layer, pruned alone.

    Attributes:
        layer: its name.
        pattern: such as "2:4".
        skip: what `twofour prune --skip`, or `Sparsifier(exclude=...)`, calls it.
        parameters: of its weight.
        energy_kept: share of the sum of squares that is left, 0 to 1.
        figure: the metric of the network then.
        drop: by how much that is worse than the dense network; negative where it is better.
        drop_error: standard error of the drop; None where it is not known.
        seconds: that scoring took.
    """

    layer: str
    pattern: str
    skip: str
    parameters: int
    energy_kept: float
    figure: float
    drop: float
    drop_error: float | None
    seconds: float


JUDGED = ("energy_kept", "figure", "drop", "drop_error", "seconds")
"""What a scan finds of a layer: the figures that a cache keeps."""


def judged(
    energy_kept: float, figure: float, drop: float, drop_error: float | None, seconds: float
) -> Result:
    """What a scan found of a layer, as a cache keeps it."""
    return dict(zip(JUDGED, (energy_kept, figure, drop, drop_error, seconds), strict=True))


def case_of(layer: tuple[str, str, int], pattern: str, found: Result) -> Case:
    """Brings a layer and what was found of it together.

    Args:
        layer: its name, what `--skip` calls it, and its parameters.
        pattern: that it was pruned to.
        found: of `judged`.
    """
    name, skip, parameters = layer
    kept, figure, drop, seconds = (
        math.nan if found[each] is None else float(found[each] or 0.0)
        for each in ("energy_kept", "figure", "drop", "seconds")
    )
    return Case(name, pattern, skip, parameters, kept, figure, drop, found["drop_error"], seconds)


@dataclass(frozen=True)
class Left:
    """A layer that was not tried.

    Attributes:
        layer: its name.
        pattern: that it was to have.
        reason: why not.
    """

    layer: str
    pattern: str
    reason: str


@dataclass(frozen=True)
class Sensitivity:
    """What a scan found.

    Attributes:
        model: its name.
        metric: its name.
        unit: "%" or "".
        higher_is_better: whether more of it is better.
        dense: the metric of the network as it is.
        samples: that it was taken of; None where that is not known.
        cases: every layer with every pattern, in the order of patterns, then of layers.
        left: layers that were not tried, with the reason.
        notes: what the user should know.
    """

    model: str
    metric: str
    unit: str
    higher_is_better: bool
    dense: float
    samples: int | None
    cases: tuple[Case, ...]
    left: tuple[Left, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def patterns(self) -> tuple[str, ...]:
        """Those that were tried."""
        return tuple(dict.fromkeys(case.pattern for case in self.cases))

    def at(self, pattern: str) -> tuple[Case, ...]:
        """The cases of a pattern, that with the largest drop first; equal ones as the layers are.

        A drop that is no number (of a network that gives NaN) counts as larger than any.
        """
        cases = [case for case in self.cases if case.pattern == pattern]
        return tuple(sorted(cases, key=lambda case: -_number(case.drop)))

    @property
    def worst(self) -> Case | None:
        """The case with the largest drop of all patterns, NaN as in `at`; None without cases."""
        return max(self.cases, key=lambda case: _number(case.drop), default=None)


@dataclass(frozen=True)
class Step:
    """One more layer pruned, in the order of drop per gain.

    Attributes:
        layer: its name.
        drop: of this layer alone, as measured.
        gain_us: of this layer.
        drop_per_us: the quotient; 0 where the drop is not positive.
        total_drop: estimated, of all layers up to this one.
        total_gain_us: of all up to this one.
        share: of the gain of all layers, 0 to 1.
    """

    layer: str
    drop: float
    gain_us: float
    drop_per_us: float
    total_drop: float
    total_gain_us: float
    share: float


@dataclass(frozen=True)
class Together:
    """The first layers of an order, pruned together and judged.

    Attributes:
        count: how many.
        figure: the metric then.
        drop: by how much that is worse than the dense network.
        drop_error: standard error of the drop; None where it is not known.
    """

    count: int
    figure: float
    drop: float
    drop_error: float | None

    @staticmethod
    def of(count: int, found: Result) -> Together:
        """Of what a scan found: see `judged`."""
        figure, drop = found["figure"], found["drop"]
        nan = math.nan
        return Together(
            count,
            nan if figure is None else figure,
            nan if drop is None else drop,
            found["drop_error"],
        )


@dataclass(frozen=True)
class Tradeoff:
    """Cost against gain, for one pattern.

    Attributes:
        pattern: of the weights.
        precision: that the gains were measured in: "f32", "bf16" or "int8".
        gains: layer -> microseconds saved; a layer that nothing is known of is missing.
        steps: layers that gain anything, in the order to prune them.
        useless: layers that gain nothing.
        together: what some of the first steps cost, measured.
    """

    pattern: str
    precision: str
    gains: dict[str, float]
    steps: tuple[Step, ...]
    useless: tuple[str, ...]
    together: tuple[Together, ...] = ()

    def step_for(self, share: float) -> int:
        """How many layers to prune to have at least this share of the gain of all.

        Args:
            share: 0 to 1.
        """
        enough = (k + 1 for k, step in enumerate(self.steps) if step.share >= share - 1e-9)
        return next(enough, len(self.steps)) if self.steps else 0


def tradeoff(
    cases: Sequence[Case], pattern: str, precision: str, gains: Mapping[str, float]
) -> Tradeoff:
    """Brings cost and gain together.

    Args:
        cases: of one pattern.
        pattern: its name.
        precision: of the gains.
        gains: layer -> microseconds; not positive where a sparse kernel is no faster.
    """
    known = {case.layer: gains[case.layer] for case in cases if case.layer in gains}
    priced = [case for case in cases if known.get(case.layer, 0.0) > 0]
    priced.sort(key=lambda case: (_cost(case) / known[case.layer], -known[case.layer]))
    whole_us = math.fsum(known[case.layer] for case in priced)
    steps: list[Step] = []
    drop = gain_us = 0.0
    for case in priced:
        own_us = known[case.layer]
        drop, gain_us = drop + _cost(case), gain_us + own_us
        steps.append(
            Step(
                case.layer,
                case.drop,
                own_us,
                _cost(case) / own_us,
                drop,
                gain_us,
                min(gain_us / whole_us, 1.0),
            )
        )
    useless = tuple(name for name, us in known.items() if us <= 0)
    return Tradeoff(pattern, precision, known, tuple(steps), useless)


def document(
    found: Sensitivity, tradeoffs: Sequence[Tradeoff], machine: str | None
) -> dict[str, Any]:
    """All as plain data: dicts, lists, strings, numbers.

    Args:
        found: the scan.
        tradeoffs: of its patterns; empty where no gains are known.
        machine: that gains were measured on; None without.
    """
    return {
        **to_plain(found),
        "machine": machine,
        "tradeoffs": [
            {
                "pattern": each.pattern,
                "precision": each.precision,
                "gains": [{"layer": name, "gain_us": us} for name, us in each.gains.items()],
                "steps": to_plain(each.steps),
                "useless": list(each.useless),
                "together": to_plain(each.together),
            }
            for each in tradeoffs
        ],
    }


def _cost(case: Case) -> float:
    return max(_number(case.drop), 0.0)


def _number(drop: float) -> float:
    return math.inf if math.isnan(drop) else drop
