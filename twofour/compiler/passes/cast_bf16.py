"""Lets Conv and Gemm multiply in bfloat16.

    twofour.Conv[Add][Relu](x, w, bias [, res])
        ->  twofour.BConv[Add][Relu]F(Cast<bfloat16>(x), bfloat16 w, bias [, res])

    x and w are rounded to 8 bits of significand, sums and all that follows stay float32. Likewise
    for Gemm. One Cast serves all readers of x.

Conditions:
    1. x is float32 and its shape is known; of a Conv it is an image, of a Gemm rows of channels
    2. w is a constant, and its bfloat16 values are finite
    3. a group has at least two input channels: a depthwise product has no pairs to add; it still
       reads and stores bfloat16 where that is held (hold_bf16, read_bf16)
    4. it is no expectation of a softmax, which is one walk with it (join_walks.py)
    5. it was not found to be faster in float32 (rivals.py), nor chosen to stay float32
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import bfloats, lineage, reading
from twofour.compiler.passes.fuse_epilogue import variant_of
from twofour.compiler.passes.rewrite import Refused, Replacement
from twofour.core.bfloat16 import round_bf16

NAME = "cast_bf16"
CHOSEN = "it was chosen to be float32"


def rule(
    node: ir.Node,
    floats: Mapping[str, str] = MappingProxyType({}),
    chosen: Collection[str] = (),
) -> Replacement | Refused | None:
    """See the module.

    Args:
        node: to look at.
        floats: why nodes of these names stay float32.
        chosen: results of the imported graph; what computes one stays float32.
    """
    variant = variant_of(node)
    if variant is None:
        return None
    op = ops.parse_op(node)
    reason = _refuses(op) or floats.get(node.name or "", "")
    if not reason and not set(chosen).isdisjoint(lineage.computes(node)):
        reason = CHOSEN
    if reason:
        return Refused(reason)
    x = op.inputs["x"]
    there = next((use.node for use in x.uses() if bfloats.is_rounding(use.node)), None)
    cast = there or bfloats.cast(x, ir.DataType.BFLOAT16)
    inputs = {**op.inputs, "x": cast.outputs[0], "w": _rounded(op.inputs["w"])}
    wanted = replace(variant, base=f"B{op.base}", float_out=True)
    new = ops.make_node(wanted, inputs, op.attributes, node)
    return Replacement(op.output, new.outputs[0], (new,) if there else (cast, new))


def _refuses(op: ops.FusedOp) -> str:
    """Why the products stay float32; "" if they need not."""
    x, w = op.inputs["x"], reading.array(op.inputs["w"])
    shape = reading.shape_of(x)
    if x.dtype != ir.DataType.FLOAT or shape is None:
        return f"{x.name!r} is {x.dtype} of shape {reading.shape_text(x)}; expected known float32"
    if len(shape) not in ((4,) if op.base == "Conv" else (2, 3)):
        return f"{x.name!r} has {len(shape)} dimensions"
    if w is None:
        return f"the weight {op.inputs['w'].name!r} is computed at run time"
    if not np.isfinite(round_bf16(w)).all():
        return f"the weight {op.inputs['w'].name!r} has values beyond bfloat16"
    if w.shape[0] == 1 and reading.is_op(x.producer(), "Softmax"):
        return "it is the expectation of a softmax, which is one walk with it"
    if w.shape[1] < 2:
        return "one input channel a group: there are no pairs of products to add"
    return ""


def _rounded(w: ir.Value) -> ir.Value:
    """The weight as a constant of bfloat16."""
    values = reading.array(w)
    if values is None:
        raise ValueError(f"{w.name!r} is not a constant")
    return reading.constant(f"{w.name}_bf16", bfloats.array_of(values))
