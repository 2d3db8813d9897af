"""Prepare a transformer for training: attention direction, activation checkpointing, compilation.

`backbone.checkpointing=true` keeps only each layer's input for the backward pass and recomputes the
layer. `selective` also keeps the outputs of linear layers and fused attention and recomputes the
rest, which is cheap. `backbone.compile=true` compiles each layer separately. Layers of the same
shape share the compiled versions (training or evaluation, one text or several).
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
from caravan.models.bidirectional import blocks, make_bidirectional

Checkpointing = bool | Literal["selective"]
VERSIONS = 64
"""Maximum number of compiled versions of a layer."""
SAVED = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
)
"""Operations that `selective` saves: products with weights and fused attention, but not the
attention scores of all pairs of tokens."""


def prepared(
    model: Any, checkpointing: Checkpointing, bidirectional: bool, compile: bool = False
) -> nn.Module:
    """Prepare a transformer, with or without a head, for training, in place.

    Raises:
        InputError: If the model does not support bidirectional attention or checkpointing, or
            torch cannot compile where it is installed.
    """
    model.config.use_cache = False
    if bidirectional:
        make_bidirectional(model)
    if checkpointing:
        _checkpoint_activations(model.base_model, checkpointing)  # without the head
    if compile:
        if " " in torch.__path__[0] and not torch.cuda.is_available():
            raise InputError(
                "no-compilation",
                f"backbone.compile=true: on CPUs torch cannot link its kernels if its path has a"
                f" space ({torch.__path__[0]}); move the environment, or set it to false",
            )
        # Beyond dynamo's default limit of versions a layer would run uncompiled.
        limits: Any = torch._dynamo.config
        limits.recompile_limit = max(limits.recompile_limit, VERSIONS)
        for block in blocks(model):
            block.compile(dynamic=True)
    return model


def _checkpoint_activations(model: Any, checkpointing: Checkpointing) -> None:
    # transformers 5.20 has only the older name.
    older = model.gradient_checkpointing_enable
    if "gradient_checkpointing_kwargs" not in inspect.signature(older).parameters:
        raise InputError(
            "no-checkpointing",
            f"{type(model).__name__} has no activation checkpointing; set"
            " backbone.checkpointing=false",
        )
    settings: dict[str, Any] = {"use_reentrant": False}
    if checkpointing == "selective":
        settings["context_fn"] = _contexts
    getattr(model, "activation_checkpointing_enable", older)(settings)


def _contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts for the forward pass of a layer and for its recomputation."""
    first, again = create_selective_checkpoint_contexts(_policy)
    return _uncached(first), _uncached(again)


@contextmanager
def _uncached(mode: AbstractContextManager[Any]) -> Iterator[None]:
    """Disable autocast's weight cache within a selective checkpointing context.

    With the cache, the forward pass may use weights cast by an earlier chunk. The recomputation
    would cast them again, and so run more operations than the forward pass.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with mode:
            yield
    finally:
        torch.set_autocast_cache_enabled(before)


def _policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Whether to save the result of an operation, for `torch.utils.checkpoint`.

    Random operations are recomputed, so that the generator has the same state as in the forward
    pass.
    """
    dropout = None
    for place, argument in enumerate(operation._schema.arguments):
        if argument.name == "dropout_p":
            default = kwargs.get(argument.name, argument.default_value)
            dropout = args[place] if place < len(args) else default
    if operation.name().partition(".")[0] in SAVED and not dropout:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
