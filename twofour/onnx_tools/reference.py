"""What an ONNX file means: ONNX Runtime without any graph optimisation.

Each operator is run as the file has it, one after the other. Optimised, ONNX Runtime would fuse
Q/DQ pairs into integer operators of its own and add up sums in another order, so that a difference
would not tell whose it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

from twofour.core.errors import InputError, UnsupportedError
from twofour.core.feeds import Form
from twofour.onnx_tools.edit import Array
from twofour.onnx_tools.infer import infer_shapes
from twofour.onnx_tools.load import model_bytes

REFUSED = (
    ort_errors.Fail,
    ort_errors.InvalidArgument,
    ort_errors.InvalidGraph,
    ort_errors.InvalidProtobuf,
    ort_errors.NotImplemented,
    ort_errors.RuntimeException,
)
"""What ONNX Runtime raises where it does not take a model or its inputs."""


class Reference:
    """A model as it is written, ready to run.

    Args:
        model: stays as it is.
        tensors: names of inner values of the main graph that can be asked for, too; those that it
            does not have are passed over, see `tensors`.
        threads: of ONNX Runtime; 0 for as many as there are cores.
        optimized: whether ONNX Runtime may fuse operators: faster, and what the network is worth
            is the same, but a difference would not tell whose it is. Q/DQ pairs stay pairs, around
            float operators: sums of its integer ones saturate on CPUs without such instructions.

    Raises:
        UnsupportedError: ONNX Runtime refuses the model.
    """

    def __init__(
        self,
        model: ir.Model,
        tensors: Sequence[str] = (),
        threads: int = 0,
        *,
        optimized: bool = False,
    ) -> None:
        """Loads the model with the tensors as further outputs."""
        self.inputs = tuple(input_form(value) for value in model.graph.inputs)
        self.outputs = tuple(str(value.name) for value in model.graph.outputs)
        self._graph = model.graph
        clone = model.clone()
        infer_shapes(clone)
        self.tensors = add_outputs(clone, tensors)
        options = ort.SessionOptions()
        level = ort.GraphOptimizationLevel
        options.graph_optimization_level = (
            level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        )
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 4  # what goes wrong is raised, not printed as well
        try:
            content = model_bytes(clone)
            self._session = ort.InferenceSession(content, options, ["CPUExecutionProvider"])
        except REFUSED as error:
            raise UnsupportedError(
                "ONNX Runtime cannot load the model that is the reference",
                [str(error)],
                "check that the model runs on ONNX Runtime",
            ) from error

    def run(self, inputs: Mapping[str, Array], names: Sequence[str] = ()) -> dict[str, Array]:
        """Computes the outputs, or the values asked for.

        Args:
            inputs: by name.
            names: of outputs or of `tensors`; by default the outputs.

        Raises:
            InputError: the model fails on these inputs.
        """
        names = names or self.outputs
        try:
            found = self._session.run(list(names), dict(inputs))
        except (*REFUSED, ValueError) as error:
            shapes = ", ".join(f"{name} {a.dtype} {list(a.shape)}" for name, a in inputs.items())
            raise InputError(
                "the model fails on the data",
                [f"inputs: {shapes}", str(error)],
                "check that the data has the types and shapes of the model's inputs",
            ) from error
        return dict(zip(names, found, strict=True))

    def nearest(self, names: Collection[str]) -> dict[str, tuple[str, ...]]:
        """For each of these values, the nearest ones above it that are among them, or inputs."""
        values = {str(v.name): v for node in self._graph for v in node.outputs}
        ends = {*names, *(each.name for each in self.inputs)}
        return {name: _above(values[name], ends) for name in names if name in values}


def _above(value: ir.Value, ends: Collection[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    seen: set[ir.Value] = set()
    left = [value]
    while left:
        node = left.pop().producer()
        for source in () if node is None else node.inputs:
            if source is None or source in seen:
                continue
            seen.add(source)
            if source.name in ends:
                found[str(source.name)] = None
            else:
                left.append(source)
    return tuple(found)


def input_form(value: ir.Value) -> Form:
    """What the model says of an input."""
    dims = None if value.shape is None else [_dim(dim) for dim in value.shape]
    dtype = "" if value.dtype is None else value.dtype.numpy().name
    return Form(str(value.name), dtype, None if dims is None else tuple(dims))


def _dim(dim: int | ir.SymbolicDim) -> int | str:
    return dim if isinstance(dim, int) else dim.value or "?"


def add_outputs(model: ir.Model, tensors: Sequence[str]) -> tuple[str, ...]:
    """Makes values of the main graph outputs, too.

    Args:
        model: changed.
        tensors: names of values; those that no node computes are passed over.

    Returns:
        The names of those that are outputs now.
    """
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    given = {str(value.name) for value in model.graph.outputs}
    for name in tensors:
        if name in values and name not in given:
            value = values[name]
            value.type = value.type or ir.TensorType(ir.DataType.FLOAT)
            model.graph.outputs.append(value)
    return tuple(name for name in dict.fromkeys(tensors) if name in values)
