"""Prepare a transformer for training: attention direction, activation checkpointing, compilation.

`backbone.checkpointing=true` keeps only each layer's input for the backward pass and recomputes the
layer. `backbone.compile=true` compiles each layer separately. Layers of the same shape share the
compiled versions (training or evaluation, one text or several).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from caravan.errors import InputError
from caravan.models.bidirectional import blocks, make_bidirectional

VERSIONS = 64
"""Maximum number of compiled versions of a layer."""


def prepared(
    model: Any, checkpointing: bool, bidirectional: bool, compile: bool = False
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
        _checkpoint_activations(model.base_model)  # without the head
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


def _checkpoint_activations(model: Any) -> None:
    # transformers 5.20 has only the older name.
    older = model.gradient_checkpointing_enable
    if "gradient_checkpointing_kwargs" not in inspect.signature(older).parameters:
        raise InputError(
            "no-checkpointing",
            f"{type(model).__name__} has no activation checkpointing; set"
            " backbone.checkpointing=false",
        )
    getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
