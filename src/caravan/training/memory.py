"""What training will need of a device's memory, before any weight is loaded.

Counted from the architecture alone (built without weights): weights, gradients and Adam's moments
exactly, activations by what a transformer block keeps for its backward pass, logits by the pieces
in which they are computed. A run that cannot fit is refused at once, not after an hour of loading.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from caravan.errors import InputError
from caravan.models.bidirectional import blocks
from caravan.models.hardware import frozen_linears
from caravan.models.output_layer import MOST_LOGITS
from caravan.models.preparing import Checkpointing

FLOAT = 4  # bytes; of all but frozen linear layers (`caravan.models.hardware.precisions`)
FOUR_BITS = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes of a weight of four bits, a scale of eight for 64 of them, and of 32 for 256 scales."""
GIB = 2**30


@dataclass(frozen=True)
class Need:
    """Bytes that training needs at its peak, by what they are for."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(
            f"{field.name} {getattr(self, field.name) / GIB:.1f}" for field in fields(self)
        )
        return f"{self.total / GIB:.1f} GiB ({parts})"


def need(
    model: nn.Module,
    tokens: int,
    bf16: bool,
    checkpointing: Checkpointing = False,
    vocabulary: int = 0,
    quantised: bool = False,
    shares: int = 1,
    chunks: int = 1,
) -> Need:
    """What a training step needs.

    Args:
        model: the network, adapters included; may be on the meta device.
        tokens: padded tokens of one batch on one device; all of them wait for the backward pass.
        bf16: whether the arithmetic is bf16.
        checkpointing: whether activations are computed again (`caravan.models.preparing`).
        vocabulary: entries of an output layer that is in use; 0 if there is none.
        quantised: whether frozen linear layers have four bits (QLoRA).
        shares: ranks that each hold a share of every weight (FSDP).
        chunks: that the tokens are computed in, one after the other.
    """
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(layer.weight.numel() for layer in frozen_linears(model))
    unit = 2 if bf16 else FLOAT
    kept_whole = _has_dora(model) and not quantised
    of_frozen = FOUR_BITS if quantised else FLOAT if kept_whole else unit
    stored = FLOAT * (total - frozen) + of_frozen * frozen
    copies = 2.0 * _cast(model, kept_whole, bool(checkpointing), chunks) if bf16 else 0.0
    gradients = float(FLOAT * trained)
    if shares > 1:
        # Whole are the layer that computes, the next one that is awaited, and what is in no layer;
        # in the precision of the arithmetic, without autocast.
        whole = _whole_at_a_time(model)
        copies, gradients = unit * whole, gradients / shares + unit * min(whole, trained)
    kept = _activations(model, bf16, checkpointing) * tokens
    pieces = (
        3 * FLOAT * min(MOST_LOGITS, vocabulary * tokens)
    )  # logits, their softmax, their gradient
    return Need(
        weights=stored / shares + copies,
        gradients=gradients,
        optimizer=2 * FLOAT * trained / shares,
        activations=kept,
        logits=pieces,
    )


def _cast(model: nn.Module, kept_whole: bool, checkpointing: bool, chunks: int) -> int:
    """Weights of which there is a bf16 copy at a time, counted with each copy.

    Under autocast, which Lightning lets keep no cache, each chunk has a copy of a float32 layer's
    weight until the backward pass; where activations are computed again, of one block at a time.
    """

    def of(part: nn.Module) -> int:
        # DoRA computes with the base twice, once behind the dropout.
        frozen = sum(layer.weight.numel() for layer in frozen_linears(part)) if kept_whole else 0
        return _trained_linear(part) + 2 * frozen

    if not checkpointing:
        return chunks * of(model)
    sizes = [of(block) for block in blocks(model)]
    return chunks * (of(model) - sum(sizes)) + max(sizes, default=0)


def _trained_linear(model: nn.Module) -> int:
    """Weights of linear layers that are trained."""
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    return sum(weight.numel() for weight in weights if weight.requires_grad)


def _has_dora(model: nn.Module) -> bool:
    """Whether frozen layers stay in float32, for the norms of their columns."""
    return bool(getattr(getattr(model, "active_peft_config", None), "use_dora", False))


def _whole_at_a_time(model: nn.Module) -> int:
    """Weights of the two largest layers, and of what is in no layer."""
    sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
    return sum(p.numel() for p in model.parameters()) - sum(sizes) + sum(sorted(sizes)[-2:])


def _activations(model: Any, bf16: bool, checkpointing: Checkpointing) -> float:
    """Bytes a token that are kept for the backward pass.

    A block keeps what goes into its norms and out of them in float32, keys, values and the gated
    MLP's factors in the precision of the arithmetic. The numbers are those of a Llama's block, read
    off what autograd saves (`tests/training/test_memory.py`).
    """
    config = model.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads = config.num_attention_heads
    if not all(isinstance(size, int) for size in (width, layers, inner, heads)):
        raise AttributeError("its layers have sizes of their own")
    shared = (getattr(config, "num_key_value_heads", None) or heads) / heads
    unit = 2 if bf16 else FLOAT
    block = 7.6 * FLOAT * width + unit * ((1 + 2 * shared) * width + 4 * inner)
    if not checkpointing:
        return float(layers * block)
    kept = FLOAT * width  # what goes into a layer
    if checkpointing == "selective":  # what its products give: of attention, then of the MLP
        kept += unit * ((4 + 2 * shared) * width + 2 * inner)
    adapters = unit * _adapted_width(model) if checkpointing == "selective" else 0
    return float(layers * kept + block + adapters)


def _adapted_width(model: nn.Module) -> int:
    """What a token's adapters give in all, their ranks and their outputs: products as well."""
    pairs: list[Any] = [layer for layer in model.modules() if getattr(layer, "lora_A", None)]
    return sum(
        down.out_features + layer.lora_B[name].out_features
        for layer in pairs
        for name, down in layer.lora_A.items()
    )


def refuse_too_large(needed: Need, there: float, device: str) -> None:
    """Stop before loading where the device is smaller than the need.

    Args:
        there: the device's memory in bytes.

    Raises:
        InputError: with what would help.
    """
    if needed.total <= there:
        return
    largest = max(fields(needed), key=lambda field: getattr(needed, field.name)).name
    remedy = {
        "activations": "set backbone.checkpointing=true or gradcache.chunk, or lower"
        " batching.queries_per_batch or encoding.passage_length",
        "logits": "lower batching.queries_per_batch or encoding.passage_length",
    }.get(largest, "train adapters (peft=lora), or take a smaller backbone or a larger device")
    raise InputError(
        f"training needs about {needed} and {device} has {there / GIB:.1f} GiB; {remedy}"
    )


def device_memory(device: torch.device) -> float:
    """Bytes of memory that a device has in all; infinite where nothing tells."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on every system
        return math.inf
