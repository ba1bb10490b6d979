"""What each choice costs, measured alone: the error of a network in which one unit has it.

    error[unit, pattern]     the unit's weights pruned, all of it float32
    error[unit, int8]        the unit rounded, everything else float32 and dense
    error[unit, bf16]        the whole network in bfloat16, shared out by parameters: it is small

The harm of "2:4 int8" is the sum of both parts. They are measured on ONNX Runtime, in one process
or several, and each is kept in the cache (`core/scan.py`).
"""

from __future__ import annotations

import functools
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from twofour.compiler.forms import BF16, INT8
from twofour.compiler.prunable import Network as Model
from twofour.core.data import DataLike
from twofour.core.progress import Stage
from twofour.core.scan import Cache, Item, Result, Spread, Work, key_of, scan
from twofour.evaluate.feeding import model_predictor
from twofour.evaluate.judging import Bench, Setup
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.reference import Reference
from twofour.onnx_tools.revert import float_switches, switched, with_biases_of
from twofour.search.apply import ApplyOptions, Catalogue, quantized, with_weights
from twofour.search.choices import Choice
from twofour.search.judging import Expected, Judged, judge
from twofour.search.network import owners
from twofour.search.units import Unit

FORMAT = 1  # of what a result means; part of a key
FIGURES = (
    "figure",
    "drop",
    "drop_error",
    "error",
    "speed",
    "speed_low",
    "speed_high",
    "time_us",
    "dense",
    "samples",
    "seconds",
)
"""Of a line of the cache; null where a line has none of them."""
_ALIKE = 1.005  # times as fast: below that the less harmful choice is as good


def line(seconds: float, **figures: float | None) -> Result:
    """A line of the cache; what is no number is null."""
    known = {**dict.fromkeys(FIGURES), **figures, "seconds": seconds}
    return {n: None if v is None or not math.isfinite(v) else v for n, v in known.items()}


def figures_of(bench: Bench, judged: Judged) -> dict[str, float | None]:
    """What the metric says of a network, beside its error."""
    metric, setup = bench.metric, bench.setup
    drop = 0.0 - metric.gain(setup.figure, judged.kept.figure)  # 0, not -0
    error = metric.error(setup.dense, judged.kept) if setup.dense else None
    return {
        "figure": judged.kept.figure,
        "drop": drop,
        "drop_error": error,
        "error": judged.error,
    }


@dataclass(frozen=True)
class Harm:
    """What one change of one unit costs.

    Attributes:
        unit: its name.
        part: a pattern, "int8" or "bf16".
        error: of the outputs; infinite where they are no numbers.
        drop: of the metric; None where it was not judged, or gave no number.
    """

    unit: str
    part: str
    error: float
    drop: float | None


@dataclass(frozen=True)
class Harms:
    """What the changes of all units cost.

    Attributes:
        by_part: name of a unit, and a part -> its harm.
    """

    by_part: Mapping[tuple[str, str], Harm]

    def parts(self, unit: Unit, choice: Choice) -> dict[str, float]:
        """The errors that a choice consists of."""
        return {part: self.by_part[unit.name, part].error for part in parts_of(choice)}

    def knows(self, unit: Unit, choice: Choice) -> bool:
        """Whether all parts of a choice were measured, and are numbers."""
        found = [self.by_part.get((unit.name, part)) for part in parts_of(choice)]
        return all(each is not None and math.isfinite(each.error) for each in found)

    def worth(self, unit: Unit) -> tuple[Choice, ...]:
        """The choices that are faster than every less harmful one of their precision."""
        found: list[Choice] = []
        known = [choice for choice in unit.times if self.knows(unit, choice)]
        known.sort(key=lambda c: (sum(self.parts(unit, c).values()), unit.times[c], c))
        for choice in known:
            same = [unit.times[c] for c in found if c.precision == choice.precision]
            if all(us > _ALIKE * unit.times[choice] for us in same):
                found.append(choice)
        return tuple(sorted(found))


def parts_of(choice: Choice) -> tuple[str, ...]:
    """What is measured of a choice: its pattern, its precision."""
    precision = choice.precision if choice.precision in (INT8, BF16) else ""
    return tuple(part for part in (choice.pattern, precision) if part)


@dataclass(frozen=True)
class Scanner:
    """Measures harms.

    Attributes:
        setup: the model, data and metric, the float model judged.
        identity: of all that results depend on.
        units: of the model.
        catalogue: of pruned weights.
        data: to calibrate with.
        apply: how to prune and to quantize.
        spread: who works.
        cache: of results.
    """

    setup: Setup
    identity: tuple[str, ...]
    units: tuple[Unit, ...]
    catalogue: Catalogue
    data: DataLike
    apply: ApplyOptions
    spread: Spread
    cache: Cache = field(compare=False)

    def scan(self, stage: Stage) -> dict[tuple[str, str], Harm]:
        """Prunes and rounds each unit alone."""
        items = [item for unit in self.units for item in self._items(unit)]
        known = all(item.key in self.cache.results for item in items)
        with tempfile.TemporaryDirectory(prefix="twofour-") as folder:
            start = functools.partial(_start, self.setup, Path(folder))
            if not known:
                self._write(Path(folder), items, stage)
            with stage("each layer alone") as report:
                results = scan(items, start, self.cache, report=report, spread=self.spread)
        found = {}
        for item, result in zip(items, results, strict=True):
            part, layers = item.argument
            error = result["error"]
            found[layers[0], part] = Harm(
                layers[0], part, math.inf if error is None else error, result["drop"]
            )
        return found

    def _items(self, unit: Unit) -> list[Item]:
        parts = dict.fromkeys(
            part for choice in sorted(unit.times) for part in parts_of(choice) if part != BF16
        )
        return [
            Item(
                f"{unit.name} {part}",
                key_of(FORMAT, *self.identity, "alone", part, *unit.layers),
                (part, unit.layers),
            )
            for part in parts
        ]

    def _write(self, folder: Path, items: Sequence[Item], stage: Stage) -> None:
        """What the processes read."""
        parts = dict.fromkeys(item.argument[0] for item in items)
        for part in parts:
            if part != INT8:
                save_model(self.catalogue.network(part), folder / _file(part))
        model = self.catalogue.model
        save_model(model, folder / _file(""))
        if INT8 in parts:
            everything = {n: Choice("", INT8) for unit in self.units for n in unit.layers}
            with stage("calibrating") as report:
                made = quantized(model, everything, self.data, self.apply, report)
            save_model(made.model, folder / _file(INT8))
            save_model(made.floats, folder / _file(f"{INT8} floats"))


def _file(part: str) -> str:
    return f"{part.replace('/', '-').replace(':', '-') or 'dense'}.onnx"


def _start(setup: Setup, folder: Path) -> Work:
    """The function of a scan: a part, and layers -> what the network is worth."""
    return _Alone.of(setup, folder).work


@dataclass(frozen=True)
class _Alone:
    """Networks in which one unit is changed."""

    bench: Bench
    expected: Expected
    folder: Path
    model: Model
    models: dict[str, Model] = field(default_factory=dict)

    @staticmethod
    def of(setup: Setup, folder: Path) -> _Alone:
        bench = Bench.of(setup)
        predict = model_predictor(Reference(bench.model, threads=setup.threads, optimized=True))
        expected, _ = Expected.of(bench.task, predict)
        return _Alone(bench, expected, folder, load_model(folder / _file("")))

    def work(self, argument: tuple[str, tuple[str, ...]]) -> Result:
        began = time.monotonic()
        part, layers = argument
        model = self._rounded(layers) if part == INT8 else self._pruned(part, layers)
        reference = Reference(model, threads=self.bench.setup.threads, optimized=True)
        judged = judge(self.bench.task, model_predictor(reference), self.expected)
        return line(time.monotonic() - began, **figures_of(self.bench, judged))

    def _pruned(self, pattern: str, layers: Sequence[str]) -> Model:
        pruned = self._loaded(pattern)
        return with_weights(self.model, dict.fromkeys(layers, pattern), {pattern: pruned})

    def _rounded(self, layers: Sequence[str]) -> Model:
        whole, floats = self._loaded(INT8), self._loaded(f"{INT8} floats")
        owner = owners(floats)
        switches = float_switches(whole, floats)
        others = [each for each in switches if owner.get(each.layer) not in layers]
        return switched(with_biases_of(whole, floats)[0], others)

    def _loaded(self, part: str) -> Model:
        if part not in self.models:
            self.models[part] = load_model(self.folder / _file(part))
        return self.models[part]


def bf16_harms(
    units: Sequence[Unit], error: float, drop: float | None
) -> dict[tuple[str, str], Harm]:
    """Of the whole network in bfloat16, shared out by parameters.

    Args:
        units: of the network.
        error: of all of it in bfloat16.
        drop: likewise.
    """
    taking = [unit for unit in units if any(c.precision == BF16 for c in unit.times)]
    whole = sum(unit.parameters for unit in taking)
    return {
        (unit.name, BF16): Harm(
            unit.name,
            BF16,
            error * unit.parameters / whole,
            None if drop is None else drop * unit.parameters / whole,
        )
        for unit in taking
    }
