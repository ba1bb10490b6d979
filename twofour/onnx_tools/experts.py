"""Nodes of routed experts and masked MLPs in a file: their weights, and their integer form.

    MixtureOfExperts(x, logits, w1, b1, w2, b2)
        =>  QMixtureOfExperts(x, logits, w1_int8, w1_scale, b1, w2_int8, w2_scale, b2)

Weights become int8 with one scale an output channel of each expert; what the experts read is
rounded row by row while running, like the inputs of other dynamic products (dynamic.py).
core/experts.py has the definition of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx_ir as ir

from twofour.core.errors import InputError
from twofour.core.experts import DOMAIN, MIXTURE
from twofour.core.experts_text import BY_NAME, inputs_of, name_of
from twofour.core.rounding import quantize_weight
from twofour.onnx_tools.edit import Array, Editor, constant, is_standard, operand

_MATRICES = ("w1", "w2")
_PER_EXPERT = 3  # dimensions of the weights of several experts
_ROUTERS = ("MatMul", "Gemm")
_PASSED = ("Add", "Reshape", "Cast", "Identity", "Mul", "Div")
ROUTES = "it decides which experts run"
NO_DATA = "each expert reads rows of its own: prune them by magnitude, in a second run"


def form_of(node: ir.Node) -> tuple[str, str, bool] | None:
    """Base, activation and whether weights are int8; None for other nodes."""
    return BY_NAME.get(node.op_type) if node.domain == DOMAIN else None


def computes_integers(node: ir.Node) -> bool:
    """Whether it has experts in int8."""
    form = form_of(node)
    return form is not None and form[2]


def is_float(node: ir.Node) -> bool:
    """Whether it has experts in float32, all of whose weights are constants."""
    form = form_of(node)
    if form is None or form[2]:
        return False
    arrays = [constant(value) for value in matrices(node)]
    return all(array is not None and array.dtype == np.float32 for array in arrays)


def matrices(node: ir.Node) -> Iterator[ir.Value | None]:
    """What the two products of its experts read as their weights."""
    form = form_of(node)
    if form is None:
        return
    names = inputs_of(form[0], quantized=form[2])
    for name in _MATRICES:
        yield operand(node, names.index(name))


def axes_of(array: Array) -> tuple[int, ...]:
    """The axes of a weight with output channels first, then input channels, then experts."""
    return (1, 2, 0) if array.ndim == _PER_EXPERT else tuple(range(array.ndim))


def quantize_node(editor: Editor, node: ir.Node) -> None:
    """Gives a node of float experts weights in int8; it becomes another operator.

    Args:
        editor: of its graph.
        node: for which `is_float` holds; changed.

    Raises:
        InputError: a weight is not finite.
    """
    form = form_of(node)
    if form is None:
        raise ValueError(f"{node.name!r} has no experts")
    base, activation, _ = form
    given = dict(zip(inputs_of(base, quantized=False), node.inputs, strict=True))
    for name in _MATRICES:
        value, array = given[name], constant(given[name])
        if value is None or array is None:
            raise ValueError(f"{node.name!r} has no constant weight {name}")
        try:
            w8, scale = quantize_weight(array.reshape(-1, array.shape[-1]))
        except ValueError as error:
            raise InputError(
                f"cannot quantize {node.op_type} {node.name!r}",
                [f"its weight {value.name!r} holds NaN or infinite values"],
                "train or export it again; or leave the node float (--exclude)",
            ) from error
        given[name] = editor.initializer(f"{value.name}_quantized", w8.reshape(array.shape))
        scales = scale.reshape(array.shape[:-1])
        given[f"{name}_scale"] = editor.initializer(f"{value.name}_scale", scales)
    node.op_type = name_of(base, activation, quantized=True)
    names = inputs_of(base, quantized=True)
    node.resize_inputs(len(names))
    for index, name in enumerate(names):
        node.replace_input_with(index, given[name])


def routers(nodes: Iterable[ir.Node]) -> set[ir.Node]:
    """The products that logits of experts come from: they stay float and dense.

    They are a thousandth of the work, and what they round may send a token elsewhere.
    """
    found = set()
    for node in nodes:
        form = form_of(node)
        value = operand(node, 1) if form is not None and form[0] == MIXTURE else None
        maker = None if value is None else value.producer()
        while maker is not None and is_standard(maker, *_PASSED):
            made = [each for each in maker.inputs if each is not None and constant(each) is None]
            maker = made[0].producer() if len(made) == 1 else None
        if maker is not None and is_standard(maker, *_ROUTERS):
            found.add(maker)
    return found
