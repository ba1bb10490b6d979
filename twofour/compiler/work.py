"""What kernels do, counted: the facts in a plan that `roofline.py` judges times by."""

from __future__ import annotations

import math

import numpy as np

from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Place, Placed, images_of
from twofour.compiler.native import MapOp, extent
from twofour.compiler.native_nd import Look, NdOp, Part
from twofour.core.sizes import usual
from twofour.engine import Work
from twofour.kernels.cpu.nd_scalar import BYTES
from twofour.kernels.cpu.nest import Tiled
from twofour.kernels.cpu.packing import end_steps
from twofour.kernels.cpu.problem import LANES, Config, ConvProblem, Pieces
from twofour.kernels.cpu.tactic import Tactic


def conv_work(placed: Placed, problem: ConvProblem, tactic: Tactic, config: Config) -> Work:
    """Of a convolution.

    Args:
        placed: its operands.
        problem: as its kernel sees it.
        tactic: the chosen one.
        config: of the tactic.
    """
    k = computed = problem.c * problem.kernel[0] * problem.kernel[1]
    channels, lanes = problem.n * problem.groups, problem.blocks * LANES * problem.groups
    down = Pieces.of(problem.out_h, config.tile_h)
    across = Pieces.of(problem.out_w, config.tile_w)
    image = problem.out_h * problem.out_w
    positions = image / (down.count * across.count)
    if isinstance(tactic.kernel, Tiled):
        step, walked = tactic.kernel.format.k_per_step, tactic.kernel.walked(problem)
        computed = step * walked.segments * -(-walked.segment_k // step)
        computed += step * end_steps(walked, tactic.kernel.format)
    elif problem.depthwise:
        lanes, positions = -(-channels // LANES) * LANES, 0.0
    return Work(
        moved_bytes(placed),
        k,
        computed,
        channels,
        lanes,
        problem.batch * image * lanes // LANES,
        round(positions, 2),
        problem.out,
        problem.add,
        problem.activation,
        problem.bounded,
        problem.gate,
        add_last=problem.add_last,
    )


def moved_bytes(placed: Placed) -> int:
    """Bytes of all that an operator reads and writes, each place once."""
    places = {id(place): place for place in (*placed.reads, *placed.writes)}
    total = sum(_size_bytes(place) for place in places.values())
    if isinstance(placed.op, MapOp):  # of each image it may read every n-th row and column
        skipped = 1 - 1 / (placed.op.steps[0] * placed.op.steps[1])
        total -= round(_size_bytes(placed.x) * skipped)
    return total


def walked_bytes(op: NdOp) -> int:
    """Likewise of a small operator: the elements that its walks come by, repeated ones once."""

    def walked(part: Part, look: Look, *, all_turns: bool) -> int:
        steps = zip(part.dims, look.axes, strict=True)
        dims = (usual(dim) for dim, (_, step) in steps if all_turns or step != 0)
        return math.prod(dims) * BYTES[op.values[look.value].kind]

    return sum(
        walked(part, look, all_turns=part.op == "gather" and look is part.inputs[0])
        for part in op.parts
        for look in (part.y, *part.inputs)
    )


def _size_bytes(place: Place) -> int:
    """Of its elements, without a halo."""
    if isinstance(place, Tensor):
        pixels = usual(images_of(place)) * place.height * place.width
        return pixels * place.channels * place.element_bytes
    return math.prod(extent(place.usual_shape)) * np.dtype(place.dtype).itemsize
