"""MiniLM as a file that gives one vector a sentence, and the STS benchmark as samples for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from minilm.sentences import UNLABELLED_ROWS, Tokens, load_sentences
from twofour.core.correlation import spearman
from twofour.train import export_onnx
from twofour.train.networks.transformer import CONFIGS, INPUT_NAMES, example_inputs, load_bert

LENGTH = 32
"""Tokens of a sentence; nearly all of the benchmark's have fewer. Longer ones are left out."""
METRIC = "minilm.pairs:spearman_of_pairs"


class Encoder(nn.Module):
    """The mean of the vectors of the tokens that are no padding."""

    def __init__(self, bert: nn.Module) -> None:
        """Takes the transformer."""
        super().__init__()
        self.bert = bert

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> Tensor:
        """int64 [B, length] each -> float32 [B, channels]."""
        hidden: Tensor = self.bert(input_ids, attention_mask, token_type_ids)
        weights = attention_mask[:, :, None].float()
        return (hidden * weights).sum(1) / weights.sum(1)


def spearman_of_pairs(outputs: Mapping[str, NDArray[Any]], labels: NDArray[Any]) -> float:
    """Rank correlation in percent of the cosines of neighbouring samples with the labels."""
    (vectors,) = outputs.values()
    a, b = vectors[0::2], vectors[1::2]
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return 100 * float(spearman((a * b).sum(1) / norms, labels[0::2]))


spearman_of_pairs.group = 2  # type: ignore[attr-defined]  # a pair is drawn as one


def write_pairs(folder: Path) -> tuple[Path, Path, Path]:
    """Writes the model, the pairs to judge, and the sentences to calibrate with.

    The pairs are those whose sentences are not among the latter; the two sentences of a pair are
    neighbouring samples, both with the pair's score as the label.
    """
    sentences, files = load_sentences("cpu")
    config = CONFIGS["minilm"]
    model, judged, learned = (folder / name for name in ("minilm.onnx", "pairs.npz", "learned.npz"))
    encoder = Encoder(load_bert(config, files.weights)).eval()
    example = example_inputs(config, 2, LENGTH)
    export_onnx(encoder, example, model, INPUT_NAMES, ("sentence",), dynamic=("batch",))
    sides = sentences.first, sentences.second
    short = np.logical_and(*(_short(side) for side in sides))
    short[:UNLABELLED_ROWS] = False
    arrays = {
        name: np.stack([side[name].numpy()[short, :LENGTH] for side in sides], 1)
        for name in INPUT_NAMES
    }
    scores = np.repeat(np.array(sentences.scores, np.float32)[short], 2)
    pairs = {name: array.reshape(-1, LENGTH) for name, array in arrays.items()}
    np.savez(judged, labels=scores, **pairs)
    chosen = _short(sentences.learned)
    order = np.random.default_rng(0).permutation(np.flatnonzero(chosen))
    np.savez(learned, **{n: sentences.learned[n].numpy()[order, :LENGTH] for n in INPUT_NAMES})
    return model, judged, learned


def _short(tokens: Tokens) -> NDArray[np.bool_]:
    """Which sentences fit."""
    lengths = torch.sum(tokens["attention_mask"], 1)
    found: NDArray[np.bool_] = (lengths <= LENGTH).numpy()
    return found
