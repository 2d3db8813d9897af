"""The task of `train.py`: build a training run from the config and run it."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caravan.cli.check import is_class
from caravan.cli.schema import build, recorded
from caravan.cli.signatures import locate
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import hardware
from caravan.models.backbone import INHERITED, FromFolder
from caravan.training import fit

PARTS = (
    "data",
    "backbone",
    "peft",
    "stage",
    "loss",
    "optimizer",
    "encoding",
    "sampler",
    "trainer",
    "strategy",
    "logger",
    "callbacks",
    "batching",
    "validation",
)


def train(cfg: DictConfig) -> float | None:
    """Train with a composed and checked config.

    Returns:
        The monitored metric of the best checkpoint, for sweepers; None without validation.
    """
    cfg = completed(cfg)
    hardware.refuse_attention(cfg.backbone.get("attention", "auto"))
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    parts = build(cfg, *PARTS)
    validation = parts["validation"]
    train_queries, read_lengths = (validation.pop(key) for key in ("train_queries", "read_lengths"))
    run = fit.Training(
        name=cfg.name,
        run_dir=Path(cfg.run_dir),
        cache_dir=Path(cfg.cache_dir),
        source=parts["data"],
        backbone=parts["backbone"],
        peft=parts["peft"],
        stage=parts["stage"],
        loss=parts["loss"],
        optimizer=parts["optimizer"],
        encoding=Encoding(**parts["encoding"]),
        sampler=parts["sampler"],
        trainer=parts["trainer"],
        max_steps=cfg.trainer.max_steps,
        strategy=parts["strategy"],
        loggers=[logger for logger in (parts["logger"] or {}).values() if logger is not None],
        callbacks=[callback for callback in parts["callbacks"].values() if callback is not None],
        batching=parts["batching"],
        validation={**validation, "ignore_identical_ids": cfg.ignore_identical_ids},
        train_queries=train_queries,
        read_lengths=read_lengths,
        gradcache=cfg.gradcache.chunk,
        seed=cfg.seed,
        resume=cfg.resume,
        precision=cfg.precision,
        settings=settings,
        config=recorded(cfg),
        facts={**source_facts(parts["data"]), "recipe": recipe(cfg)},
    )
    return fit.train(run)


def completed(cfg: DictConfig) -> DictConfig:
    """A config in which values replace the nulls that a backbone takes from its model folder.

    Accepts a config that has not been checked. If the folder cannot be read, which the check
    reports, they become the default values.
    """
    folder = _folder_of(cfg)
    if folder is None or not isinstance(cfg.get("encoding"), DictConfig):
        return cfg
    try:
        inherited = FromFolder.inherited(Path(folder))
    except InputError:
        inherited = {name: getattr(Encoding(), name) for name in INHERITED}
    cfg = copy.deepcopy(cfg)
    direction = inherited.pop("bidirectional")
    for node, values in (("backbone", {"bidirectional": direction}), ("encoding", inherited)):
        given: Any = OmegaConf.to_container(cfg[node], resolve=False)
        for name, value in values.items():
            if given.get(name, value) is None:
                cfg[node][name] = value
    return cfg


def _folder_of(cfg: DictConfig) -> str | None:
    """The model folder from which the backbone is initialized, if it is a `FromFolder`."""
    try:
        kind = locate(str(OmegaConf.select(cfg, "backbone._target_")))
        folder = OmegaConf.select(cfg, "backbone.folder")
    except (LookupError, OmegaConfBaseException):
        return None
    return folder if is_class(kind, FromFolder) and isinstance(folder, str) else None


def source_facts(source: Any) -> dict[str, Any]:
    """The dataset's id on the hub and its language, if the data source knows them."""
    named = {"datasets": getattr(source, "hub_id", None)}
    named["language"] = getattr(source, "language", None)
    return {name: [value] for name, value in named.items() if value is not None}


def recipe(cfg: DictConfig) -> dict[str, Any]:
    """The hyperparameters for the model card; unset ones are omitted."""

    def class_of(node: Any) -> str:
        if node is None:
            return ""
        if node.get("losses") is not None:
            return " + ".join(map(class_of, node.losses))
        return str(node.get("_target_")).rpartition(".")[2]

    def given(place: str) -> Any:
        return OmegaConf.select(cfg, place)

    accumulated = given("trainer.accumulate_grad_batches") or 1
    rows = {
        "stage": class_of(cfg.stage),
        "loss": class_of(cfg.loss),
        "temperature": given("loss.temperature"),
        "queries an update": cfg.batching.queries_per_batch * accumulated,
        "negatives a query": given("sampler.number"),
        "negatives from": ", ".join(Path(run).name for run in given("sampler.runs") or ()),
        "optimizer": class_of(cfg.optimizer),
        "learning rate": given("optimizer.lr"),
        "warm-up steps": given("optimizer.warmup_steps"),
        "LoRA": None if given("peft.rank") is None else f"rank {given('peft.rank')}",
        "seed": cfg.seed,
    }
    return {name: value for name, value in rows.items() if value not in (None, "")}
