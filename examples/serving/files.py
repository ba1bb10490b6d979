"""What is served: ResNet-20 and MiniLM, 2:4 and INT8, as ONNX files and as engines."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from float_files import FEED_FORWARD, FloatFile, minilm, resnet

import twofour
from twofour.compiler.requests import Requested
from twofour.onnx_tools.load import save_model
from twofour.onnx_tools.one_shot import Calibration
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize

IMAGE = (3, 32, 32)
MOST_ROWS, LONGEST = 32, 128


@dataclass(frozen=True)
class Served:
    """One network.

    Attributes:
        name: of the model.
        float_file: dense float32, what others serve too.
        int8_file: Q/DQ.
        engine: of the INT8 file, one thread, rows open.
    """

    name: str
    float_file: Path
    int8_file: Path
    engine: Path


def prepare(name: str, folder: Path) -> Served:
    """Makes the files that are not there yet."""
    place = folder / name
    place.mkdir(parents=True, exist_ok=True)
    served = Served(name, place / "float.onnx", place / "int8.onnx", place / f"{name}.engine")
    if not served.engine.is_file():
        given = resnet(20, place) if name == "resnet20" else minilm(place)
        given.path.replace(served.float_file)
        save_model(_smaller(given), served.int8_file)
        shapes = _shapes(given)
        twofour.build(served.int8_file, sparsity="enable", shapes=shapes, threads=1).save(
            served.engine
        )
    return served


def _smaller(given: FloatFile) -> ir.Model:
    """2:4 by SparseGPT, then INT8."""
    calibration = Calibration(given.samples, "sparsegpt")
    only = {"skip": given.skip} if given.skip else {"include": FEED_FORWARD}
    model, _ = prune(given.model, "2:4", **only, calibration=calibration)
    return quantize(model, given.samples, QuantizeOptions())


def _shapes(given: FloatFile) -> Requested:
    """Rows open, and of sentences the length."""
    if "x" in given.shapes:
        return {"x": ((1, *IMAGE), (8, *IMAGE), (MOST_ROWS, *IMAGE))}
    return dict.fromkeys(given.shapes, ((1, 4), (8, 16), (MOST_ROWS, LONGEST)))
