"""The task of `evaluate.py`: build an evaluation from the config, run it and print its metrics.

python evaluate.py retriever=<model folder>|bm25|<run file> data=beir data.path=<folder>
python evaluate.py retriever=[bm25,<model folder>] fuse=rrf reranker=<model folder>
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from caravan.cli import suite
from caravan.cli.schema import build, recorded
from caravan.errors import InputError
from caravan.report.records import to_depth
from caravan.report.suites import show_suite
from caravan.report.summary import show_stages
from caravan.retrieval import pipeline
from caravan.retrieval.inference import Models
from caravan.retrieval.pipeline import Evaluation
from caravan.retrieval.rerank import Reranking
from caravan.retrieval.systems import Component, Systems

log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate with a composed and checked config; returns the content of metrics.json.

    Raises:
        InputError: If the data, a model or run_dir is invalid. A suite raises at its end, with the
            collections that failed.
    """
    models = models_of(cfg)
    systems = systems_of(cfg)
    systems.check_lengths(models)
    if cfg.collections is None:
        evaluation = _open(cfg, models)
        metrics = pipeline.evaluate(evaluation)
        if metrics:
            _report(evaluation, metrics)
        return metrics
    members = suite.each(cfg)
    metrics = pipeline.evaluate_suite(
        Path(cfg.run_dir),
        {member.folder: partial(_open, one, models) for member, one in members.items()},
        {member.folder: member.group for member in members},
        recorded(cfg),
        _report,
    )
    if metrics.get("collections"):
        show_suite(metrics, Path(cfg.run_dir))
    if failed := metrics.get("failed"):
        lines = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise InputError(
            "collections-failed",
            f"{len(failed)} of {len(members)} collections failed and are not in the mean:\n"
            f"{lines}\nfinished collections are kept; the same command resumes the others",
        )
    return metrics


def models_of(cfg: DictConfig) -> Models:
    """The `Models` with the settings of a config."""
    return Models(
        cfg.precision, cfg.token_budget, cfg.num_workers, cfg.attention, cfg.trust_remote_code
    )


def systems_of(cfg: DictConfig) -> Systems:
    """The systems of a config; raises for invalid settings before any work starts."""
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    parts = {}
    for name in ("bm25", "index", "fuse"):
        build(cfg, name)
        parts[name] = Component(partial(_part, cfg, name), settings[name])
    names = settings["retriever"]
    return Systems(
        retrievers=[str(name) for name in (names if isinstance(names, list) else [names])],
        reranker=None if cfg.reranker is None else Path(cfg.reranker),
        rerank=Reranking(**settings["rerank"]),
        lengths={name: settings[name] for name in ("query_length", "passage_length")},
        block=cfg.block,
        **parts,
    )


def _part(cfg: DictConfig, name: str) -> Any:
    return build(cfg, name)[name]


def _open(cfg: DictConfig, models: Models) -> Evaluation:
    data = _part(cfg, "data")
    return Evaluation(
        collection=data.collection(Path(cfg.cache_dir)),
        split=data.split,
        run_dir=Path(cfg.run_dir),
        store=Path(cfg.store),
        systems=systems_of(cfg),
        models=models,
        measures=list(cfg.measures),
        ignore_identical_ids=cfg.ignore_identical_ids,
        config=recorded(cfg),
    )


def _report(evaluation: Evaluation, metrics: dict[str, Any]) -> None:
    """Print the metrics of a collection, without measures deeper than its runs."""
    shown = to_depth(metrics)
    if len(metrics["stages"]) > 1:
        show_stages(metrics)
    if shown["too_deep"]:
        left_out = ", ".join(shown["too_deep"])
        log.info(f"{shown['system']} has depth {shown['depth']}, so it has no {left_out}")
    overall = "  ".join(f"{name} {value:.4f}" for name, value in shown["overall"].items())
    name = metrics["collection"]["name"]
    log.info(f"{metrics['system']} on {name} {metrics['split']}: {overall}")
    log.info(averaged(metrics))
    run_dir = evaluation.stages.run_dir
    log.info("run %s, metrics %s", run_dir / metrics["run"], run_dir / "metrics.json")


def averaged(metrics: dict[str, Any]) -> str:
    """Describe the queries in the mean in one line."""
    zero = {
        "without a relevant passage": metrics["without_relevant"],
        "without a passage in the run": metrics["missing"] - metrics["unknown_queries"],
        "unknown to the collection": metrics["unknown_queries"],
    }
    counted = ", ".join(f"{count:,} {what}" for what, count in zero.items() if count)
    text = f"mean over {metrics['queries']:,} judged queries"
    if counted:
        text += f" ({counted}: these score 0)"
    if lost := metrics["unknown_passages"]:
        text += f"; {lost:,} judgements of passages unknown to the corpus count as not found"
    return text
