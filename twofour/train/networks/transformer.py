"""BERT-like encoders for text, with the module names that checkpoints of such networks use.

With a window they are encoders for long documents: each token attends to its neighbours, and to
some global ones (train/sparse_attention.py).

Source: Devlin et al. 2018, arXiv:1810.04805; the small configuration is that of Wang et al. 2020,
arXiv:2002.10957 (MiniLM), as sentence encoders use it; the long one is shaped like that of Beltagy
et al. 2020, arXiv:2004.05150 (Longformer), with one set of projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from twofour.core.errors import InputError
from twofour.train.sparse_attention import SparseAttention, SparsePattern

INPUT_NAMES = ("input_ids", "attention_mask", "token_type_ids")
OUTPUT_NAMES = ("last_hidden_state",)


@dataclass(frozen=True)
class BertConfig:
    """Sizes of an encoder.

    Attributes:
        layers: how many.
        hidden: channels between layers; a multiple of `heads`.
        heads: of each attention.
        intermediate: channels inside a feed-forward block.
        vocabulary: number of token ids.
        positions: longest sequence.
        types: number of token type ids.
        eps: of each LayerNorm.
        pooler: whether the network ends in a pooled vector beside the hidden state.
        window: tokens that a token attends to on each side; None for all there are.
        global_tokens: with a window, so many first tokens attend to all, and all to them.
    """

    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocabulary: int = 30522
    positions: int = 512
    types: int = 2
    eps: float = 1e-12
    pooler: bool = False
    window: int | None = None
    global_tokens: int = 0

    def __post_init__(self) -> None:
        """Refuses heads of unequal size. Raises InputError."""
        if self.hidden % self.heads:
            raise InputError(
                f"{self.hidden} channels do not divide among {self.heads} heads",
                ["expected hidden to be a multiple of heads"],
                "choose other sizes",
            )

    @property
    def pattern(self) -> SparsePattern | None:
        """Which keys queries see, if not all."""
        if self.window is None:
            return None
        return SparsePattern(self.heads, self.window, self.global_tokens)


CONFIGS: Mapping[str, BertConfig] = {
    "minilm": BertConfig(layers=6, hidden=384, heads=12, intermediate=1536),
    "bert_base": BertConfig(layers=12, hidden=768, heads=12, intermediate=3072),
    "long_bert": BertConfig(*(12, 768, 12, 3072), positions=4096, window=256, global_tokens=1),
}


class Embeddings(nn.Module):
    """LayerNorm(word + position + type)."""

    def __init__(self, config: BertConfig) -> None:
        """Makes the tables."""
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocabulary, config.hidden)
        self.position_embeddings = nn.Embedding(config.positions, config.hidden)
        self.token_type_embeddings = nn.Embedding(config.types, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden, config.eps)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> Tensor:
        """Two int64 [B, S] -> float32 [B, S, hidden]."""
        x = self.word_embeddings(input_ids) + self.token_type_embeddings(token_type_ids)
        y: Tensor = self.LayerNorm(x + self.position_embeddings.weight[: input_ids.shape[1]])
        return y


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(d) + mask) V for each head, heads side by side in the channels."""

    def __init__(self, config: BertConfig) -> None:
        """Makes the projections."""
        super().__init__()
        self.heads = config.heads
        self.sparse = None if config.pattern is None else SparseAttention(config.pattern)
        self.query = nn.Linear(config.hidden, config.hidden)
        self.key = nn.Linear(config.hidden, config.hidden)
        self.value = nn.Linear(config.hidden, config.hidden)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, S, hidden] -> [B, S, hidden].

        Args:
            x: hidden state.
            mask: what is added to scores, [B, 1, 1, S]; with a window which tokens there are, bool
                [B, S].
        """
        if self.sparse is not None:
            attended: Tensor = self.sparse(self.query(x), self.key(x), self.value(x), mask)
            return attended
        y = functional.scaled_dot_product_attention(
            self._split(self.query(x)), self._split(self.key(x)), self._split(self.value(x)), mask
        )
        return y.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        """[B, S, hidden] -> [B, heads, S, hidden / heads]."""
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class Residual(nn.Module):
    """LayerNorm(dense(x) + shortcut)."""

    def __init__(self, channels_in: int, config: BertConfig) -> None:
        """Makes the layers."""
        super().__init__()
        self.dense = nn.Linear(channels_in, config.hidden)
        self.LayerNorm = nn.LayerNorm(config.hidden, config.eps)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:
        """[B, S, channels_in] and [B, S, hidden] -> [B, S, hidden]."""
        y: Tensor = self.LayerNorm(self.dense(x) + shortcut)
        return y


class Layer(nn.Module):
    """Self-attention, then two dense layers with a GELU between, each with its residual."""

    def __init__(self, config: BertConfig) -> None:
        """Makes the layers under the names that checkpoints have."""
        super().__init__()
        self.attention = nn.ModuleDict(
            {"self": SelfAttention(config), "output": Residual(config.hidden, config)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden, config.intermediate)})
        self.output = Residual(config.intermediate, config)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[B, S, hidden] and a mask, as `SelfAttention` takes it -> [B, S, hidden]."""
        x = self.attention["output"](self.attention["self"](x, mask), x)
        y: Tensor = self.output(functional.gelu(self.intermediate["dense"](x)), x)
        return y


class Bert(nn.Module):
    """An encoder: token ids in, one vector a token out.

    Args:
        config: its sizes.
    """

    def __init__(self, config: BertConfig) -> None:
        """Makes the layers; weights are normal with a deviation of 0.02."""
        super().__init__()
        self.sparse = config.pattern is not None
        self.embeddings = Embeddings(config)
        layers = [Layer(config) for _ in range(config.layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = None
        if config.pooler:
            self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden, config.hidden)})
        self.apply(_draw)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Three int64 [B, S] -> float32 [B, S, hidden], and [B, hidden] with a pooler.

        `attention_mask` is 1 for a token and 0 for padding, which nothing attends to.
        """
        x: Tensor = self.embeddings(input_ids, token_type_ids)
        if self.sparse:
            mask = attention_mask != 0
        else:
            lowest = torch.finfo(x.dtype).min
            mask = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * lowest
        for layer in self.encoder["layer"].children():
            x = layer(x, mask)
        if self.pooler is None:
            return x
        return x, torch.tanh(self.pooler["dense"](x[:, 0]))


def example_inputs(config: BertConfig, batch: int, length: int) -> tuple[Tensor, ...]:
    """Seeded token ids without padding, int64 [batch, length] for each of `INPUT_NAMES`."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocabulary, (batch, length), generator=random)
    return ids, torch.ones_like(ids), torch.zeros_like(ids)


def load_bert(config: BertConfig, path: Path | str) -> Bert:
    """An encoder with the weights of a safetensors file.

    Args:
        config: the sizes that the weights have.
        path: of a file with the module names used here, with or without `bert.` in front. A pooler
            in the file is left out unless the configuration has one.

    Raises:
        InputError: no such file, it is no safetensors file, or its tensors do not fit.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as e:
        raise InputError(f"cannot read weights from {path}", [str(e)], "check the path") from e
    tensors = {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
    tensors.pop("embeddings.position_ids", None)  # a constant that some files carry along
    if not config.pooler:
        tensors = {k: v for k, v in tensors.items() if not k.startswith("pooler.")}
    model = Bert(config)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as e:
        reasons = [line.strip() for line in str(e).splitlines()[1:]]
        raise InputError(
            f"the weights in {path} do not fit", reasons, "choose the configuration they have"
        ) from e
    return model


def _draw(module: nn.Module) -> None:
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
