"""A detector of the shape of YOLOv8: decoupled heads, distances as distributions, boxes in pixels.

The backbone and the neck are the blocks of yolo.py. Each of three levels has a branch for boxes,
which gives 16 chances for each of the four distances to the sides, and one for classes.

Source: Jocher et al. 2023 (YOLOv8); Li et al. 2020, arXiv:2006.04388 (distances as distributions).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from twofour.train.networks.yolo import Conv, Csp, PyramidPool

STRIDES = (8, 16, 32)
BINS = 16
"""Chances for each distance."""
OUTPUT_NAMES = ("boxes", "scores")
"""Of a network that is `split`."""
RARE = -4.5
"""A score without evidence, before the sigmoid, such that some hundred boxes are worth a look."""


@dataclass(frozen=True)
class Yolov8Config:
    """Sizes of a detector.

    Attributes:
        width: channels of the first convolution; the deepest level has 16 times as many.
        depths: bottlenecks of the CSP blocks of the backbone, and last of those of the neck.
        classes: of objects.
        side: of its square images in pixels, a multiple of 32.
        split: boxes and scores as two outputs, as what suppresses overlapping boxes reads them.
    """

    width: int = 16
    depths: tuple[int, int, int, int, int] = (1, 2, 2, 1, 1)
    classes: int = 80
    side: int = 640
    split: bool = False


class Head(nn.Module):
    """What one level says of each of its places.

    Args:
        channels_in: of the level.
        inner: channels inside the two branches, boxes and classes.
        classes: of objects.
    """

    def __init__(self, channels_in: int, inner: tuple[int, int], classes: int) -> None:
        """Makes the layers."""
        super().__init__()
        ends = (4 * BINS, classes)
        self.boxes, self.classes = (
            nn.Sequential(Conv(channels_in, c, 3), Conv(c, c, 3), nn.Conv2d(c, end, 1))
            for c, end in zip(inner, ends, strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, 4 * BINS + classes, H, W]."""
        return torch.cat([self.boxes(x), self.classes(x)], 1)


class Yolov8(nn.Module):
    """For [B, 3, side, side]; boxes in pixels and the chance of each class, for all places.

    Args:
        config: its sizes.
    """

    anchors: Tensor
    strides: Tensor
    bins: Tensor

    def __init__(self, config: Yolov8Config | None = None) -> None:
        """Makes the layers."""
        super().__init__()
        self.config = config = config or Yolov8Config()
        one = config.width
        two, four, eight, sixteen = 2 * one, 4 * one, 8 * one, 16 * one
        first, second, third, last, neck = config.depths
        self.stem = nn.Sequential(
            Conv(3, one, 3, 2), Conv(one, two, 3, 2), Csp(two, two, first), Conv(two, four, 3, 2)
        )
        self.level8 = Csp(four, four, second)
        self.level16 = nn.Sequential(Conv(four, eight, 3, 2), Csp(eight, eight, third))
        self.level32 = nn.Sequential(
            Conv(eight, sixteen, 3, 2), Csp(sixteen, sixteen, last), PyramidPool(sixteen)
        )
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.neck16 = Csp(sixteen + eight, eight, neck, shortcut=False)
        self.neck8 = Csp(eight + four, four, neck, shortcut=False)
        self.down16 = Conv(four, four, 3, 2)
        self.back16 = Csp(four + eight, eight, neck, shortcut=False)
        self.down32 = Conv(eight, eight, 3, 2)
        self.back32 = Csp(eight + sixteen, sixteen, neck, shortcut=False)
        inner = max(16, four // 4, 4 * BINS), max(four, min(config.classes, 100))
        self.heads = nn.ModuleList(
            Head(channels, inner, config.classes) for channels in (four, eight, sixteen)
        )
        anchors, strides = _places(config.side)
        self.register_buffer("anchors", anchors, persistent=False)
        self.register_buffer("strides", strides, persistent=False)
        self.register_buffer("bins", torch.arange(BINS, dtype=torch.float32), persistent=False)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Boxes (centre x, centre y, width, height) and scores, each for P places.

        Returns:
            [B, 4 + classes, P]; where split, [B, P, 4] and [B, classes, P].
        """
        at8 = self.level8(self.stem(x))
        at16 = self.level16(at8)
        at32 = self.level32(at16)
        neck16 = self.neck16(torch.cat([self.up(at32), at16], 1))
        small = self.neck8(torch.cat([self.up(neck16), at8], 1))
        medium = self.back16(torch.cat([self.down16(small), neck16], 1))
        large = self.back32(torch.cat([self.down32(medium), at32], 1))
        levels = zip(self.heads, (small, medium, large), strict=True)
        flat = [head(level).flatten(2) for head, level in levels]
        chances, scores = torch.split(torch.cat(flat, 2), [4 * BINS, self.config.classes], 1)
        boxes, scores = self.boxes(chances), scores.sigmoid()
        if self.config.split:
            return boxes.transpose(1, 2), scores
        return torch.cat([boxes, scores], 1)

    @torch.no_grad()
    def make_rare(self, logit: float) -> None:
        """Lowers all scores, as training begins and ends: few places show an object.

        Args:
            logit: what a score is without any evidence, before the sigmoid.
        """
        for head in self.heads:
            head.classes[-1].bias.fill_(logit)  # type: ignore[union-attr,index]

    def boxes(self, chances: Tensor) -> Tensor:
        """[B, 4 * BINS, P] -> [B, 4, P] in pixels."""
        batch, _, places = chances.shape
        shares = chances.view(batch, 4, BINS, places).transpose(1, 2).softmax(1)
        distances = nn.functional.conv2d(shares, self.bins.view(1, BINS, 1, 1))
        before, behind = distances.view(batch, 4, places).chunk(2, 1)
        low, high = self.anchors - before, self.anchors + behind
        return torch.cat([(low + high) / 2, high - low], 1) * self.strides


def _places(side: int) -> tuple[Tensor, Tensor]:
    """The centre of each place in steps of its level, [2, P], and that step in pixels, [1, P]."""
    centres, steps = [], []
    for stride in STRIDES:
        line = torch.arange(side // stride, dtype=torch.float32) + 0.5
        y, x = torch.meshgrid(line, line, indexing="ij")
        centres.append(torch.stack([x.flatten(), y.flatten()]))
        steps.append(torch.full((1, len(line) ** 2), float(stride)))
    return torch.cat(centres, 1), torch.cat(steps, 1)
