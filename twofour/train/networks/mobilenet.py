"""Networks of depthwise convolutions for images of 224 pixels.

Source: Sandler et al. 2018, arXiv:1801.04381 (V2); Howard et al. 2019, arXiv:1905.02244 (V3).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

EXCITE_DIVISOR = 4


@dataclass(frozen=True)
class MobileConfig:
    """Sizes of a network.

    Attributes:
        stages: (expansion, channels, blocks, stride of the first block) in order.
        stem: channels of the first convolution.
        head: channels of the last convolution.
        classes: of the output.
        hard_swish: the activation, instead of ReLU6.
        excite: each block weighs its channels (squeeze-and-excite).
    """

    stages: tuple[tuple[int, int, int, int], ...] = field(
        default=(
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
    )
    stem: int = 32
    head: int = 1280
    classes: int = 1000
    hard_swish: bool = False
    excite: bool = False


CONFIGS: Mapping[str, MobileConfig] = {
    "mobilenetv2": MobileConfig(),
    "mobilenetv3_like": MobileConfig(hard_swish=True, excite=True),
}


class Excite(nn.Module):
    """x * hard_sigmoid(fc2(relu(fc1(mean(x))))): one factor a channel."""

    def __init__(self, channels: int) -> None:
        """Makes the layers."""
        super().__init__()
        squeezed = max(channels // EXCITE_DIVISOR, 8)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, squeezed, 1)
        self.relu = nn.ReLU()
        self.fc2 = nn.Conv2d(squeezed, channels, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] -> the same."""
        y: Tensor = x * self.gate(self.fc2(self.relu(self.fc1(self.pool(x)))))
        return y


class Block(nn.Module):
    """Expand 1x1, depthwise 3x3, project 1x1; plus the input where shapes agree."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        """Makes the convolutions; `insert` adds what a configuration asks for."""
        super().__init__()
        width = channels_in * expansion
        self.width, self.shortcut = width, stride == 1 and channels_in == channels
        self.expand = nn.Sequential()
        if expansion != 1:
            self.expand = convolution(channels_in, width, 1, 1)
        self.depthwise = convolution(width, width, 3, stride, groups=width)
        self.project = convolution(width, channels, 1, 1)

    def insert(self, config: MobileConfig) -> Block:
        """Puts activations behind the first two convolutions, and the excitation between."""
        if len(self.expand):
            self.expand.append(activation(config))
        self.depthwise.append(activation(config))
        if config.excite:
            self.depthwise.append(Excite(self.width))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels, H/stride, W/stride]."""
        y: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class MobileNet(nn.Module):
    """For [B, 3, 224, 224].

    Args:
        config: its sizes.
    """

    def __init__(self, config: MobileConfig | None = None) -> None:
        """Makes the layers."""
        super().__init__()
        config = config or MobileConfig()
        self.stem = convolution(3, config.stem, 3, 2).append(activation(config))
        blocks, channels_in = [], config.stem
        for expansion, channels, count, stride in config.stages:
            for index in range(count):
                step = 1 if index else stride
                blocks.append(Block(channels_in, channels, step, expansion).insert(config))
                channels_in = channels
        self.blocks = nn.Sequential(*blocks)
        self.head = convolution(channels_in, config.head, 1, 1).append(activation(config))
        self.classifier = nn.Linear(config.head, config.classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, classes]."""
        x = self.head(self.blocks(self.stem(x)))
        classes: Tensor = self.classifier(x.mean((2, 3)))
        return classes


def convolution(
    channels_in: int, channels: int, kernel: int, stride: int, groups: int = 1
) -> nn.Sequential:
    """Convolution and BatchNorm, sides kept or divided by the stride."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels),
    )


def activation(config: MobileConfig) -> nn.Module:
    """HardSwish or ReLU6."""
    return nn.Hardswish() if config.hard_swish else nn.ReLU6()
