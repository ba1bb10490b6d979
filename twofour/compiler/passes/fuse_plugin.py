"""Gives an operator of a plugin its quantized form, where a tactic takes that.

    [Q](X(DQ(a), DQ(b), c))  ->  QuantizedX[F](a, b, c, scales and zero points of a, b [and y])

Conditions:
    1. the plugin names operands that may be quantized, and its meaning is a function
    2. all of its inputs among these are dequantized per tensor
    3. a tactic takes the quantized operands on the target

Its results are quantized too where each of those that may be is read by one QuantizeLinear alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from twofour.compiler.native import NotNative
from twofour.compiler.native_plugin import problem_of, refusals
from twofour.compiler.passes import quantizers
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.core.plugins import Operator
from twofour.core.target import Target, host_target
from twofour.onnx_tools.plugins import plugin_of, quantized_of
from twofour.onnx_tools.plugins_quantized import QuantizedOperator, quantized_name

NAME = "fuse_plugin"


def rule(node: ir.Node, target: Target | None = None) -> Replacement | Refused | None:
    """See the module; without a target for this machine."""
    base = plugin_of(node)
    if base is None or not base.is_function or not base.quantized or not base.cpu:
        return None
    if isinstance(base, QuantizedOperator):
        return None
    form = quantized_of(base, float_out=True)
    given = dict(zip(form.inputs, node.inputs, strict=False))
    read: dict[str, quantizers.PerTensor] = {}
    for name in form.scaled:
        value = given.get(name)
        if value is None:
            return Refused(f"its input {name!r} is left out")
        found = quantizers.dequantizer(value)
        if isinstance(found, str):
            return Refused(found)
        read[name] = found
    written = _written(node, base, form)
    new = _node(node, base, read, written, given)
    try:
        operator = plugin_of(new)
        assert operator is not None
        reasons = refusals(
            operator, problem_of(_typed(new, node, written), operator), target or host_target()
        )
    except NotNative as error:
        reasons = [str(error)]
    if reasons:
        return Refused(f"not quantized: {'; '.join(reasons)}")
    ends = [w.result for w in written] if written else list(node.outputs)
    pairs = list(zip(ends, new.outputs, strict=True))
    return Replacement(*pairs[0], (new,), more=tuple(pairs[1:]))


def _written(node: ir.Node, base: Operator, form: QuantizedOperator) -> list[quantizers.PerTensor]:
    """The quantizers of all results; none where one stays float."""
    names = quantized_of(base, float_out=False).scaled[len(form.scaled) :]
    if len(names) != len(node.outputs):
        return []
    found = [quantizers.sole_quantizer(value) for value in node.outputs]
    usable = [each for each in found if not isinstance(each, str)]
    return usable if len(usable) == len(found) else []


def _node(
    node: ir.Node,
    base: Operator,
    read: dict[str, quantizers.PerTensor],
    written: Sequence[quantizers.PerTensor],
    given: dict[str, ir.Value | None],
) -> ir.Node:
    """The new node."""
    inputs = [read[name].source if name in read else value for name, value in given.items()]
    form = quantized_of(base, float_out=True)
    inputs += [None] * (len(form.inputs) - len(inputs))
    for each in (*read.values(), *written):
        inputs += [each.scale, each.zero_point]
    return ir.node(
        quantized_name(base.name, not written),
        inputs,
        dict(node.attributes),
        domain=node.domain,
        name=node.name,
        num_outputs=len(node.outputs),
    )


def _typed(new: ir.Node, old: ir.Node, written: Sequence[quantizers.PerTensor]) -> ir.Node:
    """The new node with types and shapes of its results, and names to ask about it."""
    ends = [each.result for each in written] or list(old.outputs)
    for value, end in zip(new.outputs, ends, strict=True):
        value.type, value.shape = end.type, end.shape
        value.name = value.name or end.name
    return new
