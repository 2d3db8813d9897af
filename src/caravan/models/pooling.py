"""Pooling: run the transformer and pool the states of its last layer to one vector per text.

RepLLaMA and RankLLaMA (arXiv 2310.08319, section 2) use the last token, the EOS. Its position comes
from the attention mask, never from the pad id, which may equal the EOS id for Llama. The result
depends neither on the other texts of the batch nor on the padding side.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from torch import Tensor, arange, nn

from caravan.encoding import Encoding
from caravan.errors import InputError, reading
from caravan.models import varlen
from caravan.models.bidirectional import unwrapped
from caravan.models.remote_code import is_remote_code


class Pooling(Protocol):
    """Pools the states of each text to one vector; has no weights.

    Select a custom class by its dotted path; its constructor gets no arguments:

        python train.py stage=retriever encoding.pooling=my_package.pooling.Max

    Loading a model folder with a custom pooling needs `trust_remote_code=true` and its package.

    >>> import torch
    >>> class Max:
    ...     def __call__(self, states: Tensor, attention_mask: Tensor) -> Tensor:
    ...         hidden = attention_mask.unsqueeze(-1) == 0
    ...         return states.float().masked_fill(hidden, -torch.inf).amax(dim=1)
    >>> Max()(torch.tensor([[[1.0], [3.0], [9.0]]]), torch.tensor([[1, 1, 0]])).tolist()
    [[3.0]]
    """

    def __call__(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        """Pool right-padded texts.

        Args:
            states: [n, L, d], states of the last layer in any precision.
            attention_mask: [n, L], 1 for a real token, 0 for padding on the right.

        Returns:
            [n, d] float32.
        """
        ...


class Cls:
    """The state of the first token."""

    def __call__(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        return states[:, 0].float()


class Mean:
    """The mean over the real tokens."""

    def __call__(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask.unsqueeze(-1).float()
        lengths = attention_mask.sum(dim=1).long().clamp(min=1)
        return (states.float() * weights).sum(dim=1) / lengths.unsqueeze(-1)


class Last:
    """The mean over the last `count` real tokens: the EOS, or LLaRA's slots (arXiv 2312.15503)."""

    def __init__(self, count: int = 1) -> None:
        self.count = count

    def __call__(self, states: Tensor, attention_mask: Tensor) -> Tensor:
        last = attention_mask.sum(dim=1).long() - 1
        places = last.unsqueeze(1) - arange(self.count, device=states.device)  # [n, K]
        rows = arange(len(states), device=states.device).unsqueeze(1)
        return states[rows, places].float().mean(dim=1)


def pooling_of(encoding: Encoding) -> Pooling:
    """Create the pooling of an encoding.

    Raises:
        InputError: If the path cannot be imported, or is not a pooling without weights.
    """
    if not encoding.has_custom_pooling:
        slots = Last(encoding.slots)
        built_in: Any = {"last": Last(), "slots": slots, "cls": Cls(), "mean": Mean()}
        return built_in[encoding.pooling]
    module, _, name = encoding.pooling.rpartition(".")
    with reading(f"encoding.pooling={encoding.pooling}", "it cannot be imported"):
        pooling: Any = getattr(importlib.import_module(module), name)()
    if not callable(pooling) or (isinstance(pooling, nn.Module) and list(pooling.parameters())):
        raise InputError(
            "invalid-pooling",
            f"encoding.pooling={encoding.pooling} is not a caravan.models.pooling.Pooling: it must"
            " be callable and have no weights, since model folders do not save them",
        )
    return pooling


def pooled_states(
    backbone: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    pooling: Pooling,
    causal: bool,
    full: bool = False,
    token_types: Tensor | None = None,
) -> Tensor:
    """Run the transformer and pool its last layer.

    Args:
        backbone: a transformers model without a head; its output has `last_hidden_state`.
        input_ids, attention_mask, token_types: [n, L], padded on either side.
        causal: whether the model is causal (`is_causal`).
        full: no text is padded (passed by the caller; a check would synchronize with the device).

    Returns:
        [n, d] float32.
    """
    if varlen.is_enabled(backbone):
        states, attention_mask = varlen.states(backbone, input_ids, attention_mask, token_types)
        return pooling(states, attention_mask)
    if not full:
        order = right_padded(attention_mask)
        input_ids = input_ids.gather(1, order)
        attention_mask = attention_mask.gather(1, order)
        token_types = None if token_types is None else token_types.gather(1, order)
    # In a causal model no real token attends to padding on its right, so no mask is needed and a
    # faster kernel is used. Remote code may still need a mask (nomic-bert's does).
    unmasked = (full or causal) and not is_remote_code(unwrapped(backbone))
    mask = None if unmasked else attention_mask
    types = {} if token_types is None else {"token_type_ids": token_types}
    states = backbone(input_ids=input_ids, attention_mask=mask, **types).last_hidden_state
    return pooling(states, attention_mask)


def right_padded(attention_mask: Tensor) -> Tensor:
    """The order [n, L] of tokens that moves padding to the right.

    Positions then start at the first token of the text for all kinds of position embeddings.
    """
    return attention_mask.argsort(dim=1, descending=True, stable=True)
