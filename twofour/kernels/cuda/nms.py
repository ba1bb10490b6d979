"""Suppression of overlapping boxes (core/suppression.py) on a GPU: exactly the same boxes.

A program has one class of one image. Its candidates are keys, 64-bit numbers: the score's bits such
that they order like numbers, then the complement of the place, so the largest key is the highest
score and of equal scores the first place. In each turn the largest key is taken, and the keys of
all boxes that overlap its box go: what is left is what one after the other would leave. A turn
reads all boxes, which stay in the cache, and there are as many turns as boxes are taken.

A second launch writes the rows, once it is known how many each class has.

Roles: boxes, scores, y (int64 [images * classes * most, 3]), count (int64 [1], rows of y in use);
between the launches keys, taken and counts.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, misc, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from twofour.core.suppression import Suppression
from twofour.kernels.cuda.kernel import Kernel, Recipe
from twofour.kernels.cuda.problem import REAL

TACTIC = "nms"
_MOST_GROUPS = 1 << 15
_NONE = tl.constexpr(-(1 << 63))
_PLACE = tl.constexpr((1 << 31) - 1)  # its complement orders equal scores
_ROWS = 256


@dataclass(frozen=True)
class NmsProblem:
    """Sizes, and where the operands lie.

    Attributes:
        images: of boxes and scores.
        classes: of the scores.
        places: boxes of an image.
        boxes: (type, elements from image to image, from place to place, from number to number).
        scores: (type, elements from image to image, from class to class, from place to place).
        how: thresholds.
    """

    images: int
    classes: int
    places: int
    boxes: tuple[str, int, int, int]
    scores: tuple[str, int, int, int]
    how: Suppression

    @property
    def most(self) -> int:
        """Boxes of an image and class that may be left."""
        return max(0, min(self.how.most, self.places))


def why_not(problem: NmsProblem) -> str:
    """Why a suppression has no kernel here; "" where it has one."""
    kinds = (problem.boxes[0], problem.scores[0])
    if not set(kinds) <= set(REAL):
        return f"boxes and scores on a GPU are real numbers, not {kinds[0]} and {kinds[1]}"
    if problem.images * problem.classes > _MOST_GROUPS:
        return f"classes of all images on a GPU are at most {_MOST_GROUPS}"
    return ""


def recipes(problem: NmsProblem, capability: int, *, effort: int = 2) -> tuple[Recipe, ...]:
    """Ways to suppress, the best guess first.

    Args:
        problem: what is computed.
        capability: of the GPU, 90 for 9.0.
        effort: 0 for the best guess alone, else all.

    Returns:
        Nothing where it has no kernel, see `why_not`.
    """
    if why_not(problem):
        return ()
    groups = problem.images * problem.classes
    scratch = {
        "keys": 8 * groups * problem.places,
        "taken": 4 * max(1, groups * problem.most),
        "counts": 4 * groups,
    }
    found = []
    for block, warps in ((4096, 16), (2048, 8), (8192, 32))[: 3 if effort else 1]:
        block = min(block, triton.next_power_of_2(problem.places))
        calls = (_suppressed(problem, block, min(warps, max(1, block // 64))), _listed(problem))
        recipe = Recipe(TACTIC, f"block {block}, {warps} warps", calls, scratch=scratch)
        found.append(recipe)
    return tuple(found)


def _suppressed(problem: NmsProblem, block: int, warps: int) -> Kernel:
    how = problem.how
    operands = (("boxes", problem.boxes[0]), ("scores", problem.scores[0]), ("keys", "int64"),
                ("taken", "int32"), ("counts", "int32"))  # fmt: skip
    constants = {
        "PLACES": problem.places,
        "MOST": problem.most,
        "BOXES": problem.boxes[1:],
        "SCORES": problem.scores[1:],
        "OVERLAP": how.overlap,
        "SCORE": how.score,
        "CENTRED": how.centred,
        "BLOCK": block,
    }
    return Kernel(_suppress, operands, constants, (problem.classes, problem.images, 1), warps)


def _listed(problem: NmsProblem) -> Kernel:
    groups = problem.images * problem.classes
    operands = (("taken", "int32"), ("counts", "int32"), ("y", "int64"), ("count", "int64"))
    constants = {
        "CLASSES": problem.classes,
        "MOST": problem.most,
        "GROUPS": groups,
        "BLOCK": triton.next_power_of_2(groups),
        "ROWS": min(_ROWS, triton.next_power_of_2(max(problem.most, 1))),
    }
    return Kernel(_list, operands, constants, (groups, 1, 1), 4)


@triton.jit
def _sides(boxes, BOXES: tl.constexpr, CENTRED: tl.constexpr, mask):
    """Low and high x, low and high y, and the area, of boxes at these addresses.

    What is multiplied passes a selection before it is added: the compiler must not fuse the two.
    """
    a = tl.load(boxes, mask=mask).to(tl.float32)
    b = tl.load(boxes + BOXES[2], mask=mask).to(tl.float32)
    c = tl.load(boxes + 2 * BOXES[2], mask=mask).to(tl.float32)
    d = tl.load(boxes + 3 * BOXES[2], mask=mask).to(tl.float32)
    if CENTRED:
        half_x, half_y = c * 0.5, d * 0.5
        low_x, high_x, low_y, high_y = a - half_x, a + half_x, b - half_y, b + half_y
    else:
        low_x, high_x = tl.where(b >= d, d, b), tl.where(b >= d, b, d)
        low_y, high_y = tl.where(a >= c, c, a), tl.where(a >= c, a, c)
    area = (high_x - low_x) * (high_y - low_y)
    return low_x, high_x, low_y, high_y, tl.where(area > 0, area, 0.0)


@triton.jit
def _suppress(
    boxes,
    scores,
    keys,
    taken,
    counts,
    PLACES: tl.constexpr,
    MOST: tl.constexpr,
    BOXES: tl.constexpr,
    SCORES: tl.constexpr,
    OVERLAP: tl.constexpr,
    SCORE: tl.constexpr,
    CENTRED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The places of one class of one image that are left, the highest score first."""
    image, kind = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    group = image * tl.num_programs(0) + kind
    boxes += image * BOXES[0]
    scores += image * SCORES[0] + kind * SCORES[1]
    keys += group * PLACES
    highest = tl.full([BLOCK], _NONE, tl.int64)
    for first in range(0, PLACES, BLOCK):
        place = first + tl.arange(0, BLOCK)
        wanted = place < PLACES
        score = tl.load(scores + place * SCORES[2], mask=wanted, other=0.0).to(tl.float32)
        score = tl.where(score == 0, 0.0, score)  # zeros of both signs are equal
        bits = score.to(tl.int32, bitcast=True)
        ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
        key = (ordered << 32) | (place ^ _PLACE).to(tl.int64)
        if SCORE is not None:
            key = tl.where(score > SCORE, key, _NONE)
        key = tl.where(wanted, key, _NONE)
        tl.store(keys + place, key, mask=wanted)
        highest = tl.maximum(highest, key)
    tl.debug_barrier()  # threads read keys that others of the block wrote
    best = tl.max(highest, axis=0)
    count = 0
    while (count < MOST) & (best != _NONE):
        own = best.to(tl.int32) ^ _PLACE
        tl.store(taken + group * MOST + count, own)
        low_x, high_x, low_y, high_y, area = _sides(boxes + own * BOXES[1], BOXES, CENTRED, None)
        highest = tl.full([BLOCK], _NONE, tl.int64)
        for first in range(0, PLACES, BLOCK):
            place = first + tl.arange(0, BLOCK)
            there = place < PLACES
            key = tl.load(keys + place, mask=there, other=_NONE)
            left, right, top, bottom, other = _sides(
                boxes + place * BOXES[1], BOXES, CENTRED, there & (key != _NONE)
            )
            width = tl.minimum(high_x, right) - tl.maximum(low_x, left)
            height = tl.minimum(high_y, bottom) - tl.maximum(low_y, top)
            both = width * height
            meet = (width > 0) & (height > 0) & (both > 0) & (tl.minimum(other, area) > 0)
            both = tl.where(meet, both, 0.0)
            union = (area + other) - both
            meet = meet & (union > 0)
            share = tl.div_rn(both, tl.where(meet, union, 1.0))
            gone = (meet & (share > OVERLAP)) | (place == own)
            key = tl.where(gone, _NONE, key)
            tl.store(keys + place, key, mask=there)
            highest = tl.maximum(highest, key)
        tl.debug_barrier()
        best = tl.max(highest, axis=0)
        count += 1
    tl.store(counts + group, count)


@triton.jit
def _list(
    taken,
    counts,
    y,
    count,
    CLASSES: tl.constexpr,
    MOST: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The rows of one class of one image, behind those of all before it."""
    group = tl.program_id(0)
    number = tl.arange(0, BLOCK)
    all_ = tl.load(counts + number, mask=number < GROUPS, other=0)
    before = tl.sum(tl.where(number < group, all_, 0), axis=0).to(tl.int64)
    own = tl.load(counts + group)
    for first in range(0, MOST, ROWS):
        row = first + tl.arange(0, ROWS)
        place = tl.load(taken + group * MOST + row, mask=row < own)
        to = y + (before + row) * 3
        tl.store(to, tl.full([ROWS], 0, tl.int64) + group // CLASSES, mask=row < own)
        tl.store(to + 1, tl.full([ROWS], 0, tl.int64) + group % CLASSES, mask=row < own)
        tl.store(to + 2, place.to(tl.int64), mask=row < own)
    if group == GROUPS - 1:
        tl.store(count, before + own)
