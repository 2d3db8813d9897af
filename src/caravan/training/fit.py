"""One training run: from a checked config to a model folder.

    run_dir/config.yaml      what was asked, resolved
    run_dir/checkpoints/     best.ckpt (by val/MRR@10), last.ckpt (to resume from)
    run_dir/tensorboard/     curves
    run_dir/runs/            the run of the latest validation
    run_dir/model/           the best weights as a model folder, with its manifest
    run_dir/metrics.json     the figure of the best validation, updates, seconds

A run that is finished is not done again; one that was interrupted goes on with `resume=true`.
"""

from __future__ import annotations

import logging
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from caravan import manifests
from caravan.cli.schema import build, recorded
from caravan.data.collection import Collection
from caravan.distributed import is_main_process, world
from caravan.encoding import Encoding, read_encoding
from caravan.errors import InputError, first_line
from caravan.files import replacing, writing
from caravan.training.provenance import file_digests, finished, inputs_of, refuse_other_run

log = logging.getLogger(__name__)

AT_THE_END = ("train_queries", "read_lengths")
"""Of the settings of `validation`: what the best weights are asked when training has ended."""


def train(cfg: Any) -> float | None:
    """Run `train.py` for a composed and checked config.

    Returns:
        The monitored figure of the best checkpoint (for sweepers), None if nothing was validated.
    """
    from omegaconf import OmegaConf

    from caravan.models import hardware

    hardware.refuse_attention(cfg.backbone.get("attention", "auto"))
    run_dir = Path(cfg.run_dir)
    source = build(cfg, "data")["data"]
    collection = source.collection(Path(cfg.cache_dir)) if _reads_collection(cfg) else None
    if cfg.trainer.max_steps != 0 and collection is not None and collection.splits:
        collection.qrels(source.dev_split)  # a missing one is told before a model is made
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    inputs = inputs_of(settings, collection)
    model_dir = run_dir / "model"
    facts = finished(model_dir, inputs, cfg.resume)
    if facts is not None:
        log.info("%s is there already, from the same settings and data", model_dir)
        return facts["best"]
    begun = run_dir / "config.yaml"
    if is_main_process():
        refuse_other_run(run_dir, begun, inputs, cfg.resume)
        # A kill between any two of these lines leaves nothing that claims to be what it is not.
        manifests.write(begun, inputs, {"versions": manifests.versions()})
        with replacing(begun) as scratch:
            scratch.write_text(recorded(cfg), "utf-8")
        manifests.remove(model_dir)
    if cfg.trainer.max_steps == 0:
        _adopt(cfg, collection, run_dir)
        best = None
    else:
        best = _fit(cfg, source, collection, run_dir)
        if (curves := run_dir / "tensorboard").is_dir():
            log.info("curves: tensorboard --logdir %s", curves)
    if is_main_process():
        record = {"best": best, "versions": manifests.versions(), "files": file_digests(model_dir)}
        manifests.write(model_dir, inputs, record)
        log.info("model folder %s", model_dir)
    return best


def _reads_collection(cfg: Any) -> bool:
    """A released model becomes a model folder without any collection (`trainer.max_steps=0`)."""
    if cfg.trainer.max_steps != 0:
        return True
    return cfg.init_from is None and build(cfg, "backbone")["backbone"].trains_tokenizer


def _module(cfg: Any, collection: Collection | None) -> Any:
    """The LightningModule with its tokenizer; weights come with `configure_model`."""
    import pytorch_lightning as pl

    from caravan.data.pairs import without_second_end
    from caravan.models.backbone import FromFolder
    from caravan.models.loading import add_slots
    from caravan.training.gradcache import GradCache

    # Lightning tells about devices it has not found; what matters is in `_facts`.
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    parts = build(cfg, "backbone", "peft", "loss", "optimizer", "stage", "encoding")
    backbone = parts["backbone"]
    if cfg.init_from is not None:
        names = ("attention", "checkpointing", "bidirectional", "compile", "trust_remote_code")
        backbone = FromFolder(cfg.init_from, **{name: getattr(backbone, name) for name in names})
    encoding = Encoding(**parts["encoding"])
    tokenizer = backbone.tokenizer(collection, Path(cfg.cache_dir))
    if cfg.init_from is None or not read_encoding(Path(cfg.init_from))[0].append_eos:
        encoding = without_second_end(tokenizer, encoding)  # else it goes on as it was trained
    add_slots(tokenizer, encoding)
    return parts["stage"](
        backbone=backbone,
        peft=parts["peft"],
        tokenizer=tokenizer,
        encoding=encoding,
        loss=parts["loss"],
        optimizer=parts["optimizer"],
        seed=cfg.seed,
        **({} if cfg.gradcache.chunk is None else {"gradcache": GradCache(cfg.gradcache.chunk)}),
    )


def _adopt(cfg: Any, collection: Collection | None, run_dir: Path) -> None:
    """Make a model folder of a backbone as it is, released or random."""
    from caravan.export.model_card import write
    from caravan.models import folder

    module = _module(cfg, collection)
    module.configure_model()
    if module.backbone.head_is_new:
        raise InputError(
            f"{module.backbone.name} has no trained head to score with, so a reranker of it would"
            " score at random; train one (trainer.max_steps above 0)"
        )
    facts = {"name": cfg.name, "base_model": module.backbone.name, "updates": 0}
    folder.save(run_dir / "model", module.model, module.tokenizer, module.encoding, facts)
    write(run_dir / "model", tokenizer=module.tokenizer)


def _fit(cfg: Any, source: Any, collection: Any, run_dir: Path) -> float | None:
    import torch
    from lightning_fabric.utilities.exceptions import MisconfigurationException
    from pytorch_lightning.callbacks import LambdaCallback, LearningRateMonitor

    from caravan.models import hardware
    from caravan.models.backbone import parameter_counts
    from caravan.models.positions import refuse_too_long
    from caravan.training.checkpoints import AtomicCheckpoints, refused, resumable
    from caravan.training.facts import first_lines, memory_needed, memory_used
    from caravan.training.fsdp import FullySharded
    from caravan.training.optim import updates

    checkpoint = resumable(run_dir / "checkpoints") if cfg.resume else None
    module = _module(cfg, collection)
    precision = hardware.resolve(cfg.precision)
    module.bf16 = precision == "bf16"
    parts = build(cfg, "sampler", "strategy", "logger", "callbacks", "trainer")
    if isinstance(parts["strategy"], FullySharded):
        precision = "float32"  # no autocast: the shards are gathered in bf16 themselves
    data = _data(cfg, module, source, collection, parts["sampler"])
    if data.dev_split is None:
        parts["trainer"].keywords["limit_val_batches"] = 0
    if parts["callbacks"].get("progress") is None or not _on_a_screen():
        parts["callbacks"]["progress"] = None
        parts["trainer"].keywords["enable_progress_bar"] = False
    callbacks = [callback for callback in parts["callbacks"].values() if callback is not None]
    loggers = [logger for logger in (parts["logger"] or {}).values() if logger is not None]
    if not loggers:  # which Lightning would refuse
        callbacks = [one for one in callbacks if not isinstance(one, LearningRateMonitor)]
    trainer = _trainer(
        parts["trainer"],
        precision=hardware.trainer_precision(precision),
        strategy=parts["strategy"],
        logger=loggers,
        callbacks=callbacks,
        plugins=[AtomicCheckpoints()],
        default_root_dir=run_dir,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    if world() not in (1, trainer.world_size):
        raise InputError(
            f"{world()} processes were started together, and the trainer has {trainer.world_size};"
            " set trainer.devices to the processes of a node, and trainer.num_nodes"
        )
    outline = module.outline()
    if outline is not None:  # what is too long fails now, and not in a validation after hours
        refuse_too_long(outline, module.encoding)
        for length in cfg.validation.read_lengths if data.dev_split is not None else ():
            read = replace(module.encoding, passage_length=length)
            refuse_too_long(outline, read, "validation.read_lengths: encoding.")
    needed = memory_needed(module, outline, data, trainer)
    batches = data.batches_per_epoch(trainer)
    # Updates and not epochs end the run: Lightning's count of epochs may lag in a resumed one.
    last = trainer.fit_loop.epoch_loop.max_steps = updates(trainer, batches)
    _tell_of_warmup(cfg, last)

    def tell() -> None:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # what loading took is no step's
        counts = parameter_counts(module)
        if not counts[0]:
            raise InputError("nothing would be trained, all is frozen; set peft=none or peft=lora")
        if trainer.is_global_zero:
            told = "; ".join(module.backbone.messages())
            for line in first_lines(cfg, trainer, data, batches, counts, checkpoint, told):
                log.info(line)
            if needed is not None and needed.total >= 1e8:  # less is nowhere in question
                log.info("memory at the peak of a step: about %s", needed)

    # The weights are loaded by then, on the device or shared out over ranks.
    trainer.callbacks.insert(0, LambdaCallback(on_fit_start=lambda *_: tell()))
    if data.dev_split is not None:
        _validate_at_least_once(trainer, batches)
    started = time.monotonic()
    try:
        with writing(run_dir / "tensorboard"):  # other files are named where they are written
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except InputError:
        raise
    except MisconfigurationException as error:
        raise InputError(f"trainer, callbacks: {first_line(error)}; change that setting") from None
    except Exception as error:
        mistake = refused(error, checkpoint)
        if mistake is None:
            raise
        raise mistake from None
    seconds = time.monotonic() - started
    return _leave(cfg, module, data, trainer, run_dir, seconds, memory_used(trainer, needed))


def _data(cfg: Any, module: Any, source: Any, collection: Any, sampler: Any) -> Any:
    """The DataModule; its dev_split is None where text alone is trained on."""
    from caravan.data.datamodule import DataModule
    from caravan.data.unlabelled import Unlabelled
    from caravan.models import hardware

    for length in cfg.validation.read_lengths:
        _reading(module, length)  # what cannot be read at the end is refused before training
    budget = hardware.chunk(cfg.batching.token_budget)
    training = module.training_set(collection, source.train_split, sampler, budget)
    text_alone = isinstance(training, Unlabelled) and not collection.splits
    return DataModule(
        collection,
        module.reading(),
        training,
        None if text_alone else source.dev_split,
        ignore_identical_ids=cfg.ignore_identical_ids,
        **{**cfg.batching, "token_budget": budget},
        **{key: value for key, value in cfg.validation.items() if key not in AT_THE_END},
    )


def _leave(
    cfg: Any,
    module: Any,
    data: Any,
    trainer: Any,
    run_dir: Path,
    seconds: float,
    memory: float | None,
) -> float | None:
    """The model folder of the best weights, and figures; returns the best of what is monitored."""
    from caravan.export.model_card import write
    from caravan.models import folder
    from caravan.models.backbone import parameter_counts
    from caravan.training.checkpoints import best_weights
    from caravan.training.facts import of_data, recipe

    told = {**of_data(build(cfg, "data")["data"], data), "recipe": recipe(cfg)}
    watched = trainer.checkpoint_callback
    best_path = getattr(watched, "best_model_path", "")
    best = None
    if best_path:
        module.load_weights(best_weights(Path(best_path)))
        best = None if watched.monitor is None else float(watched.best_model_score)
    read = {
        length: _read_at(length, trainer, module, data)
        for length in (cfg.validation.read_lengths if data.dev_split is not None else ())
    }
    data.templates = module.reading()
    asked = cfg.validation.train_queries if data.dev_split is not None else None
    trained_on = {} if asked is None else _of_training(cfg, trainer, module, data, asked)
    network = module.whole()
    if trainer.is_global_zero:
        facts = {
            "name": cfg.name,
            "base_model": module.backbone.name,
            "collection": f"{data.collection.name} ({data.collection.digest[:12]})",
            "updates": trainer.global_step,
            "monitored": getattr(watched, "monitor", None),
            "best": best,
        }
        folder.save(
            run_dir / "model", network, module.tokenizer, module.encoding, {**facts, **told}
        )
        write(run_dir / "model", tokenizer=module.tokenizer)
        figures = {**facts, "train_seconds": seconds, **({"read": read} if read else {})}
        figures |= {"train": trained_on} if trained_on else {}
        trained, total = parameter_counts(network)
        figures |= {"trained_parameters": trained, "parameters": total}
        figures |= {"memory_gib": round(memory, 3)} if memory is not None else {}
        manifests.write_json(run_dir / "metrics.json", figures)
    return best


def _of_training(cfg: Any, trainer: Any, module: Any, data: Any, queries: int) -> dict[str, float]:
    """The validation's figures of the best weights for training queries, over as many passages."""
    from caravan.training.callbacks import named

    data.ask(build(cfg, "data")["data"].train_split, queries, cfg.validation.passages)
    last = _asked("train_queries", trainer, module, data)
    log.info("training queries: %s", named(last))
    return {name.removeprefix("val/"): value for name, value in last.items() if "val/" in name}


def _asked(name: str, trainer: Any, module: Any, data: Any) -> dict[str, float]:
    """The figures of a validation of another kind, beside the curves and run of those before."""
    callbacks = [callback for callback in trainer.callbacks if hasattr(callback, "run_file")]
    files, loggers = [callback.run_file for callback in callbacks], trainer.loggers
    for callback, file in zip(callbacks, files, strict=True):
        callback.run_file = file.with_name(f"{name}.trec")
    trainer.loggers = []
    try:
        (*_, last) = trainer.validate(module, datamodule=data, verbose=False)
    finally:
        trainer.loggers = loggers
        for callback, file in zip(callbacks, files, strict=True):
            callback.run_file = file
    return dict(last)


def _read_at(length: int, trainer: Any, module: Any, data: Any) -> dict[str, float]:
    """The validation's figures of the best weights, with passages of another length."""
    from caravan.training.callbacks import named

    data.templates = _reading(module, length)
    last = _asked(f"read_{length}", trainer, module, data)
    log.info("read at %d tokens: %s", length, named(last))
    return {
        name.removeprefix("val/"): value
        for name, value in last.items()
        if name.startswith("val/") and "first_stage" not in name
    }


def _reading(module: Any, length: int) -> Any:
    """How the model reads texts, with passages of another length."""
    encoding = replace(module.encoding, passage_length=length)
    try:
        return type(module.reading())(module.tokenizer, encoding)
    except InputError as error:
        raise InputError(f"validation.read_lengths={length}: {error}") from None


def _trainer(make: Any, **settings: Any) -> Any:
    """Lightning's Trainer; a device that is not there is the user's mistake."""
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    try:
        return make(**settings)
    except (MisconfigurationException, ValueError, TypeError) as error:
        raise InputError(
            f"trainer: {first_line(error)}; change the settings of trainer or strategy"
        ) from None


def _validate_at_least_once(trainer: Any, batches: int) -> None:
    """Validate at the run's end where it would end before its first validation.

    Without a validation there is no figure and no best checkpoint, however long the run was.

    Args:
        batches: of one epoch.
    """
    every, per_epoch = trainer.val_check_interval, trainer.check_val_every_n_epoch
    last = batches if per_epoch is not None else _batches(trainer, batches)
    if isinstance(every, int) and last is not None and 0 < last < every:
        if is_main_process():
            log.warning(
                "trainer.val_check_interval=%d is beyond the %d batches of %s; it validates after"
                " %d",
                *(every, last, "the run" if per_epoch is None else "an epoch", last),
            )
        trainer.val_check_interval = last


def _tell_of_warmup(cfg: Any, last: int) -> None:
    """A small collection's epoch may be over before the learning rate has risen."""
    given = cfg.optimizer.get("warmup_steps")
    if isinstance(given, int) and given >= last > 0 and is_main_process():
        log.warning(
            "optimizer.warmup_steps=%d is not over in the %d updates of the run, so the learning"
            " rate stays below optimizer.lr=%g; set it to %d",
            *(given, last, cfg.optimizer.get("lr", math.nan), last // 10),
        )


def _on_a_screen() -> bool:
    """Whether a progress bar can be drawn: on a terminal, or in a notebook."""
    from rich import get_console

    return get_console().is_terminal or get_console().is_jupyter


def _batches(trainer: Any, batches: int) -> int | None:
    """Batches of the whole run, None where only time ends it.

    Args:
        batches: of one epoch.
    """
    ends = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs * batches)
    if trainer.max_steps >= 0:
        # An epoch's last batch makes an update, however few were accumulated.
        accumulated = trainer.accumulate_grad_batches
        epochs, updates_left = divmod(trainer.max_steps, max(math.ceil(batches / accumulated), 1))
        ends.append(epochs * batches + min(updates_left * accumulated, batches))
    return min(ends) if ends else None
