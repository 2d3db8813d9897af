"""Attention for CPUs in bf16: three matrix operations instead of the fused kernel.

PyTorch's fused kernel on CPUs computes short bf16 attention at half the speed of a plain product,
softmax, product (5.8 against 2.8 ms, heads of MiniLM, 256 tokens). Longer texts keep
the fused kernel, whose memory does not grow with the square of the length, and so do GPUs and
float32. transformers' own masks are used unchanged.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "caravan"
LONGEST = 1024  # tokens; the scores of longer texts no longer fit a cache
LAYERS = ("full_attention", "sliding_attention")
"""The kinds of layers whose masks are known; others (chunked, linear) have masks of their own."""
UNKNOWN = ("s_aux", "sinks", "softcap", "alibi_slopes", "head_mask")
"""What transformers' layers may ask of an attention and would not get from this one."""

_MASKED = torch.finfo(torch.bfloat16).min


def attention(
    module: nn.Module,
    query: Tensor,  # [B, H, L, D]
    key: Tensor,  # [B, K, L, D], K divides H
    value: Tensor,  # [B, K, L, D]
    attention_mask: Tensor | None,  # [B, 1, L, L] bool, True where one token may see another
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: states [B, L, H, D], and no weights.

    Raises:
        ValueError: the layer asks for what neither this nor the fused kernel computes.
    """
    refused = [name for name in UNKNOWN if settings.get(name) is not None]
    if refused:
        raise ValueError(
            f"{type(module).__name__} wants {', '.join(refused)}, which this attention does not"
            " compute; set backbone.attention=eager"
        )
    length = query.shape[2]
    bf16 = query.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu")
    biased = settings.get("position_bias") is not None or settings.get("cache") is not None
    if query.device.type != "cpu" or not bf16 or biased or not 1 < length <= LONGEST:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **settings
        )
    batch, heads, _, width = query.shape
    if key.shape[1] != heads:
        shared = heads // key.shape[1]
        key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    rows = query.reshape(batch * heads, length, width).bfloat16()
    columns = key.reshape(batch * heads, length, width).bfloat16().transpose(1, 2)
    scale = width**-0.5 if scaling is None else scaling
    causal = settings.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is None and causal:
        scores = torch.baddbmm(_future(length), rows, columns, alpha=scale)
    else:
        scores = torch.baddbmm(rows.new_zeros(1), rows, columns, beta=0, alpha=scale)
    if attention_mask is not None:
        by_head = scores.view(batch, heads, length, length)
        if attention_mask.dtype == torch.bool:
            by_head = by_head.masked_fill(~attention_mask, _MASKED)
        else:
            by_head = by_head + attention_mask.to(scores.dtype)
        scores = by_head.view_as(scores)
    weights = torch.softmax(scores, dim=-1)
    if dropout:
        weights = nn.functional.dropout(weights, dropout, module.training)
    values = value.reshape(batch * heads, length, width).bfloat16()
    states = torch.bmm(weights, values).view(batch, heads, length, width)
    return states.transpose(1, 2).contiguous(), None


def suits(model: Any) -> bool:
    """Whether the model computes the same with this attention as with its own.

    Not so with capped logits or sinks, which transformers marks as beyond the fused kernel.
    """
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    sinks = any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters())
    return bool(getattr(model, "_supports_sdpa", False)) and not capped and not sinks


def computes_in_half(model: nn.Module) -> bool:
    """Whether layers compute in half precision: their weights have it, or four bits."""
    return any(weight.itemsize < 4 for weight in model.parameters())


@lru_cache(maxsize=LONGEST)
def _future(length: int) -> Tensor:
    """[1, L, L]: 0 for the past, the lowest number for the future."""
    return torch.full((1, length, length), _MASKED, dtype=torch.bfloat16).triu(1)


# On import, so that a model that reaches another process pickled finds its attention there.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
