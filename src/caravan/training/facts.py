"""What a run tells of itself: its first lines, and the memory that it needs and has used.

A run that the device is too small for is refused here, before anything loads.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from caravan.models import hardware
from caravan.training.fsdp import FullySharded
from caravan.training.memory import device_memory, need, refuse_too_large
from caravan.training.optim import updates

log = logging.getLogger(__name__)


def first_lines(
    cfg: Any,
    trainer: Any,
    data: Any,
    per_epoch: int,
    parameters: tuple[int, int],
    checkpoint: Path | None,
    told: str,
) -> Iterator[str]:
    """The first lines of a run: what is trained, on what, and how large an update is."""
    batch, accumulated = cfg.batching.queries_per_batch, trainer.accumulate_grad_batches
    steps = updates(trainer, per_epoch)
    shared = ", weights shared out" if isinstance(trainer.strategy, FullySharded) else ""
    yield f"{cfg.name} in {cfg.run_dir}" + (f", resumed from {checkpoint}" if checkpoint else "")
    yield (
        f"{trainer.num_devices * trainer.num_nodes} x {trainer.strategy.root_device.type}, "
        f"{hardware.resolve(cfg.precision)}{shared};"
        f" {parameters[0]:,} trainable parameters of {parameters[1]:,}"
    )
    if told:
        yield told
    yield (
        f"{data.training.told(data.collection.name, batch, accumulated)};"
        f" {steps:,} updates, {per_epoch:,} batches an epoch"
    )
    if steps < cfg.trainer.max_steps:
        log.warning(
            "trainer.max_epochs=%d ends the run after %d updates, before trainer.max_steps=%d",
            *(trainer.max_epochs, steps, cfg.trainer.max_steps),
        )
    if data.candidates is not None:
        yield (
            f"validation: {len(data.candidates.passage_rows):,} candidates of"
            f" {len(data.dev_qrels.queries):,} queries"
        )
    elif len(data.dev_qrels):
        yield (
            f"validation: {len(data.dev_qrels.queries):,} queries over"
            f" {len(data.dev_passages):,} of {len(data.collection.corpus):,} passages"
        )


def of_data(source: Any, data: Any) -> dict[str, Any]:
    """What the model card tells of the data: where it is known, and what the validation asks."""
    told: dict[str, Any] = {}
    if (dataset := getattr(source, "hub_id", None)) is not None:
        told["datasets"] = [dataset]
    if (language := getattr(source, "language", None)) is not None:
        told["language"] = [language]
    if data.dev_split is not None:
        told["validation"] = {
            "collection": data.collection.name,
            "split": data.dev_split,
            "queries": len(data.dev_qrels.queries),
            "passages": None if data.candidates is not None else len(data.dev_passages),
        }
    return told


def recipe(cfg: Any) -> dict[str, Any]:
    """The settings of a training that a model card has, those that there are."""

    def target(node: Any) -> str:
        if node is None:
            return ""
        losses = node.get("losses")
        if losses is not None:
            return " + ".join(map(target, losses))
        return str(node.get("_target_")).rpartition(".")[2]

    def given(place: str) -> Any:
        return OmegaConf.select(cfg, place)

    runs = ", ".join(Path(run).name for run in given("sampler.runs") or ())
    accumulated = given("trainer.accumulate_grad_batches") or 1
    rows = {
        "stage": target(cfg.stage),
        "loss": target(cfg.loss),
        "temperature": given("loss.temperature"),
        "queries an update": cfg.batching.queries_per_batch * accumulated,
        "negatives a query": given("sampler.number"),
        "negatives from": runs,
        "optimizer": target(cfg.optimizer),
        "learning rate": given("optimizer.lr"),
        "warm-up steps": given("optimizer.warmup_steps"),
        "LoRA": None if given("peft.rank") is None else f"rank {given('peft.rank')}",
        "seed": cfg.seed,
    }
    return {name: value for name, value in rows.items() if value not in (None, "")}


def memory_needed(module: Any, outline: Any, data: Any, trainer: Any) -> Any:
    """What a step needs, by the first batch; refused where the device has less.

    Args:
        outline: `Stage.outline`.
    """
    if outline is None:
        return None
    data.setup()
    ranks = trainer.num_devices * trainer.num_nodes
    each = min(-(-data.queries_per_batch // ranks), len(data.training))
    first = data.training[0, np.arange(each)].packed()
    tokens, chunks = first.padded, first.chunks
    vocabulary = outline.config.get_text_config().vocab_size if module.tells_tokens else 0
    if module.gradcache is not None:  # the activations of one piece wait for the backward pass
        encoding = module.encoding
        longest = max(encoding.query_length, encoding.passage_length)
        if encoding.kind == "reranker":
            longest = encoding.query_length + encoding.passage_length
        tokens, chunks = min(tokens, module.gradcache.chunk * longest), 1
    quantised = module.backbone.quantization is not None
    shares = ranks if isinstance(trainer.strategy, FullySharded) else 1
    kept_again = module.backbone.checkpointing
    try:
        needed = need(
            *(outline, tokens, module.bf16, kept_again, vocabulary, quantised, shares),
            chunks=chunks,
        )
    except AttributeError as error:  # no transformer's shape
        log.debug("no estimate of memory: %s", error)
        return None
    device = trainer.strategy.root_device
    refuse_too_large(needed, device_memory(device), f"the {device.type}")
    return needed


def memory_used(trainer: Any, needed: Any) -> float | None:
    """GiB at the peak: a GPU's own count; on a CPU, which keeps none, what a step needs."""
    if trainer.strategy.root_device.type == "cuda":
        return torch.cuda.max_memory_allocated(trainer.strategy.root_device) / 2**30
    return None if needed is None else needed.total / 2**30
