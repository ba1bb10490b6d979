"""How many bytes a network takes: its files, and each layer's weights, in several forms at once.

    compare([size_of("sparse.engine"), size_of("dense.engine"), size_of("f32.onnx")])

A packed weight of an engine holds its values in the order of the kernel, what tells where they
belong (2:4: a quarter of the dense bytes in format H, an eighth in C), and beside them a scale, a
bias and a correction for each channel. Of a 2:4 weight in INT8 so remain 0.75 or 0.625 of the dense
one, and of a small layer a little more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from twofour.core.errors import InputError
from twofour.core.plan import Plan
from twofour.engine import Engine
from twofour.onnx_tools.inspect import inspect
from twofour.onnx_tools.load import load_model

ENGINE, ONNX = "engine", "onnx"


@dataclass(frozen=True)
class LayerSize:
    """A layer's weight.

    Attributes:
        weight_bytes: as packed, or as the ONNX file stores it.
        elements: of the weight as if dense; 0 where it is not known.
        precision: "int8", "bfloat16", "float32".
        pattern: that its kernel or file keeps: "2:4", "dense", ...
        tactic: of an engine, in whose format it is packed; "" of a file.
        sources: nodes of the source model that it computes.
    """

    weight_bytes: int
    elements: int
    precision: str
    pattern: str
    tactic: str
    sources: frozenset[str]


@dataclass(frozen=True)
class Size:
    """A model or an engine.

    Attributes:
        name: of the file.
        kind: "onnx" or "engine".
        file_bytes: of the file.
        layers: name -> those that have a weight, in order.
    """

    name: str
    kind: str
    file_bytes: int
    layers: Mapping[str, LayerSize]

    @property
    def weight_bytes(self) -> int:
        """Of all layers."""
        return sum(layer.weight_bytes for layer in self.layers.values())

    @property
    def weights(self) -> str:
        """What most bytes of weights are, such as "2:4 int8"."""
        total: dict[str, int] = {}
        for layer in self.layers.values():
            words = f"{layer.pattern} {layer.precision}"
            total[words] = total.get(words, 0) + layer.weight_bytes
        return max(total, key=lambda words: total[words], default="no weights")


@dataclass(frozen=True)
class LayerRow:
    """A layer in all forms.

    Attributes:
        name: in the first.
        elements: of its weight as if dense.
        pattern: in the first.
        precision: in the first.
        tactic: of the first.
        weight_bytes: in each; None where there is no such layer.
    """

    name: str
    elements: int
    pattern: str
    precision: str
    tactic: str
    weight_bytes: tuple[int | None, ...]


@dataclass(frozen=True)
class Saved:
    """2:4 weights in INT8 beside the same ones packed dense in INT8.

    Attributes:
        layers: that are the one in the first, and the other in an engine beside it.
        sparse_bytes: theirs.
        dense_bytes: theirs.
        beside_bytes: of each of both, scales, biases, corrections and padding: what the dense
            layers have beyond their elements.
    """

    layers: int
    sparse_bytes: int
    dense_bytes: int
    beside_bytes: int

    @property
    def ratio(self) -> float:
        """As they lie in the engines."""
        return self.sparse_bytes / self.dense_bytes

    @property
    def weights_alone(self) -> float:
        """Without what is beside them."""
        alone = self.dense_bytes - self.beside_bytes
        return (self.sparse_bytes - self.beside_bytes) / alone


def size_of(path: Path) -> Size:
    """Of an ONNX file or an engine, told apart by what the file is.

    Raises:
        InputError, EngineError: there is none, or it is neither.
    """
    if path.suffix == ".onnx":
        layers = _stored(path)
        kind = ONNX
    else:
        layers = _packed(Engine.load(path).plan)
        kind = ENGINE
    return Size(path.name, kind, path.stat().st_size, layers)


def compare(sizes: Sequence[Size]) -> tuple[LayerRow, ...]:
    """The layers of the first, beside those of the others that compute the same nodes.

    Raises:
        InputError: another has no layer in common with the first.
    """
    first, *others = sizes
    for other in others:
        if not any(_same(layer, other) for layer in first.layers.items()):
            raise InputError(
                f"{other.name} is no other form of {first.name}",
                ["expected layers of the same names, got none that both have"],
                "give engines and ONNX files of one network",
            )
    rows = []
    for name, layer in first.layers.items():
        found = [_same((name, layer), other) for other in others]
        each = (layer.weight_bytes, *(same.weight_bytes if same else None for same in found))
        rows.append(
            LayerRow(name, layer.elements, layer.pattern, layer.precision, layer.tactic, each)
        )
    return tuple(rows)


def saved(first: Size, other: Size) -> Saved | None:
    """By 2:4 in INT8; None where no layer is sparse in the one and dense in the other."""
    count = sparse = dense = beside = 0
    for name, layer in first.layers.items():
        same = _same((name, layer), other)
        if same is None or {first.kind, other.kind} != {ENGINE}:
            continue
        if (layer.precision, same.precision) != ("int8", "int8"):
            continue
        if layer.tactic.startswith("2:4") and not same.tactic.startswith("2:4"):
            count += 1
            sparse += layer.weight_bytes
            dense += same.weight_bytes
            beside += same.weight_bytes - layer.elements
    return Saved(count, sparse, dense, beside) if count else None


def _same(layer: tuple[str, LayerSize], other: Size) -> LayerSize | None:
    """The layer of another form: of the same name, or computing one of the same nodes."""
    name, size = layer
    if name in other.layers:
        return other.layers[name]
    names = size.sources | {name}
    return next((each for each in other.layers.values() if names & each.sources), None)


def _packed(plan: Plan) -> dict[str, LayerSize]:
    """Of the first profile: all profiles share their weights."""
    indices = [i for step in plan.profiles[0].steps for i in step.layers]
    return {
        layer.name: LayerSize(
            layer.weight_bytes,
            layer.work.k * layer.work.channels,
            layer.precision,
            layer.pattern or "dense",
            layer.tactic,
            frozenset(layer.source),
        )
        for layer in (plan.layers[i] for i in indices)
        if layer.weight_bytes and layer.work.k
    }


def _stored(path: Path) -> dict[str, LayerSize]:
    found = {}
    for weight in inspect(load_model(path)).weights:
        pattern = weight.patterns[0] if weight.patterns else "dense"
        found[weight.node] = LayerSize(
            weight.size_bytes, 0, weight.dtype, pattern, "", frozenset((weight.node,))
        )
    return found
