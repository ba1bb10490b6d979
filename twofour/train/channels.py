"""The channels of a PyTorch model that may trade places, found by tracing it.

The model is exported (`torch.export`), and the labels of channels (`core/labels.py`) are carried
through its graph of aten operators (`train/aten.py`). What comes out: the labels along each axis of
each parameter, and the spaces in which channels may be permuted.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from twofour.core.channels import Channels, Ids
from twofour.core.errors import UnsupportedError
from twofour.train.aten import Tracer
from twofour.train.aten_layers import RULES

Inputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class ChannelGraph:
    """Which channels the axes of a model's parameters hold.

    Attributes:
        channels: ties, constraints and spaces.
        axes: name of a parameter or buffer -> for each of its axes int64 [size], or None for an
            axis that is never permuted.
        grouped: name of the weight of a grouped convolution -> int64 [groups, C / groups], the
            channels that it reads; its axis 1 is None in `axes`.
        names: every name of a shared parameter -> the one used here.
        training: some parameters run in training mode only, such as those of auxiliary heads.
    """

    channels: Channels
    axes: dict[str, list[Ids | None]]
    grouped: dict[str, Ids]
    names: dict[str, str]
    training: bool = False

    def reads(self, name: str) -> Ids | None:
        """The channels that a weight reads: int64 [groups, C / groups]; None if it never ran."""
        name = self.names.get(name, name)
        if name in self.grouped:
            return self.grouped[name]
        axes = self.axes.get(name)
        if axes is None or len(axes) < 2 or axes[1] is None:
            return None
        return axes[1][None]


def trace_channels(model: nn.Module, example_inputs: Inputs) -> ChannelGraph:
    """Finds which channels are tied together, and which cannot move.

    Args:
        model: any that `torch.export` takes; it is not changed.
        example_inputs: a tensor, a tuple of positional or a mapping of keyword arguments.

    Raises:
        UnsupportedError: the model cannot be traced, with the reason that torch gives.
    """
    copied, names = _copy(model).eval(), _first_names(model)
    channels = Channels()
    tracer = Tracer(channels, RULES)
    idle = _walk(tracer, export(copied, example_inputs), names)
    weights = {name for name in idle if tracer.parameters[name].weight}
    if weights:
        idle &= _walk(tracer, export(copied.train(), example_inputs), names)
    for name in sorted(idle):
        tracer.pin(tracer.parameters[name], "it was not run")
    for parameter in tracer.parameters.values():
        tracer.finish(parameter)
    axes = {name: list(p.vectors) for name, p in tracer.parameters.items()}
    return ChannelGraph(channels, axes, tracer.grouped, names, bool(weights - idle))


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except RuntimeError as e:
        raise UnsupportedError(
            f"cannot copy {type(model).__name__} to trace it",
            [f"copy.deepcopy: {str(e).splitlines()[0]}"],
            "remove torch.nn.utils.weight_norm (its successor in torch.nn.utils.parametrizations "
            "can be copied) and results of earlier calls that modules keep as attributes",
        ) from e


def _walk(tracer: Tracer, program: torch.export.ExportedProgram, names: dict[str, str]) -> set[str]:
    """Carries labels through a graph; returns the parameters and buffers that it does not read."""
    tensors = {**program.state_dict, **program.constants}
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    values: dict[str, Any] = {}
    read: dict[str, bool] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and spec.target in tensors:
            name, tensor = names.get(spec.target, spec.target), tensors[spec.target]
            kept = tracer.parameters.get(name)
            if kept is None:
                weight = spec.kind == InputKind.PARAMETER
                kept = tracer.parameter(name, tuple(tensor.shape), weight, tensor.dtype)
            values[spec.arg.name] = kept
            read[name] = read.get(name, False) or bool(placeholders[spec.arg.name].users)
    for node in program.graph.nodes:
        _require_sizes(node)
        _visit(tracer, node, values)
    return {name for name, users in read.items() if not users}


def _require_sizes(node: fx.Node) -> None:
    value = node.meta.get("val")
    for each in value if isinstance(value, (tuple, list)) else [value]:
        if isinstance(each, Tensor) and any(type(size) is not int for size in each.shape):
            raise UnsupportedError(
                "cannot follow channels through values whose number depends on data",
                [f"the operator {node.target} returns {list(each.shape)}"],
                "permute the part of the model before it, as a module of its own",
            )


def export(model: nn.Module, example_inputs: Inputs) -> torch.export.ExportedProgram:
    """The model as a graph of aten operators, for the sizes of these inputs.

    Raises:
        UnsupportedError: torch cannot do it, such as for control flow that depends on data.
    """
    args, kwargs = arguments(example_inputs)
    mode = "training" if model.training else "eval"
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # its operators hide what they are made of
    try:
        with torch.no_grad():
            return torch.export.export(model, args, kwargs)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as e:
        # What torch and the model's own code raise while it is traced has no common class.
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        raise UnsupportedError(
            f"cannot trace {type(model).__name__} in {mode} mode to see which channels are tied "
            "together",
            [f"torch.export: {type(e).__name__}: {lines[0] if lines else 'no message'}"],
            "give example inputs that the model takes in both modes; wrap it in a module that "
            "returns tensors; make a part with control flow a module of its own and permute the "
            "parts; or go on without permutation",
        ) from e
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def arguments(example_inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call of the model."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    return tuple(example_inputs), {}


def _first_names(model: nn.Module) -> dict[str, str]:
    """Each name of a parameter or buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    every = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name: first.setdefault(id(tensor), name) for name, tensor in every}


def _visit(tracer: Tracer, node: fx.Node, values: dict[str, Any]) -> None:
    if node.op == "placeholder":
        if node.name not in values:
            values[node.name] = tracer.opaque(node.meta.get("val"))
        return
    args: Any = fx.map_arg(node.args, lambda n: values[n.name])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: values[n.name])
    if node.op == "output":
        tracer.pin((args, kwargs), "an output of the network")
    elif node.target is operator.getitem:
        values[node.name] = args[0][args[1]]
    elif _changes_a_part(node):
        tracer.pin((args, kwargs), "a part of it is changed in place")
        values[node.name] = args[0]
    elif node.op == "call_function":
        result = node.meta.get("val")
        values[node.name] = tracer.call(node.target, args, kwargs, result)
        changed = _changed(node)
        if changed is not None:
            values[changed.name] = values[node.name]
    else:  # get_attr: a constant, or a graph that a control flow operator calls
        values[node.name] = tracer.opaque(node.meta.get("val"))


def _changed(node: fx.Node) -> fx.Node | None:
    """The value that an operator changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable or not node.args:
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _changes_a_part(node: fx.Node) -> bool:
    """Whether an operator writes to some elements of an older value, so that these differ now."""
    changed = _changed(node)
    if changed is None:
        return False
    value = changed.meta["val"]
    while changed.op == "call_function" and changed.args:
        before = changed.args[0]
        if not isinstance(before, fx.Node) or not isinstance(before.meta.get("val"), Tensor):
            return changed.target is operator.getitem
        if before.meta["val"].numel() != value.numel():
            return getattr(changed.target, "is_view", False)
        if not getattr(changed.target, "is_view", False):
            return False
        changed = before
    return False
