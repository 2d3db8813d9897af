"""One training run: from a data source and a backbone to a model folder.

    run_dir/config.yaml      the resolved config; its manifest records the inputs of the run
    run_dir/checkpoints/     best.ckpt (by val/MRR@10), last.ckpt (to resume from)
    run_dir/tensorboard/     curves
    run_dir/runs/            the run of the latest validation
    run_dir/model/           the best weights as a model folder, with its manifest
    run_dir/metrics.json     the monitored metric of the best validation, updates, seconds

A finished run is not repeated; an interrupted run continues with `resume=true`.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from rich import get_console

from caravan import manifests
from caravan.data.mixture import Part, instructed, open_parts, texts_of
from caravan.data.segments import Reading
from caravan.data.tokenization import without_second_end
from caravan.distributed import is_main_process, world_size
from caravan.encoding import Encoding
from caravan.errors import InputError, first_line
from caravan.export import model_card
from caravan.files import replacing, writing
from caravan.models import folder, hardware
from caravan.models.backbone import Backbone, FromFolder, Pretrained
from caravan.models.hardware import parameter_counts
from caravan.models.loading import add_slots
from caravan.models.positions import refuse_too_long
from caravan.models.released import check_released
from caravan.training.callbacks import FitSummary
from caravan.training.checkpoints import LAST, RESUMED, AtomicCheckpoints, read_checkpoint
from caravan.training.datamodule import DataModule, validated
from caravan.training.distillation import Distillation
from caravan.training.evaluation import (
    evaluate_again,
    evaluate_reading,
    validate_at_least_once,
)
from caravan.training.fsdp import FullySharded
from caravan.training.gradcache import GradCache
from caravan.training.memory import Need, memory_needed
from caravan.training.optim import AdamW, updates
from caravan.training.provenance import file_digests, finished, inputs_of, refuse_other_run
from caravan.training.stage import Stage

log = logging.getLogger(__name__)


@dataclass
class Training:
    """The components and settings of one run; `caravan.cli.train` builds them from the config.

    Names that are not explained have the meaning of the settings in conf/train.yaml.
    """

    name: str
    run_dir: Path
    cache_dir: Path
    source: Any  # the data source of the collection (`caravan.data.readers`)
    backbone: Backbone
    stage: Callable[..., Stage]  # called with the components below
    optimizer: Any
    encoding: Encoding
    trainer: Callable[..., pl.Trainer]  # called with the arguments that the run adds
    max_steps: int  # as in the trainer; 0 saves the backbone as a model folder without training
    settings: dict[str, Any]  # the resolved config, which determines the inputs of the run
    config: str  # the same as text, for config.yaml
    batching: dict[str, Any]  # arguments of `DataModule`
    validation: dict[str, Any] = field(default_factory=dict)  # arguments of `Validation`
    peft: Any = None
    loss: Any = None
    sampler: Any = None  # draws the negatives; None for adaptation
    strategy: Any = "auto"
    loggers: Sequence[Any] = ()
    callbacks: Sequence[pl.Callback] = ()
    train_queries: int | None = None
    readings: Sequence[Reading] = ()
    gradcache: int | None = None
    distillation: Distillation | None = None
    seed: int = 0
    resume: bool = False
    precision: str = "auto"
    facts: Mapping[str, Any] = field(default_factory=dict)  # for the model card


def train(run: Training) -> float | None:
    """Train and write all files of the run into `run.run_dir`.

    Returns:
        The monitored metric of the best checkpoint; None without validation.

    Raises:
        InputError: If a setting or file is invalid, or run_dir belongs to another run.
    """
    # Saving a released model as a model folder needs no collection.
    reads = run.max_steps != 0 or run.backbone.trains_tokenizer
    parts = open_parts(run.source, run.cache_dir, run.sampler) if reads else []
    for part in parts if run.max_steps != 0 else ():
        if part.collection.splits:
            part.collection.qrels(part.dev_split)  # report a missing split before loading a model
    run.encoding = instructed(run.encoding, parts)
    inputs = inputs_of(run.settings, parts)
    if run.distillation is not None:
        inputs["embeddings"] = run.distillation.inputs(parts)
    model_dir, config = run.run_dir / "model", run.run_dir / "config.yaml"
    record = finished(model_dir, inputs, run.resume)
    if record is not None:
        log.info("%s exists already, from the same settings and data", model_dir)
        return record["best"]
    if is_main_process():
        refuse_other_run(run.run_dir, config, inputs, run.resume)
        # In this order, a kill between any two lines leaves no manifest of an unfinished product.
        manifests.write(config, inputs, {"versions": manifests.versions()})
        with replacing(config) as scratch:
            scratch.write_text(run.config, "utf-8")
        manifests.remove(model_dir)
    best = None
    if run.max_steps == 0:
        _adopt(run, parts)
    else:
        best = _fit(run, parts)
    if is_main_process():
        facts = {"best": best, "versions": manifests.versions(), "files": file_digests(model_dir)}
        samplers = {part.name: part.sampler.facts() for part in parts if part.sampler is not None}
        facts["sampler"] = samplers.pop("", samplers)
        manifests.write(model_dir, inputs, facts)
        log.info("model folder %s", model_dir)
    return best


def _module(run: Training, parts: Sequence[Part]) -> Stage:
    """The LightningModule with its tokenizer; `configure_model` loads the weights."""
    # Silence Lightning's hints about unused devices; `FitSummary` logs the devices in use.
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    pl.seed_everything(run.seed, workers=True, verbose=False)
    encoding, tokenizer = run.encoding, run.backbone.tokenizer(texts_of(parts), run.cache_dir)
    if not (isinstance(run.backbone, FromFolder) and run.backbone.encoding.append_eos):
        encoding = without_second_end(tokenizer, encoding)  # otherwise keep the trained encoding
    add_slots(tokenizer, encoding)
    optional: dict[str, Any] = {}  # not all stages have them
    if run.gradcache is not None:
        optional["gradcache"] = GradCache(run.gradcache)
    if run.distillation is not None:
        optional["distillation"] = run.distillation
    return run.stage(
        backbone=run.backbone,
        peft=run.peft,
        tokenizer=tokenizer,
        encoding=encoding,
        loss=run.loss,
        optimizer=run.optimizer,
        seed=run.seed,
        **optional,
    )


def _adopt(run: Training, parts: Sequence[Part]) -> None:
    """Save a backbone, released or random, as a model folder."""
    module = _module(run, parts)
    if module.encoding.kind == "reranker" and isinstance(run.backbone, Pretrained):
        name, revision = run.backbone.name, run.backbone.revision
        check_released(name, revision, module.tokenizer, module.encoding)
    module.configure_model()
    if run.backbone.head_is_new:
        raise InputError(
            "untrained-head",
            f"{run.backbone.name} has no trained head, so a reranker of it would score at random;"
            " train a head (trainer.max_steps above 0)",
        )
    facts = {"name": run.name, "base_model": run.backbone.name, "updates": 0}
    _save(run, module.network, module, facts)


def _save(
    run: Training, network: Any, module: Stage, facts: dict[str, Any], parts: Sequence[Part] = ()
) -> None:
    """Write the model folder, with the instructions of the collections that it was trained on."""
    encoding = module.encoding
    if encoding.uses_instruction:
        names = [part.collection.name for part in parts]
        own = {name: encoding.instructed(name).instruction for name in names}
        encoding = replace(encoding, instructions={**encoding.instructions, **own})
    folder.save(run.run_dir / "model", network, module.tokenizer, encoding, facts)
    model_card.write(run.run_dir / "model", tokenizer=module.tokenizer)


def _fit(run: Training, parts: Sequence[Part]) -> float | None:
    """Train with Lightning and save the best weights; returns their monitored metric."""
    checkpoint = run.run_dir / "checkpoints" / LAST
    resumes = run.resume and checkpoint.exists()
    if resumes:
        read_checkpoint(checkpoint, RESUMED)  # now instead of after the model is loaded
    if is_main_process():
        resumed = f", resumed from {checkpoint}" if resumes else ""
        log.info("%s in %s%s", run.name, run.run_dir, resumed)
    module = _module(run, parts)
    precision = hardware.resolve(run.precision)
    module.bf16 = precision == "bf16"
    outline = module.outline()
    size = None if outline is None else parameter_counts(outline)[1]
    workers = hardware.workers(run.batching["num_workers"], size)
    batching = {**run.batching, "num_workers": workers}
    data = DataModule(run.source, parts, module, run.validation, **batching)
    trainer = _trainer(run, precision, validates=bool(data.validations))
    for lengths in ({}, *(reading.lengths for reading in run.readings)):
        place = "validation.readings: encoding." if lengths else "encoding."
        for part in parts:  # now instead of in the first validation
            encoding = module.reading(part.collection.name, lengths).encoding
            if outline is not None:
                refuse_too_long(outline, encoding, place)
    needed = memory_needed(module, outline, data, trainer)
    batches = data.batches_per_epoch(trainer)
    # End by updates instead of epochs: Lightning's epoch counter may lag after a resume.
    last = trainer.fit_loop.epoch_loop.max_steps = updates(trainer, batches)
    if is_main_process():
        if last < run.max_steps:
            log.warning("trainer.max_epochs ends the run after %d updates, before max_steps", last)
        if isinstance(run.optimizer, AdamW):
            run.optimizer.warn_if_warmup_outlasts(last)
    trainer.callbacks.insert(0, FitSummary())
    if data.validations:
        validate_at_least_once(trainer, batches)
    started = time.monotonic()
    try:
        with writing(run.run_dir / "tensorboard"):  # errors for other files include their path
            resumed_from = checkpoint if resumes else None
            trainer.fit(module, datamodule=data, ckpt_path=resumed_from, weights_only=True)
    except MisconfigurationException as error:
        raise _invalid(error, "trainer, callbacks") from None
    return _finish(run, module, data, trainer, time.monotonic() - started, needed)


def _trainer(run: Training, precision: str, validates: bool) -> Any:
    """Create Lightning's Trainer.

    Raises: InputError if Lightning rejects a setting or the number of processes.
    """
    sharded = isinstance(run.strategy, FullySharded)
    callbacks = list(run.callbacks)
    if not (get_console().is_terminal or get_console().is_jupyter):
        callbacks = [one for one in callbacks if not isinstance(one, ProgressBar)]
    if not run.loggers:  # Lightning raises an error for a LearningRateMonitor without a logger
        callbacks = [one for one in callbacks if not isinstance(one, LearningRateMonitor)]
    bars = any(isinstance(one, ProgressBar) for one in callbacks)
    try:
        trainer = run.trainer(
            # FSDP needs no autocast because it gathers the shards in bf16.
            precision="bf16-mixed" if precision == "bf16" and not sharded else "32-true",
            strategy=run.strategy,
            logger=list(run.loggers),
            callbacks=callbacks,
            plugins=[AtomicCheckpoints()],
            default_root_dir=run.run_dir,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            **({} if bars else {"enable_progress_bar": False}),
            **({} if validates else {"limit_val_batches": 0}),
        )
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise _invalid(error, "trainer, strategy") from None
    if world_size() not in (1, trainer.world_size):
        raise InputError(
            "wrong-world-size",
            f"{world_size()} processes were started together, and the trainer has"
            f" {trainer.world_size}; set trainer.devices to the processes of a node, and"
            " trainer.num_nodes",
        )
    return trainer


def _invalid(error: Exception, place: str) -> InputError:
    text = f"{place}: {first_line(error)}; change that setting"
    return InputError("invalid-trainer-setting", text)


def _finish(
    run: Training,
    module: Stage,
    data: DataModule,
    trainer: pl.Trainer,
    seconds: float,
    needed: Need | None,
) -> float | None:
    """Write the best weights as a model folder, and metrics.json; returns the best metric."""
    used = None if needed is None else sum(needed.values())
    if trainer.strategy.root_device.type == "cuda":  # on a CPU use the estimate
        used = torch.cuda.max_memory_allocated(trainer.strategy.root_device)
    best, monitor, watched = None, None, trainer.checkpoint_callback
    if isinstance(watched, ModelCheckpoint):
        monitor = watched.monitor
        if watched.best_model_path:
            module.load_weights(read_checkpoint(Path(watched.best_model_path))["state_dict"])
            best = None if (score := watched.best_model_score) is None else float(score)
    found: dict[str, Any] = {}
    validations = data.validations
    if validations:
        if run.readings:
            found["read"] = [evaluate_reading(one, module, data, trainer) for one in run.readings]
        if run.train_queries is not None:
            given = {"queries": run.train_queries, "run": None}
            data.validations = data.validations_on("train_split", **given)
            found["train"] = evaluate_again("train_queries", module, data, trainer)
    network = module.whole()
    if trainer.is_global_zero:
        collections = [part.collection for part in data.parts]
        summary = {
            "name": run.name,
            "base_model": run.backbone.name,
            "collection": ", ".join(f"{one.name} ({one.digest[:12]})" for one in collections),
            "updates": trainer.global_step,
            "monitored": monitor,
            "best": best,
        }
        facts = {**summary, **run.facts}
        if validations:
            facts["validation"] = validated(validations)
        _save(run, network, module, facts, data.parts)
        trained, total = parameter_counts(network)
        found |= {"trained_parameters": trained, "parameters": total}
        found |= {} if used is None else {"memory_gib": round(used / 2**30, 3)}
        metrics = {**summary, "train_seconds": seconds, **found}
        manifests.write_json(run.run_dir / "metrics.json", metrics)
        if (curves := run.run_dir / "tensorboard").is_dir():
            log.info("curves: tensorboard --logdir %s", curves)
    return best
