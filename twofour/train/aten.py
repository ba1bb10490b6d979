"""What each aten operator does to the labels of channels.

Operators that move elements are run on the labels themselves. All others follow the rules of
`core/labels.py`; an operator that is not known here pins what it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twofour.core.channels import UNIFORM, Channels, Ids
from twofour.core.labels import (
    Labels,
    alike,
    pointwise,
    reduced,
    settled,
)

MOVES = frozenset(
    "alias cat channel_shuffle chunk clone concat contiguous detach expand expand_as flatten flip "
    "hsplit lift_fresh_copy mT matrix_H movedim moveaxis narrow native_channel_shuffle numpy_T "
    "permute pixel_shuffle pixel_unshuffle repeat repeat_interleave reshape roll select slice "
    "split split_with_sizes squeeze stack swapaxes swapdims t tensor_split tile transpose "
    "unbind unflatten unsafe_chunk unsafe_split unsafe_split_with_sizes unsqueeze view view_as "
    "vsplit _unsafe_view _reshape_alias".split()
)
SAME = frozenset(
    "hardswish relu6 selu celu mish log_sigmoid threshold softplus rrelu clip softsign "
    "dropout feature_dropout alpha_dropout to _to_copy type_as masked_fill where "
    "fill full_like zeros_like ones_like empty_like".split()
)
REDUCTIONS = frozenset(
    "mean sum amax amin prod var std logsumexp linalg_vector_norm norm any all var_mean std_mean "
    "max min count_nonzero".split()
)
ORDERED = frozenset(
    "argmax argmin median mode cumsum cumprod cummax cummin sort argsort topk kthvalue "
    "logcumsumexp".split()
)
CREATES = frozenset(
    "arange zeros ones full empty new_zeros new_ones new_full new_empty scalar_tensor eye "
    "linspace tril_indices triu_indices sym_size "
    "_assert_tensor_metadata _assert_async sym_constrain_range_for_size".split()
)
WINDOWS = ("max_pool", "avg_pool", "lp_pool", "adaptive_", "upsample_", "reflection_pad",
           "replication_pad", "_upsample_")  # fmt: skip


@dataclass
class Parameter:
    """A parameter or buffer, or a view of one.

    Attributes:
        shape: of the view.
        vectors: for each axis its labels; None for an axis that is never permuted.
        weight: a parameter, not a buffer.
        name: of the whole parameter; empty for a view.
    """

    shape: tuple[int, ...]
    vectors: list[Ids | None]
    weight: bool
    name: str = ""


@dataclass
class Tracer:
    """Carries labels through a graph, one call after the other.

    Attributes:
        channels: learns what the operators tie, separate and pin.
        rules: of operators with weights, by name (`train/aten_layers.py`).
        parameters: by name.
        grouped: what the weights of grouped convolutions read.
    """

    channels: Channels
    rules: Mapping[str, Callable[[Call], Any]] = field(default_factory=dict)
    parameters: dict[str, Parameter] = field(default_factory=dict)
    grouped: dict[str, Ids] = field(default_factory=dict)

    def parameter(
        self, name: str, shape: tuple[int, ...], weight: bool, dtype: torch.dtype
    ) -> Parameter:
        """A new parameter or buffer, with labels along all axes that could be permuted."""
        real = dtype.is_floating_point or dtype.is_complex
        vectors = [self.channels.new(n) if n > 1 and real else None for n in shape]
        self.parameters[name] = Parameter(shape, vectors, weight, name)
        return self.parameters[name]

    def finish(self, parameter: Parameter) -> None:
        """Registers what only the whole graph tells."""
        if parameter.name in self.grouped:
            self.channels.axis(self.grouped[parameter.name])

    def opaque(self, value: Any) -> Any:
        """Labels for what nobody can move, shaped as a traced result."""
        if isinstance(value, Tensor):
            return Labels.constant(tuple(int(size) for size in value.shape))
        if isinstance(value, (tuple, list)):
            return [self.opaque(each) for each in value]
        return value

    def pin(self, values: Any, reason: str) -> None:
        """Pins all channels in these values, lists of values included."""
        if isinstance(values, Labels):
            self.channels.pin(values.ids, reason)
        elif isinstance(values, Parameter):
            for ids in values.vectors:
                if ids is not None:
                    self.channels.pin(ids, reason)
        elif isinstance(values, dict):
            self.pin(list(values.values()), reason)
        elif isinstance(values, (tuple, list)):
            for value in values:
                self.pin(value, reason)

    def call(self, target: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """The labels of what an operator returns.

        Args:
            target: of the node.
            args: positional arguments; labels and parameters in place of tensors.
            kwargs: keyword arguments.
            result: the traced value, or a list of them.
        """
        if not isinstance(target, torch._ops.OpOverload):
            self.pin((args, kwargs), f"read by {getattr(target, '__name__', target)}")
            return self.opaque(result)
        given = dict(zip([a.name for a in target._schema.arguments], args, strict=False)) | kwargs
        call = Call(self, target, given, result)
        return call.rule()(call)


@dataclass(frozen=True)
class Call:
    """One call of an operator.

    Attributes:
        tracer: that meets it.
        target: the operator.
        given: its arguments by name.
        result: the traced value.
    """

    tracer: Tracer
    target: torch._ops.OpOverload
    given: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        """Without namespace and overload; operators in place go by their plain name."""
        name: str = self.target.overloadpacket.__name__
        return name[:-1] if name.endswith("_") and not name.startswith("__") else name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the result, or of the first one."""
        first = self.result[0] if isinstance(self.result, (tuple, list)) else self.result
        return tuple(int(size) for size in first.shape)

    def rule(self) -> Callable[[Call], Any]:
        """What to do with it."""
        if self.name in self.tracer.rules:
            return self.tracer.rules[self.name]
        if self.name in _RULES:
            return _RULES[self.name]
        if self.name in MOVES:
            return move
        if self.name.startswith(WINDOWS):
            return window
        if self.name in ORDERED:
            return ordered
        if self.name in REDUCTIONS:
            return reduction
        if self.name in CREATES:
            return created
        if self.name in SAME or torch.Tag.pointwise in self.target.tags:
            return elementwise
        return unknown

    def labels(self, value: Any, near: Sequence[Labels] = ()) -> Labels:
        """Of a value; of a parameter along the axis where its partners' channels lie."""
        if isinstance(value, Labels):
            return value
        assert isinstance(value, Parameter)
        channels, rank = self.tracer.channels, len(value.shape)
        wanted = {axis - len(other.shape) for other in near for axis in other.varying}
        named = [axis for axis, ids in enumerate(value.vectors) if ids is not None]
        chosen = [axis for axis in named if axis - rank in wanted]
        if len(chosen) > 1:  # a class token lies beside patches, and both along channels
            counts = [max(_distinct(other, axis - rank) for other in near) for axis in chosen]
            chosen = [axis for axis, n in zip(chosen, counts, strict=True) if n == max(counts)]
        if len(chosen) != 1:
            chosen = named[-1:] if (value.weight and not near) or len(named) == 1 else []
        for axis in named:
            if axis not in chosen:
                channels.pin(value.vectors[axis], "a parameter is indexed by it")  # type: ignore[arg-type]
        if not chosen:
            return Labels.constant(value.shape)
        ids = value.vectors[chosen[0]]
        assert ids is not None
        return Labels.along(value.shape, chosen[0], ids)

    def operands(self) -> list[Labels]:
        """Of all tensors among the arguments; parameters look at the others."""
        tensors = [v for v in _flat(self.given.values()) if isinstance(v, (Labels, Parameter))]
        known = [v for v in tensors if isinstance(v, Labels)]
        return [self.labels(v, [k for k in known if k.wired]) for v in tensors]

    def of(self, name: str) -> Labels:
        """The labels of one argument."""
        return self.labels(self.given[name])

    def axes(self, name: str = "dim") -> list[int]:
        """Axes that an argument names, 0 or greater; all if it names none."""
        rank = len(self.of("self" if "self" in self.given else "input").shape)
        given = self.given.get(name)
        if given is None or given == []:
            return list(range(rank))
        return sorted({axis % rank for axis in (given if isinstance(given, list) else [given])})


def _distinct(labels: Labels, axis: int) -> int:
    """How many labels lie along an axis, counted from the end, in its first line."""
    if -axis > labels.ids.ndim:
        return 0
    line = np.moveaxis(labels.ids, axis, 0).reshape(labels.ids.shape[axis], -1)[:, 0]
    return len(np.unique(line))


def _flat(values: Any) -> list[Any]:
    found: list[Any] = []
    for value in values:
        found += _flat(value) if isinstance(value, (tuple, list)) else [value]
    return found


def unknown(call: Call) -> Any:
    """Pins what is read."""
    call.tracer.pin(call.given, f"read by the operator {call.name}")
    return call.tracer.opaque(call.result)


def created(call: Call) -> Any:
    """Reads no channel."""
    return call.tracer.opaque(call.result)


def elementwise(call: Call) -> Any:
    """What meets is one channel."""
    merged = pointwise(call.tracer.channels, call.operands(), call.shape)
    many = isinstance(call.result, (tuple, list))
    return [merged for _ in call.result] if many else merged


def move(call: Call) -> Any:
    """Labels move as their elements do; those of a parameter along each axis on its own."""
    first = next(iter(call.given.values()))
    if isinstance(first, Parameter):
        return _move_parameter(call, first)
    if call.name in ("expand", "expand_as") and not first.wired:
        extent = first.aligned(len(call.shape)).spread
        return Labels(call.shape, np.full((1,) * len(extent), int(first.ids.min())), extent)
    known = [v for v in _flat(call.given.values()) if isinstance(v, Labels) and v.wired]

    def full(value: Any) -> Ids:
        return call.labels(value, known).full

    return _moved(call, full)


def _move_parameter(call: Call, parameter: Parameter) -> Any:
    views: list[Parameter] | None = None
    for axis, ids in enumerate(parameter.vectors):
        if ids is None:
            continue
        moved = _moved(call, partial(_constantly, Labels.along(parameter.shape, axis, ids).full))
        several = moved if isinstance(moved, list) else [moved]
        if views is None:
            views = [Parameter(m.shape, [None] * len(m.shape), parameter.weight) for m in several]
        for view, labels in zip(views, several, strict=True):
            lies = labels.varying
            if len(lies) == 1 and view.vectors[min(lies)] is None:
                view.vectors[min(lies)] = labels.ids.reshape(-1)
            else:
                call.tracer.channels.pin(labels.ids, "a parameter is reshaped across axes")
    if views is None:
        return call.tracer.opaque(call.result)
    return views if isinstance(call.result, (tuple, list)) else views[0]


def _constantly(ids: Ids, value: Any) -> Ids:
    del value
    return ids


def _moved(call: Call, full: Callable[[Any], Ids]) -> Any:
    """Runs the operator on labels."""

    def tensors(value: Any) -> Any:
        if isinstance(value, (Labels, Parameter)):
            return torch.from_numpy(full(value).copy())
        if isinstance(value, (tuple, list)):
            return [tensors(each) for each in value]
        return value

    given = {name: tensors(value) for name, value in call.given.items()}
    if "other" in given:  # of expand_as and view_as: only its shape counts
        given["other"] = torch.empty(call.shape)
    result = call.target(**given)
    if isinstance(result, (tuple, list)):
        return [Labels.of(tuple(each.shape), each.numpy()) for each in result]
    return Labels.of(tuple(result.shape), result.numpy())


def pad(call: Call) -> Any:
    """Zeros beside channels are UNIFORM; beside pixels they belong to their channel."""
    x, amounts = call.of("self"), list(call.given["pad"])
    mode = call.given.get("mode", "constant")
    ids = x.ids
    for index in range(len(amounts) // 2):
        axis, before, after = len(x.shape) - 1 - index, amounts[2 * index], amounts[2 * index + 1]
        if axis not in x.varying or (before, after) == (0, 0):
            continue
        if mode != "constant" or min(before, after) < 0:
            return unknown(call)
        widths = [(before, after) if a == axis else (0, 0) for a in range(ids.ndim)]
        ids = np.pad(ids, widths, constant_values=UNIFORM)
    return Labels.of(call.shape, ids)


def window(call: Call) -> Any:
    """Pooling and resizing: the last axes are pixels, the others pass."""
    x = call.of("self" if "self" in call.given else "input")
    count = next(d for d in (1, 2, 3) if f"{d}d" in call.name)
    pixels = range(len(x.shape) - count, len(x.shape))
    x = settled(call.tracer.channels, x, list(pixels))
    if isinstance(call.result, (tuple, list)):
        return [Labels(tuple(map(int, r.shape)), x.ids) for r in call.result]
    return Labels(call.shape, x.ids)


def reduction(call: Call) -> Any:
    """Symmetric in what it sums up; of a maximum with its index, only if that names no channel."""
    x = call.of("self")
    if "other" in call.given:  # the maximum of two tensors
        return elementwise(call)
    many = isinstance(call.result, (tuple, list))
    if many and call.name in ("max", "min"):
        return ordered(call)
    result = reduced(call.tracer.channels, x, call.axes(), bool(call.given.get("keepdim")))
    return [result for _ in call.result] if many else result


def ordered(call: Call) -> Any:
    """Gives the order along an axis a meaning."""
    x, keep = call.of("self"), len(call.shape) == len(call.of("self").shape)
    axes = call.axes() if "dim" in call.given else [len(x.shape) - 1]
    if x.varying & set(axes):
        return unknown(call)
    ids = x.ids if keep else x.ids.squeeze(tuple(axes))
    if isinstance(call.result, (tuple, list)):
        return [Labels(tuple(map(int, r.shape)), ids) for r in call.result]
    return Labels(call.shape, ids)


def softmax(call: Call) -> Any:
    """Channels that are all treated the same may trade places."""
    x = call.of("self")
    alike(call.tracer.channels, x, call.axes(), "normalized for each position on its own")
    return x


def glu(call: Call) -> Any:
    """The first half times a gate from the second."""
    x, axis = call.of("self"), int(call.given.get("dim", -1))
    halves = [Labels.of(call.shape, half) for half in np.split(x.full, 2, axis)]
    return pointwise(call.tracer.channels, halves, call.shape)


_RULES: dict[str, Callable[[Call], Any]] = {
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax"), softmax),
    "glu": glu,
}
