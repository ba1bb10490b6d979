"""The layers of an engine and what passes between them, as a report shows them.

    layers, edges = outline(engine.plan)

Times are those measured at build. A float32 time stands in an engine's own candidates only where it
was timed beside another precision, so the plan of the float32 engine may be given beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from twofour.compiler.explain import Explained, explain, layers_of
from twofour.compiler.origins import MODEL
from twofour.compiler.rates import Rates
from twofour.compiler.roofline import gaps
from twofour.core.outcome import Edge, LayerRow
from twofour.core.plan import IN_FLOAT32, is_sparse
from twofour.engine import Layer, Plan


class Outline(NamedTuple):
    """An engine as a report shows it.

    Attributes:
        layers: in the order they run in.
        edges: between them, by their places in `layers`.
    """

    layers: tuple[LayerRow, ...]
    edges: tuple[Edge, ...]


def outline(
    plan: Plan, profile: int = 1, rates: Rates | None = None, floats: Plan | None = None
) -> Outline:
    """The layers and edges of one profile.

    Args:
        plan: of an engine.
        profile: its number, from 1.
        rates: of the machine that it was built on; without, no share of the roofline is known.
        floats: the plan of a float32 engine of the same network, for the times of its products.

    Raises:
        InputError: there is no such profile.
    """
    layers, rows = layers_of(plan, profile), explain(plan, profile)
    ideals = [gap.ideal_us for gap in gaps(plan, rates, profile)] if rates else [None] * len(rows)
    known = _float_times(floats) if floats is not None else {}
    shown = zip(layers, rows, ideals, strict=True)
    return Outline(
        tuple(_row(layer, row, ideal, known) for layer, row, ideal in shown),
        tuple(dict.fromkeys(_edges(plan, profile))),
    )


def _row(
    layer: Layer, row: Explained, ideal_us: float | None, floats: Mapping[str, float]
) -> LayerRow:
    roofline = min(ideal_us / layer.time_us, 1.0) if ideal_us and layer.time_us else None
    return LayerRow(
        layer.name,
        layer.op,
        layer.shape,
        layer.precision,
        layer.pattern,
        f"{layer.tactic} {layer.config}".strip(),
        _reason(layer, row),
        layer.time_us,
        row.share,
        row.best_dense_us,
        row.best_sparse_us,
        _float_us(layer, floats),
        roofline,
    )


def _reason(layer: Layer, row: Explained) -> str:
    """Why it runs as it does; what `explain` says, and of a sparse layer how much that gains."""
    found = list(row.why)
    if is_sparse(layer.tactic) and row.gain is not None:
        found.insert(0, f"sparse is {row.gain:.2f} times as fast as the best dense kernel")
    if row.cause:
        found.append(row.cause)
    return "; ".join(found)


def _float_us(layer: Layer, floats: Mapping[str, float]) -> float | None:
    """The best time of the layer in float32."""
    if layer.precision == "float32":
        timed = [c.time_us for c in layer.candidates if c.time_us is not None]
        return min(timed, default=None)
    beside = [c for c in layer.candidates if c.tactic.endswith(IN_FLOAT32)]
    timed = [c.time_us for c in beside if c.time_us is not None]
    if layer.pattern and layer.name in floats:
        timed.append(floats[layer.name])
    return min(timed, default=None)


def _float_times(plan: Plan) -> dict[str, float]:
    """The time of each product of a float32 engine, by its name."""
    return {
        layer.name: layer.time_us
        for layer in layers_of(plan, 1)
        if layer.pattern and layer.precision == "float32" and layer.time_us is not None
    }


def _edges(plan: Plan, profile: int) -> Iterator[Edge]:
    """What passes between layers, then what leaves the network."""
    found = plan.profiles[profile - 1]
    numbers = [number for step in found.steps for number in step.layers]
    places = {number: place for place, number in enumerate(numbers)} | {MODEL: -1}
    for number in numbers:
        for read in plan.layers[number].reads:
            if read.layer in places:
                yield Edge(places[read.layer], places[number], read.tensor)
    outputs = {info.name for info in found.outputs}
    for number in numbers:
        for write in plan.layers[number].writes:
            if write.at is None and write.tensor.name in outputs:
                yield Edge(places[number], -1, write.tensor.name)
