"""The output layer: states to logits over the vocabulary, a part of them at a time.

With 128 thousand entries the logits of one text of 512 tokens are 256 MiB. Losses are therefore
computed from `MOST_LOGITS` at a time, and the backward pass computes them again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caravan.errors import InputError

MOST_LOGITS = 1 << 25
"""Logits in memory at once: 128 MiB in float32, whatever the size of the vocabulary."""


def log_probabilities(model: Any, states: Tensor, tokens: Tensor) -> Tensor:
    """Log probabilities [M] float32 of tokens given states, in nats.

    Args:
        model: a language model of transformers, for its output layer, and for what its config does
            to logits (Gemma caps them, Granite and Cohere scale them).
        states: [M, d].
        tokens: [M] int64.
    """
    logits = output_layer(model)

    def part(some: Tensor, ids: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(logits(some), ids, reduction="none")

    size = max(MOST_LOGITS // vocabulary(model), 1)
    parts = zip(states.split(size), tokens.split(size), strict=True)
    return torch.cat([checkpointed(part, *some) for some in parts])


def output_layer(model: Any) -> Callable[[Tensor], Tensor]:
    """States [..., d] to logits [..., V], at least float32, as the model itself computes them."""
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)

    def logits(states: Tensor) -> Tensor:
        # FSDP gathers weights in bf16, outside of autocast, where states may be float32. A layer
        # that was packed for a CPU has no `weight`, and takes states as they are.
        weight = getattr(head, "weight", None)
        found: Tensor = head(states if weight is None else states.to(weight.dtype))
        found = (found.float() if found.dtype.itemsize < 4 else found) * scale
        return cap * torch.tanh(found / cap) if cap else found

    return logits


@torch.no_grad()
def check_output_layer(model: Any) -> None:
    """Check on a few tokens that logits are the output layer's of the trunk's states.

    Some models have a transform between the two (ModernBERT's decoder, BERT).

    Raises:
        InputError: If they are not.
    """
    device = model.get_output_embeddings().weight.device
    ids = (torch.arange(5, 11, device=device) % vocabulary(model)).unsqueeze(0)
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids).logits.float()
        found = output_layer(model)(model.base_model(input_ids=ids).last_hidden_state)
        tolerance = 0.02 * float(expected.abs().max())
        equal = found.shape == expected.shape
        equal = equal and torch.allclose(found, expected, rtol=0, atol=tolerance)
    except RuntimeError:
        equal = False
    finally:
        model.train(training)
    if not equal:
        raise InputError(
            "model-not-supported",
            f"{type(model).__name__} computes more than its output layer between states and"
            " logits, which is not supported; choose another language model",
        )


def vocabulary(model: Any) -> int:
    """Entries of the output layer."""
    return int(model.config.get_text_config().vocab_size)


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Activation checkpointing of one function without random operations."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    settings: Any = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(function, *inputs, **settings)
