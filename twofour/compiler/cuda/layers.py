"""What `explain` shows of each turn, in the words that it has for the CPU."""

from __future__ import annotations

import math

from twofour.compiler.cuda.choose import Choice
from twofour.compiler.cuda.lower import Turn
from twofour.compiler.cuda.tensors import Tensor
from twofour.compiler.native import ConvOp
from twofour.core.patterns import held, why_not
from twofour.core.plan import is_sparse
from twofour.engine import Layer, Work
from twofour.kernels.cuda.kernel import as_bytes
from twofour.kernels.cuda.problem import AttentionProblem, ConvProblem

_KERNEL_PATTERNS = ("2:4/pair", "2:4", "4:8")
_SMALL_K = 512
_COPIES = "the model's inputs and outputs have another form or type than kernels work on"


def layer_of(turn: Turn, choice: Choice) -> Layer:
    """A turn as `explain` shows it.

    Args:
        turn: the turn.
        choice: what it will do.
    """
    op, recipe, problem = turn.op, choice.way.recipe, turn.problem
    x = next(iter(turn.operands.values()))
    y = next(turn.operands[role] for role in turn.writes)
    text = f"{_show(x)} -> {_show(y)}"
    pattern, notes = "", []
    if isinstance(op, ConvOp) and isinstance(problem, ConvProblem):
        text += _window(problem)
        pattern = next(iter(held(op.w, _KERNEL_PATTERNS)), "dense")
        notes = _notes(op, choice, pattern)
    size = sum(as_bytes(array).size for array in recipe.constants.values())
    moved = sum(_bytes(tensor) for tensor in turn.operands.values())
    time = None if choice.time_us is None else round(choice.time_us, 3)
    return Layer(
        op.name,
        op.op_type,
        recipe.tactic,
        recipe.config,
        time,
        text,
        x.dtype if isinstance(problem, ConvProblem) else y.dtype,
        pattern,
        macs_of(turn),
        size if pattern else 0,
        choice.candidates,
        tuple(notes),
        Work(moved_bytes=moved),
        cause=_COPIES if op.op_type == "Copy" else "",
    )


def macs_of(turn: Turn) -> int:
    """Multiply-adds of a turn, counted as if dense."""
    problem = turn.problem
    if isinstance(problem, ConvProblem):
        return problem.rows * problem.k * problem.out_channels
    if isinstance(problem, AttentionProblem):
        scores = problem.batch * problem.heads * problem.q_len * problem.k_len
        return scores * (problem.head_dim + problem.value_dim)
    return 0


def _notes(op: ConvOp, choice: Choice, pattern: str) -> list[str]:
    """Why the layer is not sparse, or why sparse lost, in words."""
    if is_sparse(choice.way.recipe.tactic):
        return []
    if pattern == "dense":
        reason = why_not(op.w, "2:4")
        return [f"the weight is not 2:4: {reason}"] if reason else []
    sparse = [c for c in choice.candidates if is_sparse(c.tactic)]
    timed = [c for c in sparse if c.time_us is not None]
    if timed and choice.time_us is not None:
        best = timed[0]
        return [
            f"the weight is {pattern}, but {best.tactic} took {best.time_us:.2f} us and dense"
            f" {choice.time_us:.2f} us here: {_why_dense_won(op, choice)}"
        ]
    if choice.time_us is None:
        return [f"the weight is {pattern}; nothing was timed, so no sparse kernel was taken"]
    reasons = dict.fromkeys(c.reason for c in sparse if c.reason)
    why = "; ".join(reasons) or "none is made for this shape"
    return [f"the weight is {pattern}, but no sparse kernel takes it: {why}"]


def _why_dense_won(op: ConvOp, choice: Choice) -> str:
    """The likely cause, from the shape."""
    k = op.w[0].size
    if k < _SMALL_K:
        return f"K = {k} is too short: reading activations takes the time, not the products"
    return "the time difference is within what this shape and GPU give"


def _show(tensor: Tensor) -> str:
    """Shape in a few characters."""
    batch, height, width, channels = tensor.extent
    image = f"{channels}" if height == width == 1 else f"{channels}x{height}x{width}"
    return image if batch == 1 else f"{batch}x{image}"


def _window(problem: ConvProblem) -> str:
    (high, wide), stride = problem.window.kernel, problem.window.stride
    if (high, wide) == (1, 1) and stride == (1, 1):
        return ""
    return f" k{high}x{wide}" + (f" s{stride[0]}" if stride[0] > 1 else "")


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.dims) * tensor.item_bytes
