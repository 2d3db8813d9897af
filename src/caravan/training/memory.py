"""The memory at the peak of a training step, computed before any weight is loaded.

Counted from the architecture, built without weights: weights, gradients and Adam's moments, and
what a transformer's blocks keep for the backward pass. Tests compare it with counted allocations:
within 10 % for decoders with RMSNorm and a gated MLP, within 25 % for BERT. Of other architectures
it was .5 (GPT-2) to 1.25 times (OPT) the count. Not counted: logits of
language models, torch.compile, and what CUDA and its allocator take for themselves. A run that
cannot fit is refused at once, not after an hour of loading.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning.strategies import DDPStrategy
from torch import nn

from caravan.distributed import is_main_process
from caravan.errors import InputError
from caravan.models.bidirectional import blocks, has_adapter
from caravan.models.hardware import frozen_linears, host_memory
from caravan.training.fsdp import FullySharded

if TYPE_CHECKING:
    from caravan.training.datamodule import DataModule
    from caravan.training.stage import Stage

HALF, FLOAT = 2, 4  # bytes of a number
FOUR_BITS = 0.5 + 1 / 64 + 4 / 64 / 256
"""Bytes of a four-bit weight: a scale of 8 bits for 64 of them, one of 32 for 256 scales."""
GIB = 2**30

Need = dict[str, float]
"""Bytes by what they are for: weights, gradients, optimizer, activations, and gathered weights."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Step:
    """What the memory of a training step depends on, beside the network.

    Args:
        chunks: tokens of each chunk, with padding if the network computes it. The activations of
            all chunks are kept until the backward pass, which begins with the last.
        bf16: whether the arithmetic is bf16.
        recomputes: whether activations are recomputed (`caravan.models.preparing`).
        quantized: whether frozen linear layers have four bits (QLoRA).
        shards: ranks over which FSDP shards the weights; 0 without FSDP.
        accumulates: whether there are gradients before the backward pass.
        bf16_norms: whether frozen norms and embeddings are bf16 (`caravan.models.adapters.LoRA`).
    """

    chunks: Sequence[int]
    bf16: bool = False
    recomputes: bool = False
    quantized: bool = False
    shards: int = 0
    accumulates: bool = False
    bf16_norms: bool = False

    @property
    def unit(self) -> int:
        """Bytes of a number in linear layers and attention."""
        return HALF if self.bf16 else FLOAT

    @property
    def stream(self) -> int:
        """Bytes of a number between blocks and after norms: autocast leaves them in float32."""
        return self.unit if self.shards or self.bf16_norms else FLOAT


def memory_needed(module: Stage, outline: Any, data: DataModule, trainer: Any) -> Need | None:
    """The memory of a step on one device, from the first batch, for which `data` is set up.

    None without an outline or a batch, or if the architecture is too unusual for an estimate.

    Args:
        outline: `Stage.outline`.

    Raises:
        InputError: The device has less, with settings that reduce the largest part; or main memory
            has too little for the embeddings of a validation.
    """
    if outline is None:
        return None
    strategy = trainer.strategy
    data.setup()
    ranks = trainer.num_devices * trainer.num_nodes
    first = next(iter(data.training.order(data.queries_per_batch, 0, ranks)), None)
    if first is None:
        return None  # the loader reports that there are too few texts
    chunks = data.training[first].packed().texts.sizes
    if module.gradcache is not None:  # only one chunk has activations at a time
        lengths = module.encoding.query_length, module.encoding.passage_length
        longest = sum(lengths) if module.encoding.kind == "reranker" else max(lengths)
        chunks = [min(sum(chunks), module.gradcache.chunk * longest)]
    step = Step(
        chunks,
        bf16=module.bf16,
        recomputes=module.backbone.checkpointing,
        quantized=module.backbone.quantization is not None,
        shards=strategy.shards if isinstance(strategy, FullySharded) else 0,
        accumulates=(
            module.gradcache is not None
            or trainer.accumulate_grad_batches > 1
            or isinstance(strategy, DDPStrategy)  # whose buckets hold gradients throughout
        ),
        bf16_norms=module.bf16_norms,
    )
    try:
        needed = need(outline, step)
    except Exception as error:  # noqa: BLE001 - of an unusual architecture; training may work
        log.debug("no estimate of memory: %s", error)
        return None
    buckets = strategy._ddp_kwargs if isinstance(strategy, DDPStrategy) else None
    if buckets is not None and not buckets.get("gradient_as_bucket_view"):
        needed["gradients"] *= 2  # they are copied into the buckets
    refuse_too_large(needed, strategy.root_device)
    if module.encoding.kind == "retriever":
        width = outline.config.get_text_config().hidden_size
        passages = sum(len(one.passages) for one in data.validations)
        refuse_validation(passages, width, trainer.num_devices)
    if is_main_process() and sum(needed.values()) >= 1e8:  # less fits on any device
        log.info("memory at the peak of a step: about %s", in_words(needed))
    return needed


def need(model: Any, step: Step) -> Need:
    """The memory of a training step at its peak.

    Args:
        model: the network with its adapters, not quantized; may be on the meta device.
    """
    parts = step.shards or 1
    total, trained = _numbers(model)
    frozen = sum(layer.weight.numel() for layer in frozen_linears(model))
    others = total - trained - frozen  # norms and embeddings, if frozen
    stored: float = FLOAT * trained + (step.unit if step.bf16_norms else FLOAT) * others
    stored += (FOUR_BITS if step.quantized else step.unit) * frozen
    found = {"weights": stored / parts, "gradients": 0.0, "optimizer": 2 * FLOAT * trained / parts}
    peak = max(_moments(model, step), key=sum)
    found |= zip(("gradients", "activations"), peak, strict=True)
    return found | ({"gathered": _gathered(model, step)} if step.shards else {})


def _numbers(*modules: nn.Module) -> tuple[int, int]:
    """The weights of modules, and the trainable ones."""
    weights = [weight for module in modules for weight in module.parameters()]
    return sum(w.numel() for w in weights), sum(w.numel() for w in weights if w.requires_grad)


def _moments(model: Any, step: Step) -> Iterator[tuple[float, float]]:
    """Bytes of gradients and of activations at the moments of a backward pass that may be its peak.

    As it proceeds, activations are freed and gradients are made.
    """
    config = model.config.get_text_config()  # layers may share their weights, as in ALBERT
    block, layers = Block.of(model, step), max(len(blocks(model)), config.num_hidden_layers)
    gradients, whole = _gradients(model, step)
    copies = _copies(model, step) / layers
    # Of one layer, for each token and for each chunk; and of the layer that is recomputed.
    kept, kept_copies, again, again_copies = block.kept, copies, 0.0, 0.0
    if step.recomputes:
        kept, kept_copies, again, again_copies = block.input, 0.0, block.recomputed, copies

    def activations(chunks: Sequence[int], of_layers: int) -> float:
        return of_layers * (sum(chunks) * kept + len(chunks) * kept_copies)

    # Where the backward pass of a chunk begins; the last norm has an input too.
    for number, size in enumerate(step.chunks, 1):
        before = step.chunks[:number]
        held = activations(before, layers) + sum(before) * block.input
        now = gradients + whole if step.accumulates or number < len(step.chunks) else 0.0
        yield now, held + size * (again + block.working) + again_copies
    # Where the backward pass of the last chunk, which is the first to run, reaches layer 0.
    *others, size = step.chunks
    held = activations(others, layers) + activations([size], 1)
    now = gradients if step.accumulates else gradients * (layers - 1) / layers
    yield now + whole, held + size * (again + block.working) + again_copies


@dataclass(frozen=True)
class Block:
    """Bytes for each token in one of the transformer's layers.

    Args:
        kept: for the backward pass, without recomputation.
        input: the input of the layer, which is all that recomputation keeps.
        recomputed: what a recomputation adds to the layer's input.
        working: temporary tensors of the backward pass.
    """

    kept: float
    input: float
    recomputed: float
    working: float

    @staticmethod
    def of(model: Any, step: Step) -> Block:
        config = model.config.get_text_config()
        width, heads = config.hidden_size, config.num_attention_heads
        inner = getattr(config, "intermediate_size", None) or 4 * width
        queries = heads * (getattr(config, "head_dim", None) or width // heads)
        keys = queries * (getattr(config, "num_key_value_heads", None) or heads) // heads
        (layer, *_), unit, stream = blocks(model), step.unit, step.stream
        frozen = frozen_linears(model)
        dropped = _dropped(layer) if any(map(has_adapter, model.modules())) else 0
        linears = [module for module in layer.modules() if isinstance(module, nn.Linear)]
        # Norms keep their inputs in float32, and trainable ones what they scale as well. Those of
        # queries and keys have the width of a head.
        named = layer.named_parameters()
        sizes = [w.numel() for name, w in named if name.lower().endswith("norm.weight")]
        norms = sizes.count(width) * (FLOAT + (0 if frozen else stream)) * width
        if sizes.count(width) < len(sizes):
            norms += (FLOAT + (0 if frozen else unit)) * (queries + keys)
        # Attention keeps queries, keys, values and its output.
        attention = unit * (2 * queries + 2 * keys)
        # Trainable linear layers keep their inputs; in an adapted layer, only its adapter does.
        # Dropout copies each input. Without it, the output projection of attention shares the
        # output counted above; and unless autocast casts each input, queries, keys and values
        # share one, and so do the MLP's gate and up projections.
        inputs = sum(one.in_features for one in linears if one.weight.requires_grad)
        if not dropped:
            inputs = max(inputs - queries - (0 if stream > unit else 3 * width), 0)
        # The MLP keeps the outputs of its gate and up projections (its factors) and the activated
        # gate. bitsandbytes returns the precision of its input, so with QLoRA it is that of the
        # stream. Experts may not be `nn.Linear`; they are counted as a gated MLP.
        factors = sum(
            one.out_features // inner
            for one in linears
            if one.in_features == width and one.out_features % inner == 0
        )
        factors = factors or 2
        factor = inner * (stream if step.quantized else unit)
        kept = norms + attention + unit * inputs + dropped + (2 * factors - 1) * factor
        shared = FLOAT * width if stream == FLOAT else 0  # the first norm's input is the layer's
        # The gradients of the factors; and of the stream and of a norm's output.
        working = factors * factor + 2 * stream * width
        return Block(kept, stream * width, kept - shared, working)


def _copies(model: nn.Module, step: Step) -> int:
    """Bytes of the bf16 copies of trainable linear layers that autocast makes for each chunk."""
    if not step.bf16 or step.shards:
        return 0
    linears = [one for one in model.modules() if isinstance(one, nn.Linear)]
    return HALF * sum(one.weight.numel() for one in linears if one.weight.requires_grad)


def _gathered(model: nn.Module, step: Step) -> float:
    """Bytes of whole weights with FSDP: of two blocks, one ahead, and of what is in no block."""
    layers = blocks(model)
    (total, trained), (of_blocks, trained_of_blocks) = _numbers(model), _numbers(*layers)
    outside = total - of_blocks + trained - trained_of_blocks  # with their gradients
    return step.unit * (outside + 2 * max(map(_numbers, layers))[0])


def _gradients(model: nn.Module, step: Step) -> tuple[float, float]:
    """Bytes of all gradients on this rank; and of a block's whole ones with FSDP.

    FSDP reduces the gradients of a block in float32.
    """
    _, trained = _numbers(model)
    if not step.shards:
        return FLOAT * trained, 0.0
    _, of_block = max(map(_numbers, blocks(model)))
    return FLOAT * trained / step.shards, (step.unit + FLOAT) * of_block


def _dropped(layer: nn.Module) -> int:
    """The inputs of adapters with dropout, per token; a byte of each is kept as mask."""
    from peft.tuners.lora import LoraLayer

    adapters: Any = (module for module in layer.modules() if isinstance(module, LoraLayer))
    return sum(
        adapter.in_features
        for adapter in adapters
        if any(isinstance(one, nn.Dropout) for one in adapter.lora_dropout.values())
    )


def in_words(needed: Need) -> str:
    """The total in GiB and its parts."""
    parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in needed.items())
    return f"{sum(needed.values()) / GIB:.1f} GiB ({parts})"


def refuse_too_large(needed: Need, device: torch.device) -> None:
    """Raise an InputError if a device has less memory than needed, less 20 % of activations."""
    available = host_memory()
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    remedy = "train adapters (peft=lora), or use a smaller backbone or a larger device"
    if needed["activations"] == max(needed.values()):
        remedy = (
            "set backbone.checkpointing=true or gradcache.chunk, or lower"
            " batching.queries_per_batch or encoding.passage_length"
        )
    # Of some architectures, such as OPT, the estimate is up to 1.25 times the count.
    if sum(needed.values()) - 0.2 * needed["activations"] > available:
        raise InputError(
            "out-of-memory",
            f"training needs about {in_words(needed)} and the {device.type} has"
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
