"""Token ids to one state a text: run the transformer, then pool its last layer.

RepLLaMA and RankLLaMA (arXiv 2310.08319, section 2) read the last token, the EOS. Which token is
the last is read from the attention mask, never from the pad id, which for Llama may equal EOS.
What comes out does not depend on what else is in the batch nor on the padding side.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, arange, nn, segment_reduce

from caravan.models import varlen
from caravan.models.remote_code import is_own_code


def pooled_states(
    backbone: nn.Module,
    input_ids: Tensor,  # [n, L], padded on either side
    attention_mask: Tensor,  # [n, L]
    pooling: str,
    causal: bool,
    full: bool = False,
    token_types: Tensor | None = None,  # [n, L]
    slots: int = 0,
) -> Tensor:
    """One state for each text, [n, d] float32.

    Args:
        backbone: a transformers model without a head; its output has `last_hidden_state`.
        causal: whether it looks to the left only (`is_causal`).
        full: no text is padded (the caller knows; looking would wait for the device).
        slots: tokens at the end that pooling "slots" takes the mean of.
    """
    if varlen.reads(backbone):
        states, lengths = varlen.states(backbone, input_ids, attention_mask, token_types)
        if pooling == "mean":
            return segment_reduce(states.float(), "mean", lengths=lengths, initial=0)
        return _at(states, lengths.cumsum(0) - lengths, lengths, pooling, slots)
    if not full:
        left = to_the_left(attention_mask)
        input_ids = input_ids.gather(1, left)
        attention_mask = attention_mask.gather(1, left)
        token_types = None if token_types is None else token_types.gather(1, left)
    # In a causal model no real token sees the padding on its right: no mask, a faster kernel.
    # A model's own code may ask for one all the same (nomic-bert's computes with it unasked).
    mask = None if (full or causal) and not is_own_code(plain(backbone)) else attention_mask
    types = {} if token_types is None else {"token_type_ids": token_types}
    states = backbone(input_ids=input_ids, attention_mask=mask, **types).last_hidden_state
    return pool(states, attention_mask, pooling, slots)


def to_the_left(attention_mask: Tensor) -> Tensor:
    """Where each token comes from [n, L] when real ones go to the left, in their order.

    Positions then count from the text's first token in every architecture, absolute or relative.
    """
    return attention_mask.argsort(dim=1, descending=True, stable=True)


def pool(states: Tensor, attention_mask: Tensor, pooling: str, slots: int = 0) -> Tensor:
    """Pool states [n, L, d] of right-padded texts to [n, d] in float32."""
    lengths = attention_mask.sum(dim=1).long()
    if pooling == "mean":
        weights = attention_mask.unsqueeze(-1).float()
        return (states.float() * weights).sum(dim=1) / lengths.clamp(min=1).unsqueeze(-1)
    first = arange(len(states), device=states.device) * states.shape[1]
    return _at(states.flatten(0, 1), first, lengths, pooling, slots)


def _at(
    states: Tensor,  # [T, d]
    first: Tensor,  # [n], where each text begins
    lengths: Tensor,  # [n]
    pooling: str,
    slots: int,
) -> Tensor:
    """The states [n, d] at the place in each text that `pooling` names."""
    if pooling == "cls":
        return states[first].float()
    if pooling == "last":
        return states[first + lengths - 1].float()
    last = (first + lengths - 1).unsqueeze(1) - arange(slots, device=states.device)  # [n, K]
    return states[last].float().mean(dim=1)


def plain(model: Any) -> Any:
    """The module inside of its adapter, or itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def attention_layers(backbone: nn.Module) -> list[nn.Module]:
    """The model's layers of attention, by the names that transformers gives them."""
    return [m for m in backbone.modules() if type(m).__name__.endswith("Attention")]


def is_decoder(backbone: nn.Module) -> bool:
    """Whether every attention layer was made to look to the left only.

    Layers that do not say so count as looking both ways, which is always right, only slower.
    """
    layers = attention_layers(backbone)
    return bool(layers) and all(getattr(m, "is_causal", False) is True for m in layers)


def blocks(network: nn.Module) -> list[nn.Module]:
    """The transformer's layers: the list of modules that holds most of the weights."""
    lists = [module for module in network.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        return []
    largest = max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))
    return list(largest)


def looks_both_ways(backbone: Any) -> bool:
    """Whether the model's config turns what its layers were made for (`models.bidirectional`)."""
    config: Any = getattr(plain(backbone), "config", None)
    return config is not None and getattr(config.get_text_config(), "is_causal", None) is False


def is_causal(backbone: nn.Module) -> bool:
    """Whether the model looks to the left only, so that no token sees padding on its right."""
    return is_decoder(backbone) and not looks_both_ways(backbone)
