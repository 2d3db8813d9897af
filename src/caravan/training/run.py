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
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caravan import manifest
from caravan.config import build
from caravan.contract import Contract, files_digest
from caravan.data.collection import Collection
from caravan.errors import InputError
from caravan.ranks import leads

log = logging.getLogger(__name__)

# Settings that change how a run is done, not what comes out of it.
_NO_INPUTS = (
    *("resume", "cache_dir", "run_dir", "name", "logger"),
    *("batching.num_workers", "callbacks.progress", "trainer.enable_progress_bar"),
)
# What a resumed run may change: how long it trains, where, and how it is watched. Anything else
# would give the weights of one run the name of another.
_MAY_CHANGE = (
    *("trainer.max_steps", "trainer.max_epochs", "strategy"),
    *("trainer.devices", "trainer.num_nodes", "trainer.accelerator", "batching.token_budget"),
    *("callbacks", "validation", "index"),
    *("trainer.log_every_n_steps", "trainer.enable_model_summary"),
)


def train(cfg: Any) -> float | None:
    """Run `train.py` for a composed and checked config.

    Returns:
        The monitored figure of the best checkpoint (for sweepers), None if nothing was validated.
    """
    from omegaconf import OmegaConf

    run_dir = Path(cfg.run_dir)
    source = build(cfg, "data")["data"]
    collection = source.collection(Path(cfg.cache_dir)) if _reads_collection(cfg) else None
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    inputs = _inputs(settings, collection)
    model_dir, checkpoint = run_dir / "model", run_dir / "checkpoints" / "last.ckpt"
    if manifest.matches(model_dir, inputs):
        facts = (manifest.read(model_dir) or {})["facts"]
        log.info("%s is there already, from the same settings and data", model_dir)
        return facts["best"]
    begun = run_dir / "config.yaml"
    if leads():
        _refuse_other_run(run_dir, begun, inputs, cfg.resume)
        # A kill between any two of these lines leaves nothing that claims to be what it is not.
        manifest.write(begun, inputs)
        begun.write_text(OmegaConf.to_yaml(cfg, resolve=True), "utf-8")
        manifest.remove(model_dir)
    if cfg.trainer.max_steps == 0:
        _adopt(cfg, collection, run_dir)
        best = None
    else:
        last = checkpoint if cfg.resume and checkpoint.exists() else None
        best = _fit(cfg, source, collection, run_dir, last)
        log.info("curves: tensorboard --logdir %s", run_dir / "tensorboard")
    if leads():
        manifest.write(model_dir, inputs, {"best": best})
        log.info("model folder %s", model_dir)
    return best


def _reads_collection(cfg: Any) -> bool:
    """A released model becomes a model folder without any collection (`trainer.max_steps=0`)."""
    return cfg.trainer.max_steps != 0 or build(cfg, "backbone")["backbone"].trains_tokenizer


def _inputs(settings: dict[str, Any], collection: Collection | None) -> dict[str, Any]:
    """What determines the weights: settings, collection, and the content of all that is read."""
    from caravan.models import hardware

    kept = _pruned(settings)
    kept["precision"] = hardware.resolve(settings["precision"])
    searched = settings["validation"]["run"]
    kept["validation"] = {
        **settings["validation"],
        "run_digest": None if searched is None else _run_digest(searched),
    }
    name = settings["backbone"].get("name")
    weights = files_digest(Path(name)) if name and Path(name).is_dir() else None
    inputs = {
        "collection": collection.digest if collection else None,
        "runs": {str(p): _run_digest(p) for p in (settings["sampler"] or {}).get("runs") or ()},
        "backbone_digest": weights,
        **kept,
    }
    # Where things are written is no input either.
    return _without(inputs, str(settings["run_dir"]))


def _pruned(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings without `_NO_INPUTS`."""
    kept = {key: value for key, value in settings.items() if key not in _NO_INPUTS}
    for group, _, key in (name.partition(".") for name in _NO_INPUTS):
        if key and isinstance(kept.get(group), dict):
            kept[group] = {name: value for name, value in kept[group].items() if name != key}
    return kept


def _run_digest(path: str) -> str:
    """A digest of a run file, read in blocks: a run of millions of queries is gigabytes."""
    import xxhash

    if not Path(path).is_file():
        raise InputError(
            f"{path}: no such run; write it with evaluate.py (retriever=bm25 or a model"
            " folder) over the same collection"
        )
    hasher = xxhash.xxh3_128()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def _without(tree: Any, run_dir: str) -> Any:
    if isinstance(tree, dict):
        return {key: _without(value, run_dir) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without(value, run_dir) for value in tree]
    return tree.replace(run_dir, "<run_dir>") if isinstance(tree, str) else tree


def _refuse_other_run(run_dir: Path, begun: Path, inputs: dict[str, Any], resume: bool) -> None:
    """Neither overwrite a run nor continue one that is another."""
    if not begun.exists() and not (run_dir / "checkpoints" / "last.ckpt").exists():
        return
    changed = manifest.differences(begun, inputs)
    if not resume:
        raise InputError(
            f"{run_dir} holds a run already"
            + (f" (it differs in {'; '.join(changed[:3])})" if changed else ", not finished")
            + "; continue it with resume=true, choose another name=, or remove the folder"
        )
    another = [line for line in changed if not _is_of(line, _MAY_CHANGE + _NO_INPUTS)]
    if another:
        raise InputError(
            f"{run_dir} cannot be resumed, for it holds another run: {'; '.join(another[:3])}"
            + (f" and {len(another) - 3} more" if len(another) > 3 else "")
            + "; give the settings and data of that one, choose another name=, or remove the folder"
        )
    for line in changed:
        if not _is_of(line, _NO_INPUTS):
            log.warning("resumed with another setting: %s", line)


def _is_of(difference: str, places: Sequence[str]) -> bool:
    """Whether a line of `manifest.differences` is about one of these settings."""
    key = difference.partition(": ")[0]
    return any(key == place or key.startswith(f"{place}.") for place in places)


def _module(cfg: Any, collection: Collection | None) -> Any:
    """The LightningModule with its tokenizer; weights come with `configure_model`."""
    import pytorch_lightning as pl

    # Lightning tells about devices it has not found; what matters is in `_facts`.
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    pl.seed_everything(cfg.seed, workers=True, verbose=False)
    parts = build(cfg, "backbone", "peft", "loss", "optimizer", "stage", "contract")
    return parts["stage"](
        backbone=parts["backbone"],
        peft=parts["peft"],
        tokenizer=parts["backbone"].tokenizer(collection, Path(cfg.cache_dir)),
        contract=Contract(**parts["contract"]),
        loss=parts["loss"],
        optimizer=parts["optimizer"],
        seed=cfg.seed,
    )


def _adopt(cfg: Any, collection: Collection | None, run_dir: Path) -> None:
    """Make a model folder of a backbone as it is, released or random."""
    from caravan.models import folder

    module = _module(cfg, collection)
    module.configure_model()
    facts = {"name": cfg.name, "base_model": module.backbone.name, "updates": 0}
    folder.save(run_dir / "model", module.model, module.tokenizer, module.contract, facts)


def _fit(
    cfg: Any, source: Any, collection: Any, run_dir: Path, checkpoint: Path | None
) -> float | None:
    import torch

    from caravan.data.datamodule import DataModule
    from caravan.data.templates import Templates
    from caravan.models import folder, hardware
    from caravan.models.backbone import parameter_counts
    from caravan.training.callbacks import AtomicCheckpoints

    module = _module(cfg, collection)
    parts = build(cfg, "sampler", "strategy", "logger", "callbacks", "trainer")
    data = DataModule(
        collection,
        Templates(module.tokenizer, module.contract),
        parts["sampler"],
        source.train_split,
        source.dev_split,
        cfg.seed,
        **{**cfg.batching, "token_budget": hardware.chunk(cfg.batching.token_budget)},
        **cfg.validation,
    )
    callbacks = [callback for callback in parts["callbacks"].values() if callback is not None]
    trainer = parts["trainer"](
        precision=hardware.trainer_precision(hardware.resolve(cfg.precision)),
        strategy=parts["strategy"],
        logger=[logger for logger in parts["logger"].values() if logger is not None],
        callbacks=callbacks,
        plugins=[AtomicCheckpoints()],
        default_root_dir=run_dir,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
    )
    module.configure_model()
    batches = data.batches_per_epoch(trainer)
    if trainer.is_global_zero:
        for line in _facts(cfg, trainer, data, batches, parameter_counts(module), checkpoint):
            log.info(line)
    _validate_at_least_once(trainer, batches)
    started = time.monotonic()
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except InputError as error:
        raise _without_traceback(error) from None
    seconds = time.monotonic() - started
    watched = trainer.checkpoint_callback
    best_path = Path(getattr(watched, "best_model_path", "") or "")
    best = None
    if best_path.is_file():
        state = torch.load(best_path, map_location="cpu", weights_only=True)
        module.load_state_dict(state["state_dict"], strict=False)
        best = float(watched.best_model_score)
    if trainer.is_global_zero:
        facts = {
            "name": cfg.name,
            "base_model": module.backbone.name,
            "collection": f"{collection.name} ({collection.digest[:12]})",
            "updates": trainer.global_step,
            "monitored": getattr(watched, "monitor", None),
            "best": best,
        }
        folder.save(run_dir / "model", module.model, module.tokenizer, module.contract, facts)
        manifest.write_json(run_dir / "metrics.json", {**facts, "train_seconds": seconds})
    return best


def _validate_at_least_once(trainer: Any, batches: int) -> None:
    """Validate at the run's end where it would end before its first validation.

    Without a validation there is no figure and no best checkpoint, however long the run was.

    Args:
        batches: of one epoch.
    """
    every, per_epoch = trainer.val_check_interval, trainer.check_val_every_n_epoch
    last = batches if per_epoch is not None else _batches(trainer, batches)
    if isinstance(every, int) and last is not None and 0 < last < every:
        if leads():
            log.warning(
                "trainer.val_check_interval=%d is beyond the %d batches of %s; it validates after"
                " %d",
                *(every, last, "the run" if per_epoch is None else "an epoch", last),
            )
        trainer.val_check_interval = last


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


def _without_traceback(error: InputError) -> InputError:
    """The user's mistake itself: a loader's worker wraps it into the text of its traceback."""
    text = str(error)
    if not text.startswith("Caught InputError in DataLoader worker"):
        return error
    told = text.strip().splitlines()[-1]
    return InputError(told.partition("InputError: ")[2] or told)


def _facts(
    cfg: Any,
    trainer: Any,
    data: Any,
    per_epoch: int,
    parameters: tuple[int, int],
    checkpoint: Path | None,
) -> Iterator[str]:
    """The first lines of a run: what is trained, on what, and how large an update is."""
    from caravan.training.optim import updates

    batch, accumulated = cfg.batching.queries_per_batch, trainer.accumulate_grad_batches
    group = 1 + data.sampler.number
    steps = updates(trainer, per_epoch)
    yield f"{cfg.name} in {cfg.run_dir}" + (f", resumed from {checkpoint}" if checkpoint else "")
    yield (
        f"{trainer.num_devices * trainer.num_nodes} x {trainer.strategy.root_device.type}, "
        f"{trainer.precision}; {parameters[0]:,} trainable parameters of {parameters[1]:,}"
    )
    yield (
        f"{len(data.groups):,} training queries of {data.collection.name}; "
        f"{batch * accumulated} queries an update, {group - 1} hard negatives a query, "
        f"{batch * group - 1} with those in the batch; {steps:,} updates, {per_epoch:,} batches an"
        " epoch"
    )
    if steps < trainer.max_steps:
        log.warning(
            "trainer.max_epochs=%d ends the run after %d updates, before trainer.max_steps=%d",
            *(trainer.max_epochs, steps, trainer.max_steps),
        )
    yield (
        f"validation: {len(data.dev_qrels.queries):,} queries over {len(data.dev_passages):,} of "
        f"{len(data.collection.corpus):,} passages"
    )
