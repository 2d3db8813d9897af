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

from caravan.errors import InputError

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
        # Sharded weights are gathered in bf16, outside of autocast, where states may be float32. A
        # layer that was packed for a CPU shows no weight, and takes states as they are.
        weight = getattr(head, "weight", None)
        found: Tensor = head(states if weight is None else states.to(weight.dtype))
        found = (found.float() if found.dtype.itemsize < 4 else found) * scale
        return cap * torch.tanh(found / cap) if cap else found

    return logits


@torch.no_grad()
def refuse_other_output(model: Any) -> None:
    """Refuse a language model whose logits are not its output layer's of its trunk's states.

    Some have a transform between the two (ModernBERT's decoder, BERT), and nothing tells of it: a
    few tokens are tried.

    Raises:
        InputError: with the model's name.
    """
    device = model.get_output_embeddings().weight.device
    ids = (torch.arange(5, 11, device=device) % vocabulary(model)).unsqueeze(0)
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids).logits.float()
        found = output_layer(model)(model.base_model(input_ids=ids).last_hidden_state)
        differs = found.shape != expected.shape or not torch.allclose(
            found, expected, rtol=0, atol=0.02 * float(expected.abs().max())
        )
    except RuntimeError:
        differs = True
    finally:
        model.train(training)
    if differs:
        raise InputError(
            f"{type(model).__name__} computes more than its output layer between states and"
            " logits, which is not supported here; choose another language model"
        )


def vocabulary(model: Any) -> int:
    """Entries of the output layer."""
    return int(model.config.get_text_config().vocab_size)


def again(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call, and in training keep nothing but the inputs: the backward pass calls again."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    settings: Any = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(function, *inputs, **settings)
