"""The plan of an engine: everything about it but its bytes, as plain data.

A plan has one profile or several. A profile is a way to run the network: for one shape of its
inputs, or for every shape within the ranges of its symbols. The profiles share code and weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twofour.core.errors import EngineError
from twofour.core.records import from_plain, to_plain
from twofour.core.sizes import Count, Size, Symbol
from twofour.core.target import Target

REBUILD = "rebuild it from its model: twofour build MODEL.onnx -o E.engine"


@dataclass(frozen=True)
class TensorInfo:
    """An input, output or boundary tensor.

    Attributes:
        name: of the tensor.
        dtype: numpy's name of it.
        shape: its dimensions; where they are open, the largest; () where they are not known.
        sizes: for each dimension its size where it is open, else None; () where all are fixed.
        known: the shape is known before running. One that is not depends on the data: only ONNX
            Runtime reads and writes such a tensor, or a program that counts what it writes.
        most: of one that a program counts, its largest shape; its first dimension is found while
            running.
        count: the plain tensor, one int64, that says then how large that is; "" for others.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sizes: tuple[Size | None, ...] = ()
    known: bool = True
    most: tuple[int, ...] = ()
    count: str = ""

    @staticmethod
    def of(name: str, dtype: str, dims: Sequence[Count]) -> TensorInfo:
        """From dimensions of which some may be open."""
        sizes = tuple(None if isinstance(dim, int) else dim for dim in dims)
        largest = tuple(dim if isinstance(dim, int) else dim.most for dim in dims)
        return TensorInfo(name, dtype, largest, sizes if any(sizes) else ())

    @property
    def dims(self) -> tuple[Count, ...]:
        """The dimensions, open ones as sizes."""
        if not self.sizes:
            return self.shape
        return tuple(
            n if size is None else size for n, size in zip(self.shape, self.sizes, strict=True)
        )

    @property
    def usual_shape(self) -> tuple[int, ...]:
        """The shape that kernels are timed with."""
        if self.count:
            return self.most
        return tuple(dim if isinstance(dim, int) else dim.usual for dim in self.dims)

    def shape_at(self, values: Sequence[int]) -> tuple[int, ...]:
        """The shape where the symbols have these values."""
        if not self.sizes:
            return self.shape
        return tuple(dim if isinstance(dim, int) else dim.at(values) for dim in self.dims)


IN_FLOAT32 = " in float32"
"""What the tactic of a candidate ends with that was timed beside a layer in bfloat16."""


CHOSEN_LATER = "tensorrt, chosen when loaded"
"""The tactic of a product whose kernel, dense or sparse, is chosen where the engine is loaded."""


_SPARSE = re.compile(r"\d+:\d+")


def is_sparse(tactic: str) -> bool:
    """Whether a tactic skips the zeros of a pattern; such tactics begin with the pattern's name."""
    return _SPARSE.match(tactic) is not None


@dataclass(frozen=True)
class Candidate:
    """One way to run a layer that was considered at build.

    Attributes:
        tactic: its name, for example "conv_sparse".
        config: its tile and format, in words.
        time_us: time of one run in microseconds, measured or estimated; None where it was refused.
        reason: why it was refused; "" where it was not.
    """

    tactic: str
    config: str
    time_us: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Work:
    """What a layer's kernel does at usual sizes: the facts that its time is judged by.

    Attributes:
        moved_bytes: of the activations it reads and writes, each counted once.
        k: products of a sum, counted as if dense; 0 without sums.
        k_computed: likewise those that its kernel computes, zeros that fill up a run included.
        channels: of the result.
        lanes: that its kernel computes for them.
        vectors: of 16 results that are scaled, rounded and stored.
        positions: results that share what is loaded of the weights, the mean of all tiles; 0
            without tiles.
        out: type of the results, "int8", "bfloat16" or "float32"; "" without sums.
        add: type of the residual; "" without one.
        activation: of the results, see core/functions.py.
        bounded: no result can leave int32 before it is rounded.
        gate: the activation is done by a table, see core/gates.py.
        scores: that go through a softmax between two products.
        add_last: the residual is added behind the activation.
    """

    moved_bytes: int = 0
    k: int = 0
    k_computed: int = 0
    channels: int = 0
    lanes: int = 0
    vectors: int = 0
    positions: float = 0.0
    out: str = ""
    add: str = ""
    activation: str = ""
    bounded: bool = False
    gate: bool = False
    scores: int = 0
    add_last: bool = False


@dataclass(frozen=True)
class Strided:
    """A tensor in the arena: images of rows of pixels, the channels of a pixel side by side.

    Attributes:
        offset: of the first element, in bytes.
        image: bytes from one image to the next; of a tensor that is none, from row to row.
        row: bytes from one row of an image to the next.
        pixel: bytes from one pixel of a row to the next.
    """

    offset: int
    image: int
    row: int
    pixel: int


@dataclass(frozen=True)
class Write:
    """A value that a layer writes, and where it lies until something else takes its place.

    Attributes:
        tensor: its name in the fused graph, its type as stored ("bfloat16" is one), and its shape.
        source: the value of the source model that it is, or is rounded from; "" for none.
        at: where it lies in the arena; None for a plain array of its name.
        scale: of a quantized value: one number or one for each channel; () for another value.
        zero_point: as stored: real = (stored - zero_point) * scale.
    """

    tensor: TensorInfo
    source: str = ""
    at: Strided | None = None
    scale: tuple[float, ...] = ()
    zero_point: int = 0

    def planes(self, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Images, channels, rows and columns of the value where it has this shape."""
        if len(shape) == 4:
            return shape[0], shape[1], shape[2], shape[3]
        return math.prod(shape[:-1]), shape[-1] if shape else 1, 1, 1


@dataclass(frozen=True)
class Read:
    """A value that a layer reads.

    Attributes:
        layer: index into `Plan.layers` of the layer that wrote it; -1 for an input of the model.
        tensor: its name in the fused graph.
    """

    layer: int
    tensor: str


@dataclass(frozen=True)
class Layer:
    """One fused operator of the engine, as `explain` shows it.

    Attributes:
        name: the source model's name of its main node.
        op: fused operator, for example "QConvAddRelu".
        tactic: the chosen one; "onnxruntime" for a fallback.
        config: of the chosen tactic.
        time_us: measured at build, or estimated (`Target.cpu`); None where it was not (fallback).
        shape: in words, for example "64x56x56 -> 64x56x56 k3".
        precision: "int8", "bfloat16" or "float32".
        pattern: of the weight, "2:4", "2:4/pair", "4:8", "dense", or "" without a weight.
        macs: multiply-adds per run, counted as if dense.
        weight_bytes: as packed.
        candidates: all that were considered, the chosen one included.
        notes: the reasons in words: why not sparse, why not integer, why a fallback.
        work: what its kernel does.
        source: the nodes of the source model that it computes.
        writes: what it writes, where.
        cause: of a conversion, who made it necessary; "" for a layer that the model means.
        reads: what it reads, and which layers wrote that.
    """

    name: str
    op: str
    tactic: str
    config: str = ""
    time_us: float | None = None
    shape: str = ""
    precision: str = ""
    pattern: str = ""
    macs: int = 0
    weight_bytes: int = 0
    candidates: tuple[Candidate, ...] = ()
    notes: tuple[str, ...] = ()
    work: Work = Work()
    source: tuple[str, ...] = ()
    writes: tuple[Write, ...] = ()
    cause: str = ""
    reads: tuple[Read, ...] = ()


CONSTANT, LEFT_OUT = -1, -2
"""Operands of a plugin that are no input of its step."""
CONSTANT_ALIGNMENT = 64
"""Bytes: what a plugin's constants begin at a multiple of."""


@dataclass(frozen=True)
class PluginCall:
    """What a step asks of an installed plugin: an operator that runs by its meaning, in Python.

    Attributes:
        step: the symbol of the step.
        domain: of the operator.
        name: of the operator.
        version: of the operator, as the plugin counts.
        package: that has it.
        attributes: of the node, as JSON.
        operands: for each input the index of the step's input, `CONSTANT` for the next constant, or
            `LEFT_OUT`.
        constants: those inputs that are; their elements lie one after the other, see `places`.
    """

    step: str
    domain: str
    name: str
    version: int
    package: str
    attributes: str
    operands: tuple[int, ...]
    constants: tuple[TensorInfo, ...] = ()

    def places(self, item_bytes: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
        """Begin and end of each constant in bytes, given those of an element by its type."""
        found: list[tuple[int, int]] = []
        for tensor in self.constants:
            begin = -(-found[-1][1] // CONSTANT_ALIGNMENT) * CONSTANT_ALIGNMENT if found else 0
            size = math.prod(tensor.shape) * item_bytes.get(tensor.dtype, 1)
            found.append((begin, begin + size))
        return tuple(found)


@dataclass(frozen=True)
class Step:
    """One call at run time.

    Attributes:
        kind: "native" (a generated program), "onnxruntime" (a subgraph), "python" (a plugin),
            "cuda" (a program of a GPU) or "tensorrt" (a network).
        symbol: the program's function in the object code, or the key of the subgraph, of a plugin's
            constants or of a GPU's program.
        inputs: names of the plain tensors it reads.
        outputs: names of the plain tensors it writes.
        layers: indices into `Plan.layers` of what it runs.
    """

    kind: str
    symbol: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Fill:
    """A region of the arena set once to one byte: the halo that convolutions read as padding."""

    offset: int
    size_bytes: int
    value: int


@dataclass(frozen=True)
class Profile:
    """One way to run the network.

    Attributes:
        inputs: of the model.
        outputs: of the model.
        boundary: plain tensors between steps.
        steps: in order.
        arena_bytes: activation memory.
        fills: halo regions of the arena.
        symbols: open dimensions with their ranges; their values lie at the start of the arena.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    boundary: tuple[TensorInfo, ...]
    steps: tuple[Step, ...]
    arena_bytes: int
    fills: tuple[Fill, ...]
    symbols: tuple[Symbol, ...] = ()

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Every plain tensor."""
        return (*self.inputs, *self.outputs, *self.boundary)


@dataclass(frozen=True)
class Plan:
    """Everything about an engine but its bytes.

    Attributes:
        target: what it was built for.
        version: of the package that built it.
        source_sha256: of the model file (or its serialised form).
        profiles: ways to run it; a run takes the first that its inputs fit.
        layers: for people; those of all profiles, one after the other.
        threads: the thread count the tactics were timed with.
        code: names of the objects, in loading order.
        source_name: file name of the model, for people.
        graph: counts before and after the passes, for people.
        notes: what was asked for and could not be done, and why, for people.
        free: nodes of the source model that no layer computes: they are folded, removed, or only
            give a result another name.
        plugins: what it asks of installed plugins.
    """

    target: Target
    version: str
    source_sha256: str
    profiles: tuple[Profile, ...]
    layers: tuple[Layer, ...]
    threads: int
    code: tuple[str, ...]
    source_name: str = ""
    graph: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    plugins: tuple[PluginCall, ...] = ()

    @property
    def inputs(self) -> tuple[TensorInfo, ...]:
        """Of the model, with the shapes of the first profile."""
        return self.profiles[0].inputs

    @property
    def outputs(self) -> tuple[TensorInfo, ...]:
        """Of the model, with the shapes of the first profile."""
        return self.profiles[0].outputs

    @property
    def steps(self) -> tuple[Step, ...]:
        """Of all profiles."""
        return tuple(step for profile in self.profiles for step in profile.steps)

    @property
    def arena_bytes(self) -> int:
        """Activation memory of one session."""
        return max(profile.arena_bytes for profile in self.profiles)

    def to_json(self) -> dict[str, Any]:
        """Plain data: dicts, lists, strings, numbers."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @staticmethod
    def from_json(data: Any) -> Plan:
        """The inverse of `to_json`; unknown, missing or ill-typed fields are errors.

        Raises:
            EngineError: names the field.
        """
        try:
            return from_plain(Plan, data, "plan")
        except ValueError as e:
            raise EngineError("the engine's plan is malformed", [str(e)], REBUILD) from e
