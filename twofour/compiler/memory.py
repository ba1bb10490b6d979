"""One arena for all activations: tensors that never live together share bytes.

A tensor with a halo keeps its bytes for tensors of exactly its layout, because the halo is set only
once, when a session starts. Tensors without a halo share all remaining bytes freely.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from twofour.compiler.layout import ALIGNMENT, Tensor
from twofour.core.abi import SLACK_BYTES
from twofour.engine import Fill

# Kernels read up to this far beyond a tensor; what they find there meets zero weights.
_GUARD_BYTES = 64


@dataclass(frozen=True)
class Life:
    """When a tensor is in use.

    Attributes:
        first: the first operator that touches it.
        last: the last one.
        replaces: the tensor it may overwrite, or "".
    """

    first: int
    last: int
    replaces: str = ""


def plan(
    tensors: Sequence[Tensor], lives: Mapping[str, Life], begin: int = 0
) -> tuple[int, tuple[Fill, ...]]:
    """Sets the offset of every tensor.

    Args:
        tensors: all native tensors.
        lives: by tensor name.
        begin: bytes that are kept for something else; a multiple of the alignment.

    Returns:
        The size of the arena in bytes, and its halo regions.
    """
    end, fills = _plan_halos([t for t in tensors if any(t.halo)], lives, begin)
    end = _plan_free([t for t in tensors if not any(t.halo)], lives, end)
    return end + SLACK_BYTES, fills


def _plan_halos(
    tensors: Sequence[Tensor], lives: Mapping[str, Life], base: int
) -> tuple[int, tuple[Fill, ...]]:
    """Slots by layout.

    A slot is free again after the last use, or at once for the tensor that replaces it.
    """
    slots: list[tuple[tuple[int, ...], int, Tensor]] = []  # layout, offset, who is in it
    end, fills = base, []
    for tensor in sorted(tensors, key=lambda t: lives[t.name].first):
        life = lives[tensor.name]
        fitting = [
            i
            for i, (layout, _, holder) in enumerate(slots)
            if layout == tensor.layout
            and (
                lives[holder.name].last < life.first
                or (holder.name == life.replaces and lives[holder.name].last == life.first)
            )
        ]
        # Taking the residual's own slot keeps one buffer fewer warm in the cache.
        fitting.sort(key=lambda i: slots[i][2].name != life.replaces)
        if fitting:
            index = fitting[0]
            tensor.offset = slots[index][1]
            slots[index] = (tensor.layout, tensor.offset, tensor)
            continue
        tensor.offset = end
        slots.append((tensor.layout, end, tensor))
        fills.append(Fill(end, tensor.size_bytes, tensor.fill))
        end += _rounded(tensor.size_bytes)
    return end, tuple(fills)


def _plan_free(tensors: Sequence[Tensor], lives: Mapping[str, Life], base: int) -> int:
    """First fit by size, largest first, between the tensors alive at the same time."""
    placed: list[Tensor] = []
    end = base
    for tensor in sorted(tensors, key=lambda t: (-t.size_bytes, lives[t.name].first)):
        beside = [other for other in placed if _meet(tensor, other, lives)]
        tensor.offset = _free_offset(tensor, beside, lives, base)
        placed.append(tensor)
        end = max(end, tensor.offset + _rounded(tensor.size_bytes))
    return end


def _free_offset(
    tensor: Tensor, beside: Sequence[Tensor], lives: Mapping[str, Life], base: int
) -> int:
    """Where `tensor` fits: over the one it replaces, else in the first gap of those `beside` it."""
    replaced = next((t for t in beside if _may_replace(tensor, t, lives)), None)
    others = [t for t in beside if t is not replaced]
    if replaced is not None and not any(_overlap(replaced.offset, tensor, t) for t in others):
        return replaced.offset
    offset = base
    for other in sorted(beside, key=lambda t: t.offset):
        if _overlap(offset, tensor, other):
            offset = other.offset + _rounded(other.size_bytes)
    return offset


def _meet(a: Tensor, b: Tensor, lives: Mapping[str, Life]) -> bool:
    """Whether the two live at the same time."""
    one, two = lives[a.name], lives[b.name]
    return one.first <= two.last and two.first <= one.last


def _may_replace(new: Tensor, old: Tensor, lives: Mapping[str, Life]) -> bool:
    """Whether `new` may be written over `old`.

    `old` must be its residual, of the same layout, read for the last time.
    """
    life = lives[new.name]
    return (
        life.replaces == old.name
        and lives[old.name].last == life.first
        and new.layout == old.layout
    )


def _overlap(offset: int, tensor: Tensor, other: Tensor) -> bool:
    """Whether `tensor` placed at `offset` would share bytes with `other`."""
    return offset < other.offset + _rounded(other.size_bytes) and other.offset < offset + _rounded(
        tensor.size_bytes
    )


def _rounded(size: int) -> int:
    return -(-(size + _GUARD_BYTES) // ALIGNMENT) * ALIGNMENT
