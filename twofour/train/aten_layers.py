"""What aten operators with parameters do to the labels of channels.

A matrix, or the filters of a convolution, ends the channels that it reads and begins those that it
writes; normalizations and biases are tied to the channels that they scale and shift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from twofour.core.channels import UNIFORM, Ids
from twofour.core.labels import (
    MIXED,
    UNKNOWN,
    Labels,
    alike,
    pointwise,
    product,
    settled,
    vector,
    weighted,
)
from twofour.train.aten import Call, Parameter, unknown


def per_channel(call: Call) -> Any:
    """Scales and shifts along axis 1: BatchNorm, PReLU."""
    x = call.of("input" if "input" in call.given else "self")
    operands = [x]
    for name in ("weight", "bias", "running_mean", "running_var"):
        value = call.given.get(name)
        if isinstance(value, Parameter) and len(x.shape) > 1 and value.vectors[0] is not None:
            shape = [x.shape[1] if axis == 1 else 1 for axis in range(len(x.shape))]
            operands.append(Labels.along(shape, 1, value.vectors[0]))
        elif isinstance(value, (Labels, Parameter)):
            operands.append(Labels.constant((1, *value.shape, *[1] * (len(x.shape) - 2))))
            call.tracer.pin(value, "the parameter of a normalization is computed")
    return pointwise(call.tracer.channels, operands, x.shape)


def group_norm(call: Call) -> Any:
    """Channels stay in their group."""
    x, groups = call.of("input"), int(call.given["num_groups"])
    x = settled(call.tracer.channels, x, list(range(2, len(x.shape))))
    if 1 in x.varying:
        colors = np.arange(x.shape[1]) // (x.shape[1] // groups)
        ids = vector(call.tracer.channels, x, 1)
        call.tracer.channels.separate(ids, colors, "alone in its group of a GroupNorm")
    return per_channel(Call(call.tracer, call.target, {**call.given, "input": x}, call.result))


def layer_norm(call: Call) -> Any:
    """Treats all channels of the last axes the same; then scales and shifts each."""
    x, channels = call.of("input"), call.tracer.channels
    count = len(call.given["normalized_shape"])
    axes = range(len(x.shape) - count, len(x.shape))
    alike(channels, x, list(axes), "normalized for each position on its own")
    scales = [call.given.get(name) for name in ("weight", "bias")]
    near = [x] if x.wired else []
    operands = [x, *(call.labels(s, near) for s in scales if s is not None)]
    return pointwise(channels, operands, x.shape)


def embedding(call: Call) -> Any:
    """Rows are named by data; columns are channels."""
    table = call.given["weight"]
    if not isinstance(table, Parameter) or table.vectors[1] is None:
        return unknown(call)
    if table.vectors[0] is not None:
        call.tracer.channels.pin(table.vectors[0], "rows of an embedding are named by the input")
    return Labels.along(call.shape, len(call.shape) - 1, table.vectors[1])


def linear(call: Call) -> Any:
    """X [.., K] times a weight [N, K]."""
    weight = call.given["weight"]
    bias = call.given.get("bias")
    if not isinstance(weight, Parameter):
        return _computed_weight(call)
    return _multiply(call, call.of("input"), (weight.vectors[1], weight.vectors[0]), bias)


def matmul(call: Call) -> Any:
    """Two activations, or an activation [.., K] and a parameter [K, N] on either side."""
    names = ("mat1", "mat2") if "mat1" in call.given else ("self", "mat2")
    names = ("self", "other") if "other" in call.given else names
    names = ("batch1", "batch2") if "batch1" in call.given else names
    a, b = (call.given[name] for name in names)
    bias = call.given.get("self") if names[0] != "self" else None
    if isinstance(b, Parameter) and len(b.shape) == 2 and isinstance(a, Labels):
        return _multiply(call, a, (b.vectors[0], b.vectors[1]), bias)
    if isinstance(a, Parameter) or isinstance(b, Parameter) or min(len(a.shape), len(b.shape)) < 2:
        return _computed_weight(call)
    result = product(call.tracer.channels, a, b, call.shape)
    if bias is None:
        return result
    return pointwise(call.tracer.channels, [result, call.labels(bias, [result])], call.shape)


def _multiply(call: Call, x: Labels, weight: tuple[Ids | None, Ids | None], bias: Any) -> Labels:
    """X [.., K] times [K, N], given the labels along K and N."""
    channels, (read, written) = call.tracer.channels, weight
    last = len(x.shape) - 1
    if x.wired and last not in x.varying and x.shape[last] > 1:
        call.tracer.pin([call.given.get("weight"), bias], "mixes positions, not channels")
        for ids in (read, written):
            if ids is not None:
                channels.pin(ids, "mixes positions, not channels")
        return Labels(call.shape, x.ids)
    if read is not None:
        weighted(channels, x, last, read)
    else:
        channels.pin(x.ids, "the only channel that a weight reads")
    if written is None:
        return Labels.constant(call.shape)
    result = Labels.along(call.shape, len(call.shape) - 1, written)
    if bias is None:
        return result
    return pointwise(channels, [result, call.labels(bias, [result])], call.shape)


def convolution(call: Call) -> Any:
    """X [B, C, ..] with a weight [N, C / groups, ..]."""
    weight, channels = call.given["weight"], call.tracer.channels
    transposed = "transpose" in call.name or bool(call.given.get("transposed"))
    groups = int(call.given.get("groups", 1))
    x = call.of("input")
    whole = isinstance(weight, Parameter) and len(x.shape) == len(call.shape)
    if not whole or (transposed and groups > 1) or (groups > 1 and not weight.name):
        return _computed_weight(call)
    if len(x.shape) != len(weight.shape) or (x.wired and x.shape[1] > 1 and 1 not in x.varying):
        return unknown(call)
    for taps in weight.vectors[2:]:
        if taps is not None:
            channels.pin(taps, "taps of a filter")
    written = weight.vectors[1 if transposed else 0]
    if groups == 1:
        read = weight.vectors[0 if transposed else 1]
        if read is None:
            channels.pin(
                x.ids, MIXED if x.varying - {1} else "the only channel that a weight reads"
            )
        else:
            weighted(channels, x, 1, read)
    else:
        _read_groups(call, x, weight, groups)
    if written is None:
        return Labels.constant(call.shape)
    result = Labels.along(call.shape, 1, written)
    bias = call.given.get("bias")
    if isinstance(bias, Parameter) and bias.vectors[0] is not None:
        channels.tie(written, bias.vectors[0])
    return result


def _read_groups(call: Call, x: Labels, weight: Parameter, groups: int) -> None:
    """Channels stay in their group; a depthwise convolution writes the channel it reads."""
    channels, (count, width) = call.tracer.channels, weight.shape[:2]
    read, written = vector(channels, x, 1), weight.vectors[0]
    assert written is not None
    if width == 1:
        repeated = np.repeat(read, count // groups)
        channels.tie(written, repeated)
        channels.pin(np.where(repeated <= 0, written, UNIFORM), UNKNOWN)
        return
    reason = "alone in its group of a convolution"
    channels.separate(read, np.arange(len(read)) // width, reason)
    channels.separate(written, np.arange(count) // (count // groups), reason)
    kept = call.tracer.grouped.setdefault(weight.name, read.reshape(groups, width))
    channels.tie(kept.reshape(-1), read)
    if weight.vectors[1] is not None:
        channels.pin(weight.vectors[1], reason)
        weight.vectors[1] = None


def einsum(call: Call) -> Any:
    """A matrix product of two activations, its axes named by letters in any order."""
    operands, equation = call.given["tensors"], call.given["equation"].replace(" ", "")
    names, _, out = equation.partition("->")
    first, _, second = names.partition(",")
    batch = [c for c in first if c in second and c in out]
    inner = [c for c in first if c in second and c not in out]
    rows = [c for c in first if c not in second] or ["<"]
    columns = [c for c in second if c not in first] or [">"]
    plain = all(len(set(letters)) == len(letters) for letters in (first, second, out))
    kept = set(first + second) - set(inner) == set(out)
    single = len(inner) == len(rows) == len(columns) == 1
    if not (plain and kept and single and all(isinstance(each, Labels) for each in operands)):
        return unknown(call)
    a = _laid(operands[0], first, [*batch, *rows, *inner])
    b = _laid(operands[1], second, [*batch, *inner, *columns])
    shape = (*np.broadcast_shapes(a.shape[:-2], b.shape[:-2]), a.shape[-2], b.shape[-1])
    result = product(call.tracer.channels, a, b, shape)
    return _laid(result, [*batch, *rows, *columns], out)


def _laid(x: Labels, names: Sequence[str], order: Sequence[str]) -> Labels:
    """With its axes in another order; one that it lacks, or that is left out, has size 1."""
    kept = [names.index(c) for c in order if c in names]
    axes = [*kept, *(axis for axis in range(len(names)) if axis not in kept)]
    shape = [x.shape[names.index(c)] if c in names else 1 for c in order]
    spread = [x.ids.shape[names.index(c)] if c in names else 1 for c in order]
    return Labels(tuple(shape), x.ids.transpose(axes).reshape(spread))


def _computed_weight(call: Call) -> Any:
    call.tracer.pin(call.given, "multiplied with a weight that is computed or viewed otherwise")
    return call.tracer.opaque(call.result)


def attention(call: Call) -> Any:
    """softmax(q k^T + mask) v."""
    channels = call.tracer.channels
    q, k, v = (call.of(name) for name in ("query", "key", "value"))
    if call.given.get("enable_gqa"):
        times = q.shape[-3] // k.shape[-3]
        k, v = (
            Labels.of((*t.shape[:-3], q.shape[-3], *t.shape[-2:]), np.repeat(t.full, times, -3))
            for t in (k, v)
        )
    batch = q.shape[:-2]
    across = Labels.of((*k.shape[:-2], k.shape[-1], k.shape[-2]), k.ids.swapaxes(-1, -2))
    scores = product(channels, q, across, (*batch, q.shape[-2], k.shape[-2]))
    mask = call.given.get("attn_mask")
    if mask is not None:
        scores = pointwise(channels, [scores, call.labels(mask, [scores])], scores.shape)
    return product(channels, scores, v, call.shape)


RULES: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(("batch_norm", "prelu", "_prelu_kernel", "instance_norm"), per_channel),
    "_native_batch_norm_legit_no_training": per_channel,
    "group_norm": group_norm,
    **dict.fromkeys(("layer_norm", "rms_norm"), layer_norm),
    "embedding": embedding,
    "linear": linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "addmm", "baddbmm", "__matmul__"), matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), convolution),
    "scaled_dot_product_attention": attention,
    "einsum": einsum,
}
