"""What a search found, and its document."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from twofour.compiler.forms import INT8
from twofour.search.choices import BASELINE, Choice
from twofour.search.final import Unseen
from twofour.search.harms import Harm
from twofour.search.points import Point, front
from twofour.search.units import Unit

INT8_DENSE = Choice("", INT8)


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        model: as the user named it.
        data: what networks were judged on, in words.
        metric: its name.
        unit: of the metric, "%" or "".
        higher_is_better: whether more of it is better.
        samples: judged.
        dense: the metric of the float model.
        max_drop: the bound; None where the latency is bounded.
        max_latency_us: the other bound.
        threads: of engines.
        cpu: in words.
        target: likewise.
        units: with the times of their choices.
        harms: of their changes.
        offered: the choices that each unit could have.
        points: in the order in which they were built.
        answer: index of the best one that holds the bound; None where none does.
        unseen: the answer on samples that the search did not use; None where there are none.
        predicted: the front that the solver predicts with all that was learned: microseconds,
            error, drop.
        notes: what the user should know.
    """

    model: str
    data: str
    metric: str
    unit: str
    higher_is_better: bool
    samples: int
    dense: float
    max_drop: float | None
    max_latency_us: float | None
    threads: int
    cpu: str
    target: str
    units: tuple[Unit, ...]
    harms: tuple[Harm, ...]
    offered: tuple[tuple[Choice, ...], ...]
    points: tuple[Point, ...]
    answer: int | None
    unseen: Unseen | None
    predicted: tuple[tuple[float, float, float], ...]
    notes: tuple[str, ...]

    @property
    def best(self) -> Point | None:
        """The answer."""
        return None if self.answer is None else self.points[self.answer]

    @property
    def front(self) -> tuple[Point, ...]:
        """Points that no other is both as fast and as good as, the fastest first."""
        return front(self.points)

    @property
    def everything_int8(self) -> Point | None:
        """The point with all layers dense in INT8, as far as they can be."""
        wanted = tuple(INT8_DENSE if INT8_DENSE in unit.times else BASELINE for unit in self.units)
        return next((point for point in self.points if point.choices == wanted), None)

    def layers(self, point: Point) -> dict[str, str]:
        """The choice of each layer, in words."""
        pairs = zip(self.units, point.choices, strict=True)
        return {layer: str(choice) for unit, choice in pairs for layer in unit.layers}

    def counts(self, point: Point) -> dict[str, int]:
        """How many layers have each choice."""
        return dict(sorted(Counter(self.layers(point).values()).items()))


_PLAIN = (
    "model",
    "data",
    "metric",
    "unit",
    "higher_is_better",
    "samples",
    "dense",
    "max_drop",
    "max_latency_us",
    "threads",
    "cpu",
    "target",
)


def document(found: Found) -> dict[str, Any]:
    """Plain data, as `--json` prints it."""
    on_front = {id(point) for point in found.front}
    return {
        **{name: getattr(found, name) for name in _PLAIN},
        "answer": found.answer,
        "layers": found.layers(found.best) if found.best else {},
        "unseen": None if found.unseen is None else asdict(found.unseen),
        "points": [
            _point(found, index, on_front=id(point) in on_front)
            for index, point in enumerate(found.points)
        ],
        "predicted": [
            dict(zip(("latency_us", "error", "drop"), each, strict=True))
            for each in found.predicted
        ],
        "units": [_unit(found, at) for at in range(len(found.units))],
        "notes": list(found.notes),
    }


def _point(found: Found, index: int, *, on_front: bool) -> dict[str, Any]:
    point = found.points[index]
    return {
        "name": point.name,
        "latency_us": point.latency_us,
        "speed": point.speed[0],
        "speed_low": point.speed[1],
        "speed_high": point.speed[2],
        "figure": point.figure,
        "drop": point.drop,
        "drop_error": point.drop_error,
        "error": point.error,
        "on_front": on_front,
        "counts": found.counts(point),
        "choices": [str(choice) for choice in point.choices],
    }


def _unit(found: Found, at: int) -> dict[str, Any]:
    unit = found.units[at]
    harms: Mapping[str, Harm] = {h.part: h for h in found.harms if h.unit == unit.name}
    return {
        "name": unit.name,
        "layers": list(unit.layers),
        "parameters": unit.parameters,
        "times_us": {str(choice): us for choice, us in sorted(unit.times.items())},
        "offered": [str(choice) for choice in found.offered[at]],
        "errors": {part: harm.error for part, harm in harms.items()},
        "drops": {part: harm.drop for part, harm in harms.items()},
        "choice": str(found.best.choices[at]) if found.best else None,
    }
