"""The output layer: states to logits over the vocabulary, in parts to save memory.

With a vocabulary of 128 thousand, the logits of one text of 512 tokens take 256 MiB. Losses are
therefore computed from at most `MOST_LOGITS` at a time; if there are more, they are recomputed in
the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from caravan.errors import InputError
from caravan.models.bidirectional import is_causal

MOST_LOGITS = 1 << 25
"""Maximum number of logits in memory: 128 MiB in float32 for any vocabulary."""


def log_probabilities(model: Any, states: Tensor, tokens: Tensor) -> Tensor:
    """Log probabilities [M] float32 of tokens given states, in nats.

    Args:
        model: a language model of transformers; its output layer and the logit settings of its
            config are used (Gemma caps logits, Granite and Cohere scale them).
        states: [M, d].
        tokens: [M] int64.
    """
    logits = output_layer(model)

    def part(some: Tensor, ids: Tensor) -> Tensor:
        return -nn.functional.cross_entropy(logits(some), ids, reduction="none")

    size = max(MOST_LOGITS // vocabulary(model), 1)
    if len(states) <= size:
        return part(states, tokens)
    parts = zip(states.split(size), tokens.split(size), strict=True)
    return torch.cat([checkpointed(part, *some) for some in parts])


def token_logits(model: Any, states: Tensor, tokens: Sequence[int]) -> Tensor:
    """Logits [n, T] float32 of T tokens alone, given states [n, d]."""
    head = model.get_output_embeddings()
    rows = list(tokens)
    bias = None if head.bias is None else head.bias[rows].float()
    with torch.autocast(states.device.type, enabled=False):
        found = nn.functional.linear(states.float(), head.weight[rows].float(), bias)
    return _formed(model, found)


def logit_form(model: Any) -> tuple[float, float | None]:
    """The factor of a model's logits, and the cap on them if it has one (Granite, Gemma 2)."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", 1.0) / getattr(config, "logits_scaling", 1.0)
    return scale, getattr(config, "final_logit_softcapping", None)


def _formed(model: Any, logits: Tensor) -> Tensor:
    scale, cap = logit_form(model)
    logits = logits * scale
    return cap * torch.tanh(logits / cap) if cap else logits


def output_layer(model: Any) -> Callable[[Tensor], Tensor]:
    """A function from states [..., d] to logits [..., V] in float32 or higher, as in the model."""
    head = model.get_output_embeddings()

    def logits(states: Tensor) -> Tensor:
        # With FSDP, weights are gathered in bf16 outside autocast, where states may be float32.
        # A layer packed for the CPU has no `weight` and accepts states of any dtype.
        weight = getattr(head, "weight", None)
        found: Tensor = head(states if weight is None else states.to(weight.dtype))
        return _formed(model, found.float() if found.dtype.itemsize < 4 else found)

    return logits


@torch.no_grad()
def check_output_layer(model: Any, feature: str) -> None:
    """Check that a model is causal and that its logits are its output layer applied to its states.

    Some models have a transform between the two (ModernBERT's decoder, BERT). The logits are
    compared on a few tokens.

    Args:
        feature: the setting or stage that needs it, for the message.

    Raises:
        InputError: "no-language-model", "model-not-supported", "diverged-model".
    """
    if model.get_output_embeddings() is None or not is_causal(model):
        raise InputError(
            "no-language-model",
            f"{feature}: {type(model).__name__} is not a causal language model; choose a decoder",
        )
    device = model.get_output_embeddings().weight.device
    ids = (torch.arange(5, 11, device=device) % vocabulary(model)).unsqueeze(0)
    training = model.training
    model.eval()
    try:
        expected = model(input_ids=ids).logits.float()
        found = output_layer(model)(model.base_model(input_ids=ids).last_hidden_state)
        largest, difference = float(expected.abs().max()), float((found - expected).abs().max())
    except RuntimeError:  # of another shape
        largest, difference = 1.0, math.inf
    finally:
        model.train(training)
    if not math.isfinite(largest):
        raise InputError(
            "diverged-model",
            f"{model.name_or_path or type(model).__name__} computes logits that are NaN or"
            " infinite: its weights are damaged, or its training diverged; train it again",
        )
    if not difference <= 0.02 * largest:
        raise InputError(
            "model-not-supported",
            f"{type(model).__name__} has more than its output layer between states and logits,"
            " which is not supported; choose another language model",
        )


def vocabulary(model: Any) -> int:
    """The number of entries of the vocabulary."""
    return int(model.config.get_text_config().vocab_size)


def checkpointed(function: Callable[..., Any], *inputs: Any) -> Any:
    """Call a function without random operations with activation checkpointing."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    settings: Any = {"use_reentrant": False, "preserve_rng_state": False}
    return checkpoint(function, *inputs, **settings)
