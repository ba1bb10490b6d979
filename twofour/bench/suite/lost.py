"""Where an engine of ours loses time: layers by their gap to the roofline, equal ones joined."""

from __future__ import annotations

from dataclasses import dataclass, field

from twofour.bench.suite.entries import Plain
from twofour.compiler.rates import measure_rates
from twofour.compiler.roofline import Gap, gaps
from twofour.engine import Engine

SHOWN = 3


@dataclass
class _Kind:
    """Layers that are alike: equal times and reasons."""

    gap: Gap
    names: list[str] = field(default_factory=list)

    @property
    def total_us(self) -> float:
        """The gaps of all of them."""
        return self.gap.gap_us * len(self.names)


def lost_time(engine: Engine, median_us: float) -> Plain:
    """What a row says about one engine: plain data.

    Args:
        engine: ours, built on this machine.
        median_us: of its runs.

    Returns:
        Microseconds of a run, of all layers as measured at build, and of both ideals: `products` of
        the layers with multiply-adds, `bytes` of the others; and `kinds`: those `SHOWN` kinds of
        layers that lose the most together.
    """
    found = gaps(engine.plan, measure_rates(engine.plan))
    kinds: dict[tuple[object, ...], _Kind] = {}
    for gap in found:
        key = (gap.time_us, gap.ideal_us, gap.losses)
        kinds.setdefault(key, _Kind(gap)).names.append(gap.name)
    most = sorted(kinds.values(), key=lambda kind: -kind.total_us)[:SHOWN]
    return {
        "run_us": median_us,
        "layers_us": sum(gap.time_us or 0.0 for gap in found),
        "products_us": _ideal_us(found, "products"),
        "bytes_us": _ideal_us(found, "bytes"),
        "kinds": [_described(kind) for kind in most],
    }


def _ideal_us(found: tuple[Gap, ...], bound: str) -> float:
    return sum(gap.ideal_us or 0.0 for gap in found if gap.bound == bound)


def _described(kind: _Kind) -> Plain:
    return {
        "layers": kind.names,
        "time_us": kind.gap.time_us,
        "ideal_us": kind.gap.ideal_us,
        "gap_us": kind.gap.gap_us,
        "share": kind.gap.share * len(kind.names),
        "why": [loss.text for loss in kind.gap.losses],
    }
