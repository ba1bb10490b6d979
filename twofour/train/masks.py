"""The masks of `core/masks.py` for torch tensors, made on the tensor's own device.

They are equal to numpy's bit for bit, ties too: nothing is computed but comparisons and sums in the
same order. On a CPU they are numpy's, which stay in its caches. Elsewhere no group is looped over:
a 1-D mask is a handful of kernels, so that training can make one at every step. `torch.compile`
takes those as part of a graph on any device; 2-D masks it runs as they are.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import chain

import torch
from torch import Tensor

from twofour.core import masks, tiles
from twofour.core.errors import InputError
from twofour.core.patterns import (
    PAIR_BLOCK,
    PAIR_DISTANCE,
    Pattern,
    paired_rows,
    require_eligible,
    show,
)

_MOST_SUMS = 1 << 26  # sums of tiles at once: 256 MB of float32


def mask_of(
    energy: Tensor, pattern: str | Pattern, search: str | None = None, *, check: bool = True
) -> Tensor:
    """True where a weight is kept: exactly `n` of each `m`, those with the most energy.

    Args:
        energy: float [N, C, ...], finite, not negative; see `core/criteria.py`. Half precision is
            compared, and added, in float32.
        pattern: such as `2:4`, `2:4/pair` or `2:4/2d`.
        search: for the tiles of a 2-D pattern, see `core/tiles.py`: "exhaustive", "greedy", or
            None for the best that is possible.
        check: looks for values that have no rank, which waits for the device. Without it they give
            a mask that may keep any number of weights in their groups, but on a CPU, which always
            looks.

    Returns:
        bool, the shape of `energy`, on its device; without a gradient.

    Raises:
        InputError: the shape cannot have the pattern, an energy is negative or not finite, the
            tensor is not of floats, or there is no such search.

    Source: Mishra et al. 2021, arXiv:2104.08378 (2:4); Zhou et al. 2021, arXiv:2102.04010 (n:m).
    """
    pattern = Pattern.parse(pattern)
    shape = tuple(energy.shape)
    require_eligible(shape, pattern)
    search = tiles.search_of(pattern, search)
    if not energy.is_floating_point():
        what = f"cannot rank a weight of shape {show(shape)} for pattern {pattern}"
        raise InputError(what, [f"expected floats; got {energy.dtype}"])
    energy = energy.detach().to(torch.promote_types(energy.dtype, torch.float32))
    if energy.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.from_numpy(masks.mask_of(energy.numpy(), pattern, search))
    if check:
        _require_ranks(energy, pattern)
    return _by_kernels(energy.contiguous(), pattern, search)


def _by_kernels(energy: Tensor, pattern: Pattern, search: str) -> Tensor:
    """The mask of float32 or float64 energies, made by the tensor's device."""
    if pattern.both:
        keep: Tensor = _tiled(energy, pattern, search)
        return keep
    rows = len(energy)
    paired = paired_rows(rows) if pattern.pair else 0
    if not paired:
        return _free(energy, pattern)
    keep = _paired(energy[:paired], pattern)
    return keep if paired == rows else torch.cat([keep, _free(energy[paired:], pattern)])


def _require_ranks(energy: Tensor, pattern: Pattern) -> None:
    """The refusals of `core/masks.py`."""
    if bool(((energy >= 0) & (energy < math.inf)).all()):
        return
    what = f"cannot rank a weight of shape {show(energy.shape)} for pattern {pattern}"
    if bad := int((~energy.isfinite()).sum()):
        fix = "load a checkpoint from before training diverged"
        raise InputError(what, [f"{bad} of its values are NaN or infinite"], fix)
    reasons = [f"{int((energy < 0).sum())} of its energies are negative"]
    raise InputError(what, reasons, "give energies, such as w * w (twofour.core.criteria)")


def _free(energy: Tensor, pattern: Pattern) -> Tensor:
    """`n` of each `m`, each output channel by itself."""
    n, m = pattern.n, pattern.m
    groups = energy.reshape(len(energy), -1, m, math.prod(energy.shape[2:]))
    if m <= masks.MOST_COMPARED:
        here, others = groups.unsqueeze(3), groups.unsqueeze(2)
        lower = torch.ones(m, m, dtype=torch.bool, device=energy.device).tril(-1).unsqueeze(2)
        outranked = (others > here) | ((others == here) & lower)  # [N, C/m, place, by, taps]
        return (outranked.sum(3, dtype=torch.uint8) < n).reshape(energy.shape)
    order = groups.argsort(dim=2, descending=True, stable=True)
    keep = torch.zeros_like(groups, dtype=torch.bool)
    return keep.scatter_(2, order[:, :, :n], True).reshape(energy.shape)


def _paired(energy: Tensor, pattern: Pattern) -> Tensor:
    """One mask for the two output channels of each pair; whole blocks only."""
    halves = energy.reshape(len(energy) // PAIR_BLOCK, 2, PAIR_DISTANCE, *energy.shape[1:])
    shared = _free((halves[:, 0] + halves[:, 1]).flatten(0, 1), pattern)
    keep = shared.reshape(len(halves), 1, *halves.shape[2:]).expand(halves.shape)
    return keep.reshape(energy.shape)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _tiled(energy: Tensor, pattern: Pattern, search: str) -> Tensor:
    """A mask for each tile of `m` by `m` channels."""
    n, m = pattern.n, pattern.m
    grid = (len(energy) // m, m, energy.shape[1] // m, m, math.prod(energy.shape[2:]))
    tiled = energy.reshape(grid).permute(0, 2, 4, 1, 3).reshape(-1, m, m)
    keep = _best(tiled, n) if search == "exhaustive" else _greedy(tiled, n)
    keep = keep.reshape(grid[0], grid[2], grid[4], m, m).permute(0, 3, 1, 4, 2)
    return keep.contiguous().reshape(energy.shape)


def _best(tiled: Tensor, n: int) -> Tensor:
    """[T, m, m] -> the first of the masks with the most energy of each tile."""
    every, choices, *rest = _tile_masks(n, tiled.shape[1], tiled.device)
    before, chosen = rest[::2], rest[1::2]
    parts = []
    for part in torch.split(tiled, max(1, _MOST_SUMS // len(every))):
        columns = part.permute(1, 2, 0).contiguous()  # [row, column, tile]
        rows = columns[:, choices[:, 0]]
        for column in choices[:, 1:].T:
            rows = rows + columns[:, column]
        sums = rows[0]
        for row, old, new in zip(rows[1:], before, chosen, strict=True):
            sums = sums[old] + row[new]
        parts.append(sums.argmax(0))
    return every[torch.cat(parts)]


@lru_cache(maxsize=8)
def _tile_masks(n: int, m: int, device: torch.device) -> tuple[Tensor, ...]:
    """The masks of `tiles.tile_masks`, the choices of a row, and `before` and `chosen` by turns."""
    every = tiles.tile_masks(n, m)
    steps = chain.from_iterable(zip(every.before, every.chosen, strict=True))
    return tuple(torch.as_tensor(x, device=device) for x in (every.masks, every.choices, *steps))


def _greedy(tiled: Tensor, n: int) -> Tensor:
    """[T, m, m] -> the mask made by taking entries in falling order, as `tiles.greedy`."""
    count, m, _ = tiled.shape
    order = (-tiled.flatten(1)).argsort(dim=1, stable=True)
    row_room = torch.full((count, m), n, dtype=torch.int16, device=tiled.device)
    column_room = row_room.clone()
    keep = torch.zeros(count, m * m, dtype=torch.bool, device=tiled.device)
    for place in torch.split(order, 1, dim=1):
        row, column = place // m, place % m
        taken = (row_room.gather(1, row) > 0) & (column_room.gather(1, column) > 0)
        row_room.scatter_add_(1, row, -taken.to(torch.int16))
        column_room.scatter_add_(1, column, -taken.to(torch.int16))
        keep.scatter_(1, place, taken)
    keep = keep.reshape(count, m, m)
    _fill(tiled, keep, n)
    return keep


def _fill(tiled: Tensor, keep: Tensor, n: int) -> None:
    """Makes the exchanges of `tiles.greedy` in `keep` until each row and column has `n`."""
    m = keep.shape[1]
    while len(short := (keep.sum((1, 2)) < n * m).nonzero().squeeze(1)):
        energy, kept = tiled[short], keep[short]
        start = torch.arange(len(short), device=keep.device)
        row = (kept.sum(2) < n).to(torch.uint8).argmax(1)
        column = (kept.sum(1) < n).to(torch.uint8).argmax(1)
        in_row, in_column = energy[start, row], energy[start, :, column]
        gain = (in_row[:, None, :] + in_column[:, :, None]) - energy
        possible = kept & ~kept[start, row][:, None, :] & ~kept[start, :, column][:, :, None]
        least_lost = gain.masked_fill(~possible, -math.inf).flatten(1).argmax(1)
        other_row, other_column = least_lost // m, least_lost % m
        kept[start, other_row, other_column] = False
        kept[start, row, other_column] = True
        kept[start, other_row, column] = True
        keep[short] = kept
