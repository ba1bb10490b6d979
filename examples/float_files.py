"""Float networks as ONNX files, each with calibration samples and the score of its task."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from cifar10.data import data_folder, load_images, load_model
from cifar10.settings import DENSE_LAYERS
from minilm.sentences import LENGTH, UNLABELLED_ROWS, Epoch, Tokens, load_sentences
from numpy.typing import NDArray

from twofour.bench.suite.text import pooled
from twofour.compiler.importer import standardized
from twofour.compiler.requests import Requested
from twofour.core.correlation import spearman
from twofour.onnx_tools.load import load_model as load_onnx
from twofour.onnx_tools.load import save_model
from twofour.onnx_tools.one_shot import Calibration
from twofour.onnx_tools.prune import prune
from twofour.train import export_onnx
from twofour.train.networks.transformer import CONFIGS, INPUT_NAMES, example_inputs, load_bert

IMAGES, IMAGE_BATCH, TEST_BATCH, SENTENCES = 512, 64, 500, 50
FEED_FORWARD = ("encoder.layer.*.intermediate.dense", "encoder.layer.?.output.dense")
Batch = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]
Score = Callable[[Run], dict[str, float]]


@dataclass(frozen=True)
class FloatFile:
    """A network and what is needed to calibrate and to score it.

    Attributes:
        path: of the file.
        model: read from it, without functions.
        skip: layers that are not pruned.
        samples: batches of calibration data.
        score: of whatever runs it, by name, in percent.
        shapes: that scoring needs, as `twofour.build` takes them.
    """

    path: Path
    model: ir.Model
    skip: Sequence[str]
    samples: Sequence[Batch]
    score: Score
    shapes: Requested


def resnet(depth: int, folder: Path) -> FloatFile:
    """The published CIFAR-10 network, its BatchNorm folded; top-1 of all test images."""
    images, path = load_images(short=False), folder / f"resnet{depth}.onnx"
    export_onnx(load_model(depth), images.normalised(images.test_x[:1]), path)
    samples = images.samples()
    calibration = _batches(images.calibration(IMAGES), IMAGE_BATCH, "x")
    return FloatFile(
        path,
        standardized(load_onnx(path)),
        DENSE_LAYERS,
        calibration,
        _top1(samples.x, samples.labels, TEST_BATCH, "x"),
        {"x": (TEST_BATCH, *samples.x.shape[1:])},
    )


def resnet8() -> FloatFile:
    """MLPerf Tiny's, as its converter wrote it: batches of one image, pixels of 0 to 255."""
    images = load_images(short=False)
    path = data_folder().parent / "onnx" / "mlperftiny_resnet8.onnx"
    model = standardized(load_onnx(path))
    (name,) = (str(value.name) for value in model.graph.inputs)

    def pixels(x: Any) -> NDArray[np.float32]:
        return np.ascontiguousarray(x.permute(0, 3, 1, 2).float().numpy())

    x = pixels(images.test_x)
    score = _top1(x, images.test_y.numpy(), 1, name)
    calibration = _batches(pixels(images.train_x[:IMAGES]), 1, name)
    return FloatFile(path, model, (), calibration, score, {name: (1, *x.shape[1:])})


def minilm(folder: Path) -> FloatFile:
    """The sentence encoder with its real weights, batch and length open; Spearman on STS-B dev."""
    sentences, files = load_sentences("cpu")
    config, path = CONFIGS["minilm"], folder / "minilm.onnx"
    export_onnx(
        load_bert(config, files.weights),
        example_inputs(config, 2, LENGTH),
        path,
        INPUT_NAMES,
        ("hidden",),
        dynamic=("batch", "length"),
    )

    def score(run: Run) -> dict[str, float]:
        sides = []
        for tokens in (sentences.first, sentences.second):
            batches = (_arrays(batch) for batch in Epoch(tokens, SENTENCES, None))
            vectors = [pooled(run(b)["hidden"], b["attention_mask"]) for b in batches]
            sides.append(np.concatenate(vectors))
        cosines, wanted = (sides[0] * sides[1]).sum(1), np.array(sentences.scores)
        rest = slice(UNLABELLED_ROWS, None)
        return {
            "unseen": 100 * spearman(cosines[rest], wanted[rest]),
            "all": 100 * spearman(cosines, wanted),
        }

    learned = list(_by_length(sentences.learned))
    model, shape = standardized(load_onnx(path)), ((1, 1), (SENTENCES, 16), (SENTENCES, LENGTH))
    return FloatFile(path, model, (), learned, score, dict.fromkeys(INPUT_NAMES, shape))


def sparse_minilm(folder: Path) -> FloatFile:
    """The same with 2:4 feed-forward layers, pruned by SparseGPT on the calibration samples."""
    dense = minilm(folder)
    calibration = Calibration(dense.samples, "sparsegpt")
    model, _ = prune(dense.model, "2:4", include=FEED_FORWARD, calibration=calibration)
    return replace(dense, path=save_model(model, folder / "minilm_24.onnx"), model=model)


def _top1(x: NDArray[Any], labels: NDArray[Any], size: int, name: str) -> Score:
    """How many of the images a model calls what they are."""

    def score(run: Run) -> dict[str, float]:
        hits = 0
        for i in range(0, len(x), size):
            (found,) = run({name: x[i : i + size]}).values()
            hits += int((found.argmax(1) == labels[i : i + size]).sum())
        return {"top1": 100 * hits / len(x)}

    return score


def _batches(x: NDArray[Any], size: int, name: str) -> list[Batch]:
    return [{name: x[i : i + size]} for i in range(0, len(x), size)]


def _by_length(tokens: Tokens) -> Iterator[Batch]:
    """Batches without padding, of at most 64 sentences."""
    lengths = tokens["attention_mask"].sum(1)
    for length in sorted(set(lengths.tolist())):
        chosen = {name: array[lengths == length] for name, array in tokens.items()}
        yield from (_arrays(batch) for batch in Epoch(chosen, 64, None))


def _arrays(batch: Mapping[str, Any]) -> Batch:
    return {name: tensor.numpy() for name, tensor in batch.items()}
