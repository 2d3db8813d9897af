"""The least memory that a training step needs, computed before any weight is loaded.

Counted from the architecture, built without weights: weights, gradients and Adam's moments exactly,
activations by what a transformer block saves for its backward pass. A run that cannot fit is
refused at once, not after an hour of loading.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from caravan.errors import InputError
from caravan.models.hardware import frozen_linears
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

    @property
    def total(self) -> float:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in vars(self).items())
        return f"{self.total / GIB:.1f} GiB ({parts})"


def memory_needed(module: Stage, outline: Any, data: DataModule, trainer: Any) -> Need | None:
    """The memory of a step on one device, from the first batch; None without an outline.

    Args:
        outline: `Stage.outline`.

    Raises:
        InputError: The device has less; with settings that reduce the largest part.
    """
    if outline is None:
        return None
    data.setup()
    ranks = trainer.num_devices * trainer.num_nodes
    each = min(-(-data.queries_per_batch // ranks), len(data.training))
    tokens = data.training[0, np.arange(each)].packed().padded
    if module.gradcache is not None:  # only one chunk has activations at a time
        lengths = module.encoding.query_length, module.encoding.passage_length
        longest = sum(lengths) if module.encoding.kind == "reranker" else max(lengths)
        tokens = min(tokens, module.gradcache.chunk * longest)
    try:
        needed = need(
            outline,
            tokens,
            module.bf16,
            module.backbone.checkpointing,
            module.backbone.quantization is not None,
            ranks if isinstance(trainer.strategy, FullySharded) else 1,
        )
    except (AttributeError, TypeError) as error:  # the shape is not that of a transformer
        log.debug("no estimate of memory: %s", error)
        return None
    device = trainer.strategy.root_device
    refuse_too_large(needed, device_memory(device), f"the {device.type}")
    return needed


def need(
    model: Any,
    tokens: int,
    bf16: bool,
    checkpointing: Checkpointing = False,
    quantised: bool = False,
    shares: int = 1,
) -> Need:
    """The memory of a training step.

    Args:
        model: the network with its adapters; may be on the meta device.
        tokens: padded tokens of a batch on one device, all kept until the backward pass.
        bf16: whether the arithmetic is bf16.
        checkpointing: whether activations are recomputed (`caravan.models.preparing`).
        quantised: whether frozen linear layers have four bits (QLoRA).
        shares: ranks over which the weights are sharded (FSDP).
    """
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(layer.weight.numel() for layer in frozen_linears(model))
    unit = 2 if bf16 else FLOAT
    stored = FLOAT * (total - frozen) + (FOUR_BITS if quantised else unit) * frozen
    # A block saves the inputs and outputs of its norms in float32, and keys, values and the gated
    # MLP's factors in the precision of the arithmetic. The factors are those of a Llama's block,
    # measured by what autograd saves.
    config = model.config.get_text_config()
    width, heads = config.hidden_size, config.num_attention_heads
    inner = getattr(config, "intermediate_size", None) or 4 * width
    shared = (getattr(config, "num_key_value_heads", None) or heads) / heads
    block = 7.6 * FLOAT * width + unit * ((1 + 2 * shared) * width + 4 * inner)
    kept = config.num_hidden_layers * (FLOAT * width if checkpointing else block)
    return Need(
        weights=stored / shares,
        gradients=FLOAT * trained / shares,
        optimizer=2 * FLOAT * trained / shares,
        activations=(kept + block if checkpointing else kept) * tokens,
    )


def refuse_too_large(needed: Need, available: float, device: str) -> None:
    """Raise an InputError if a device has fewer bytes than needed."""
    if needed.total <= available:
        return
    remedy = "train adapters (peft=lora), or use a smaller backbone or a larger device"
    if needed.activations == max(vars(needed).values()):
        remedy = "set backbone.checkpointing=true or gradcache.chunk, or lower"
        remedy += " batching.queries_per_batch or encoding.passage_length"
    raise InputError(
        "out-of-memory",
        f"training needs at least {needed} and {device} has {available / GIB:.1f} GiB; {remedy}",
    )


def device_memory(device: torch.device) -> float:
    """Bytes of memory of a device."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
