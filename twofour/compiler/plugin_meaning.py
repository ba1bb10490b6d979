"""What a plugin's operator computes by its meaning: the oracle of its kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, helper

from twofour.compiler.native import constant
from twofour.compiler.native_plugin import PluginOp
from twofour.compiler.second_opinion import ERRORS, open_session
from twofour.core.bfloat16 import from_bf16, to_bf16
from twofour.core.errors import UnsupportedError
from twofour.core.numerics import quantize
from twofour.core.plugins import Operand, Operator, Problem, c_strides
from twofour.onnx_tools.plugins import function_at
from twofour.onnx_tools.plugins_quantized import QuantizedOperator, computed

Array = NDArray[Any]
_OPSET = 21
_FIX = "mend the plugin; until then, build without it installed"


def samples(operator: Operator, problem: Problem) -> list[Array]:
    """Arrays to compare and time kernels with, one for each input that is there.

    bfloat16 is float32 here, with values that it has.

    Raises:
        UnsupportedError: the plugin gives none that fit.
    """
    rng = np.random.default_rng(0)
    inputs = [each for each in problem.inputs if each is not None]
    running = [each for each in inputs if each.constant is None]
    base = operator.base if isinstance(operator, QuantizedOperator) else operator
    if base is not None and base.samples is not None:
        try:
            given = [np.asarray(array) for array in base.samples(_in_float(problem), rng)]
        except Exception as error:
            raise _broken(operator, f"its samples: {type(error).__name__}: {error}") from error
        given = [_quantized(*pair) for pair in zip(running, given, strict=False)]
    else:
        given = [_sample(operator, each, rng) for each in running]
    shapes = [array.shape for array in given]
    if shapes != [each.shape for each in running]:
        raise _broken(operator, f"its samples have the shapes {shapes}")
    rest = iter(given)
    return [_typed(each, next(rest)) if each.constant is None else each.constant for each in inputs]


def _in_float(problem: Problem) -> Problem:
    """The problem of the operator whose quantized form this is of; others as they are."""

    def real(operand: Operand) -> Operand:
        if operand.scale is None:
            return operand
        strides = c_strides(operand.shape, "float32")
        return replace(operand, dtype="float32", strides=strides, scale=None, zero_point=0)

    inputs = tuple(None if each is None else real(each) for each in problem.inputs)
    return replace(problem, inputs=inputs, outputs=tuple(map(real, problem.outputs)))


def _quantized(operand: Operand, array: Array) -> Array:
    """A float sample as a quantized operand has it."""
    if operand.scale is None or array.dtype.kind != "f":
        return array
    return quantize(array, operand.scale, operand.zero_point, operand.dtype)


def _sample(operator: Operator, operand: Operand, rng: np.random.Generator) -> Array:
    """Normal floats; bytes of a quantized tensor."""
    if operand.dtype in ("float32", "bfloat16", "float16", "float64"):
        return rng.standard_normal(operand.shape, np.float32)
    if operand.dtype in ("int8", "uint8"):
        limits = np.iinfo(operand.dtype)
        return rng.integers(limits.min, limits.max + 1, operand.shape, operand.dtype)
    if operand.dtype == "bool":
        return rng.integers(0, 2, operand.shape).astype(bool)
    raise _broken(operator, f"it reads {operand.dtype}, and has no samples of it")


def _typed(operand: Operand, array: Array) -> Array:
    """A sample in the operand's type; bfloat16 as float32."""
    if operand.dtype == "bfloat16":
        return from_bf16(to_bf16(array.astype(np.float32)))
    return array.astype(operand.dtype)


def meant(op: PluginOp, arrays: Sequence[Array]) -> list[Array]:
    """The results by the meaning.

    Args:
        op: the operator.
        arrays: as `samples` gives them.

    Returns:
        An array for each output; bfloat16 as float32.

    Raises:
        UnsupportedError: the meaning fails, or gives other shapes than it should.
    """
    operator, problem = op.operator, op.problem
    try:
        if _by_numpy(operator):
            results = _computed(operator, problem, arrays)
        else:
            results = _executed(op, arrays)
    except ERRORS as error:
        raise _broken(operator, f"its meaning: {error}") from error
    except Exception as error:
        raise _broken(operator, f"its meaning: {type(error).__name__}: {error}") from error
    expected = [each.shape for each in problem.outputs]
    if [result.shape for result in results] != expected:
        raise _broken(
            operator,
            f"its meaning gives {[result.shape for result in results]}, expected {expected}",
        )
    return results


def _by_numpy(operator: Operator) -> bool:
    """Whether numpy tells the results."""
    base = operator.base if isinstance(operator, QuantizedOperator) else operator
    return base is not None and (base.reference is not None or not base.is_function)


def _computed(operator: Operator, problem: Problem, arrays: Sequence[Array]) -> list[Array]:
    """By numpy."""
    rest = iter(arrays)
    given = [None if each is None else next(rest) for each in problem.inputs]
    if isinstance(operator, QuantizedOperator):
        return computed(operator, problem, given)
    function: Any = operator.reference or operator.meaning
    results = function(*given, **problem.attributes)
    return [np.asarray(each) for each in (results if isinstance(results, tuple) else (results,))]


def _executed(op: PluginOp, arrays: Sequence[Array]) -> list[Array]:
    """By ONNX Runtime."""
    model = meaning_model(op)
    session = open_session(model.SerializeToString())
    feeds = dict(zip([value.name for value in model.graph.input], arrays, strict=True))
    return [np.asarray(result) for result in session.run(None, feeds)]


def meaning_model(op: PluginOp) -> onnx.ModelProto:
    """A model of one node with its function; all operands are inputs, bfloat16 ones as float32."""
    problem, operator = op.problem, op.operator
    inputs, nodes = [], []
    names = [f"x{i}" if each is not None else "" for i, each in enumerate(problem.inputs)]
    for name, each in zip(names, problem.inputs, strict=True):
        if each is None:
            continue
        rounded = each.dtype == "bfloat16"
        kind = (
            TensorProto.FLOAT if rounded else helper.np_dtype_to_tensor_dtype(np.dtype(each.dtype))
        )
        inputs.append(helper.make_tensor_value_info(f"{name}_in", kind, each.shape))
        to = TensorProto.BFLOAT16 if rounded else kind
        nodes.append(helper.make_node("Cast", [f"{name}_in"], [name], to=to))
    called: onnx.NodeProto = ir.to_proto(op.node)
    ends = [f"y{i}" for i in range(len(problem.outputs))]
    del called.input[:], called.output[:]
    called.input.extend(names)
    numbers = [value for value in op.node.inputs[len(names) :] if value is not None]
    called.input.extend(value.name for value in numbers)
    called.output.extend(ends)
    nodes.append(called)
    outputs = []
    for name, each in zip(ends, problem.outputs, strict=True):
        rounded = each.dtype == "bfloat16"
        kind = (
            TensorProto.FLOAT if rounded else helper.np_dtype_to_tensor_dtype(np.dtype(each.dtype))
        )
        outputs.append(helper.make_tensor_value_info(f"{name}_out", kind, each.shape))
        nodes.append(helper.make_node("Cast", [name], [f"{name}_out"], to=kind))
    function = ir.to_proto(function_at(operator, 0))
    opsets = [o for o in function.opset_import if o.domain != operator.domain]
    if all(o.domain not in ("", "ai.onnx") for o in opsets):
        opsets.append(helper.make_opsetid("", _OPSET))
    opsets.append(helper.make_opsetid(operator.domain, 1))
    held = [onnx.numpy_helper.from_array(constant(value), value.name) for value in numbers]
    graph = helper.make_graph(nodes, "meaning", inputs, outputs, held)
    base = operator.base if isinstance(operator, QuantizedOperator) else None
    functions = [function, *([ir.to_proto(function_at(base, 0))] if base is not None else [])]
    return helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=10)


def _broken(operator: Operator, reason: str) -> UnsupportedError:
    return UnsupportedError(
        f"the plugin operator {operator} cannot be checked against its meaning", [reason], _FIX
    )
