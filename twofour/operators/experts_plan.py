"""What routed experts and a masked MLP ask of their kernels, and where these keep what they find.

A slot is one row of one expert: what a token asks of an expert that it was routed to. Slots are
ordered by expert, then by token, so the rows of an expert lie one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

from twofour.core.abi import SLACK_BYTES
from twofour.core.experts import MIXTURE, SWIGLU
from twofour.core.experts_text import BY_NAME, inputs_of
from twofour.core.plugins import Array, Operand, Problem
from twofour.kernels.cpu.quantize_rows import row_tail

SHARES = 64
"""Parts of work that depends on the routing, for threads."""
_LINE_BYTES = 64
_CHUNK_BYTES = 384 << 10  # of rows that meet all weights of an expert: they stay in L2 meanwhile
_LEAST_CHUNK = 28


@dataclass(frozen=True)
class Product:
    """One of the two products of an expert.

    Attributes:
        k: inputs.
        n: outputs.
        x_pixel: bytes from one row of inputs to the next.
        y_pixel: bytes from one row of outputs to the next.
    """

    k: int
    n: int
    x_pixel: int
    y_pixel: int

    @property
    def chunk(self) -> int:
        """The most rows that meet the weights of an expert at a time."""
        return max(_LEAST_CHUNK, _CHUNK_BYTES // self.x_pixel)


@dataclass(frozen=True)
class Plan:
    """The sizes of a problem, and the parts of the workspace.

    Attributes:
        tokens: rows of x.
        experts: how many there are; 1 of a masked MLP.
        k: experts a token; 1 of a masked MLP.
        hidden: channels of x and y.
        inner: channels that the second product reads.
        activation: between the products.
        quantized: weights are int8, and rows are quantized.
        routed: by logits, not by a mask.
        normalize: gates of a token add up to 1.
    """

    tokens: int
    experts: int
    k: int
    hidden: int
    inner: int
    activation: str
    quantized: bool
    routed: bool
    normalize: bool

    @staticmethod
    def of(problem: Problem) -> Plan:
        """The sizes that the operands of a problem have."""
        base, activation, quantized = BY_NAME[problem.operator]
        x, chooser, w1 = (shape_of(problem, name) for name in inputs_of(base, quantized=False)[:3])
        routed = base == MIXTURE
        k, normalize = (problem.attributes.get(key, 1) for key in ("k", "normalize"))
        return Plan(
            prod(x[:-1]),
            chooser[-1] if routed else 1,
            int(str(k)) if routed else 1,
            x[-1],
            w1[-2] // (2 if activation == SWIGLU else 1),
            activation,
            quantized,
            routed,
            bool(normalize),
        )

    @property
    def slots(self) -> int:
        """The most rows that experts have in all."""
        return self.tokens * self.k

    @property
    def usual_rows(self) -> int:
        """Of an expert, if the router is fair, and half the mask is set."""
        return max(1, self.slots // (self.experts if self.routed else 2))

    @property
    def gated(self) -> bool:
        """Whether the activation is a kernel of its own, that takes two halves."""
        return self.activation == SWIGLU

    @property
    def first(self) -> Product:
        """From x to what the activation takes."""
        count = 2 * self.inner if self.gated else self.inner
        return Product(self.hidden, count, self._pixel(self.hidden), _floats(count))

    @property
    def second(self) -> Product:
        """From what the activation gives to the results of experts; floats stay where they are."""
        pixel = self._pixel(self.inner) if self.quantized else self.first.y_pixel
        return Product(self.inner, self.hidden, pixel, _floats(self.hidden))

    def _pixel(self, channels: int) -> int:
        """Bytes from one row of inputs to the next."""
        return row_tail(channels)[1] if self.quantized else _floats(channels)

    @cached_property
    def offsets(self) -> dict[str, int]:
        """Where the parts of the workspace begin; "end" is where they all end.

        chosen    i64 [tokens, k], the experts of a token
        gates     f32 [tokens, k]
        places    i64 [tokens, k], the slots of a token; -1 where the mask is not set
        begins    i64 [experts + 1], the first slot of each expert, and how many there are
        cursors   i64 [experts]
        owners    i64 [slots], the token of a slot
        rows      inputs of the first product, by slot
        inner     its results
        halves    inputs of the second product; the results themselves, where they are floats
        results   of the second product, by slot
        """
        first, second = self.first, self.second
        sizes = {
            "chosen": 8 * self.slots,
            "gates": 4 * self.slots,
            "places": 8 * self.slots,
            "begins": 8 * (self.experts + 1),
            "cursors": 8 * self.experts,
            "owners": 8 * self.slots,
            "rows": self.slots * first.x_pixel + SLACK_BYTES,
            "inner": self.slots * first.y_pixel + SLACK_BYTES,
            "halves": self.slots * second.x_pixel + SLACK_BYTES if self.quantized else 0,
            "results": self.slots * second.y_pixel + SLACK_BYTES,
        }
        offsets, at = {}, 0
        for name, size in sizes.items():
            offsets[name] = at
            at += -(-size // _LINE_BYTES) * _LINE_BYTES
        if not self.quantized:
            offsets["halves"] = offsets["inner"]
        return {**offsets, "end": at}


def operand(problem: Problem, name: str) -> Operand:
    """An input by the name that the meaning has for it.

    Raises:
        ValueError: the problem has none.
    """
    base, _, quantized = BY_NAME[problem.operator]
    places = dict(zip(inputs_of(base, quantized=quantized), problem.inputs, strict=True))
    found = places.get(name)
    if found is None:
        raise ValueError(f"{problem.operator} has no input {name!r}")
    return found


def why_not_sized(problem: Problem) -> str:
    """Why the operands of a problem do not fit together; "" if they do."""
    base, activation, quantized = BY_NAME[problem.operator]
    names = inputs_of(base, quantized=quantized)
    count = sum(each is not None for each in problem.inputs)
    if count != len(names):
        return f"it has {count} inputs: expected {', '.join(names)}"
    given = {name: operand(problem, name) for name in names}
    x, chooser, w1 = (given[name].shape for name in ("x", names[1], "w1"))
    routed, halves = base == MIXTURE, 2 if activation == SWIGLU else 1
    if len(w1) != 2 + routed or not x or len(chooser) < routed:
        return f"x, {names[1]} and w1 have {len(x)}, {len(chooser)} and {len(w1)} dimensions"
    experts, hidden, inner = w1[:-2], x[-1], w1[-2] // halves
    kind = "int8" if quantized else "float32"
    wanted = {
        "x": (x, "float32"),
        names[1]: ((*x[:-1], *experts), "float32" if routed else "bool"),
        "w1": ((*experts, inner * halves, hidden), kind),
        "w1_scale": ((*experts, inner * halves), "float32"),
        "b1": ((*experts, inner * halves), "float32"),
        "w2": ((*experts, hidden, inner), kind),
        "w2_scale": ((*experts, hidden), "float32"),
        "b2": ((*experts, hidden), "float32"),
    }
    for name in names:
        one, (shape, dtype) = given[name], wanted[name]
        held = one.shape if one.constant is None else one.constant.shape  # a file may say another
        for found in (one.shape, held):
            if (found, one.dtype) != wanted[name]:
                return f"{name} is {one.dtype} {list(found)}: expected {dtype} {list(shape)}"
        if 0 in shape:
            return f"{name} is empty: {list(shape)}"
    return ""


def shape_of(problem: Problem, name: str) -> tuple[int, ...]:
    """The shape of an input."""
    return operand(problem, name).shape


def weights(problem: Problem, name: str) -> Array:
    """A constant input, of each expert: a masked MLP has one.

    Raises:
        ValueError: it is computed while running.
    """
    found = operand(problem, name)
    if found.constant is None:
        raise ValueError(f"{name!r} of {problem.operator} is no constant")
    return found.constant if BY_NAME[problem.operator][0] == MIXTURE else found.constant[None]


def _floats(channels: int) -> int:
    """Bytes of a row of floats: an odd number of lines, so that rows spread over the sets of L1."""
    lines = -(-4 * channels // _LINE_BYTES)
    return _LINE_BYTES * (lines | 1)
