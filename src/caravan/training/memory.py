"""The least memory that a training step needs, computed before any weight is loaded.

Counted from the architecture, built without weights: weights, gradients and Adam's moments exactly,
activations by what a transformer block saves for its backward pass. A run that cannot fit is
refused at once, not after an hour of loading.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from caravan.distributed import is_main_process
from caravan.errors import InputError
from caravan.models.bidirectional import has_adapter
from caravan.models.hardware import frozen_linears, host_memory
from caravan.training.fsdp import FullySharded

if TYPE_CHECKING:
    from caravan.training.datamodule import DataModule
    from caravan.training.stage import Stage

FLOAT = 4  # bytes; of all but frozen linear layers (`caravan.models.hardware.precisions`)
HALF = 2  # bytes
FOUR_BITS = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes of a four-bit weight: a scale of 8 bits for 64 of them, one of 32 for 256 scales."""
GIB = 2**30

Need = dict[str, float]
"""Bytes by what they are for: weights, gradients, optimizer, activations."""

log = logging.getLogger(__name__)


def memory_needed(module: Stage, outline: Any, data: DataModule, trainer: Any) -> Need | None:
    """The memory of a step on one device, from the first batch; None without an outline.

    Args:
        outline: `Stage.outline`.

    Raises:
        InputError: The device has less, with settings that reduce the largest part; or main memory
            has too little for the embeddings of a validation.
    """
    if outline is None:
        return None
    strategy = trainer.strategy
    shares = strategy.shards if isinstance(strategy, FullySharded) else 1
    data.setup()
    ranks = trainer.num_devices * trainer.num_nodes
    first = next(iter(data.training.order(data.queries_per_batch, 0, ranks)), None)
    if first is None:
        return None  # the loader reports that there are too few texts
    texts = data.training[first].packed().texts
    tokens, chunk = texts.padded, texts.largest
    if module.gradcache is not None:  # only one chunk has activations at a time
        lengths = module.encoding.query_length, module.encoding.passage_length
        longest = sum(lengths) if module.encoding.kind == "reranker" else max(lengths)
        tokens = chunk = min(tokens, module.gradcache.chunk * longest)
    quantised = module.backbone.quantization is not None
    recomputes = module.backbone.checkpointing
    try:
        needed = need(outline, tokens, module.bf16, recomputes, quantised, shares, chunk)
    except (AttributeError, TypeError) as error:  # the shape is not that of a transformer
        log.debug("no estimate of memory: %s", error)
        return None
    refuse_too_large(needed, strategy.root_device)
    if module.encoding.kind == "retriever":
        width = outline.config.get_text_config().hidden_size
        passages = sum(len(one.passages) for one in data.validations)
        refuse_validation(passages, width, trainer.num_devices)
    if is_main_process() and sum(needed.values()) >= 1e8:  # less fits on any device
        log.info("memory at the peak of a step: at least %s", in_words(needed))
    return needed


def need(
    model: Any,
    tokens: int,
    bf16: bool,
    recomputes: bool = False,
    quantised: bool = False,
    shares: int = 1,
    chunk: int | None = None,
) -> Need:
    """The memory of a training step.

    Args:
        model: the network with its adapters; may be on the meta device.
        tokens: padded tokens of a batch on one device, all kept until the backward pass.
        bf16: whether the arithmetic is bf16.
        recomputes: whether activations are recomputed (`caravan.models.preparing`).
        quantised: whether frozen linear layers have four bits (QLoRA).
        shares: ranks over which the weights are sharded (FSDP).
        chunk: the padded tokens of the largest chunk; the backward pass recomputes a block of one
            chunk at a time. None: of all.
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
    norms = 5.05 if frozen else 7.6  # frozen norms keep no inputs for their own gradients
    block = norms * FLOAT * width + unit * ((1 + 2 * shared) * width + 4 * inner)
    layers = config.num_hidden_layers
    block += _dropped(model) * (unit + 1) / layers  # the remaining values and the mask
    activations = tokens * layers * (FLOAT * width if recomputes else block)
    if recomputes:
        activations += (tokens if chunk is None else chunk) * block
    return {
        "weights": stored / shares,
        "gradients": FLOAT * trained / shares,
        "optimizer": 2 * FLOAT * trained / shares,
        "activations": activations,
    }


def _dropped(model: Any) -> int:
    """The inputs of all adapters with dropout, per token."""
    if not any(map(has_adapter, model.modules())):
        return 0
    from peft.tuners.lora import LoraLayer

    adapters: Any = (layer for layer in model.modules() if isinstance(layer, LoraLayer))
    return sum(
        layer.in_features
        for layer in adapters
        if any(isinstance(one, torch.nn.Dropout) for one in layer.lora_dropout.values())
    )


def in_words(needed: Need) -> str:
    """The total in GiB and its parts."""
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.items())
    return f"{sum(needed.values()) / GIB:.1f} GiB ({parts})"


def refuse_too_large(needed: Need, device: torch.device) -> None:
    """Raise an InputError if a device has less memory than needed."""
    available = host_memory()
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    remedy = "train adapters (peft=lora), or use a smaller backbone or a larger device"
    if needed["activations"] == max(needed.values()):
        remedy = (
            "set backbone.checkpointing=true or gradcache.chunk, or lower"
            " batching.queries_per_batch or encoding.passage_length"
        )
    if sum(needed.values()) > available:
        raise InputError(
            "out-of-memory",
            f"training needs at least {in_words(needed)} and the {device.type} has"
            f" {available / GIB:.1f} GiB; {remedy}",
        )


def refuse_validation(passages: int, width: int, processes: int) -> None:
    """Raise an InputError if the embeddings of a validation do not fit into main memory.

    Args:
        passages, width: their shape; each process has all of them in float16, and `index=flat` of
            them in float32.
        processes: of this machine.
    """
    size, available = (HALF + FLOAT) * passages * width * processes, host_memory()
    if size > available:
        raise InputError(
            "out-of-memory",
            f"a validation over {passages:,} passages needs {size / GIB:.1f} GiB in"
            f" {processes} processes, and the machine has {available / GIB:.1f} GiB; set"
            " validation.passages=100000",
        )
