"""The memory that a training step needs, estimated before any weight is loaded.

Counted from the architecture (built without weights): weights, gradients and Adam's moments
exactly, activations by what a transformer block saves for its backward pass, logits by the pieces
in which they are computed. A run that cannot fit is refused at once, not after an hour of loading.
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from caravan.errors import InputError
from caravan.models.bidirectional import blocks
from caravan.models.hardware import frozen_linears
from caravan.models.output_layer import MOST_LOGITS
from caravan.models.preparing import Checkpointing
from caravan.training.fsdp import FullySharded

if TYPE_CHECKING:
    from caravan.data.datamodule import DataModule
    from caravan.training.stage import Stage

FLOAT = 4  # bytes; of all but frozen linear layers (`caravan.models.hardware.precisions`)
FOUR_BITS = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes of a four-bit weight: a scale of 8 bits for 64 of them, one of 32 for 256 scales."""
GIB = 2**30

log = logging.getLogger(__name__)


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


def memory_needed(module: Stage, outline: Any, data: DataModule, trainer: Any) -> Need | None:
    """The memory of a training step, estimated from the first batch; None without an outline.

    Args:
        outline: `Stage.outline`.

    Raises:
        InputError: the device has less.
    """
    if outline is None:
        return None
    data.setup()
    ranks = trainer.num_devices * trainer.num_nodes
    each = min(-(-data.queries_per_batch // ranks), len(data.training))
    first = data.training[0, np.arange(each)].packed()
    tokens, chunks = first.padded, first.chunks
    if module.gradcache is not None:  # only one chunk has activations at a time
        encoding = module.encoding
        longest = max(encoding.query_length, encoding.passage_length)
        if encoding.kind == "reranker":
            longest = encoding.query_length + encoding.passage_length
        tokens, chunks = min(tokens, module.gradcache.chunk * longest), 1
    try:
        needed = need(
            outline,
            tokens,
            module.bf16,
            module.backbone.checkpointing,
            outline.config.get_text_config().vocab_size if module.uses_output_layer else 0,
            module.backbone.quantization is not None,
            ranks if isinstance(trainer.strategy, FullySharded) else 1,
            chunks,
        )
    except AttributeError as error:  # the shape is not that of a transformer
        log.debug("no estimate of memory: %s", error)
        return None
    device = trainer.strategy.root_device
    refuse_too_large(needed, device_memory(device), f"the {device.type}")
    return needed


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
    """The memory of a training step.

    Args:
        model: the network with its adapters; may be on the meta device.
        tokens: padded tokens of a batch on one device, all kept until the backward pass.
        bf16: whether the arithmetic is bf16.
        checkpointing: which activations are recomputed (`caravan.models.preparing`).
        vocabulary: size of the output layer, if it is used; else 0.
        quantised: whether frozen linear layers have four bits (QLoRA).
        shares: ranks over which the weights are sharded (FSDP).
        chunks: that the tokens are computed in, one after the other.
    """
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(layer.weight.numel() for layer in frozen_linears(model))
    unit = 2 if bf16 else FLOAT
    of_frozen = FOUR_BITS if quantised else unit
    stored = FLOAT * (total - frozen) + of_frozen * frozen
    copies = 2.0 * _cast(model, bool(checkpointing), chunks) if bf16 else 0.0
    gradients = float(FLOAT * trained)
    if shares > 1:
        # Gathered in the precision of the arithmetic: the layer that computes, the next one, and
        # everything outside layers.
        sizes = [sum(p.numel() for p in block.parameters()) for block in blocks(model)]
        gathered = total - sum(sizes) + sum(sorted(sizes)[-2:])
        copies, gradients = unit * gathered, gradients / shares + unit * min(gathered, trained)
    # Logits, their softmax and their gradient.
    logits = 3 * FLOAT * min(MOST_LOGITS, vocabulary * tokens)
    return Need(
        weights=stored / shares + copies,
        gradients=gradients,
        optimizer=2 * FLOAT * trained / shares,
        activations=_activations(model, bf16, checkpointing) * tokens,
        logits=logits,
    )


def _cast(model: nn.Module, checkpointing: bool, chunks: int) -> int:
    """Weights that have a bf16 copy at a time, counted with each copy.

    Under autocast, whose cache Lightning switches off, each chunk has a copy of a float32 layer's
    weight until the backward pass; with checkpointing, of one block at a time.
    """

    def of(part: nn.Module) -> int:
        linear = [layer.weight for layer in part.modules() if isinstance(layer, nn.Linear)]
        return sum(weight.numel() for weight in linear if weight.requires_grad)

    if not checkpointing:
        return chunks * of(model)
    sizes = [of(block) for block in blocks(model)]
    return chunks * (of(model) - sum(sizes)) + max(sizes, default=0)


def _activations(model: Any, bf16: bool, checkpointing: Checkpointing) -> float:
    """Bytes per token that are saved for the backward pass.

    A block saves the inputs and outputs of its norms in float32, and keys, values and the gated
    MLP's factors in the precision of the arithmetic. The factors are those of a Llama's block,
    measured by what autograd saves (`tests/training/test_memory.py`).
    """
    config = model.config.get_text_config()
    width, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * width
    heads = config.num_attention_heads
    if not all(isinstance(size, int) for size in (width, layers, inner, heads)):
        raise AttributeError("its layers have different sizes")
    shared = (getattr(config, "num_key_value_heads", None) or heads) / heads
    unit = 2 if bf16 else FLOAT
    block = 7.6 * FLOAT * width + unit * ((1 + 2 * shared) * width + 4 * inner)
    if not checkpointing:
        return float(layers * block)
    saved = FLOAT * width  # a layer's input
    if checkpointing != "selective":
        return float(layers * saved + block)
    saved += unit * ((4 + 2 * shared) * width + 2 * inner)  # outputs of its matrix products
    adapters: list[Any] = [layer for layer in model.modules() if getattr(layer, "lora_A", None)]
    ranks = sum(
        down.out_features + layer.lora_B[name].out_features
        for layer in adapters
        for name, down in layer.lora_A.items()
    )
    return float(layers * saved + block + unit * ranks)


def refuse_too_large(needed: Need, available: float, device: str) -> None:
    """Stop before loading if the device has less memory than needed.

    Args:
        available: the device's memory in bytes.

    Raises:
        InputError: with settings that reduce the largest part.
    """
    if needed.total <= available:
        return
    largest = max(fields(needed), key=lambda field: getattr(needed, field.name)).name
    remedy = {
        "activations": "set backbone.checkpointing=true or gradcache.chunk, or lower"
        " batching.queries_per_batch or encoding.passage_length",
        "logits": "lower batching.queries_per_batch or encoding.passage_length",
    }.get(largest, "train adapters (peft=lora), or use a smaller backbone or a larger device")
    raise InputError(
        "out-of-memory",
        f"training needs about {needed} and {device} has {available / GIB:.1f} GiB; {remedy}",
    )


def device_memory(device: torch.device) -> float:
    """Bytes of memory of a device; infinite if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # not on every system
        return math.inf
