"""Packed weights: what every convolution kernel reads besides activations.

    header, 64 bytes: f32 residual scale, f32 offset (where the residual comes last), f32 low,
        f32 high, i32 output zero point, f32 1 / y_scale (where the activation does not clamp),
        i32 low and i32 high as stored bytes, 20 bytes of a gate
    then the lines of a gate (gates.py), where the activation is one
    then per panel: the format's stream;
        then per block 16 x i32 start, 16 x f32 scale, 16 x f32 bias

A panel is `blocks` blocks of 16 output channels. `start` is what an integer sum begins with: minus
the zero point of x times the sum of the weights. Zero points are as stored (int8 values plus 128).
One that is known at run time only counts as 1 here, and is multiplied then (epilogue.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twofour.core.bfloat16 import to_bf16
from twofour.core.numerics import Epilogue
from twofour.kernels.cpu.gates import GATE_BYTES, NUMBERS, gate_lines, gate_numbers
from twofour.kernels.cpu.llvm import Value
from twofour.kernels.cpu.problem import LANES, ConvProblem, ends_of, segments_of
from twofour.kernels.cpu.vector import Vector

_HEADER_BYTES = 64
CONSTANTS_BYTES = 3 * 4 * LANES


class Format(Protocol):
    """A packed weight format and the inner loop that reads it."""

    @property
    def name(self) -> str:
        """As reports show it."""
        ...

    @property
    def k_per_step(self) -> int:
        """Inputs that a step takes from a run."""
        ...

    @property
    def steps_per_group(self) -> int:
        """Steps that are packed together."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether the last step of a run that steps do not divide begins earlier.

        Its weights stand at the step's end then, and nothing beyond the run is read. Without this,
        what lies there meets zeros, or is not picked. Steps of such a format are packed alone.
        """
        ...

    def group_bytes(self, blocks: int, steps: int) -> int:
        """Bytes of a group of `steps` steps for a panel of `blocks` blocks."""
        ...

    def pack_group(self, w: NDArray[Any]) -> NDArray[np.uint8]:
        """[panels, blocks, 16, steps, k_per_step] to uint8 [panels, group_bytes]."""
        ...

    def emit_group(
        self, v: Vector, rows: Sequence[int], x: Value, w: Value, sums: list[Value], steps: int
    ) -> list[Value]:
        """Adds one group of steps to sums[row * blocks + block].

        Args:
            v: emits the operations.
            rows: the positions, as byte offsets from `x`.
            x: points at the group's first input.
            w: points at the group's packed weights.
            sums: before the group.
            steps: at most `steps_per_group`.

        Returns:
            The sums after the group.
        """
        ...


def panel_bytes(problem: ConvProblem, fmt: Format, blocks: int) -> int:
    """Bytes of one packed panel: stream and constants."""
    steps = -(-problem.segment_k // fmt.k_per_step)
    full, rest = divmod(steps, fmt.steps_per_group)
    run = full * fmt.group_bytes(blocks, fmt.steps_per_group) + (
        fmt.group_bytes(blocks, rest) if rest else 0
    )
    ends = fmt.group_bytes(blocks, end_steps(problem, fmt)) if problem.ends else 0
    return problem.segments * run + ends + blocks * CONSTANTS_BYTES


def end_steps(problem: ConvProblem, fmt: Format) -> int:
    """Steps that the ends of all runs make."""
    return -(-problem.segments * problem.ends // fmt.k_per_step)


def pack(
    w: NDArray[Any],
    problem: ConvProblem,
    fmt: Format,
    blocks: int,
    epilogue: Epilogue,
    x_zero_point: int = 0,
) -> NDArray[np.uint8]:
    """Weights and constants in the kernel's order.

    Args:
        w: [groups * n, c, KH, KW], int8 or float32; for bfloat16, float32 that are rounded.
        problem: the problem.
        fmt: the format.
        blocks: blocks of a panel.
        epilogue: its constants; zero points as stored, so a quantized y is unsigned.
        x_zero_point: of the input as stored (uint8).

    Returns:
        uint8 [header_bytes + panels * panel_bytes].
    """
    if problem.dtype == "bfloat16":
        w = to_bf16(w + np.float32(0))  # no -0, which formats would take for a weight
    ordered = segments_of(w, problem, fmt.k_per_step)
    if fmt.overlaps:
        missing = -problem.segment_k % fmt.k_per_step
        ordered[..., -1, :] = np.roll(ordered[..., -1, :], missing, axis=-1)
    panels = ordered.shape[0] // blocks
    ordered = ordered.reshape(panels, blocks, *ordered.shape[1:])
    full, rest = divmod(ordered.shape[4], fmt.steps_per_group)
    whole, last = np.split(ordered, [full * fmt.steps_per_group], axis=4)
    groups = _groups(fmt, whole, full) + _groups(fmt, last, 1 if rest else 0)
    parts = [np.concatenate(groups, axis=2).reshape(panels, -1)]
    if problem.ends:
        ends = ends_of(w, problem, fmt.k_per_step)
        parts += [_groups(fmt, ends.reshape(panels, blocks, *ends.shape[1:]), 1)[0][:, 0]]
    start = np.zeros(w.shape[0], np.int32)
    if problem.dtype == "int8":
        start = starts(w, x_zero_point)
    constants = np.stack(
        [
            _per_lane(c, problem).view(np.int32)
            for c in (start, epilogue.scale.astype(np.float32), epilogue.bias.astype(np.float32))
        ],
        axis=1,
    )
    constants = constants.reshape(panels, -1).view(np.uint8)
    body = np.concatenate([*parts, constants], axis=1)
    return np.concatenate([header(epilogue), body.reshape(-1)])


def _groups(fmt: Format, ordered: NDArray[Any], count: int) -> list[NDArray[np.uint8]]:
    """`count` groups of every run, packed; [] for none.

    [panels, blocks, 16, segments, steps, k] to [[panels, segments, bytes]].
    """
    if not count:
        return []
    panels, blocks, lanes, segments, steps, k = ordered.shape
    split = ordered.reshape(panels, blocks, lanes, segments, count, steps // count, k)
    split = split.transpose(0, 3, 4, 1, 2, 5, 6).reshape(-1, blocks, lanes, steps // count, k)
    return [fmt.pack_group(split).reshape(panels, segments, -1)]


def starts(w: NDArray[Any], x_zero_point: int) -> NDArray[np.int32]:
    """What the integer sums of each output channel begin with: [N, ...] -> [N]."""
    sums = w.reshape(w.shape[0], -1).astype(np.int64).sum(1)
    start: NDArray[np.int32] = (-x_zero_point * sums).astype(np.int32)
    return start


def _per_lane(values: NDArray[Any], problem: ConvProblem) -> NDArray[Any]:
    """[groups * n] to [groups * blocks, 16], zeros in the unused lanes."""
    grouped = values.reshape(problem.groups, problem.n)
    padded = np.pad(grouped, ((0, 0), (0, problem.blocks * LANES - problem.n)))
    return padded.reshape(problem.groups * problem.blocks, LANES)


def header_bytes(problem: ConvProblem) -> int:
    """Bytes before the panels."""
    return _HEADER_BYTES + (GATE_BYTES if problem.gate else 0)


def header(epilogue: Epilogue) -> NDArray[np.uint8]:
    """What stands before the panels."""
    low, high = epilogue.rounded_bounds()
    out = np.zeros(_HEADER_BYTES // 4, np.int32)
    out[[0, 2, 3]] = np.array([epilogue.residual_scale, low, high], np.float32).view(np.int32)
    if epilogue.zero_point is not None:
        out[4] = epilogue.added_zero
        out[6:8] = np.rint(np.array([low, high])).astype(np.int32) + epilogue.added_zero
    out[[1, 5]] = np.array([epilogue.offset, epilogue.y_factor], np.float32).view(np.int32)
    if epilogue.gate is None or epilogue.zero_point is None:
        return out.view(np.uint8)
    numbers = gate_numbers(epilogue.gate)
    out[NUMBERS // 4 :][: len(numbers)] = numbers
    return np.concatenate([out.view(np.uint8), gate_lines(epilogue.gate, epilogue.zero_point)])
