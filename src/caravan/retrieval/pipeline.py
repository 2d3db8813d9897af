"""An evaluation: retrieve, fuse, rerank, and score every stage; what `evaluate.py` does.

    python evaluate.py retriever=<model folder>|bm25|<run file> data=beir data.path=<folder>
    python evaluate.py retriever=[bm25,<model folder>] fuse=rrf reranker=<model folder>

    run_dir/config.yaml what was asked, resolved
    run_dir/runs/       <stage>.<split>.trec, the run of each stage
    run_dir/metrics.json  figures of the last stage, and of all stages side by side

Mining hard negatives is this over the training queries (`data.split=train`).
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from caravan import manifest
from caravan.config import build, recorded
from caravan.contract import FILE
from caravan.errors import InputError
from caravan.ranks import leads
from caravan.retrieval.stages import Stage, Stages

log = logging.getLogger(__name__)


def evaluate(cfg: Any) -> dict[str, Any]:
    """Run `evaluate.py` for a composed and checked config; returns what metrics.json holds."""
    from omegaconf import OmegaConf

    parts = build(cfg, "data", "index", "bm25", "fuse")
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    run_dir = Path(cfg.run_dir)
    if (run_dir / "checkpoints").exists():
        raise InputError(f"{run_dir} holds a training run; choose another name= for the evaluation")
    if leads():
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(recorded(cfg), "utf-8")
    stages = Stages(
        collection=parts["data"].collection(Path(cfg.cache_dir)),
        split=parts["data"].split,
        run_dir=run_dir,
        store=Path(cfg.store),
        k=parts["index"].k,
    )
    asked = settings["retriever"]
    retrievers = asked if isinstance(asked, list) else [asked]
    made = [_retrieved(stages, str(name), parts, settings) for name in retrievers]
    if len(made) > 1:
        made.append(stages.fused(parts["fuse"], settings["fuse"], made))
    if settings["reranker"] is not None:
        made.append(
            stages.reranked(
                Path(settings["reranker"]),
                settings["rerank"],
                made[-1],
                precision=cfg.precision,
                token_budget=cfg.token_budget,
                num_workers=cfg.num_workers,
                attention=cfg.attention,
            )
        )
    if not leads():
        return {}
    metrics = _scored(stages, made, _measures(stages, settings["measures"]))
    if len(made) > 1:
        from caravan.report.table import show_stages

        show_stages(metrics)
    overall = "  ".join(f"{name} {value:.4f}" for name, value in metrics["overall"].items())
    log.info(
        "%s on %s %s: %s",
        *(metrics["system"], metrics["collection"]["name"], metrics["split"], overall),
    )
    log.info("run %s, figures %s", run_dir / metrics["run"], run_dir / "metrics.json")
    return metrics


def _retrieved(stages: Stages, name: str, parts: dict[str, Any], settings: dict[str, Any]) -> Stage:
    """The first stage that a name stands for: bm25, a model folder, or a run file."""
    if name == "bm25":
        return stages.bm25(parts["bm25"], settings["bm25"])
    path = Path(name)
    if path.is_file() and path.name != FILE:
        return stages.given(path)
    if not path.exists():
        raise InputError(f"retriever={name}: there is no model folder and no run file {name}")
    lengths = ("query_length", "passage_length")
    return stages.dense(
        path,
        parts["index"],
        settings["index"],
        precision=settings["precision"],
        lengths={key: settings[key] for key in lengths if settings[key] is not None},
        token_budget=settings["token_budget"],
        block=settings["block"],
        num_workers=settings["num_workers"],
        attention=settings["attention"],
    )


def _measures(stages: Stages, asked: list[str]) -> list[str]:
    """The measures as the split's judgements want them."""
    from caravan.retrieval.metrics import spelled

    relevant_from = stages.collection.relevant_from.get(stages.split, 1)
    measures = spelled(asked, relevant_from)
    if measures != asked:
        log.info(
            "%s %s: relevant from grade %d on, so scored by %s",
            *(stages.collection.name, stages.split, relevant_from, ", ".join(measures)),
        )
    return measures


def _scored(stages: Stages, made: list[Stage], measures: list[str]) -> dict[str, Any]:
    """Figures of all stages in metrics.json, unless they are there from the same runs."""
    path = stages.run_dir / "metrics.json"
    scored_from = {
        "stages": [{**stage.inputs, "stage": stage.name} for stage in made],
        "runs": [stage.digest for stage in made],
        "measures": measures,
    }
    if not manifest.matches(path, scored_from):
        manifest.remove(path)
        manifest.write_json(path, _figures(stages, made, measures))
        manifest.write(path, scored_from)
    return json.loads(path.read_text("utf-8"))


def _figures(stages: Stages, made: list[Stage], measures: list[str]) -> dict[str, Any]:
    from caravan.retrieval.metrics import deepest, score_run

    collection, rows = stages.collection, []
    scored: dict[str, Any] = {}
    queries = len(stages.qrels.queries)
    best = None
    for stage in made:
        run = stages.read(stage, depth=max(1, deepest(measures)))
        scored = score_run(run, stages.qrels, collection.queries, collection.corpus, measures)
        first = next(iter(scored["overall"].values()))
        rows.append(
            {
                "stage": stage.name,
                "run": f"runs/{stage.path.name}",
                "run_xxh3": stage.digest,
                "overall": scored["overall"],
                "seconds": stage.seconds,
                "queries_per_second": queries / stage.query_seconds
                if stage.query_seconds
                else None,
                "gain": None if best is None else first - best,
            }
        )
        best = first if best is None else max(best, first)
    last = made[-1]
    return {
        "system": last.name,
        "collection": {"name": collection.name, "digest": collection.digest},
        "split": stages.split,
        "passages": len(collection.corpus),
        "run": f"runs/{last.path.name}",
        "seconds": sum(stage.seconds for stage in made),
        "facts": last.facts,
        "stages": rows,
        **scored,
    }
