"""The layers of a network that choices are for, and what else follows their choices.

A node without a weight of its own (a residual Add, an activation, the products within attention)
belongs to the last layer above it: that is whose epilogue it becomes, or whose results it reads.
So every node behind the first layer belongs to one, by the file alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from twofour.compiler.prunable import Network
from twofour.core.errors import InputError
from twofour.onnx_tools.edit import constant
from twofour.onnx_tools.revert import is_quantized
from twofour.onnx_tools.weights import layer_weights


@dataclass(frozen=True)
class Layer:
    """A Conv, Gemm or MatMul with a constant weight.

    Attributes:
        name: of the node.
        weight: name of the initializer.
        parameters: of the weight.
    """

    name: str
    weight: str
    parameters: int


@dataclass(frozen=True)
class Passage:
    """A tensor that a node of one layer makes and a node of another one reads.

    Attributes:
        source: the layer that makes it.
        target: the layer that reads it.
        elements: of the tensor.
    """

    source: str
    target: str
    elements: int


def layers_of(model: Network) -> tuple[Layer, ...]:
    """The layers of the main graph, in order.

    Args:
        model: float, with named nodes (`compiler/prunable.py`).

    Raises:
        InputError: the model is quantized, or has no such layer.
    """
    if is_quantized(model):
        raise InputError(
            "the model is quantized already",
            ["choices are made for a float model: they say which layers become INT8"],
            "give the float model",
        )
    main = set(model.graph)
    found = tuple(
        Layer(node.name or "", weight.name, int(weight.stored.size))
        for node, weight in layer_weights(model)
        if node in main
    )
    if not found:
        raise InputError(
            "the model has no layer to choose for",
            ["expected a Conv, Gemm or MatMul with a constant weight in the main graph"],
        )
    return found


def owners(model: Network) -> dict[str, str]:
    """The layer that each node belongs to, by names; those before the first layer have none."""
    weighted = {node for node, _ in layer_weights(model)}
    order = [node for node in model.graph if node in weighted]
    place = {node: index for index, node in enumerate(order)}
    last: dict[object, int] = {}
    found: dict[str, str] = {}
    for node in model.graph:
        above = [last[value] for value in node.inputs if value in last]
        own = place.get(node, max(above, default=-1))
        if own >= 0:
            last |= dict.fromkeys(node.outputs, own)
            found[node.name or ""] = order[own].name or ""
    return found


def passages(model: Network, owner: Mapping[str, str]) -> Iterator[Passage]:
    """What passes from layer to layer, each tensor once for each reader.

    Args:
        model: with known shapes; others count nothing.
        owner: of each node.
    """
    seen = set()
    for node in model.graph:
        target = owner.get(node.name or "")
        for value in node.inputs:
            producer = None if value is None else value.producer()
            source = None if producer is None else owner.get(producer.name or "")
            if value is None or source is None or target is None or source == target:
                continue
            if constant(value) is None and (value, target) not in seen:
                seen.add((value, target))
                dims = [] if value.shape is None else [d for d in value.shape if isinstance(d, int)]
                known = value.shape is not None and len(dims) == len(value.shape)
                yield Passage(source, target, math.prod(dims) if known else 0)
