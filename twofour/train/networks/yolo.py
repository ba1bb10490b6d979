"""A small detector like YOLO: CSP blocks, pyramid pooling, a neck that goes up and down.

Source: Wang et al. 2020, arXiv:1911.11929 (CSP); Bochkovskiy et al. 2020, arXiv:2004.10934.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

OUTPUT_NAMES = ("small", "medium", "large")


@dataclass(frozen=True)
class YoloConfig:
    """Sizes of a detector.

    Attributes:
        width: channels of the first convolution; the deepest level has 16 times as many.
        depth: bottlenecks in a CSP block.
        outputs: channels of each head: boxes, and classes.
    """

    width: int = 16
    depth: int = 1
    outputs: int = 85


class Conv(nn.Module):
    """silu(bn(conv(x)))."""

    def __init__(self, channels_in: int, channels: int, kernel: int = 1, stride: int = 1) -> None:
        """Makes the layers."""
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels, H/stride, W/stride]."""
        y: Tensor = self.act(self.bn(self.conv(x)))
        return y


class Csp(nn.Module):
    """Half of the channels go through bottlenecks; all that was made on the way is joined."""

    def __init__(self, channels_in: int, channels: int, depth: int, shortcut: bool = True) -> None:
        """Makes the layers."""
        super().__init__()
        half = channels // 2
        self.enter = Conv(channels_in, channels)
        self.inner = nn.ModuleList(
            nn.Sequential(Conv(half, half, 3), Conv(half, half, 3)) for _ in range(depth)
        )
        self.leave = Conv((2 + depth) * half, channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels, H, W]."""
        parts = list(self.enter(x).chunk(2, 1))
        for inner in self.inner:
            y = inner(parts[-1])
            parts.append(parts[-1] + y if self.shortcut else y)
        joined: Tensor = self.leave(torch.cat(parts, 1))
        return joined


class PyramidPool(nn.Module):
    """Three max pools of 5x5 in a row, joined with their input (SPPF)."""

    def __init__(self, channels: int) -> None:
        """Makes the layers."""
        super().__init__()
        self.enter = Conv(channels, channels // 2)
        self.pool = nn.MaxPool2d(5, 1, 2)
        self.leave = Conv(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same."""
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        y: Tensor = self.leave(torch.cat(parts, 1))
        return y


class Yolo(nn.Module):
    """For [B, 3, H, W], sides multiples of 32; three maps out, at strides of 8, 16 and 32.

    Args:
        config: its sizes.
    """

    def __init__(self, config: YoloConfig | None = None) -> None:
        """Makes the layers."""
        super().__init__()
        config = config or YoloConfig()
        one, depth = config.width, config.depth
        two, four, eight, sixteen = 2 * one, 4 * one, 8 * one, 16 * one
        self.stem = nn.Sequential(
            Conv(3, one, 3, 2), Conv(one, two, 3, 2), Csp(two, two, depth), Conv(two, four, 3, 2)
        )
        self.level8 = Csp(four, four, depth)
        self.level16 = nn.Sequential(Conv(four, eight, 3, 2), Csp(eight, eight, depth))
        self.level32 = nn.Sequential(
            Conv(eight, sixteen, 3, 2), Csp(sixteen, sixteen, depth), PyramidPool(sixteen)
        )
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.neck16 = Csp(sixteen + eight, eight, depth, shortcut=False)
        self.neck8 = Csp(eight + four, four, depth, shortcut=False)
        self.down16 = Conv(four, four, 3, 2)
        self.back16 = Csp(four + eight, eight, depth, shortcut=False)
        self.down32 = Conv(eight, eight, 3, 2)
        self.back32 = Csp(eight + sixteen, sixteen, depth, shortcut=False)
        self.heads = nn.ModuleList(
            nn.Conv2d(channels, config.outputs, 1) for channels in (four, eight, sixteen)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, 3, H, W] -> [B, outputs, H/8, W/8], [.., H/16, W/16], [.., H/32, W/32]."""
        at8 = self.level8(self.stem(x))
        at16 = self.level16(at8)
        at32 = self.level32(at16)
        neck16 = self.neck16(torch.cat([self.up(at32), at16], 1))
        small = self.neck8(torch.cat([self.up(neck16), at8], 1))
        medium = self.back16(torch.cat([self.down16(small), neck16], 1))
        large = self.back32(torch.cat([self.down32(medium), at32], 1))
        levels = zip(self.heads, (small, medium, large), strict=True)
        return tuple(head(level) for head, level in levels)
