"""Faster inference and training on CPUs: bf16 attention, and linear layers packed for oneDNN.

PyTorch's fused attention on CPUs takes twice as long for short bf16 texts as a plain product,
softmax, product. Longer texts keep the fused kernel, whose memory does not grow with the square of
the length, and so do GPUs and float32.

PyTorch sends float32 linear layers to MKL, which leaves AVX-512 idle on AMD, and lays bf16 weights
out anew at every call. With weights packed for oneDNN beforehand both are faster (single products
on one AMD with AVX-512: 2.4 times in float32, 1.3 in bf16). The operators are those that PyTorch's
own compiler emits.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

log = logging.getLogger(__name__)

NAME = "caravan"
LONGEST = 1024  # tokens; the scores of longer texts do not fit a cache
UNSUPPORTED = ("s_aux", "sinks", "softcap", "alibi_slopes", "head_mask")
"""Settings of transformers' layers that this attention does not compute."""
ROWS = 2048  # the packed layout is chosen for products of about so many rows

_MASKED = torch.finfo(torch.bfloat16).min


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        query: [B, H, L, D].
        key, value: [B, K, L, D]; K divides H.
        attention_mask: [B, 1, L, L], True where a token attends, or added to the scores.

    Returns:
        States [B, L, H, D], and no weights.

    Raises:
        ValueError: If the layer needs something that is not computed here.
    """
    given = [name for name in UNSUPPORTED if settings.get(name) is not None]
    if given:
        raise ValueError(
            f"{type(module).__name__} needs {', '.join(given)}, which this attention does not"
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
    rows, columns, values = (
        states.reshape(batch * heads, length, width).bfloat16() for states in (query, key, value)
    )
    columns = columns.transpose(1, 2)
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
    states = torch.bmm(weights, values).view(batch, heads, length, width)
    return states.transpose(1, 2).contiguous(), None


def is_suitable(model: Any) -> bool:
    """Whether the model computes the same with this attention as with its own.

    Not with capped logits or sinks: transformers marks those models as unfit for sdpa.
    """
    capped = getattr(model.config, "attn_logit_softcapping", None) is not None
    sinks = any(name.rpartition(".")[2] == "sinks" for name, _ in model.named_parameters())
    return bool(getattr(model, "_supports_sdpa", False)) and not capped and not sinks


@lru_cache(maxsize=LONGEST)
def _future(length: int) -> Tensor:
    """[1, L, L]: 0 for the past, the lowest number for the future."""
    return torch.full((1, length, length), _MASKED, dtype=torch.bfloat16).triu(1)


class PackedLinear(nn.Module):
    """A linear layer for inference, with its weight packed for oneDNN."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, states: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(states, self.packed, self.bias, "none", [], "")


def pack_linears(model: nn.Module, but: nn.Module | None = None) -> int:
    """Replace every `nn.Linear` below the model by a `PackedLinear`, in place.

    The model can neither be trained nor saved afterwards.

    Args:
        but: a layer that is left as it is.

    Returns:
        The number of layers; 0 where this PyTorch lacks the operators.
    """
    if not _is_available(next(model.parameters()).dtype):
        return 0
    linears = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child is not but
    ]
    for parent, name, child in linears:
        setattr(parent, name, PackedLinear(child))
    return len(linears)


def _is_available(dtype: torch.dtype) -> bool:
    """Whether PyTorch has the operators, and they compute what a linear layer does."""
    if not torch.backends.mkldnn.is_available():
        return False
    linear = nn.Linear(8, 8, dtype=dtype)
    states = torch.linspace(-1, 1, 16, dtype=dtype).view(2, 8)
    try:
        found = PackedLinear(linear)(states)
    except (AttributeError, RuntimeError, TypeError) as error:
        log.info("linear layers are not packed: %s", error)
        return False
    return torch.allclose(found, linear(states), atol=1e-2)


# On import, so that a model that is unpickled in another process finds its attention.
AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
