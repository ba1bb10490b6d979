"""The ONNX files of a network: float32 and INT8, dense, 2:4 and 2:4/pair, and as peers like them.

    f32.onnx   24-f32.onnx   pair-f32.onnx    as trained (or drawn), and pruned by magnitude
    int8.onnx  24-int8.onnx  pair-int8.onnx   quantized for our engines: symmetric int8
    24-uint8.onnx                     as integer kernels of others like it: uint8 activations, both
                                      inputs of an Add quantized
    dynamic.onnx                      text: ONNX Runtime's dynamic quantization

Batch sizes stay open in them. Zeros of a weight do not change the time of peers, so that each peer
runs one file of a kind.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from twofour.bench.peers.onnxruntime import write_dynamic
from twofour.bench.suite.cache import MODEL_CODE, code_sha256, file_sha256, once
from twofour.bench.suite.rows import SuiteOptions, SuiteRow
from twofour.bench.suite.text import TextModel, read_pairs, text_model, tokenize
from twofour.bench.timing import Array
from twofour.core.progress import Report
from twofour.onnx_tools.load import load_model, save_model
from twofour.onnx_tools.options import QuantizeOptions
from twofour.onnx_tools.prune import prune
from twofour.onnx_tools.quantize import quantize
from twofour.train.networks.catalog import NETWORKS, Network, write_network

IMAGES, SENTENCES = 16, 64
INT8 = QuantizeOptions(activation="int8")
UINT8 = QuantizeOptions(activation="uint8", add_inputs="both")
TEXT_WEIGHTS = "minilm"
"""The network that real weights are at hand for."""


@dataclass(frozen=True)
class Files:
    """The files of one network.

    Attributes:
        folder: where they lie.
        text: whether it takes text.
        real: whether its weights were trained.
        calibrated_on: in words.
    """

    folder: Path
    text: bool
    real: bool
    calibrated_on: str

    def path(self, kind: str) -> Path:
        """Of a kind: "f32", "24-f32", "int8", ..."""
        return self.folder / f"{kind}.onnx"


def float_kind(kind: str) -> str:
    """The kind of file that one was quantized from; of a float one itself."""
    return {"int8": "f32", "24-int8": "24-f32", "pair-int8": "pair-f32"}.get(kind, kind)


def write_files(row: SuiteRow, options: SuiteOptions, report: Report) -> Files:
    """Writes what is not there yet.

    Args:
        row: its network is written.
        options: `cache` and `data` count here.
        report: told what is being written.

    Raises:
        InputError: the data does not fit.
        UnsupportedError: the network cannot be quantized.
    """
    network = NETWORKS[row.network]
    weights = text_model() if row.network == TEXT_WEIGHTS else None
    calibration, words = calibration_data(network, row, options)
    folder = options.cache / row.network
    files = Files(folder, network.bert is not None, weights is not None, words)
    origin = {
        "network": row.network,
        "length": row.length,
        "code": code_sha256(MODEL_CODE),
        "weights": file_sha256(weights.weights) if weights else "",
        "calibration": words,
    }
    makers = _makers(row, files, weights, calibration)
    for done, (kind, make) in enumerate(makers.items()):
        report(done, len(makers), f"{kind}.onnx")
        once(files.path(kind), {**origin, "kind": kind}, make)
    return files


def _makers(
    row: SuiteRow, files: Files, weights: TextModel | None, data: dict[str, Array]
) -> dict[str, Callable[[], None]]:
    """Kind of file -> what writes it, each after those it is made from."""
    path = files.path
    real = weights.weights if weights else None
    makers: dict[str, Callable[[], None]] = {
        "f32": partial(write_network, row.network, path("f32"), row.length, real),
        "24-f32": partial(_pruned, path("f32"), path("24-f32"), "2:4"),
        "pair-f32": partial(_pruned, path("f32"), path("pair-f32"), "2:4/pair"),
        "int8": partial(_quantized, path("f32"), path("int8"), data, INT8),
        "24-int8": partial(_quantized, path("24-f32"), path("24-int8"), data, INT8),
        "pair-int8": partial(_quantized, path("pair-f32"), path("pair-int8"), data, INT8),
        "24-uint8": partial(_quantized, path("24-f32"), path("24-uint8"), data, UINT8),
    }
    if files.text:
        makers["dynamic"] = partial(write_dynamic, path("f32"), path("dynamic"))
    return makers


def _pruned(source: Path, path: Path, pattern: str) -> None:
    save_model(prune(load_model(source), pattern)[0], path)


def _quantized(source: Path, path: Path, data: dict[str, Array], options: QuantizeOptions) -> None:
    save_model(quantize(load_model(source), data, options), path)


def calibration_data(
    network: Network, row: SuiteRow, options: SuiteOptions
) -> tuple[dict[str, Array], str]:
    """Arrays by input name, and what they are in words.

    Real sentences where data and a tokenizer are at hand; else seeded random tokens or images.
    """
    if network.bert is None:
        side = network.side or 0
        shape = (IMAGES, 3, side, side)
        images = np.random.default_rng(1).standard_normal(shape, np.float32)
        return {"x": images}, f"{IMAGES} random images"
    model = text_model()
    if model is None or options.data is None:
        feeds = token_feeds(SENTENCES, row.length, network.bert.vocabulary, seed=1)
        return feeds, f"{SENTENCES} random texts"
    sentences = read_pairs(options.data, SENTENCES).first
    return tokenize(sentences, model.tokenizer, row.length), f"{SENTENCES} sentences"


def token_feeds(batch: int, length: int, vocabulary: int, seed: int = 0) -> dict[str, Array]:
    """Seeded random tokens without padding: int64 [batch, length] for each of three inputs."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (batch, length))
    return {
        "input_ids": ids,
        "attention_mask": np.ones_like(ids),
        "token_type_ids": np.zeros_like(ids),
    }


def race_feeds(row: SuiteRow) -> dict[str, Array]:
    """The input that all contestants of a row get."""
    network = NETWORKS[row.network]
    if network.bert is not None:
        return token_feeds(row.batch, row.length, network.bert.vocabulary)
    side = network.side or 0
    random = np.random.default_rng(0)
    return {"x": random.standard_normal((row.batch, 3, side, side), np.float32)}
