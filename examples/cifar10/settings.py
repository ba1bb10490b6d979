"""What the command line chose, and where each network's files are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twofour.train import Schedule

DENSE = "dense"
DENSE_LAYERS = ("conv1", "linear")
"""Never pruned: the first convolution has three input channels, the last layer takes no time."""
DEPTH, EPOCHS, LR, CALIBRATION = 20, 12, 0.05, 512
FOLDERS = {DENSE: "dense", "2:4": "24", "2:4/pair": "24-pair"}


@dataclass(frozen=True)
class Network:
    """One form of the ResNet and its files.

    Attributes:
        name: "dense", or the pattern of its weights.
        folder: holds its files.
    """

    name: str
    folder: Path

    @property
    def sparse(self) -> bool:
        """Whether it was pruned."""
        return self.name != DENSE

    @property
    def checkpoint(self) -> Path:
        """Of fine-tuning."""
        return self.folder / "finetune.pt"

    def onnx(self, kind: str) -> Path:
        """The file of a kind: "f32", or "int8" or "uint8" for the type of the activations."""
        return self.folder / f"{kind}.onnx"

    def engine(self, kind: str) -> Path:
        """The engine that was built from the file of that kind."""
        return self.folder / f"{kind}.engine"


@dataclass(frozen=True)
class Settings:
    """What the command line chose.

    Attributes:
        out: folder for everything that is made.
        depth: of the ResNet.
        patterns: keys of `FOLDERS`.
        schedule: of fine-tuning.
        batch_size: of fine-tuning.
        calibration: training images that quantization sees.
        duration_s: of the race for the lowest latency.
        short: a few hundred images, one epoch.
    """

    out: Path
    depth: int
    patterns: tuple[str, ...]
    schedule: Schedule
    batch_size: int
    calibration: int
    duration_s: float
    short: bool

    def network(self, name: str) -> Network:
        """The dense network, or that of a pattern."""
        return Network(name, self.out / FOLDERS[name])
