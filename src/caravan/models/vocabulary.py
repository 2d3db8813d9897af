"""The output layer: states to logits over the vocabulary, never more than a piece at a time.

With 128 thousand entries the logits of one text of 512 tokens are 256 MiB. Here a loss is computed
from a piece of them, and in training the piece is computed again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PIECE = 1 << 25
"""Logits that are in memory at once: 128 MiB in float32, whatever the size of the vocabulary. In
training too, since they are computed again in the backward pass rather than kept."""


def log_probabilities(model: Any, states: Tensor, tokens: Tensor) -> Tensor:
    """Log probability [M] float32 of token m given state m.

    Args:
        model: a language model of transformers; gives the output layer, and what its config does
            to logits (Gemma caps them, Granite and Cohere scale them).
        states: [M, d]. tokens: [M] int64.
    """
    logits = output_layer(model)

    def piece(some: Tensor, ids: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(logits(some), ids, reduction="none")

    size = max(PIECE // vocabulary(model), 1)
    pieces = zip(states.split(size), tokens.split(size), strict=True)
    return torch.cat([again(piece, *some) for some in pieces])


def output_layer(model: Any) -> Callable[[Tensor], Tensor]:
    """States [..., d] to logits [..., V], at least float32, as the model itself computes them."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)

    def logits(states: Tensor) -> Tensor:
        found: Tensor = head(states)
        found = (found.float() if found.dtype.itemsize < 4 else found) * scale
        return cap * torch.tanh(found / cap) if cap else found

    return logits


def vocabulary(model: Any) -> int:
    """Entries of the output layer."""
    return int(model.config.get_text_config().vocab_size)


def again(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call, and in training keep nothing but the inputs: the backward pass calls again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    settings: Any = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(function, *inputs, **settings)
