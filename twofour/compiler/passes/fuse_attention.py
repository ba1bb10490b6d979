"""Turns the spellings of attention into one operator on [batch, length, heads * channels].

    q, k, v = rows of heads, moved to [batch, heads, length, channels]
    p = Softmax(MatMul(q, k') * scale [+ mask])
    y = MatMul(p, v), moved back to rows   ->  twofour.Attention[Mask | Causal](q, k, v [, mask])

    q, k and v are read where their heads lie side by side in a row, before Reshape and Transpose:
    the kernel addresses heads, it does not move them. Factors of q, k and the scores become one
    scale; a joint projection is read in slices. `Where(c, s, low)` is `s + Where(c, 0, low)`, and a
    constant mask that hides what comes after a query is `Causal`.

    A query that sees no key at all, each being masked by -inf, gets zeros where the softmax would
    give NaN; exporters write the same as `Where(IsNaN(p), 0, p)`, which is taken in.

    If q, k, v and p are quantized, y = twofour.QAttention..., and what p was rounded to is left
    out: that p is quantized says that bytes are enough, and int8 attention has finer ones, in 255
    steps up to a query's highest share instead of up to 1 (core/attention.py).
    If q, k and v are, but p is not, they are dequantized and the attention stays float.

Conditions:
    1. the softmax is over the keys, the last axis, and read by one product alone
    2. the factors are constant numbers; at most one mask is added, after the scaling
    3. heads of q, k and v lie side by side in the rows of some value, all as many
    4. the product is moved back to rows by operators that nobody else reads
    5. q, k and v are all quantized or none, and p only if they are
    6. a quantized p reaches 1, up to two steps: else it saturates, which leaving it out would undo
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from twofour.compiler import ops
from twofour.compiler.passes import attention_mask, quantizers, reading, tracing
from twofour.compiler.passes.attention_ends import Heads, Result, heads_of, result_of
from twofour.compiler.passes.attention_mask import Mask
from twofour.compiler.passes.rewrite import Refused, Replacement

NAME = "fuse_attention"


@dataclass(frozen=True)
class _Scores:
    """What a softmax reads.

    Attributes:
        product: the MatMul of q and k'.
        factor: what it is multiplied with.
        mask: what is added then.
    """

    product: ir.Node
    factor: float
    mask: Mask


def rule(node: ir.Node) -> Replacement | Refused | None:
    """See the module."""
    if not reading.is_op(node, "Softmax"):
        return None
    second = _product(node)
    scores = _scores(reading.data(node))
    if second is None or scores is None:
        return None
    product, p_quantizer = second
    shape = reading.shape_of(node.outputs[0])
    if shape is None or reading.int_attribute(node, "axis", -1) % len(shape) != len(shape) - 1:
        return Refused("the softmax is not over the last axis, or its shape is not known")
    if isinstance(scores, str):
        return Refused(scores)
    q = heads_of(reading.data(scores.product), transposed=False)
    k = heads_of(reading.data(scores.product, 1), transposed=True)
    v = heads_of(reading.data(product, 1), transposed=False)
    for name, operand in (("q", q), ("k", k), ("v", v)):
        if isinstance(operand, str):
            return Refused(f"{name}: {operand}")
    assert not isinstance(q, str)
    assert not isinstance(k, str)
    assert not isinstance(v, str)
    if reason := _mismatch(q, k, v):
        return Refused(reason)
    result = result_of(product.outputs[0], q, v.channels)
    if isinstance(result, str):
        return Refused(result)
    if reason := _quantized_in_part((q, k, v), p_quantizer):
        return Refused(reason)
    return _fused(scores, (q, k, v), result, int8=p_quantizer is not None)


def _product(softmax: ir.Node) -> tuple[ir.Node, quantizers.PerTensor | None] | None:
    """The MatMul that alone reads the softmax, and the quantizer between the two."""
    p = _guarded(softmax.outputs[0])
    reader = reading.sole_reader(p)
    quantizer = None
    if not isinstance(reader, str) and reading.is_op(reader, "QuantizeLinear"):
        q = quantizers.per_tensor(reader)
        dequantize = reading.sole_reader(reader.outputs[0])
        if isinstance(q, str) or isinstance(dequantize, str):
            return None
        if not reading.is_op(dequantize, "DequantizeLinear"):
            return None
        dq = quantizers.per_tensor(dequantize)
        if isinstance(dq, str) or not q.same_as(dq):
            return None
        quantizer, p = q, dq.result
        reader = reading.sole_reader(p)
    if isinstance(reader, str) or not reading.is_op(reader, "MatMul"):
        return None
    return (reader, quantizer) if reading.data(reader) is p else None


def _guarded(p: ir.Value) -> ir.Value:
    """Where(IsNaN(p), 0, p) if that alone reads p, else p."""
    readers = [use.node for use in p.uses()]
    guard = next((node for node in readers if reading.is_op(node, "Where")), None)
    if guard is None or len(readers) != 2 or p.is_graph_output():
        return p
    test, zero = reading.data(guard).producer(), reading.array(guard.inputs[1])
    tested = test is not None and reading.is_op(test, "IsNaN") and reading.data(test) is p
    if tested and guard.inputs[2] is p and zero is not None and not zero.any():
        return guard.outputs[0]
    return p


def _scores(value: ir.Value) -> _Scores | str | None:
    """Reads what the softmax reads; None where no product is behind it."""
    factor, mask = 1.0, Mask()
    while (node := value.producer()) is not None:
        if reading.is_op(node, "MatMul"):
            return _Scores(node, factor, mask)
        scaled = tracing.scale_of(node)
        if scaled is not None:
            value, factor = scaled[0], factor * scaled[1]
        elif reading.is_op(node, "Add", "Where"):
            if mask.kind:
                return "two masks are added to the scores"
            if factor != 1.0:
                return "the scores are scaled after the mask is added"
            found = attention_mask.read(node)
            if found is None or isinstance(found, str):
                return found
            value, mask = found
        elif reading.is_op(node, "Reshape", "Unsqueeze", "Squeeze") and _keeps_rows(node):
            value = reading.data(node)
        else:
            return None
    return None


def _keeps_rows(node: ir.Node) -> bool:
    """Whether queries and keys stay the last two axes."""
    before, after = reading.shape_of(reading.data(node)), reading.shape_of(node.outputs[0])
    return before is not None and after is not None and before[-2:] == after[-2:]


def _mismatch(q: Heads, k: Heads, v: Heads) -> str:
    """Why the three do not belong together; "" if they do."""
    counts = [(operand.batch, operand.heads) for operand in (q, k, v)]
    if len(set(counts)) > 1:
        text = ", ".join(f"{batch} x {heads}" for batch, heads in counts)
        return f"q, k and v differ in sequences x heads: {text}"
    if k.length != v.length or q.channels != k.channels:
        return "the lengths of k and v or the channels of q and k differ"
    return ""


def _quantized_in_part(operands: tuple[Heads, ...], p: quantizers.PerTensor | None) -> str:
    """Why the quantizers of q, k, v and the softmax do not go together; "" if they do."""
    kinds = [operand.quantizer is not None for operand in operands]
    if len(set(kinds)) > 1 or (p is not None and not kinds[0]):
        named = zip("qkv", kinds, strict=True)
        return "only some of q, k, v and the softmax are quantized: " + ", ".join(
            f"{name} {'is' if kind else 'is not'}" for name, kind in named
        )
    if p is None:
        return ""
    most = 127 if p.dtype == ir.DataType.INT8 else 255
    highest = (most - p.zero_point_number) * p.scale_number
    if highest >= 1 - 2 * p.scale_number:
        return ""
    return f"the softmax is quantized and saturates at {highest:.4g}; expected a range up to 1"


def _fused(
    scores: _Scores, operands: tuple[Heads, Heads, Heads], result: Result, *, int8: bool
) -> Replacement:
    """The fused operator, with what its operands and its result still need."""
    nodes: list[ir.Node] = []
    inputs: dict[str, ir.Value] = {}
    for name, operand in zip("qkv", operands, strict=True):
        value = operand.rows(nodes)
        if operand.quantizer is not None and not int8:
            value = operand.dequantized(value, nodes)
        elif operand.quantizer is not None:
            inputs[f"{name}_scale"] = operand.quantizer.scale
            inputs[f"{name}_zero_point"] = operand.quantizer.zero_point
        inputs[name] = value
    mask = scores.mask.value(nodes)
    if mask is not None:
        inputs["mask"] = mask
    y = result.quantizer if int8 else None
    if y is not None:
        inputs |= {"y_scale": y.scale, "y_zero_point": y.zero_point}
    q, k, _ = operands
    factor = float(np.float32(scores.factor * q.factor * k.factor))
    base = "QAttention" if int8 else "Attention"
    variant = ops.Variant(base, float_out=int8 and y is None, mask=scores.mask.kind)
    new = ops.make_node(variant, inputs, {"heads": q.heads, "scale": factor}, scores.product)
    new.name = f"{scores.product.name}/attention"
    nodes.append(new)
    note = "it stays float: the softmax is not quantized" if q.quantizer and not int8 else ""
    nodes += result.back(new.outputs[0], q, y)
    return Replacement(result.value, nodes[-1].outputs[0], tuple(nodes), note)
