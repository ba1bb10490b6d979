"""Runs the kernels of routed experts and masked MLPs as an engine would, in guarded memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from twofour.core.abi import SLACK_BYTES
from twofour.core.experts import MASKED, MIXTURE, SWIGLU, Experts, masked, mixture
from twofour.core.experts_text import inputs_of, name_of
from twofour.core.masks import magnitude_mask
from twofour.core.plugins import Code as PluginCode
from twofour.core.plugins import CpuTactic, Operand, Operator, Problem, c_strides
from twofour.core.target import Target
from twofour.kernels.cpu.llvm import Source, compile_object, renamed
from twofour.operators.experts import OPERATORS
from twofour.runtime.cpu import Code, address, allocate

GUARD = 0xA5
MARGIN = 256


@dataclass(frozen=True)
class Case:
    """One layer with its inputs.

    Attributes:
        x: float32 [..., hidden].
        chooser: logits [..., experts], or mask [...].
        experts: the weights.
        k: experts a token.
        normalize: gates add up to 1.
    """

    x: np.ndarray
    chooser: np.ndarray
    experts: Experts
    k: int = 1
    normalize: bool = True

    @property
    def base(self) -> str:
        return MASKED if self.chooser.dtype == bool else MIXTURE

    @property
    def quantized(self) -> bool:
        return self.experts.w1_scale is not None

    @property
    def operator(self) -> Operator:
        name = name_of(self.base, self.experts.activation, quantized=self.quantized)
        return next(each for each in OPERATORS if each.name == name)

    def expected(self) -> np.ndarray:
        if self.base == MASKED:
            return masked(self.x, self.chooser, self.experts)
        return mixture(self.x, self.chooser, self.experts, self.k, normalize=self.normalize)

    def with_chooser(self, chooser: np.ndarray) -> Case:
        """The same with other logits or another mask."""
        return replace(self, chooser=chooser)

    @property
    def values(self) -> dict[str, np.ndarray]:
        """Every input by its name; a masked MLP has no axis of experts."""
        names = inputs_of(self.base, quantized=self.quantized)
        found = {"x": self.x, names[1]: self.chooser}
        for name in names[2:]:
            value = getattr(self.experts, name)
            found[name] = value if self.base == MIXTURE else value[0]
        return found

    @property
    def problem(self) -> Problem:
        inputs = tuple(
            Operand(
                f"model/{name}",  # what a model calls it is its own
                value.shape,
                value.dtype.name,
                c_strides(value.shape, value.dtype.name),
                value if index > 1 else None,
            )
            for index, (name, value) in enumerate(self.values.items())
        )
        y = Operand("y", self.x.shape, "float32", c_strides(self.x.shape, "float32"))
        given = {"k": self.k, "normalize": int(self.normalize)} if self.base == MIXTURE else {}
        return Problem(self.operator.name, inputs, (y,), given)


def make(
    random: np.random.Generator,
    *,
    shape: tuple[int, ...] = (7,),
    hidden: int = 24,
    inner: int = 40,
    experts: int = 4,
    k: int = 2,
    activation: str = "Relu",
    quantized: bool = True,
    pattern: str = "",
    normalize: bool = True,
    base: str = MIXTURE,
) -> Case:
    """A layer with random weights, inputs and routing."""
    count = experts if base == MIXTURE else 1
    rows = 2 * inner if activation == SWIGLU else inner
    w1, w2 = (
        _weights(random, (count, n, m), pattern) for n, m in ((rows, hidden), (hidden, inner))
    )
    b1, b2 = (random.normal(0, 0.3, (count, n)).astype(np.float32) for n in (rows, hidden))
    made = Experts(w1, b1, w2, b2, activation)
    x = random.standard_normal((*shape, hidden), np.float32)
    chooser = (
        random.standard_normal((*shape, experts), np.float32)
        if base == MIXTURE
        else random.random(shape) < 0.5
    )
    return Case(x, chooser, quantize(made) if quantized else made, k, normalize)


def quantize(experts: Experts) -> Experts:
    """The same in int8, one scale an output channel."""
    w1, s1 = _int8(experts.w1)
    w2, s2 = _int8(experts.w2)
    return replace(experts, w1=w1, w2=w2, w1_scale=s1, w2_scale=s2)


def run(
    case: Case, tactic: CpuTactic, target: Target, config: str | None = None, parts: int = 1
) -> np.ndarray:
    """What a tactic computes; fails if a byte outside of output and workspace changed."""
    problem = case.problem
    assert not tactic.refuse(problem, target)
    code = tactic.emit(problem, target, config or tactic.configs(problem, target)[0])
    return Runner(code, case, target).run(parts)


class Runner:
    """The compiled stages of a case, and the memory that they work on."""

    def __init__(self, code: PluginCode, case: Case, target: Target):
        self.code, self.case = code, case
        sources = [Source(renamed(s.text, f"s{i}"), s.vectorize) for i, s in enumerate(code.stages)]
        self.mapped = Code([compile_object(sources, target)])
        self.kernels = [self.mapped.kernel(f"s{i}") for i in range(len(sources))]
        self.constants = allocate(code.constants.size + SLACK_BYTES, huge=True)
        self.constants[: code.constants.size] = code.constants
        self.workspace = allocate(code.workspace_bytes + 2 * MARGIN + SLACK_BYTES)
        self.y = np.empty(case.x.nbytes + 2 * MARGIN, np.uint8)
        self.inputs = [np.ascontiguousarray(value) for value in case.values.values()]
        self.table = np.array(
            [
                *(
                    0 if i in code.unread else each.ctypes.data  # who reads it there, crashes
                    for i, each in enumerate(self.inputs)
                ),
                self.y.ctypes.data + MARGIN,
                address(self.workspace) + MARGIN,
            ],
            np.int64,
        )

    def run(self, parts: int = 1) -> np.ndarray:
        """All stages, each in so many calls, the last one first."""
        self.workspace[:], self.y[:] = GUARD, GUARD
        before = [each.copy() for each in self.inputs]
        self.call(parts)
        end = MARGIN + self.code.workspace_bytes
        for memory, size in ((self.workspace, end), (self.y, self.y.size - MARGIN)):
            assert (memory[:MARGIN] == GUARD).all(), "bytes before changed"
            assert (memory[size:] == GUARD).all(), "bytes behind changed"
        for one, other in zip(before, self.inputs, strict=True):
            np.testing.assert_array_equal(one, other)
        return self.y[MARGIN:-MARGIN].view(np.float32).reshape(self.case.x.shape).copy()

    def call(self, parts: int = 1) -> None:
        """The stages alone."""
        y = self.y.ctypes.data + MARGIN
        for kernel, stage in zip(self.kernels, self.code.stages, strict=True):
            for part in reversed(range(parts)):
                begin, end = (stage.pieces * p // parts for p in (part, part + 1))
                kernel(self.table.ctypes.data, address(self.constants), y, y, begin, end, 0, 1)


def _weights(random: np.random.Generator, shape: tuple[int, ...], pattern: str) -> np.ndarray:
    w = random.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)
    if pattern:
        w = np.stack([np.where(magnitude_mask(each, pattern), each, np.float32(0)) for each in w])
    return w


def _int8(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scale = (np.abs(w).max(-1) / 127).astype(np.float32)
    return np.rint(w / scale[..., None]).astype(np.int8), scale
