"""The weights of a model, some pruned while the others stay as they are."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from glob import escape
from itertools import chain
from os import PathLike

import onnx_ir as ir

from twofour.compiler.importer import name_nodes, standardized
from twofour.core.errors import InputError
from twofour.core.sensitivity import Left
from twofour.onnx_tools.load import load_model, model_bytes
from twofour.onnx_tools.plugins import inline
from twofour.onnx_tools.prune import Pruned, prune, require_matches
from twofour.onnx_tools.weights import layer_weights

Network = ir.Model
"""A model whose layers can be pruned: of standard operators, without functions."""


def read_network(path: str | PathLike[str]) -> Network:
    """Reads an ONNX file.

    Raises:
        InputError: it cannot be read.
        UnsupportedError: its opset cannot be converted.
    """
    model = standardized(load_model(path))
    if model.functions:
        model = model.clone()
        inline(model)
    return model


def digest(model: Network) -> str:
    """SHA-256 of the model, external weights included."""
    return hashlib.sha256(model_bytes(model)).hexdigest()


@dataclass(frozen=True)
class Layer:
    """A weight, and the first layer that reads it.

    Attributes:
        name: as the compiler calls that layer.
        skip: the layer's name in the file; of its weight where several read it or it has no name.
        weight: its name.
        parameters: of the weight.
        excluded: whether the user left it out.
        readers: how many layers read it.
    """

    name: str
    skip: str
    weight: str
    parameters: int
    excluded: bool
    readers: int


Try = tuple[Layer, str, Pruned]
"""A layer, the pattern it is to have, and what pruning all layers says of it."""
Plan = Mapping[str, Sequence[Try]]
"""The tries of each pattern."""
_NAMELESS = re.compile(r"(node(_\d+)?)?")  # as `load_model` fills in


def find_layers(model: Network, skip: Sequence[str]) -> Iterator[Layer]:
    """Each constant weight of a Conv, Gemm or MatMul, once.

    Args:
        model: without functions; not changed.
        skip: shell patterns of names of layers or weights to exclude.

    Raises:
        InputError: a pattern matches none.
    """
    renamed = model.clone()
    name_nodes(renamed.graph)
    readers: dict[str, list[_Reader]] = {}
    pairs = zip(layer_weights(model), layer_weights(renamed), strict=True)
    for (node, read), (named, _) in pairs:
        reader = _Reader(node.name or "", named.name or "", read.stored.size)
        readers.setdefault(read.name, []).append(reader)
    known = {
        weight: {weight, *(r.own for r in found), *(r.name for r in found)}
        for weight, found in readers.items()
    }
    require_matches(skip, chain.from_iterable(known.values()))
    for weight, found in readers.items():
        first = found[0]
        alone = len(found) == 1 and not _NAMELESS.fullmatch(first.own)
        excluded = any(fnmatchcase(name, glob) for name in known[weight] for glob in skip)
        skip_name = first.own if alone else weight
        yield Layer(first.name, skip_name, weight, first.parameters, excluded, len(found))


@dataclass(frozen=True)
class _Reader:
    """A layer that reads a weight: its name in the file, the compiler's, the weight's size."""

    own: str
    name: str
    parameters: int


def tries(model: Network, pattern: str, layers: Sequence[Layer]) -> Iterator[Try]:
    """Each layer, and what pruning all of them says of it."""
    report: dict[str, Pruned] = {}
    for found in prune(model, pattern)[1]:
        report.setdefault(found.weight, found)  # its later readers find it pruned already
    for layer in layers:
        entry = report[layer.weight]
        yield layer, pattern, replace(entry, reason="excluded by name") if layer.excluded else entry


def tried(plan: Plan) -> list[Try]:
    """Those that can be pruned."""
    return [each for found in plan.values() for each in found if not each[2].reason]


def left_out(model: str, plan: Plan) -> tuple[Left, ...]:
    """Why layers are not tried.

    Raises:
        InputError: no layer can be.
    """
    found = [Left(layer.name, p, each.reason) for t in plan.values() for layer, p, each in t]
    if not tried(plan):
        reasons = [f"{each.layer}, {each.pattern}: {each.reason}" for each in found]
        raise InputError(
            f"no layer of {model} can be pruned",
            reasons or ["expected a Conv, Gemm or MatMul with constant weights"],
            "choose another --pattern or fewer --skip",
        )
    return tuple(each for each in found if each.reason)


def prune_only(model: Network, weights: Sequence[str], pattern: str) -> tuple[Network, float]:
    """The model with these weights pruned, by magnitude, and no others.

    Returns:
        It, and the least share of its sum of squares that one of them keeps.

    Raises:
        InputError: names cannot tell them from others.
    """
    pruned, report = prune(model, pattern, include=[escape(name) for name in weights])
    if wrong := {entry.weight for entry in report if not entry.reason} ^ set(weights):
        raise InputError(
            f"cannot prune {', '.join(weights)} without others",
            [f"a layer and a weight of another share the name {min(wrong)!r}"],
            "leave it out: --skip",
        )
    return pruned, min(entry.energy_kept for entry in report if not entry.reason)


def named(model: Network) -> Network:
    """A copy as `read_network` has it, its nodes named as the compiler names them."""
    model = standardized(model).clone()
    if model.functions:
        inline(model)
    name_nodes(model.graph)
    return model
