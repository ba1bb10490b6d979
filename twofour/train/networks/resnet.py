"""Residual networks for images of 224 and of 32 pixels.

Source: He et al. 2015, arXiv:1512.03385; the stride of a bottleneck stands in its 3x3 convolution,
as ImageNet checkpoints of today have it.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

IMAGENET_DEPTHS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
}


class Block(nn.Module):
    """relu(residual(x) + shortcut(x)): two 3x3 convolutions, or a bottleneck of three.

    Args:
        channels_in: of the input.
        width: of the 3x3 convolutions.
        stride: of the block.
        bottleneck: 1x1, 3x3, 1x1 with four times as many channels at the end.
    """

    def __init__(self, channels_in: int, width: int, stride: int, bottleneck: bool) -> None:
        """Makes the layers."""
        super().__init__()
        channels = width * 4 if bottleneck else width
        if bottleneck:
            shapes = [(width, 1, 1), (width, 3, stride), (channels, 1, 1)]
        else:
            shapes = [(width, 3, stride), (channels, 3, 1)]
        c = channels_in
        for index, (n, kernel, step) in enumerate(shapes, 1):
            self.add_module(f"conv{index}", nn.Conv2d(c, n, kernel, step, kernel // 2, bias=False))
            self.add_module(f"bn{index}", nn.BatchNorm2d(n))
            c = n
        self.count = len(shapes)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels, H/stride, W/stride]."""
        y = x
        for index in range(1, self.count + 1):
            y = self.get_submodule(f"bn{index}")(self.get_submodule(f"conv{index}")(y))
            y = functional.relu(y) if index < self.count else y
        return functional.relu(y + self.downsample(x))


class ResNet(nn.Module):
    """ResNet-18, -34 or -50 for [B, 3, 224, 224].

    Args:
        depth: a key of `IMAGENET_DEPTHS`.
        classes: of the output.
    """

    def __init__(self, depth: int, classes: int = 1000) -> None:
        """Makes the layers."""
        super().__init__()
        bottleneck = depth >= 50
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        channels = 64
        for stage, blocks in enumerate(IMAGENET_DEPTHS[depth]):
            width = 64 << stage
            layers = []
            for index in range(blocks):
                stride = 2 if stage and not index else 1
                layers.append(Block(channels, width, stride, bottleneck))
                channels = width * 4 if bottleneck else width
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, classes]."""
        x = self.maxpool(functional.relu(self.bn1(self.conv1(x))))
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
        classes: Tensor = self.fc(x.mean((2, 3)))
        return classes


class CifarResNet(nn.Module):
    """ResNet-20, -32, -44 or -56 for [B, 3, 32, 32], with shortcuts that cost no weights.

    Args:
        depth: 6 n + 2.
        classes: of the output.
    """

    def __init__(self, depth: int, classes: int = 10) -> None:
        """Makes the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        for stage, width in enumerate((16, 32, 64), 1):
            blocks = []
            for index in range((depth - 2) // 6):
                grows = stage > 1 and not index
                blocks.append(CifarBlock(width // 2 if grows else width, width, 1 + grows))
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[B, 3, 32, 32] -> [B, classes]."""
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.get_submodule("layer1")(x)
        x = self.get_submodule("layer2")(x)
        x = self.get_submodule("layer3")(x)
        classes: Tensor = self.linear(x.mean((2, 3)))
        return classes


class CifarBlock(nn.Module):
    """relu(conv-bn-relu-conv-bn(x) + shortcut(x)); the shortcut subsamples and pads channels."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        """Makes the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.more = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels_in, H, W] -> [B, channels, H/stride, W/stride]."""
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.more:
            x = x[:, :, :: self.stride, :: self.stride]
            x = functional.pad(x, (0, 0, 0, 0, self.more, self.more))
        return functional.relu(y + x)
