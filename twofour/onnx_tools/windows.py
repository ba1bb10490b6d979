"""What has nothing to compute: windows larger than their input, and sizes below zero."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from twofour.core.errors import InputError

_WINDOWED = ("AveragePool", "Conv", "LpPool", "MaxPool")
_STANDARD = ("", "ai.onnx")


def require_windows(nodes: Iterable[ir.Node]) -> None:
    """Refuses windows larger than their input: nothing is left to compute.

    ONNX makes such a result empty, and runtimes do not agree on it.

    Args:
        nodes: with the shapes that are known.

    Raises:
        InputError: names the first one.
    """
    for node in nodes:
        if problem := _problem(node):
            raise _nothing_to_compute(node, [problem])


def require_sizes(nodes: Iterable[ir.Node]) -> None:
    """Refuses results with a negative dimension.

    Args:
        nodes: with the shapes that are known.

    Raises:
        InputError: names the first one.
    """
    for node in nodes:
        for value in node.outputs:
            if any(isinstance(dim, int) and dim < 0 for dim in value.shape or ()):
                reasons = [f"its result {value.name!r} has a negative dimension: {value.shape}"]
                problem = _problem(node)
                raise _nothing_to_compute(node, reasons if problem is None else [problem, *reasons])


def _nothing_to_compute(node: ir.Node, reasons: list[str]) -> InputError:
    return InputError(
        f"{node.op_type} {node.name!r} has nothing to compute at these shapes",
        reasons,
        "give larger inputs, as --shapes x:1x3x224x224",
    )


def _problem(node: ir.Node) -> str | None:
    """How the window does not fit."""
    if node.op_type not in _WINDOWED or node.domain not in _STANDARD or not node.inputs:
        return None
    x = node.inputs[0].shape if node.inputs[0] is not None else None
    size = _window_size(node)
    pads = _integers(node, "pads", [0] * 2 * len(size))
    dims = [dim for dim in x[2:] if isinstance(dim, int)] if x is not None else []
    if x is None or not len(size) == len(dims) == len(x) - 2 or len(pads) != 2 * len(size):
        return None
    padded = [d + pads[i] + pads[i + len(size)] for i, d in enumerate(dims)]
    if not any(reach > room for reach, room in zip(size, padded, strict=True)):
        return None
    return f"its window is {_dims(size)}, its input with padding {_dims(padded)}"


def _window_size(node: ir.Node) -> list[int]:
    """What a window covers of each spatial axis; [] where that is not known, or padded to fit."""
    if node.attributes.get_string("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return []
    kernel = _integers(node, "kernel_shape", [])
    if not kernel and len(node.inputs) > 1 and node.inputs[1] is not None:
        w = node.inputs[1].shape
        kernel = [int(dim) for dim in w.numpy()[2:]] if w is not None and w.is_static() else []
    dilations = _integers(node, "dilations", [1] * len(kernel))
    if len(dilations) != len(kernel):
        return []
    return [d * (k - 1) + 1 for k, d in zip(kernel, dilations, strict=True)]


def _integers(node: ir.Node, name: str, default: list[int]) -> list[int]:
    """An attribute, or what it is if not given."""
    return list(node.attributes.get_ints(name, default))


def _dims(sizes: Iterable[int]) -> str:
    return "x".join(map(str, sizes))
