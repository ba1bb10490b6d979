"""Lets Conv and Gemm add a residual and apply an activation before they store.

    Add(twofour.Conv(x, w, bias), res)  ->  twofour.ConvAdd(x, w, bias, res)
    Relu(twofour.Conv[Add](...))        ->  twofour.Conv[Add]Relu(...), likewise Clip, Gelu, ...
    Add(twofour.ConvSilu(...), res)     ->  twofour.ConvSiluAdd(..., res)

    The same sums in the same order, without a tensor in between; likewise for twofour.Gemm,
    RowGemm and TensorGemm. Where both operands of Add could take the other one as residual (a
    projection shortcut), the one that is computed later does: the other result is then ready.

Conditions:
    1. nobody else reads the result of the Conv or Gemm
    2. the residual has the shape of that result: no broadcasting
    3. for Add, no other Add comes before it, and no activation but one, of a Conv, that does more
       than clamp: that one then comes first, and no further one follows
    4. for an activation, no other one comes before it
    5. the kernels have the activation
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.bases import DYNAMIC, PLAIN
from twofour.compiler.passes import activations, reading
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.core.functions import Activation

NAME = "fuse_epilogue"


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if reading.is_op(node, "Add"):
        return _add(node)
    activation = activations.read(node)
    return None if activation is None else _activation(node, activation)


def variant_of(node: ir.Node | None) -> ops.Variant | None:
    """The variant, where the node is a float Conv or Gemm of domain "twofour"."""
    variant = _product(node)
    return None if variant is None or variant.base in DYNAMIC else variant


def _product(node: ir.Node | None) -> ops.Variant | None:
    """The variant, where the node is a product that reads and writes floats."""
    if node is None or not ops.is_fused(node):
        return None
    variant = ops.parse_type(node.op_type)
    return variant if variant.base in PLAIN else None


def _activation(node: ir.Node, activation: Activation | str) -> Replacement | Refused | None:
    """Conv, Relu -> ConvRelu."""
    producer = reading.data(node).producer()
    variant = _product(producer)
    if producer is None or variant is None:
        return None
    if isinstance(activation, str):
        return Refused(f"not fused into {producer.name!r}: {activation}")
    if variant.activation:
        return Refused(f"{producer.name!r} has a {variant.activation} already")
    if isinstance(reader := reading.sole_reader(producer.outputs[0]), str):
        return Refused(f"not fused into {producer.name!r}: {reader}")
    op = ops.parse_op(producer)
    attributes = {**op.attributes, **activations.attributes(activation)}
    variant = replace(variant, activation=activation.name)
    new = ops.make_node(variant, op.inputs, attributes, producer)
    return Replacement(node.outputs[0], new.outputs[0], (new,))


def _add(node: ir.Node) -> Replacement | Refused | None:
    """Conv, Add -> ConvAdd."""
    reasons = []
    legal: list[tuple[ir.Node, ir.Value]] = []
    for index in (0, 1):
        producer = reading.data(node, index).producer()
        if producer is None or _product(producer) is None:
            continue
        res = reading.data(node, 1 - index)
        if reason := _refuses_residual(producer, res, node):
            reasons.append(f"not fused into {producer.name!r}: {reason}")
        else:
            legal.append((producer, res))
    if not legal:
        return Refused("; ".join(reasons)) if reasons else None
    plain = [one for one in legal if not ops.parse_op(one[0]).activation.name]
    legal = plain or legal  # whose sum may still go through an activation
    producer, res = (
        legal[-1] if len(legal) == 1 or reading.precedes(legal[0][0], legal[1][0]) else legal[0]
    )
    op = ops.parse_op(producer)
    activation = op.activation.name
    variant = ops.Variant(op.base, "Add", activation, add_last=bool(activation))
    new = ops.make_node(variant, {**op.inputs, "res": res}, op.attributes, producer)
    return Replacement(node.outputs[0], new.outputs[0], (new,))


def _adds_last(variant: ops.Variant) -> bool:
    return ops.may_add_last(variant.base, variant.activation)


def _refuses_residual(producer: ir.Node, res: ir.Value, total: ir.Node) -> str:
    """Why the Conv or Gemm cannot add this residual in the place of `total`; "" if it can."""
    result = producer.outputs[0]
    if isinstance(reader := reading.sole_reader(result), str):
        return reader
    variant = ops.parse_type(producer.op_type)
    if variant.add or (variant.activation and not _adds_last(variant)):
        return "it has an activation or a residual already"
    behind = reading.sole_reader(total.outputs[0])
    if variant.activation and isinstance(behind, ir.Node) and activations.read(behind) is not None:
        return f"it has an activation, and {behind.name!r} is one of the sum"
    shape = reading.shape_of(result)
    if shape is None or shape != reading.shape_of(res):
        mine, theirs = reading.shape_text(result), reading.shape_text(res)
        return f"the residual has shape {theirs}, the result {mine}"
    return ""
