"""Attention in which each query sees chosen keys alone, as a module: trains, exports, is exact.

    attention = SparseAttention(SparsePattern(heads=12, window=256, global_tokens=1))
    y = attention(q, k, v, keep)

`core/sparse_attention.py` says which keys a query sees. Some queries at a time meet the keys that
any of them sees, so that time and memory grow with the length, in training too. In an exported file
it is one node `twofour.plugins.SparseAttention`, beside the function that says what it means.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import wrap_torch_function

from twofour.core.errors import InputError
from twofour.core.sparse_attention import NO_BLOCKS, Pattern, random_blocks

OPERATOR = "twofour.plugins::SparseAttention"
_QUERIES, _RUN = 256, 64  # queries at a time, and keys


@dataclass(frozen=True)
class SparsePattern:
    """Which keys queries see, for sequences of any length.

    Attributes:
        heads: side by side in the channels.
        window: tokens seen on each side of a query; -1 for no band.
        global_tokens: so many first tokens see all and are seen by all.
        random_blocks: blocks of keys drawn for each block of queries, among those it does not see.
        block: tokens of a block.
        causal: no query sees a later key.
        seed: of the random blocks.
        scale: of the scores; None for 1 / sqrt(channels of a head).
    """

    heads: int
    window: int = 256
    global_tokens: int = 0
    random_blocks: int = 0
    block: int = 64
    causal: bool = False
    seed: int = 0
    scale: float | None = None

    def __post_init__(self) -> None:
        """Refuses what makes no sense. Raises InputError."""
        self.at(1)

    def at(self, length: int) -> Pattern:
        """The pattern of sequences of one length.

        Raises:
            InputError: the numbers make no sense.
        """
        return _pattern(self, length)


@lru_cache(maxsize=64)
def _pattern(settings: SparsePattern, length: int) -> Pattern:
    window, first, block = settings.window, settings.global_tokens, settings.block
    try:
        drawn = NO_BLOCKS
        if settings.random_blocks:
            count, seed = settings.random_blocks, settings.seed
            drawn = random_blocks(length, block, count, window, first, seed)
        return Pattern(length, window, first, settings.causal, block, drawn)
    except ValueError as error:
        raise InputError(
            "no such sparse attention", [str(error)], "choose other numbers"
        ) from error


class SparseAttention(nn.Module):
    """Attention of the heads of q, k and v, without projections and without parameters.

    Args:
        pattern: which keys queries see.
    """

    def __init__(self, pattern: SparsePattern) -> None:
        """Keeps the pattern."""
        super().__init__()
        self.pattern = pattern

    def forward(self, q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None = None) -> Tensor:
        """Three [B, L, heads * d] -> [B, L, heads * d].

        Args:
            q: queries.
            k: keys.
            v: values.
            keep: bool, broadcastable to [B, L]: the keys that are seen at all; None for all.

        Raises:
            InputError: the tensors do not fit together.
        """
        self._check(q, k, v)
        if keep is None:
            keep = torch.ones(1, 1, dtype=torch.bool, device=q.device)
        attended: Tensor = attend(q, k, v, keep.to(torch.bool), self.pattern)
        return attended

    def extra_repr(self) -> str:
        """The pattern."""
        return str(self.pattern)

    def _check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        shapes = [tuple(x.shape) for x in (q, k, v)]
        same = shapes[0] == shapes[1] == shapes[2]
        if not same or q.ndim != 3 or q.shape[2] % self.pattern.heads:
            raise InputError(
                "sparse attention cannot take these tensors",
                [
                    "expected q, k and v [batch, length, channels], all alike, the channels a"
                    f" multiple of {self.pattern.heads} heads",
                    f"got {', '.join(map(str, shapes))}",
                ],
                "split the channels evenly among heads, and give all three the same shape",
            )


def _attend(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, settings: SparsePattern) -> Tensor:
    """The attention; in an export one node."""
    if torch.onnx.is_in_onnx_export():
        return _node(q, k, v, keep, settings)
    heads, (batch, length, channels) = settings.heads, q.shape
    q, k, v = (x.reshape(batch, length, heads, -1).transpose(1, 2) for x in (q, k, v))
    factor = (channels // heads) ** -0.5 if settings.scale is None else settings.scale
    pattern = settings.at(length)
    keep = keep.expand(keep.shape[0], length)[:, None, None]
    parts = []
    for first in range(0, length, _QUERIES):
        last = min(first + _QUERIES, length)
        keys, seen = _seen(pattern, first, last, q.device)
        parts.append(_some(q[:, :, first:last] * factor, k, v, keys, seen & keep[..., keys]))
    return torch.cat(parts, 2).transpose(1, 2).reshape(batch, length, channels)


attend: Any = wrap_torch_function(lambda q, k, v, keep, settings: (q, k, v, keep))(_attend)
"""`_attend`, as one function to whoever watches a forward."""


def _seen(pattern: Pattern, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The keys that some of the queries see, and which of them each sees."""
    runs: NDArray[Any] = pattern.candidates(first, last, _RUN)[:, None] * _RUN + np.arange(_RUN)
    keys = runs.reshape(-1)
    keys = keys[keys < pattern.length]
    seen = pattern.visible(first, last, keys)
    return torch.from_numpy(keys).to(device), torch.from_numpy(seen).to(device)


def _some(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, seen: Tensor) -> Tensor:
    """Some queries' attention to some keys; zeros for a query that sees none."""
    scores = q @ k[:, :, keys].transpose(-1, -2)
    if not len(keys):
        return q.new_zeros(*q.shape[:-1], v.shape[-1])
    scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    # Where a query sees no key, all shares are alike, and none counts.
    shares = torch.softmax(scores, -1).masked_fill(~seen, 0.0)
    return shares @ v[:, :, keys]


def _node(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, settings: SparsePattern) -> Tensor:
    """The node of an exported file; without random blocks the length may stay open in it."""
    table = settings.at(int(q.shape[1])).blocks if settings.random_blocks else NO_BLOCKS
    attributes: dict[str, Any] = {
        "heads": settings.heads,
        "window": settings.window,
        "global_tokens": settings.global_tokens,
        "causal": int(settings.causal),
        "block": settings.block,
        "scale": float(settings.scale or 0.0),
    }
    blocks = torch.from_numpy(np.ascontiguousarray(table, np.int32))
    return torch.onnx.ops.symbolic(
        OPERATOR, (q, k, v, keep, blocks), attributes, dtype=q.dtype, shape=q.shape, version=1
    )
