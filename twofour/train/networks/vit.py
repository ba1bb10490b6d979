"""Vision transformers for [B, 3, H, W].

Source: Dosovitskiy et al. 2020, arXiv:2010.11929.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from twofour.core.errors import InputError


@dataclass(frozen=True)
class VitConfig:
    """Sizes of a vision transformer.

    Attributes:
        layers: how many.
        hidden: channels between layers; a multiple of `heads`.
        heads: of each attention.
        intermediate: channels inside a feed-forward block.
        image: height and width in pixels; a multiple of `patch`.
        patch: height and width of what becomes one token.
        classes: of the output.
        eps: of each LayerNorm.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    image: int = 224
    patch: int = 16
    classes: int = 1000
    eps: float = 1e-6

    def __post_init__(self) -> None:
        """Refuses sizes that do not divide. Raises InputError."""
        if self.hidden % self.heads or self.image % self.patch:
            raise InputError(
                "sizes of a vision transformer do not divide",
                [
                    f"hidden {self.hidden} by heads {self.heads}: expected no remainder",
                    f"image {self.image} by patch {self.patch}: expected no remainder",
                ],
                "choose other sizes",
            )

    @property
    def tokens(self) -> int:
        """Patches of an image, and the class token."""
        return (self.image // self.patch) ** 2 + 1


CONFIGS: Mapping[str, VitConfig] = {
    "vit_b16": VitConfig(layers=12, hidden=768, heads=12, intermediate=3072),
}


class Attention(nn.Module):
    """Self-attention whose Q, K and V come from one projection."""

    def __init__(self, config: VitConfig) -> None:
        """Makes the projections."""
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.proj = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, hidden] -> [B, S, hidden]."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return projected


class Layer(nn.Module):
    """x + attention(norm1(x)), then x + fc2(gelu(fc1(norm2(x))))."""

    def __init__(self, config: VitConfig) -> None:
        """Makes the layers."""
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden, config.eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.hidden, config.eps)
        self.fc1 = nn.Linear(config.hidden, config.intermediate)
        self.fc2 = nn.Linear(config.intermediate, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, hidden] -> [B, S, hidden]."""
        y: Tensor = x + self.attn(self.norm1(x))
        y = y + self.fc2(functional.gelu(self.fc1(self.norm2(y))))
        return y


class Vit(nn.Module):
    """Patches to tokens, layers, and a classifier on the class token.

    Args:
        config: its sizes.
    """

    def __init__(self, config: VitConfig) -> None:
        """Makes the layers."""
        super().__init__()
        self.patch_embed = nn.Conv2d(3, config.hidden, config.patch, config.patch)
        self.cls_token = nn.Parameter(torch.randn(1, 1, config.hidden) * 0.02)
        self.pos_embed = nn.Parameter(torch.randn(1, config.tokens, config.hidden) * 0.02)
        self.blocks = nn.Sequential(*[Layer(config) for _ in range(config.layers)])
        self.norm = nn.LayerNorm(config.hidden, config.eps)
        self.head = nn.Linear(config.hidden, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, image, image] -> [B, classes]."""
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        classes: Tensor = self.head(self.norm(self.blocks(x)[:, 0]))
        return classes
