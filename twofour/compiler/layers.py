"""What `explain` shows of each operator: shapes in words, and why a weight is not read sparse."""

from __future__ import annotations

from twofour.compiler.layout import Tensor
from twofour.compiler.lower import Place, Placed
from twofour.compiler.native import ConvOp, NativeOp, extent
from twofour.compiler.tune import Choice, rounded
from twofour.compiler.work import conv_work, moved_bytes
from twofour.core.patterns import held, why_not
from twofour.core.sizes import usual
from twofour.engine import Candidate, Layer, Work
from twofour.kernels.cpu.problem import ConvProblem

_OF_KERNELS = ("2:4/pair", "2:4", "4:8")


def plain_layer(
    op: NativeOp,
    placed: Placed,
    tactic: str,
    config: str = "",
    macs: int = 0,
    scores: int = 0,
) -> Layer:
    """An operator without a choice of kernels; `scores` of it go through a softmax."""
    return Layer(
        op.name,
        op.op_type,
        tactic,
        config,
        shape=f"{_show(placed.x)} -> {_show(placed.y)}",
        precision=precision_of(placed.y),
        macs=macs,
        work=Work(moved_bytes(placed), scores=scores),
    )


def conv_layer(
    op: ConvOp,
    placed: Placed,
    problem: ConvProblem,
    choice: Choice,
    candidates: tuple[Candidate, ...],
    size: int,
) -> Layer:
    """What `explain` shows of a convolution."""
    pattern = next(iter(held(op.w, _OF_KERNELS)), "dense")
    window = op.window
    text = f"{_show(placed.x)} -> {_show(placed.y)}"
    if window.kernel != (1, 1) or window.stride != (1, 1):
        text += f" k{window.kernel[0]}x{window.kernel[1]}" + (
            f" s{window.stride[0]}" if window.stride[0] > 1 else ""
        )
    return Layer(
        op.name,
        op.op_type,
        choice.tactic.name,
        str(choice),
        rounded(choice.time_us),
        text,
        problem.dtype,
        pattern,
        problem.macs,
        size,
        candidates,
        tuple(_notes(op, choice, candidates, pattern)),
        conv_work(placed, problem, choice.tactic, choice.config),
    )


def _notes(
    op: ConvOp, choice: Choice, candidates: tuple[Candidate, ...], pattern: str
) -> list[str]:
    """Why the layer is not sparse, or why sparse lost, in words."""
    if choice.tactic.pattern:
        return []
    if pattern == "dense":
        reason = why_not(op.w, "2:4")
        return [f"the weight is not 2:4: {reason}"] if reason else []
    timed = [c for c in candidates if c.time_us is not None and c.tactic != choice.tactic.name]
    if timed and timed[0].time_us is not None and choice.time_us is not None:
        best = timed[0]
        return [
            f"the weight is {pattern}, but {best.tactic} took {best.time_us:.2f} us and dense"
            f" {choice.time_us:.2f} us here: {_why_dense_won(op)}"
        ]
    reasons = dict.fromkeys(c.reason for c in candidates if c.reason)
    return [f"the weight is {pattern}, but no sparse kernel takes it: {'; '.join(reasons)}"]


def _why_dense_won(op: ConvOp) -> str:
    """The likely cause, from the shape."""
    k, n = op.w[0].size, op.w.shape[0]
    if k < 128:
        return f"K = {k} is too short for half the products to outweigh reading the indices"
    if n % 16:
        return f"{n} output channels leave lanes of the last block idle"
    return "the time difference is within what this shape and machine give"


def extent_of(place: Place) -> tuple[int, int, int, int]:
    """Batch, height, width, channels; the usual ones where sizes are open."""
    if isinstance(place, Tensor):
        return usual(place.count), place.height, place.width, place.channels
    return extent(place.usual_shape)


def _show(place: Place) -> str:
    """Shape in a few characters."""
    batch, height, width, channels = extent_of(place)
    image = f"{channels}" if height == width == 1 else f"{channels}x{height}x{width}"
    return image if batch == 1 else f"{batch}x{image}"


def precision_of(place: Place) -> str:
    """Of the elements: "float32", "bfloat16", "int8", or another type's name."""
    kind = place.kind if isinstance(place, Tensor) else place.dtype
    return "int8" if kind in ("u8", "uint8") else kind
