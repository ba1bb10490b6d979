"""The quantization of a run: how well INT8 represents each tensor, drawn as `quantize` draws it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from twofour.report.histograms import histogram, layer_bars, tensor_row
from twofour.report.outcomes import read_record

_SHOWN = 14


@dataclass(frozen=True)
class Bins:
    """A histogram."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class TensorPart:
    """What is read of a tensor."""

    name: str
    kind: str
    sqnr_db: float | None
    worst_channel_db: float | None
    clipped: float | None
    seen: tuple[float, ...] | None
    kept: tuple[float, ...]
    bins: Bins | None


@dataclass(frozen=True)
class LayerPart:
    """What is read of a layer."""

    layer: str
    op: str
    sqnr_db: float | None
    cosine: float


@dataclass(frozen=True)
class QualityPart:
    """What is read of the quality."""

    tensors: tuple[TensorPart, ...]
    layers: tuple[LayerPart, ...]


@dataclass(frozen=True)
class QuantizeDocument:
    """What is read of a document."""

    method: str
    recipe: str
    int8_layers: int
    float_layers: tuple[Any, ...]
    quality: QualityPart | None


def quantized(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The histograms; None where there are none.

    Args:
        document: of `twofour quantize --json --report`.

    Raises:
        ValueError: it is none.
    """
    found: QuantizeDocument = read_record(QuantizeDocument, document, "quantize")
    if found.quality is None:
        return None
    drawn = [histogram(tensor_row(asdict(each))) for each in found.quality.tensors if _whole(each)]
    drawn.sort(key=lambda plot: plot["db"])
    if not drawn and not found.quality.layers:
        return None
    return {
        "why": "",
        "said": _said(found),
        "first": drawn[:_SHOWN],
        "rest": drawn[_SHOWN:],
        "bars": layer_bars(_layers(found.quality.layers)) if found.quality.layers else None,
    }


def _whole(tensor: TensorPart) -> bool:
    """Whether all is there that a histogram shows."""
    bins = tensor.bins
    if bins is None or tensor.seen is None or len(tensor.seen) != 2 or len(tensor.kept) != 2:
        return False
    numbers = (bins.low, bins.high, *tensor.kept)
    known = all(number == number for number in numbers)
    return known and bool(bins.counts) and min(bins.counts) >= 0 and max(bins.counts) > 0


def _layers(layers: Sequence[LayerPart]) -> list[dict[str, Any]]:
    return [asdict(each) for each in layers]


def _said(found: QuantizeDocument) -> str:
    """How the model was quantized, in a sentence."""
    total = found.int8_layers + len(found.float_layers)
    if not total:
        return ""
    how = [f"ranges by {found.method}"] if found.method else []
    how += [f"recipe {found.recipe}"] if found.recipe else []
    said = f"{found.int8_layers} of {total} layers with weights are in INT8"
    return f"{said}{': ' if how else ''}{', '.join(how)}."
