"""What a transformer is given before it trains: a direction, activations to recompute, compilation.

`backbone.checkpointing=true` keeps a layer's input alone for the backward pass and computes the
layer again; `selective` keeps what linear layers and fused attention gave too, and computes the
rest again, which is cheap. `backbone.compile=true` compiles each layer by itself, and layers of one
shape share what was compiled: a few versions (training or not, one text or several).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from caravan.errors import InputError
from caravan.models import varlen
from caravan.models.bidirectional import look_both_ways
from caravan.models.crossencoder import with_head
from caravan.models.pooling import blocks

VERSIONS = 64
Checkpointing = bool | Literal["selective"]

KEPT = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_varlen_forward",
)
"""What `selective` keeps: products of matrices with weights, and fused attention. Scores of every
token with every other are not among them."""


def prepared(
    model: Any, checkpointing: Checkpointing, bidirectional: bool, compile: bool = False
) -> nn.Module:
    """A transformer, with a head or without, as a backbone's settings say.

    Raises:
        InputError: it cannot look both ways, or recompute activations.
    """
    model.config.use_cache = False
    if bidirectional:
        look_both_ways(model)
    if checkpointing:
        _recompute(model.base_model, checkpointing)  # inside of a head
    if varlen.reads(model):
        varlen.refuse_dropout(model)
    if compile:
        # A layer's versions, for all lengths; past dynamo's own limit it would not be compiled.
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, VERSIONS)
        for block in blocks(model):
            block.compile(dynamic=True)
    return model


def new_head(model: nn.Module, tokenizer: Any) -> nn.Module:
    scorer: Any = with_head(model, tokenizer.pad_token_id)
    scorer.head_is_new = True
    return scorer


def _recompute(model: Any, checkpointing: Checkpointing) -> None:
    # transformers 5.20 knows the older name alone.
    older = model.gradient_checkpointing_enable
    if "gradient_checkpointing_kwargs" not in inspect.signature(older).parameters:
        raise InputError(f"{type(model).__name__} cannot recompute activations")
    settings: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        settings["context_fn"] = _contexts
    getattr(model, "activation_checkpointing_enable", older)(settings)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What goes around a layer's computation, and around its repetition."""
    first, again = create_selective_checkpoint_contexts(_policy)
    return _uncached(first), _uncached(again)


@contextmanager
def _uncached(mode: AbstractContextManager[Any]) -> Iterator[None]:
    """Without autocast's cache, in which a second chunk finds the weights that a first one cast.

    Its repetition finds it empty; it would make more operations than were counted before.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with mode:
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _given(operation: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An argument of an operation; None where it has no such."""
    for place, argument in enumerate(operation._schema.arguments):
        if argument.name == name:
            return args[place] if place < len(args) else kwargs.get(name, argument.default_value)
    return None


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """For `torch.utils.checkpoint`: what to do with an operation's result.

    One that draws random numbers is computed again: if it were not, whatever draws after it in the
    repetition would draw other ones.
    """
    kept = operation.name().partition(".")[0] in KEPT
    if kept and not _given(operation, "dropout_p", args, kwargs):
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
