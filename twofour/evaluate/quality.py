"""The quality of a quantized model: its tensors, its layers, and what integer kernels move.

    tensors    what each scale keeps and costs, from calibration (`onnx_tools/quality.py`)
    layers     each layer's output against that of the float model, both run on some samples
    moved      each byte tensor of an engine against the same one of the Q/DQ file

An engine fuses the float operators between Q/DQ pairs into integer ones that round in other places
(docs/architecture.md, "Numerics"), so a value between two steps may go to the other one. Each layer
is held against what the file makes of the same bytes: that is its own share. What was moved goes on
through the network, so the tensors of both, run as a whole, differ more with every layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np

from twofour.compiler.build import BuildOptions, compile_model
from twofour.compiler.prunable import Network
from twofour.core.data import DataLike, as_data
from twofour.core.errors import Error
from twofour.core.feeds import Run
from twofour.core.progress import Report, Stage, unseen
from twofour.engine import Write
from twofour.evaluate.differences import Array, Sums
from twofour.evaluate.judge import Task
from twofour.onnx_tools.quality import (
    Rounded,
    TensorQuality,
    cut_at,
    rounded_values,
    tensor_quality,
)
from twofour.onnx_tools.quantize import Quantized
from twofour.onnx_tools.reference import Reference
from twofour.onnx_tools.revert import float_switches
from twofour.onnx_tools.runner import batch_size
from twofour.runtime.session import Session

LAYER_SAMPLES = 64
MOVED_SAMPLES = 16


@dataclass(frozen=True)
class LayerQuality:
    """What a layer computes, against the float model.

    Attributes:
        layer: name of the node; of an output of the model, that output's.
        op: its operator; "output" for one.
        sqnr_db: of what it computes, everything before it quantized, too.
        cosine: likewise.
    """

    layer: str
    op: str
    sqnr_db: float
    cosine: float


@dataclass(frozen=True)
class Moved:
    """A byte tensor of the engine against that of the Q/DQ file.

    Attributes:
        name: of the value that is rounded.
        values: compared.
        own: how many differ, given the bytes that the engine's layer reads.
        own_by_more: of them, by more than one step.
        by_one: how many differ by one step, both run as a whole.
        by_more: by more than one step.
    """

    name: str
    values: int
    own: int
    own_by_more: int
    by_one: int
    by_more: int


@dataclass(frozen=True)
class Quality:
    """The report.

    Attributes:
        tensors: the lowest SQNR first.
        layers: outputs of the model, then layers in their order.
        layer_samples: that `layers` were judged on.
        moved: byte tensors in the order in which the engine writes them.
        moved_samples: that `moved` were counted on.
        notes: what could not be measured, and why.
    """

    tensors: tuple[TensorQuality, ...]
    layers: tuple[LayerQuality, ...] = ()
    layer_samples: int = 0
    moved: tuple[Moved, ...] = ()
    moved_samples: int = 0
    notes: tuple[str, ...] = ()


def quality(
    quantized: Quantized, model: Network, data: DataLike | None, stage: Stage = unseen
) -> Quality:
    """Measures a quantized model.

    Args:
        quantized: what `quantize` decided.
        model: its model, or one with some of its layers left float.
        data: samples as for calibration; None leaves out all but the tensors.
        stage: shows the progress.

    Raises:
        InputError: the data does not fit.
    """
    tensors = tensor_quality(model, quantized.floats, quantized.histograms)
    if data is None:
        return Quality(tensors, notes=("no data was given: layers were not run",))
    forms = Reference(model).inputs
    task = Task(as_data(data, [form.name for form in forms]), forms, 1)
    with stage("judging layers") as report:
        layers, layer_samples = _layers(quantized, model, task, report)
    with stage("counting what integer kernels move") as report:
        moved, moved_samples, notes = _moved(model, task, report)
    return Quality(tensors, layers, layer_samples, moved, moved_samples, notes)


def _layers(
    quantized: Quantized, model: Network, task: Task, report: Report
) -> tuple[tuple[LayerQuality, ...], int]:
    """The outputs and each layer, and on how many samples."""
    nodes = {str(node.name): node for node in quantized.floats.graph}
    place = {name: index for index, name in enumerate(nodes)}
    switches = sorted(float_switches(model, quantized.floats), key=lambda s: place[s.layer])
    ops = {str(value.name): (str(value.name), "output") for value in model.graph.outputs}
    for switch in switches:
        ops.setdefault(str(nodes[switch.layer].outputs[0].name), (switch.layer, switch.op))
    names = list(ops)
    most = batch_size(quantized.floats, names)
    pair = Reference(quantized.floats, names), Reference(model, names)
    sums = {name: Sums(name) for name in names}
    done = 0
    task = Task(task.data, task.forms, most)
    for run in task.runs(LAYER_SAMPLES):
        expected, got = (each.run(run.feeds, names) for each in pair)
        for name in names:
            sums[name].add(np.atleast_1d(expected[name]), np.atleast_1d(got[name]), 0)
        done = run.batch.start + len(run.batch)
        report(done, None, "")
    results = {name: each.result() for name, each in sums.items()}
    found = (LayerQuality(*ops[name], each.sqnr_db, each.cosine) for name, each in results.items())
    return tuple(found), done


@dataclass
class _Counts:
    values: int = 0
    own: int = 0
    own_by_more: int = 0
    by_one: int = 0
    by_more: int = 0

    def add(self, engine: Array, alone: Array, whole: Array) -> None:
        """Bytes of the engine, and of the file given the engine's and run as a whole."""
        off, all_off = (np.abs(engine.astype(np.int64) - each) for each in (alone, whole))
        self.values += off.size
        self.own += int((off > 0).sum())
        self.own_by_more += int((off > 1).sum())
        self.by_one += int((all_off == 1).sum())
        self.by_more += int((all_off > 1).sum())


class _Walks:
    """The engine and the file, run on the same samples."""

    def __init__(self, session: Session, model: Network) -> None:
        """Loads the file twice: as it is, and cut where the engine writes bytes of it."""
        self._session = session
        plan = session.engine.plan
        written = {write.source: write for layer in plan.layers for write in layer.writes}
        self._rounded = {
            each.value: each
            for each in rounded_values(model)
            if each.value in written and _same(written[each.value], each)
        }
        names = [each.quantized for each in self._rounded.values()]
        cut, self._given = cut_at(model, names)
        self._whole, self._alone = Reference(model, names), Reference(cut, names)
        self.counts: dict[str, _Counts] = {}

    def add(self, run: Run) -> None:
        """One run of each."""
        found = {}
        for tap in self._session.walk(run.feeds):
            each = self._rounded.get(tap.source)
            if each is not None:
                steps = np.rint(tap.value / np.float32(each.scheme.scale)) + each.scheme.zero_point
                found[each.value] = steps.astype(each.scheme.dtype)
        if not found:
            return
        names = {value: self._rounded[value].quantized for value in found}
        whole = self._whole.run(run.feeds, list(names.values()))
        given = {self._given[name]: found[value] for value, name in names.items()}
        alone = self._alone.run({**run.feeds, **given}, list(names.values()))
        for value, name in names.items():
            counts = self.counts.setdefault(value, _Counts())
            counts.add(found[value], alone[name], whole[name])


def _same(write: Write, rounded: Rounded) -> bool:
    """Whether the engine writes the value as bytes of the scale that the file has."""
    scale = np.float32(rounded.scheme.scale)
    return len(write.scale) == 1 and np.float32(write.scale[0]) == scale


def _moved(
    model: Network, task: Task, report: Report
) -> tuple[tuple[Moved, ...], int, tuple[str, ...]]:
    """Counts of each byte tensor, on how many samples, and why there are none."""
    samples = list(islice(_alike(task), MOVED_SAMPLES))
    options = BuildOptions(tuning_effort=0, race=False, shapes=dict(_shapes(samples[0])))
    try:
        engine = compile_model(model, options)
    except Error as e:
        return (), 0, (f"no engine to count what integer kernels move: {e.what}",)
    with Session(engine) as session:
        walks = _Walks(session, model)
        for index, run in enumerate(samples):
            walks.add(run)
            report(index + 1, len(samples), "")
    found = tuple(Moved(name, **vars(counts)) for name, counts in walks.counts.items())
    notes = () if found else ("the engine writes no bytes that the file has, too",)
    return found, len(samples), notes


def _alike(task: Task) -> Iterator[Run]:
    """Of the first samples, those that have the most frequent shapes."""
    counts = Counter(_shapes(run) for run in task.runs(LAYER_SAMPLES))
    usual = max(counts, key=lambda shapes: counts[shapes])
    return (run for run in task.runs(LAYER_SAMPLES) if _shapes(run) == usual)


def _shapes(run: Run) -> tuple[tuple[str, tuple[int, ...]], ...]:
    return tuple((name, array.shape) for name, array in run.feeds.items())
