"""Attention problems with their tensors and what comes out, for interpreter and GPU alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from tests.kernels.cuda.interpret import TORCH
from twofour.core.attention import attention
from twofour.kernels.cuda.problem import QUANTIZED, AttentionProblem, Rows

# Relative to the largest result: eps of the type that products read, and a few roundings.
BOUNDS = {"float32": 2e-6, "float16": 4e-3, "bfloat16": 2e-2, "int8": 4e-3, "float8e4m3fn": 4e-3}


@dataclass
class Case:
    """One attention: q, k and v are thirds of one tensor where the lengths allow it."""

    problem: AttentionProblem
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    @staticmethod
    def of(
        dtype: str,
        lengths: tuple[int, int],
        heads: int,
        dims: tuple[int, int],
        *,
        batch: int = 2,
        out: str = "",
        mask: torch.Tensor | None = None,
        causal: bool = False,
        device: str = "cpu",
        seed: int = 0,
    ) -> Case:
        """Seeded operands with room between their rows.

        Args:
            dtype: of q, k and v.
            lengths: of queries and keys.
            heads: of all.
            dims: channels of a head of q and k, and of v and y.
            batch: sequences.
            out: type of y; by default that of q, or float32 of quantized ones.
            mask: float32 of four dimensions, each 1 or whole.
            causal: see `AttentionProblem`.
            device: where the tensors lie.
            seed: of the operands.
        """
        random = torch.Generator(device).manual_seed(seed)
        out = out or ("float32" if dtype in QUANTIZED else dtype)
        widths = {"q": heads * dims[0], "k": heads * dims[0], "v": heads * dims[1]}
        together = lengths[0] == lengths[1]
        wide = sum(widths.values())
        tensors, rows, at = {}, {}, 0
        shared = numbers((batch, lengths[0], wide), dtype, random, device) if together else None
        for role, width in widths.items():
            length = lengths[role != "q"]
            if shared is None:
                tensors[role] = numbers((batch, length, width), dtype, random, device)
            else:
                tensors[role] = shared[:, :, at : at + width]
                at += width
            step = tensors[role].stride()
            rows[role] = Rows(dtype, step[0], step[1])
        y = torch.full((batch, lengths[0], heads * dims[1] + 8), 3.0, device=device)
        tensors["y"] = y.to(TORCH[out])[:, :, : heads * dims[1]]
        rows["y"] = Rows(out, *tensors["y"].stride()[:2])
        strides: tuple[int, ...] = ()
        if mask is not None:
            tensors["mask"] = mask.to(device)
            sizes = zip(mask.shape, mask.stride(), strict=True)
            strides = tuple(0 if size == 1 else step for size, step in sizes)
        spread = 40.0 if dtype == "int8" else 1.0
        problem = AttentionProblem(
            batch, *lengths, heads, *dims, **rows,
            score_scale=dims[0] ** -0.5 / spread**2, mask_strides=strides, causal=causal,
        )  # fmt: skip
        if dtype in QUANTIZED:
            problem = replace(problem, v_scale=1 / spread)
        if out in QUANTIZED:
            problem = replace(problem, y_scale=0.02, y_zero=-3 if out == "int8" else 0)
        return Case(problem, tensors)

    def expected(self) -> np.ndarray:
        """The definition in float32; in units of y's scale where y is quantized."""
        p = self.problem

        def heads_of(role: str) -> np.ndarray:
            x = self.tensors[role].float().cpu().numpy()
            return x.reshape(p.batch, x.shape[1], p.heads, -1).transpose(0, 2, 1, 3)

        mask = self.tensors["mask"].cpu().numpy() if p.mask_strides else None
        q, k, v = heads_of("q") - np.float32(p.q_zero), heads_of("k"), heads_of("v")
        found = attention(q, k, v, p.score_scale, mask, p.causal) * np.float32(p.v_scale)
        y: np.ndarray = found.transpose(0, 2, 1, 3).reshape(p.batch, p.q_len, -1)
        return y

    def wrong(self) -> str:
        """What differs from the definition by more than rounding explains; "" if nothing does."""
        p, y = self.problem, self.tensors["y"]
        got, wanted = y.float().cpu().numpy(), self.expected()
        bound = BOUNDS[p.q.dtype] * float(np.abs(wanted).max())
        if p.y.dtype in QUANTIZED:
            wanted = wanted / np.float32(p.y_scale) + p.y_zero
            low, high = (-128, 127) if p.y.dtype == "int8" else (-448, 448)
            wanted = np.clip(wanted, low, high)
            step = 0.5 if p.y.dtype == "int8" else np.maximum(np.abs(wanted) / 16, 2.0**-10)
            bound = bound / p.y_scale + step
        elif p.y.dtype != "float32":
            bound = bound + np.abs(wanted) * (2.0**-8 if p.y.dtype == "bfloat16" else 2.0**-11)
        off = np.abs(got - wanted)
        if not np.isfinite(got).all() or (off > bound).any():
            worst = float(np.nanmax(off - bound))
            place = np.unravel_index(np.nanargmax(off - bound), off.shape)
            return f"off by {worst:.3g} more than allowed at {place}: {got[place]}, {wanted[place]}"
        beyond = whole(y).float()[:, :, y.shape[2] :]
        return "" if (beyond == 3).all() else "elements behind the rows of y were written"


def flat(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What kernels get: all elements from a view's first one on, in one row."""
    return {
        role: whole(x).as_strided(
            (whole(x).numel() - x.storage_offset(),), (1,), x.storage_offset()
        )
        for role, x in tensors.items()
    }


def whole(x: torch.Tensor) -> torch.Tensor:
    """The tensor that a view is of, or itself."""
    return x if x._base is None else x._base


def numbers(
    shape: tuple[int, ...], dtype: str, random: torch.Generator, device: str
) -> torch.Tensor:
    """Normal floats, or bytes like those of a quantized tensor."""
    x = torch.randn(shape, generator=random, device=device)
    return (
        (x * 40).round().clamp(-128, 127).to(torch.int8) if dtype == "int8" else x.to(TORCH[dtype])
    )


def padding(batch: int, keys: int, hidden: tuple[int, ...]) -> torch.Tensor:
    """A mask that hides so many keys at the end of each sequence, [batch, 1, 1, keys]."""
    seen = torch.arange(keys)[None] < keys - torch.tensor(hidden)[:, None]
    return torch.where(seen, 0.0, -torch.inf)[:, None, None, :].contiguous()
