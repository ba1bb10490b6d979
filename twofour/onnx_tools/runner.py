"""Runs a model on samples for the sake of some of its inner tensors, in ONNX Runtime.

Only what these tensors need is run: the graph is cut behind them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
import onnxruntime as ort
from numpy.typing import NDArray

from twofour.core.data import Batch, Data
from twofour.core.errors import InputError, UnsupportedError
from twofour.onnx_tools.edit import reads
from twofour.onnx_tools.load import model_bytes
from twofour.onnx_tools.reference import REFUSED, add_outputs

BATCH_BYTES = 128 * 2**20
"""The most that the tensors of one batch should take."""
MAX_BATCH = 64
BATCH_IF_UNKNOWN = 4
"""Samples in a run where the shapes do not tell."""

Array = NDArray[Any]


class Runner:
    """The model in ONNX Runtime, with the wanted tensors as its outputs.

    Args:
        model: with the types of its values known; it stays as it is.
        tensors: names of values of the main graph, inputs among them.
        threads: of ONNX Runtime; 0 for as many as there are cores.
        known: names of the values that a run is given, if not all inputs of the model: inputs, and
            inner values, so that what computes these is not run.

    Raises:
        InputError: there is no such tensor.
        UnsupportedError: ONNX Runtime cannot run the model.
    """

    def __init__(
        self,
        model: ir.Model,
        tensors: Sequence[str],
        threads: int,
        known: Sequence[str] | None = None,
    ) -> None:
        """Loads what the tensors need; nothing where all are inputs."""
        inputs = {str(value.name) for value in model.graph.inputs}
        self._inner = [name for name in tensors if name not in inputs]
        self._given = [name for name in tensors if name in inputs]
        self._session = _session(_cut(model, self._inner, known), threads) if self._inner else None

    def run(self, inputs: dict[str, Array]) -> dict[str, Array]:
        """The wanted tensors for one batch.

        Raises:
            InputError: the model fails on it.
        """
        arrays = {name: inputs[name] for name in self._given}
        if self._session is None:
            return arrays
        try:
            found = self._session.run(self._inner, inputs)
        except REFUSED as error:
            shapes = ", ".join(f"{name} {array.shape}" for name, array in inputs.items())
            raise InputError(
                "the model fails on the calibration data",
                [f"inputs: {shapes}", str(error)],
                "check that the float model runs on this data",
            ) from error
        return arrays | dict(zip(self._inner, found, strict=True))


def batch_size(model: ir.Model, tensors: Sequence[str], unknown: int = BATCH_IF_UNKNOWN) -> int:
    """So many samples that the tensors take about `BATCH_BYTES`.

    Args:
        model: with the shapes of its values, as far as they are known.
        tensors: names of values of the main graph.
        unknown: where the shapes do not tell.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    shapes = [values[name].shape for name in tensors if name in values]
    elements = 0
    for shape in shapes:
        dims = shape.dims[1:] if shape is not None else ["unknown"]
        if not all(isinstance(dim, int) for dim in dims):
            return unknown
        elements += math.prod(dim for dim in dims if isinstance(dim, int))
    return min(max(BATCH_BYTES // max(4 * elements, 1), 1), MAX_BATCH)


def not_finite(tensor: str, source: Data, batch: Batch) -> InputError:
    """The error for a tensor that is NaN or infinite on a batch."""
    last = batch.start + len(batch) - 1
    one = last == batch.start
    samples = f"sample {last} makes" if one else f"one of samples {batch.start} to {last} makes"
    return InputError(
        f"tensor {tensor!r} is not finite while calibrating",
        [f"data {source.source}: {samples} it NaN or infinite"],
        "check these samples, and that the float model gives finite results for them",
    )


def _session(content: bytes, threads: int) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.log_severity_level = 3
    try:
        return ort.InferenceSession(content, settings, ["CPUExecutionProvider"])
    except REFUSED as error:
        raise UnsupportedError(
            "ONNX Runtime cannot load the model for calibration",
            [str(error)],
            "check that the float model runs on ONNX Runtime",
        ) from error


def _cut(model: ir.Model, tensors: Sequence[str], known: Sequence[str] | None) -> bytes:
    """The part of the model that computes the tensors from those known, as a file."""
    clone = model.clone()
    missing = set(tensors) - set(add_outputs(clone, tensors))
    if missing:
        raise InputError(
            f"no tensor {min(missing)!r} to calibrate", [], "name one of the main graph"
        )
    wanted = [value for value in clone.graph.outputs if value.name in set(tensors)]
    clone.graph.outputs.clear()
    clone.graph.outputs.extend(wanted)
    if known is not None:
        _start_from(clone, set(known))
    _keep_needed(clone.graph)
    common_passes.RemoveUnusedNodesPass()(clone)  # and initializers
    return model_bytes(clone)


def _start_from(model: ir.Model, known: set[str]) -> None:
    """Makes these values the inputs of the model, and no others."""
    for value in [value for node in model.graph for value in node.outputs]:
        if value.name in known:
            given = ir.Value(name=value.name, type=value.type, shape=value.shape)
            value.name = f"{value.name}_computed"
            value.replace_all_uses_with(given)
            model.graph.inputs.append(given)
    for value in [value for value in model.graph.inputs if value.name not in known]:
        model.graph.inputs.remove(value)


def _keep_needed(graph: ir.Graph) -> None:
    """Removes nodes that no output needs, also those that only a removed node's body reads."""
    needed: set[ir.Node] = set()
    left = list(graph.outputs)
    while left:
        node = left.pop().producer()
        if node is not None and node not in needed:
            needed.add(node)
            left += reads(node)
    for node in [node for node in graph if node not in needed]:
        _detach(node)
        graph.remove(node)


def _detach(node: ir.Node) -> None:
    """Takes a node, and what stands in its bodies, from the readers of what it reads."""
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            for inner in attribute.as_graph():
                _detach(inner)
    for index in range(len(node.inputs)):
        node.replace_input_with(index, None)
