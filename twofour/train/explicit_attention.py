"""Attention written out as products and a softmax, each of which can be rounded.

`functional.scaled_dot_product_attention` and `functional.multi_head_attention_forward` are one
function each to whoever watches a forward. These compute the same with functions that can be told
apart.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`functional.scaled_dot_product_attention`: [.., L, D], [.., S, D], [.., S, E] -> [.., L, E].

    A query that a mask of bools lets see nothing gets the mean of all values, not zero.
    """
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    if is_causal:
        attn_mask = _causal(query, key)
    return _weights(query, key, attn_mask, dropout_p, scale) @ value


def _weights(
    query: Tensor, key: Tensor, mask: Tensor | None, dropout: float, scale: float | None = None
) -> Tensor:
    """softmax(q k' * scale + mask): [.., L, S]."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores + _added(mask, scores.dtype)
    weights = functional.softmax(scores, -1)
    return functional.dropout(weights, dropout) if dropout else weights


def _causal(query: Tensor, key: Tensor) -> Tensor:
    shape = (query.shape[-2], key.shape[-2])
    return torch.ones(shape, dtype=torch.bool, device=query.device).tril()


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores; no -inf, of which a row would make NaN."""
    lowest = torch.finfo(dtype).min
    if mask.dtype is torch.bool:
        return torch.where(mask, 0.0, lowest).to(dtype)
    return mask.to(dtype).clamp(min=lowest)


def multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    *parameters: Any,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`functional.multi_head_attention_forward`, of what `why_composite` allows.

    Args:
        query: [L, B, E] or [L, E].
        key: [S, B, E] or [S, E].
        value: as key.
        embed_dim_to_check: E.
        num_heads: heads side by side in the channels.
        *parameters: as given there by place.
        **options: as given there by name.

    Returns:
        [L, B, E] or [L, E], and the weights of the softmax, where they are asked for.
    """
    given = arguments(*parameters, **options)
    alone = query.ndim == 2
    if alone:
        same = (key is query, value is key)
        query = query.unsqueeze(1)
        key = query if same[0] else key.unsqueeze(1)
        value = key if same[1] else value.unsqueeze(1)
    q, k, v = (_heads(x, num_heads) for x in _projected(query, key, value, given))
    dropout = given["dropout_p"] if given["training"] else 0.0
    mask = _masks(given, query, key, num_heads)
    if given["need_weights"] or mask is not None or not given["is_causal"]:
        causal = None
    else:
        causal = _causal(q, k)
    mask = causal if mask is None else mask
    weights: Tensor | None = None
    if given["need_weights"]:
        weights = _weights(q, k, mask, dropout)
        joined = weights @ v
    else:
        joined = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
    joined = joined.permute(2, 0, 1, 3).flatten(2)
    result = functional.linear(joined, given["out_proj_weight"], given["out_proj_bias"])
    if weights is not None and given["average_attn_weights"]:
        weights = weights.mean(1)
    if alone:
        return result.squeeze(1), None if weights is None else weights.squeeze(0)
    return result, weights


_PLACES = (
    "in_proj_weight",
    "in_proj_bias",
    "bias_k",
    "bias_v",
    "add_zero_attn",
    "dropout_p",
    "out_proj_weight",
    "out_proj_bias",
    "training",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "use_separate_proj_weight",
    "q_proj_weight",
    "k_proj_weight",
    "v_proj_weight",
    "static_k",
    "static_v",
    "average_attn_weights",
    "is_causal",
)
_DEFAULTS = {"training": True, "need_weights": True, "average_attn_weights": True}


def arguments(*parameters: Any, **options: Any) -> dict[str, Any]:
    """All arguments of `functional.multi_head_attention_forward` behind `num_heads`, by name."""
    given = {name: _DEFAULTS.get(name) for name in _PLACES}
    return given | dict(zip(_PLACES, parameters, strict=False)) | options


def why_composite(*parameters: Any, **options: Any) -> str | None:
    """Why a call of `functional.multi_head_attention_forward` is not written out, or None."""
    given = arguments(*parameters[5:], **options)
    for name in ("bias_k", "bias_v", "add_zero_attn", "static_k", "static_v"):
        if given[name] is not None and given[name] is not False:
            return f"attention with {name} stays float"
    return None


def _projected(query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> list[Tensor]:
    """q, k and v: [L, B, E], by as few products as they have different sources."""
    bias = given["in_proj_bias"]
    if given["use_separate_proj_weight"]:
        names = ("q_proj_weight", "k_proj_weight", "v_proj_weight")
        biases = (None, None, None) if bias is None else bias.chunk(3)
        every = zip((query, key, value), (given[name] for name in names), biases, strict=True)
        return [functional.linear(x, w, b) for x, w, b in every]
    weight = given["in_proj_weight"]
    if query is key and key is value:
        return list(functional.linear(query, weight, bias).chunk(3, -1))
    if key is value:
        sizes = (len(weight) // 3, 2 * len(weight) // 3)
        first, second = (None, None) if bias is None else bias.split(sizes)
        q, kv = weight.split(sizes)
        return [
            functional.linear(query, q, first),
            *functional.linear(key, kv, second).chunk(2, -1),
        ]
    biases = (None, None, None) if bias is None else bias.chunk(3)
    every = zip((query, key, value), weight.chunk(3), biases, strict=True)
    return [functional.linear(x, w, b) for x, w, b in every]


def _heads(x: Tensor, heads: int) -> Tensor:
    """[L, B, E] -> [B, heads, L, E / heads]."""
    return x.view(*x.shape[:2], heads, -1).permute(1, 2, 0, 3)


def _masks(given: dict[str, Any], query: Tensor, key: Tensor, heads: int) -> Tensor | None:
    """Both masks as what is added to scores: [B or 1, heads or 1, L or 1, S]."""
    mask: Tensor | None
    padding: Tensor | None
    mask, padding = given["attn_mask"], given["key_padding_mask"]
    if mask is not None:
        mask = _barred(mask, query.dtype)
        if mask.ndim == 3:
            mask = mask.view(query.shape[1], heads, *mask.shape[1:])
    if padding is None:
        return mask if mask is None or mask.ndim == 4 else mask[None, None]
    padding = _barred(padding, query.dtype).reshape(-1, 1, 1, key.shape[0])
    return padding if mask is None else mask + padding


def _barred(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Of a mask that is True, or -inf, where nothing may look."""
    if mask.dtype is torch.bool:
        return torch.where(mask, torch.finfo(dtype).min, 0.0).to(dtype)
    return mask.clamp(min=torch.finfo(dtype).min)


WRITTEN_OUT: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": attend,
    "multi_head_attention_forward": multi_head,
}
"""Name of a function of `torch.nn.functional` -> the same of functions that can be told apart."""
