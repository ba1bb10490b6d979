"""SQNR at every tensor that an engine writes, by the model's names, the fusion left as it is.

The engine runs layer by layer (`Session.walk`): the same kernels, and what each wrote is read
before anything takes its place. The model gives the same tensors, a few at a time, so that memory
stays bounded however many there are. Energies are summed over all samples.

What a layer loses is its SQNR held against the worst of what it reads; tensors that the engine does
not write are passed through on the way up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from twofour.compiler.explain import layers_of
from twofour.core.feeds import Run
from twofour.core.progress import Report
from twofour.engine import Layer, Plan, Write
from twofour.evaluate.differences import Array, Sums
from twofour.evaluate.judge import Task
from twofour.onnx_tools.reference import Reference
from twofour.runtime.session import Session

CHUNK_BYTES = 128 << 20
"""Of tensors that the model gives at a time."""


@dataclass(frozen=True)
class LayerDifference:
    """One tensor that the engine writes.

    Attributes:
        value: its name in the model.
        layer: name of the engine's layer, the model's name of its main node.
        op: fused operator.
        precision: of the layer.
        sqnr_db: against the model's tensor.
        cosine: likewise.
        max_abs: largest difference.
        reference_max_abs: largest value of the model's tensor.
        reads: the nearest tensors above that the engine writes, too, or takes as input.
        lost_db: how much less the SQNR is than the least of what it reads; None where all of that
            is exact.
    """

    value: str
    layer: str
    op: str
    precision: str
    sqnr_db: float
    cosine: float
    max_abs: float
    reference_max_abs: float
    reads: tuple[str, ...] = ()
    lost_db: float | None = None


@dataclass(frozen=True)
class Layers:
    """All tensors of the fused engine.

    Attributes:
        rows: in the order in which they are written.
        without: those that cannot be compared, each with the reason.
    """

    rows: tuple[LayerDifference, ...]
    without: tuple[str, ...]


def compare_layers(
    session: Session, model: Reference, task: Task, report: Report, chunk_bytes: int = CHUNK_BYTES
) -> Layers:
    """Walks through the engine and the model on all samples.

    Args:
        session: of the engine.
        model: with the engine's tensors among its `tensors`, see `tensors_of`.
        task: the data.
        report: told the samples done.
        chunk_bytes: of tensors that the model gives at a time.
    """
    plan = session.engine.plan
    known = {*model.tensors, *(each.name for each in model.inputs)}
    walk = _Walk(session, model, _Chunks(plan, known, chunk_bytes))
    for run in task.runs():
        walk.add(run)
        report(run.batch.start + len(run.batch), task.total, "layer by layer")
    return Layers(tuple(_with_losses(walk.rows(), model)), tuple(walk.without(known)))


def tensors_of(plan: Plan) -> list[str]:
    """The model's names of all that the engine writes."""
    writes = (write for layer in plan.layers for write in layer.writes)
    return list(dict.fromkeys(write.source for write in writes if write.source))


class _Chunks:
    """Which of the model's tensors are asked for together: those of consecutive layers."""

    def __init__(self, plan: Plan, known: set[str], chunk_bytes: int) -> None:
        self._chunks: list[list[str]] = [[]]
        self._of: dict[str, int] = {}
        size = 0
        for layer in layers_of(plan, 1):
            for write in layer.writes:
                if write.source not in known or write.source in self._of:
                    continue
                size_bytes = 4 * math.prod(write.tensor.usual_shape)
                if size and size + size_bytes > chunk_bytes:
                    self._chunks.append([])
                    size = 0
                size += size_bytes
                self._chunks[-1].append(write.source)
                self._of[write.source] = len(self._chunks) - 1

    def of(self, source: str) -> list[str] | None:
        """The chunk that a tensor is in; None for one that the model does not have."""
        return self._chunks[self._of[source]] if source in self._of else None


class _Walk:
    """Adds up the differences of every tensor over all runs."""

    def __init__(self, session: Session, model: Reference, chunks: _Chunks) -> None:
        self._session, self._model, self._chunks = session, model, chunks
        self._plan = session.engine.plan
        self._sums: dict[tuple[int, str], tuple[Sums, str]] = {}
        self._shapes: dict[str, str] = {}

    def add(self, run: Run) -> None:
        """One run of both."""
        held: list[str] = []
        values: dict[str, Array] = {}
        for tap in self._session.walk(run.feeds):
            chunk = self._chunks.of(tap.source)
            if chunk is None:
                continue
            if chunk is not held:
                held = chunk
                inner = [name for name in chunk if name not in run.feeds]
                values = dict(run.feeds)
                if inner:
                    values |= self._model.run(run.feeds, inner)
            expected = np.asarray(values[tap.source])
            if expected.shape != tap.value.shape:
                shapes = (
                    f"{list(tap.value.shape)} in the engine, {list(expected.shape)} in the model"
                )
                self._shapes[tap.source] = shapes
                continue
            pair = [_counted(array, run) for array in (expected, tap.value)]
            fresh = Sums(tap.source), tap.source
            sums, _ = self._sums.setdefault((tap.layer, tap.name), fresh)
            sums.add(pair[0], pair[1], run.batch.start)

    def rows(self) -> Iterator[LayerDifference]:
        """What was found, in the order of the engine."""
        for (index, _), (sums, source) in self._sums.items():
            layer, found = self._plan.layers[index], sums.result()
            yield LayerDifference(
                source,
                layer.name,
                layer.op,
                layer.precision,
                found.sqnr_db,
                found.cosine,
                found.max_abs,
                found.reference_max_abs,
            )

    def without(self, known: set[str]) -> Iterator[str]:
        """What could not be compared."""
        for layer in layers_of(self._plan, 1):
            for write in layer.writes:
                if reason := self._reason(write, known):
                    yield f"{write.source or write.tensor.name} of {_named(layer)}: {reason}"

    def _reason(self, write: Write, known: set[str]) -> str:
        if not write.source:
            return "made by the fusion, the model has no such tensor"
        if write.source not in known:
            return "the model has no tensor of this name"
        return self._shapes.get(write.source, "")


def _named(layer: Layer) -> str:
    return f"{layer.name} ({layer.op})"


def _counted(array: Array, run: Run) -> Array:
    """Without the samples that only fill up the run; at least one axis."""
    array = np.atleast_1d(array)
    fed = max((len(each) for each in run.feeds.values() if each.ndim), default=1)
    samples = len(run.batch)
    return array[:samples] if len(array) == fed and samples < fed else array


def _with_losses(rows: Iterator[LayerDifference], model: Reference) -> Iterator[LayerDifference]:
    """Holds each row against what it reads; one that rounds a tensor again, against that one."""
    every = list(rows)
    written = {row.value for row in every}
    sources = model.nearest(written)
    seen: dict[str, float] = {}
    for row in every:
        reads = (row.value,) if row.value in seen else sources.get(row.value, ())
        before = min((seen.get(name, math.inf) for name in reads), default=math.inf)
        lost = None if before == math.inf else _less(before, row.sqnr_db)
        seen[row.value] = row.sqnr_db
        yield replace(row, reads=reads, lost_db=lost)


def _less(before_db: float, after_db: float) -> float:
    return 0.0 if before_db == after_db else before_db - after_db


def marked(rows: Sequence[LayerDifference], most: int = 5, least_db: float = 3.0) -> set[int]:
    """Indices of the rows that lose most: at most so many, and at least so much each."""
    losing = [i for i, row in enumerate(rows) if (row.lost_db or 0.0) >= least_db]
    return set(sorted(losing, key=lambda i: -(rows[i].lost_db or 0.0))[:most])
