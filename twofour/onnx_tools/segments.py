"""A model run in pieces, so that not all tensors that are wanted lie in memory at once.

    x -> A -> B -> C -> D -> y        wanted: a, b, c, d

    one piece    runs x -> a, b, c, d
    two pieces   run x -> a, b and then b -> c, d, with a forgotten in between

A piece begins where the tensors wanted so far would take more than a budget. It is given what
earlier pieces computed and it or a later one reads. So nothing is computed twice and every weight
is loaded once; the price is that ONNX Runtime cannot fuse operators across a cut.

Where sizes are open, a tensor counts as 1/16 of the budget, and a run is cut into parts of so many
samples as its own sizes allow.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from twofour.onnx_tools.edit import reads
from twofour.onnx_tools.reference import input_form
from twofour.onnx_tools.runner import BATCH_BYTES, BATCH_IF_UNKNOWN, Runner

MOST_UNSIZED = 16
"""Wanted tensors of a piece, where the size of one is not known."""

Array = NDArray[Any]
Dims = tuple[int | str, ...]


class Segments:
    """The model in ONNX Runtime, in as many pieces as the wanted tensors need.

    Args:
        model: with the types of its values known; it stays as it is.
        tensors: names of values of the main graph, inputs among them.
        threads: of ONNX Runtime; 0 for as many as there are cores.
        samples: in a run.

    Raises:
        InputError: there is no such tensor.
        UnsupportedError: ONNX Runtime cannot run the model.
    """

    def __init__(self, model: ir.Model, tensors: Sequence[str], threads: int, samples: int) -> None:
        """Loads what the tensors need."""
        inputs = [str(value.name) for value in model.graph.inputs]
        self._given = [name for name in inputs if name in tensors]
        inner = [name for name in tensors if name not in inputs]
        groups = _groups(model, inner, samples)
        self._pieces = _pieces(model, groups)
        self._sizes = _Sizes.of(model, groups)
        self._runners = [
            Runner(model, [*piece.wanted, *piece.kept], threads, piece.inputs)
            for piece in self._pieces
        ]

    def __len__(self) -> int:
        """How many pieces there are."""
        return len(self._pieces)

    def parts(self, inputs: dict[str, Array], samples: int) -> Iterator[dict[str, Array]]:
        """The inputs of a run, cut into parts if that is needed and axis 0 counts their samples.

        How many samples a part has, a power of two, follows from the shapes of the inputs alone.
        """
        most = samples if self._sizes is None else self._sizes.samples(inputs, samples)
        for start in range(0, samples, most):
            whole = most == samples
            yield inputs if whole else {n: x[start : start + most] for n, x in inputs.items()}

    def run(self, inputs: dict[str, Array]) -> Iterator[dict[str, Array]]:
        """The wanted tensors for one batch, those of a piece at a time.

        Each dict is emptied when the next is asked for, so that only one piece is held.

        Raises:
            InputError: the model fails on it.
        """
        yield {name: inputs[name] for name in self._given}
        known = dict(inputs)
        for i, (piece, runner) in enumerate(zip(self._pieces, self._runners, strict=True)):
            found = runner.run({name: known[name] for name in piece.inputs})
            later = {name for each in self._pieces[i + 1 :] for name in each.inputs}
            known = {name: array for name, array in (known | found).items() if name in later}
            found = {name: found[name] for name in piece.wanted}
            yield found
            found.clear()


@dataclass(frozen=True)
class _Sizes:
    """Shapes with names for open sizes: of the inputs, and of the tensors of each piece."""

    inputs: Mapping[str, Dims]
    groups: tuple[tuple[Dims, ...], ...]

    @classmethod
    def of(cls, model: ir.Model, groups: list[list[str]]) -> _Sizes | None:
        """None where runs are not cut: no size is open, or axis 0 of an input is no open batch."""
        values = {str(value.name): value for node in model.graph for value in node.outputs}
        shapes = [[_dims(values[name]) for name in group if name in values] for group in groups]
        inputs = {str(value.name): _dims(value) for value in model.graph.inputs}
        fixed = all(isinstance(dim, int) for group in shapes for dims in group for dim in dims[1:])
        if fixed or not all(dims and isinstance(dims[0], str) for dims in inputs.values()):
            return None
        return cls(inputs, tuple(tuple(group) for group in shapes))

    def samples(self, inputs: Mapping[str, Array], samples: int) -> int:
        """How many samples of a run make a part within the budget."""
        known: dict[str, int] = {}
        for name, dims in self.inputs.items():
            named = zip(dims, inputs[name].shape, strict=False)
            known |= {dim: size for dim, size in named if isinstance(dim, str) and dim != "?"}
        most, total = samples, 0
        for group in self.groups:
            if not all(isinstance(dim, int) or dim in known for dims in group for dim in dims):
                most = min(most, BATCH_IF_UNKNOWN)
                continue
            sizes = [
                math.prod(known[dim] if isinstance(dim, str) else dim for dim in dims)
                for dims in group
            ]
            total = max(total, 4 * sum(sizes))
        within = max(BATCH_BYTES * samples // max(total, 1), 1)
        return most if within >= most else 1 << within.bit_length() - 1


def _dims(value: ir.Value) -> Dims:
    """The sizes of a value, and the names of open ones; ("?",) where nothing is known."""
    form = input_form(value)
    return ("?",) if form.dims is None else form.dims


@dataclass(frozen=True)
class _Piece:
    """Names of the values that a piece reads, of the tensors in it, and of what later ones read."""

    inputs: tuple[str, ...]
    wanted: tuple[str, ...]
    kept: tuple[str, ...] = ()


def _pieces(model: ir.Model, groups: list[list[str]]) -> list[_Piece]:
    """What computes each group; groups are joined where a value between them is no plain tensor."""
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    owner: dict[ir.Node, int] = {}
    pieces: list[_Piece] = []
    for i, group in enumerate(groups):
        own, given = _computes(model, [values[name] for name in group if name in values], owner)
        inner = [value for value in given if value.producer() is not None]
        if not all(_is_plain(value) for value in inner):
            return _pieces(model, [*groups[: i - 1], groups[i - 1] + group, *groups[i + 1 :]])
        owner |= dict.fromkeys(own, i)
        for value in inner:
            before = pieces[owner[_producer(value)]]
            if value.name not in (*before.kept, *before.wanted):
                kept = (*before.kept, str(value.name))
                pieces[owner[_producer(value)]] = replace(before, kept=kept)
        pieces.append(_Piece(tuple(str(value.name) for value in given), tuple(group)))
    return pieces


def _computes(
    model: ir.Model, wanted: list[ir.Value], owner: Mapping[ir.Node, int]
) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes that compute values, less those that somebody owns; and what they read of others.

    What is read are values of nodes that are owned, and inputs of the model.
    """
    inputs = set(model.graph.inputs)
    own: dict[ir.Node, None] = {}
    given: dict[ir.Value, None] = {}
    left = list(wanted)
    while left:
        value = left.pop()
        node = value.producer()
        if value in inputs or node in owner:
            given[value] = None
        elif node is not None and node.graph is model.graph and node not in own:
            own[node] = None
            left += reads(node)
    return list(own), sorted(given, key=lambda value: str(value.name))


def _producer(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _is_plain(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype is not None


def _groups(model: ir.Model, tensors: Sequence[str], samples: int) -> list[list[str]]:
    """The tensors in the order of the graph, each group within the budget if it has several."""
    wanted, groups, total = set(tensors), list[list[str]](), 0
    for node in model.graph:
        for value in node.outputs:
            if value.name not in wanted:
                continue
            wanted.discard(value.name)
            size = _bytes(value, samples)
            if not groups or total + size > BATCH_BYTES:
                groups, total = [*groups, []], 0
            groups[-1].append(str(value.name))
            total += size
    if wanted:  # the model does not have them; a runner will say so
        groups.append(sorted(wanted))
    return groups


def _bytes(value: ir.Value, samples: int) -> int:
    """What a tensor takes in a run; a share of the budget where its sizes are open."""
    dims = [] if value.shape is None else [*value.shape.dims[1:]]
    if value.shape is None or not all(isinstance(dim, int) for dim in dims):
        return BATCH_BYTES // MOST_UNSIZED
    return 4 * samples * math.prod(dim for dim in dims if isinstance(dim, int))
