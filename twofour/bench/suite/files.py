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
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from twofour.bench.declared import random_feeds, static_inputs
from twofour.bench.inputs import model_inputs
from twofour.bench.peers.onnxruntime import write_dynamic
from twofour.bench.suite.cache import MODEL_CODE, code_sha256, file_sha256, once
from twofour.bench.suite.rows import SuiteOptions, SuiteRow
from twofour.bench.suite.text import TextModel, read_pairs, text_model, tokenize
from twofour.bench.timing import Array
from twofour.core.errors import InputError
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
    network = None if row.file else NETWORKS[row.network]
    source = _source(row, options) if row.file else None
    weights = text_model() if row.network == TEXT_WEIGHTS else None
    if source is not None or network is None:
        calibration, words = _random_images(_source(row, options)), f"{IMAGES} random images"
    else:
        calibration, words = calibration_data(network, row, options)
    folder = options.cache / row.network
    text = network is not None and network.bert is not None
    files = Files(folder, text, weights is not None or network is None, words)
    origin = {
        "network": row.network,
        "source": file_sha256(source) if source else "",
        "length": row.length,
        "code": code_sha256(MODEL_CODE),
        "weights": file_sha256(weights.weights) if weights else "",
        "calibration": words,
    }
    makers = _makers(row, files, weights, calibration)
    if source is not None:
        makers["f32"] = partial(_copied, source, files.path("f32"))
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


def _source(row: SuiteRow, options: SuiteOptions) -> Path:
    """The file of a row.

    Raises:
        InputError: there is none.
    """
    path = options.data / row.file if options.data is not None else None
    if path is None or not path.is_file():
        raise InputError(
            f"row {row.name} needs {row.file}",
            [f"expected it in the folder of data, got {path or 'no such folder'}"],
            "name the folder: TWOFOUR_DATA=FOLDER",
        )
    return path


def _random_images(source: Path, count: int = IMAGES) -> dict[str, Array]:
    """Seeded random arrays for the inputs of a file, `count` samples along axis 0."""
    inputs = static_inputs(model_inputs(source), {}, None)
    several = [replace(each, shape=(count, *each.shape[1:])) for each in inputs]
    return random_feeds(several, seed=1)


def _copied(source: Path, path: Path) -> None:
    save_model(load_model(source), path)


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


def race_feeds(row: SuiteRow, files: Files) -> dict[str, Array]:
    """The input that all contestants of a row get."""
    if row.file:
        return _random_images(files.path("f32"), row.batch)
    network = NETWORKS[row.network]
    if network.bert is not None:
        return token_feeds(row.batch, row.length, network.bert.vocabulary)
    side = network.side or 0
    random = np.random.default_rng(0)
    return {"x": random.standard_normal((row.batch, 3, side, side), np.float32)}
