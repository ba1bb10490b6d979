"""Units: layers that get one choice together, and what each choice takes, measured.

The model is built in its uniform forms (`compiler/forms.py`), every layer with the same choice, and
the plans tell what each layer takes. Layers that the compiler makes one (the joint product of q, k
and v) or that share a weight are one unit. A layer without a weight (attention, a pooling, a
conversion) counts with the unit that its nodes belong to; so the times of all units are together
that of the whole form.

What passes between units of different precisions has to be converted, which no uniform form
shows. Forms in which the units take turns show it (`Passing`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from twofour.compiler.build import BuildOptions, compile_model
from twofour.compiler.explain import FALLBACK
from twofour.compiler.forms import BF16, INT8, WORDS, Form, Forms
from twofour.core.plan import Plan
from twofour.core.progress import Report, Stage
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.placeholder import placeholder_quantize
from twofour.onnx_tools.prepare import prepare
from twofour.search.choices import BASELINE, Choice
from twofour.search.names import exactly
from twofour.search.network import Layer, Passage, owners, passages

Pair = tuple[str, str]
Plans = Mapping[Form, Plan]


@dataclass(frozen=True)
class Unit:
    """Layers with one choice.

    Attributes:
        layers: their names, in order.
        parameters: of their weights.
        times: microseconds that each choice takes that has kernels.
    """

    layers: tuple[str, ...]
    parameters: int
    times: Mapping[Choice, float]

    @property
    def name(self) -> str:
        """That of the first layer."""
        return self.layers[0]


@dataclass(frozen=True)
class Network:
    """A model as a search sees it.

    Attributes:
        units: in order.
        passages: between units, by their indices.
        per_element: microseconds that an element takes to pass between two precisions; pairs in
            alphabetical order.
    """

    units: tuple[Unit, ...]
    passages: tuple[tuple[int, int, int], ...]
    per_element: Mapping[Pair, float]

    @property
    def choices(self) -> tuple[Choice, ...]:
        """All that some unit has."""
        return tuple(sorted({choice for unit in self.units for choice in unit.times}))


def build_plans(
    forms: Forms, patterns: Sequence[str], options: BuildOptions, stage: Stage
) -> Plans:
    """Builds every uniform form.

    Raises:
        UnsupportedError: one cannot be compiled.
    """
    plans = {}
    for form in forms.list(patterns):
        with stage(f"times: {form}") as report:
            plans[form] = forms.build(form, options, partial(building, report)).plan
    return plans


def building(report: Report, done: int, total: int | None, what: str) -> None:
    """Progress of a build."""
    report(done, total, f"building {what}")


def find_units(layers: Sequence[Layer], plans: Plans, owner: Mapping[str, str]) -> tuple[Unit, ...]:
    """Brings the plans together.

    Args:
        layers: of the model.
        plans: of its uniform forms.
        owner: the layer that each node belongs to.
    """
    groups = _groups(layers, plans)
    index = {name: at for at, group in enumerate(groups) for name in group}
    sizes = {layer.name: layer.parameters for layer in layers}
    times: list[dict[Choice, float]] = [{} for _ in groups]
    for form, plan in plans.items():
        for at, us in enumerate(_times(form, plan, len(groups), index, owner)):
            if us is not None:
                times[at][Choice.of(form)] = us
    return tuple(
        Unit(
            group,
            sum(sizes[name] for name in group),
            own if BASELINE in own else {BASELINE: 0.0},  # ONNX Runtime runs it, whatever it is
        )
        for group, own in zip(groups, times, strict=True)
    )


def _groups(layers: Sequence[Layer], plans: Plans) -> list[tuple[str, ...]]:
    """Layers that are one somewhere, in the order of their first ones."""
    group = {layer.name: {layer.name} for layer in layers}
    by_weight: dict[str, list[str]] = {}
    for layer in layers:
        by_weight.setdefault(layer.weight, []).append(layer.name)
    together: Iterable[Sequence[str]] = [
        *by_weight.values(),
        *([n for n in each.source if n in group] for p in plans.values() for each in p.layers),
    ]
    for names in together:
        joint = set().union(*(group[name] for name in names)) if len(names) > 1 else set()
        group |= dict.fromkeys(joint, joint)
    order = [layer.name for layer in layers]
    whole = dict.fromkeys(tuple(n for n in order if n in group[name]) for name in order)
    return list(whole)


def _times(
    form: Form, plan: Plan, count: int, index: Mapping[str, int], owner: Mapping[str, str]
) -> list[float | None]:
    """What each unit takes in a form; None where it has no kernel of that form."""
    sums = [0.0] * count
    own = [0] * count
    missing = set()
    waiting = 0.0  # of what stands before the unit that it is for
    last = 0
    for layer in plan.layers:
        names = [name for name in layer.source if name in index]
        at = index[names[0]] if names else _unit_of(layer.source, index, owner)
        if at is None:
            waiting += layer.time_us or 0.0
            continue
        sums[at] += waiting + (layer.time_us or 0.0)
        waiting, last = 0.0, at
        if names:
            own[at] += 1
            fits = layer.precision == WORDS[form.precision].lower()
            if not fits or (layer.pattern if form.pattern else "") != form.pattern:
                missing.add(at)
            if layer.tactic == FALLBACK or layer.time_us is None:
                missing.add(at)
    sums[last] += waiting
    return [None if at in missing or not own[at] else us for at, us in enumerate(sums)]


def _unit_of(
    nodes: Iterable[str], index: Mapping[str, int], owner: Mapping[str, str]
) -> int | None:
    """The last unit that these nodes belong to; None where they belong to none."""
    known = [index[owner[node]] for node in nodes if owner.get(node) in index]
    return max(known, default=None)


# Passages.


def unit_passages(
    units: Sequence[Unit], found: Iterable[Passage]
) -> tuple[tuple[int, int, int], ...]:
    """Between units: the index of the source, that of the target, the elements."""
    index = {name: at for at, unit in enumerate(units) for name in unit.layers}
    sums: dict[tuple[int, int], int] = {}
    for each in found:
        if each.source in index and each.target in index:
            ends = index[each.source], index[each.target]
            if ends[0] != ends[1]:
                sums[ends] = sums.get(ends, 0) + each.elements
    return tuple((*ends, elements) for ends, elements in sums.items() if elements)


def pair_of(a: str, b: str) -> Pair:
    """Two precisions in alphabetical order."""
    return (a, b) if a < b else (b, a)


def crossing(precisions: Sequence[str], between: Iterable[tuple[int, int, int]]) -> dict[Pair, int]:
    """Elements that pass between units of different precisions.

    Args:
        precisions: of each unit.
        between: as of `Network.passages`.
    """
    found: dict[Pair, int] = {}
    for source, target, elements in between:
        if precisions[source] != precisions[target]:
            pair = pair_of(precisions[source], precisions[target])
            found[pair] = found.get(pair, 0) + elements
    return found


@dataclass(frozen=True)
class Passing:
    """Measures what passes between precisions, by a form in which units take turns.

    Attributes:
        forms: the model.
        units: of it.
        between: as of `Network.passages`.
        options: how to build.
    """

    forms: Forms
    units: tuple[Unit, ...]
    between: tuple[tuple[int, int, int], ...]
    options: BuildOptions

    def measure(self, stage: Stage) -> dict[Pair, float]:
        """Microseconds for an element, of each pair of precisions."""
        known = sorted(self.forms.bases)
        pairs = [(a, b) for i, a in enumerate(known) for b in known[i + 1 :]]
        found = {}
        for pair in pairs if self.between else ():
            turns = [self._turn(unit, pair, at) for at, unit in enumerate(self.units)]
            elements = crossing(turns, self.between).get(pair, 0)
            if elements:
                with stage(f"times: {WORDS[pair[0]]} beside {WORDS[pair[1]]}") as report:
                    took_us = self._built_us(turns, report)
                uniform_us = sum(
                    unit.times[Choice("", turn)]
                    for unit, turn in zip(self.units, turns, strict=True)
                )
                found[pair] = max(took_us - uniform_us, 0.0) / elements
        return found

    def _turn(self, unit: Unit, pair: Pair, at: int) -> str:
        wanted = pair[at % 2], pair[1 - at % 2], BASELINE.precision
        return next((p for p in wanted if Choice("", p) in unit.times), BASELINE.precision)

    def _built_us(self, turns: Sequence[str], report: Report) -> float:
        graph = next(base for name, base in self.forms.bases.items() if name != INT8)
        owner = owners(graph)
        turn_of = {
            name: turn for unit, turn in zip(self.units, turns, strict=True) for name in unit.layers
        }
        if INT8 in turns:
            stay = [n for n, layer in owner.items() if turn_of.get(layer) != INT8]
            exclude = exactly(stay, prepare(graph))
            graph = placeholder_quantize(graph, QuantizeOptions(exclude=exclude))
        options = replace(
            self.options,
            sparsity="disable",
            race=False,
            bf16=BF16 in turns,
            stay_float32=frozenset(n for n, turn in turn_of.items() if turn == BASELINE.precision),
        )
        plan = compile_model(graph, options, partial(building, report)).plan
        return sum(layer.time_us or 0.0 for layer in plan.layers)


def measured_network(
    forms: Forms,
    layers: Sequence[Layer],
    patterns: Sequence[str],
    options: BuildOptions,
    stage: Stage,
) -> Network:
    """Units, their times, and what passes between them.

    Args:
        forms: of the model.
        layers: of the model.
        patterns: those wanted.
        options: how to build.
        stage: shows the progress.

    Raises:
        UnsupportedError: a form cannot be compiled.
    """
    plans = build_plans(forms, patterns, options, stage)
    graph = next(base for name, base in forms.bases.items() if name != INT8)
    owner = owners(graph)
    units = find_units(layers, plans, owner)
    between = unit_passages(units, passages(graph, owner))
    per_element = Passing(forms, units, between, options).measure(stage)
    return Network(units, between, per_element)
