"""The quantized form of a plugin's operator: what DQ -> operator -> Q becomes as one node.

    QuantizedX(inputs of X, then scale and zero point of each quantized one, then of the results)
        = Q(X(DQ(inputs)))
    QuantizedXF(...) = X(DQ(inputs))                            its results stay float

It is an operator like its base: a function says what it means, and the tactics of the base take it,
whose problems have the types, scales and zero points of the quantized operands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from twofour.core.errors import InputError
from twofour.core.numerics import dequantize, quantize
from twofour.core.plugins import Operand, Operator, Problem

Array = NDArray[Any]
_PREFIX, _FLOAT_OUT = "Quantized", "F"


@dataclass(frozen=True, eq=False)
class QuantizedOperator(Operator):
    """An operator whose inputs, and maybe results, are quantized.

    Attributes:
        base: the float operator.
        inputs: names of the base's inputs.
        scaled: of the operands that have a scale and a zero point, in the order of these.
    """

    base: Operator | None = None
    inputs: tuple[str, ...] = ()
    scaled: tuple[str, ...] = ()


def quantized_name(base: str, float_out: bool) -> str:
    """The operator type of the quantized form."""
    return f"{_PREFIX}{base}{_FLOAT_OUT * float_out}"


def base_name(op_type: str) -> list[tuple[str, bool]]:
    """The operator types that one may be the quantized form of, and whether results are float."""
    if not op_type.startswith(_PREFIX):
        return []
    rest = op_type.removeprefix(_PREFIX)
    found = [(rest, False)]
    return [*found, (rest[:-1], True)] if rest.endswith(_FLOAT_OUT) else found


@cache
def quantized_form(base: Operator, meaning: bytes, float_out: bool) -> QuantizedOperator:
    """The quantized form of an operator.

    Args:
        base: its meaning is a function, and some of its operands may be quantized.
        meaning: the serialised function of the base.
        float_out: whether its results stay float.

    Raises:
        InputError: `base.quantized` names what the meaning does not have.
    """
    function = onnx.FunctionProto.FromString(meaning)
    inputs, outputs = tuple(function.input), tuple(function.output)
    if unknown := set(base.quantized) - {*inputs, *outputs}:
        raise InputError(
            f"the plugin operator {base} has no operand {min(unknown)!r}",
            [f"its meaning has {', '.join((*inputs, *outputs))}"],
            "mend `quantized` of the plugin",
        )
    ends = () if float_out else outputs
    scaled = tuple(name for name in (*inputs, *ends) if name in base.quantized)
    return QuantizedOperator(
        base.domain,
        quantized_name(base.name, float_out),
        _meaning(base, function, scaled, float_out).SerializeToString(),
        tactics=base.tactics,
        tolerance=base.tolerance,
        version=base.version,
        package=base.package,
        base=base,
        inputs=inputs,
        scaled=scaled,
    )


def _meaning(
    base: Operator, function: onnx.FunctionProto, scaled: Sequence[str], float_out: bool
) -> onnx.FunctionProto:
    """DQ, the base, Q; `scaled` are the operands that are quantized."""
    inner = {name: f"{name}_real" for name in scaled}
    call = helper.make_node(
        base.name,
        [inner.get(name, name) for name in function.input],
        [inner.get(name, name) for name in function.output],
        domain=base.domain,
    )
    call.attribute.extend(_handed_on(function))
    found = onnx.FunctionProto(name=quantized_name(base.name, float_out), domain=base.domain)
    found.input.extend([*function.input, *(end for name in scaled for end in _of(name))])
    found.output.extend(function.output)
    for name in filter(inner.get, function.input):
        found.node.append(helper.make_node("DequantizeLinear", [name, *_of(name)], [inner[name]]))
    found.node.append(call)
    for name in filter(inner.get, function.output):
        found.node.append(helper.make_node("QuantizeLinear", [inner[name], *_of(name)], [name]))
    found.attribute.extend(function.attribute)
    found.attribute_proto.extend(function.attribute_proto)
    found.opset_import.extend(function.opset_import)
    if all(opset.domain != base.domain for opset in function.opset_import):
        found.opset_import.append(helper.make_opsetid(base.domain, 1))
    return found


def _handed_on(function: onnx.FunctionProto) -> list[onnx.AttributeProto]:
    """The function's attributes as those of a call of it within another function."""
    kinds = {attribute.name: attribute.type for attribute in function.attribute_proto}
    for node in function.node:
        kinds |= {a.ref_attr_name: a.type for a in node.attribute if a.ref_attr_name}
    return [
        onnx.AttributeProto(name=name, ref_attr_name=name, type=kind)
        for name, kind in kinds.items()
    ]


def _of(name: str) -> tuple[str, str]:
    """Names of the scale and the zero point of an operand."""
    return f"{name}_scale", f"{name}_zero_point"


def computed(
    form: QuantizedOperator, problem: Problem, arrays: Sequence[Array | None]
) -> list[Array]:
    """The meaning by the base's reference in numpy, or by the base's own rule for what is stored.

    Args:
        form: its base has a reference or a rule.
        problem: of the form.
        arrays: an array for each input of the base; None where it is left out.
    """
    assert form.base is not None
    reference = form.base.reference
    if form.base.stored is not None:
        return [np.asarray(each) for each in form.base.stored(problem, arrays)]
    assert reference is not None
    real = [_real(*pair) for pair in zip(arrays, problem.inputs, strict=True)]
    found = reference(*real, **problem.attributes)
    results = found if isinstance(found, tuple) else (found,)
    return [_stored(*pair) for pair in zip(results, problem.outputs, strict=True)]


def _real(array: Array | None, operand: Operand | None) -> Array | None:
    """An input as the base reads it."""
    if array is None or operand is None or operand.scale is None:
        return array
    return dequantize(array, operand.scale, operand.zero_point)


def _stored(result: Any, operand: Operand) -> Array:
    """A result of the base as the form gives it."""
    array = np.asarray(result)
    if operand.scale is None:
        return array
    return quantize(array, operand.scale, operand.zero_point, operand.dtype)
