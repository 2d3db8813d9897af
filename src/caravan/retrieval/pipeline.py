"""An evaluation: retrieve, fuse, rerank, and score every stage; what `evaluate.py` does.

    python evaluate.py retriever=<model folder>|bm25|<run file> data=beir data.path=<folder>
    python evaluate.py retriever=[bm25,<model folder>] fuse=rrf reranker=<model folder>

    run_dir/config.yaml the resolved config; its manifest has the evaluation's inputs
    run_dir/runs/       <stage>.<split>.trec, the run of each stage
    run_dir/metrics.json  figures of the last stage, and of all stages side by side

Of a suite (`caravan.cli.suite`), each collection has such a folder in run_dir.
Mining hard negatives is this over the training queries (`data.split=train`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from caravan import manifests
from caravan.cli import suite
from caravan.cli.schema import build, recorded
from caravan.distributed import is_main_process, world_size
from caravan.encoding import FILE
from caravan.errors import InputError, OccupiedError, is_termination, sentence
from caravan.files import claimed, replacing
from caravan.retrieval.folders import Folders
from caravan.retrieval.inputs import (
    inputs_of,
    record_of,
    refuse_another,
    suite_inputs,
)
from caravan.retrieval.means import means
from caravan.retrieval.stages import Stage, Stages

log = logging.getLogger(__name__)

_LENGTHS = ("query_length", "passage_length")


def evaluate(cfg: Any) -> dict[str, Any]:
    """Run `evaluate.py` for a composed and checked config; returns what metrics.json holds.

    Raises:
        InputError: what is wrong with the collection; of a suite, at the end, those that failed.
    """
    steps = _Steps(cfg)
    if cfg.collections is None:
        evaluation = _Evaluation(cfg, steps.folders)
        for step in steps:
            evaluation.do(step)
        return evaluation.scored()
    with ExitStack() as held:
        return _of_suite(cfg, steps, held)


def _of_suite(cfg: Any, steps: _Steps, held: ExitStack) -> dict[str, Any]:
    """Stage by stage, each over all collections, so that each model loads once.

    A collection that fails is told of at the end.

    Args:
        held: of the locks of the collections' folders.
    """
    run_dir = Path(cfg.run_dir)
    members = suite.each(cfg)
    inputs = suite_inputs(list(members))
    refuse_another(run_dir, inputs)
    evaluations: dict[suite.Member, _Evaluation] = {}
    failed: dict[str, str] = {}
    for member, one in members.items():
        with _going_on(member.folder, failed):
            if is_main_process():
                held.enter_context(claimed(Path(one.run_dir)))
            evaluations[member] = _Evaluation(one, steps.folders)
    _write_config(cfg, inputs)
    records = {}
    for number, step in enumerate(steps, start=1):
        for member, evaluation in evaluations.items():
            if member.folder in failed:
                continue
            with _going_on(member.folder, failed):
                evaluation.do(step)
                if number == len(steps):
                    records[member] = evaluation.scored()
    if not is_main_process():
        return {}
    metrics = {**means(records), "failed": failed}
    _write_metrics(run_dir / "metrics.json", metrics, metrics["collection"])
    if records:
        from caravan.report.collections import show

        show([run_dir])
    if failed:
        lines = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise InputError(
            f"{len(failed)} of {len(members)} collections failed, and are not in the mean:\n"
            f"{lines}\nwhat is finished stays; the same command goes on with these"
        )
    return metrics


@contextmanager
def _going_on(name: str, failed: dict[str, str]) -> Iterator[None]:
    """What fails here is told, and noted under its name.

    Several processes wait for one another's blocks; where one of them has failed, all of them end.
    """
    try:
        yield
    except Exception as error:
        if world_size() > 1 or is_termination(error) or isinstance(error, OccupiedError):
            raise
        message = sentence(error)
        log.error("%s: %s", name, message or "it failed", exc_info=message is None)
        reason = message or f"{type(error).__name__}: {error}"
        failed[name] = " ".join(reason.split())


class _Evaluation:
    """One collection, and the stages that were made of it so far."""

    def __init__(self, cfg: Any, folders: Folders) -> None:
        from omegaconf import OmegaConf

        settings: Any = OmegaConf.to_container(cfg, resolve=True)
        self.settings: dict[str, Any] = settings
        data = build(cfg, "data")["data"]
        collection = data.collection(Path(cfg.cache_dir))
        inputs = inputs_of(settings, collection, data.split, folders)
        refuse_another(Path(cfg.run_dir), inputs)
        _write_config(cfg, inputs)
        self.stages = Stages(
            collection=collection,
            split=data.split,
            run_dir=Path(cfg.run_dir),
            store=Path(cfg.store),
            k=cfg.index.k,
            folders=folders,
            ignore_identical_ids=cfg.ignore_identical_ids,
        )
        self.made: list[Stage] = []

    def do(self, step: Step) -> None:
        self.made.append(step(self.stages, self.made, self.settings))

    def scored(self) -> dict[str, Any]:
        """Figures of all stages, told and in metrics.json."""
        if not is_main_process():
            return {}
        measures = _measures(self.stages, self.settings["measures"])
        metrics = _scored(self.stages, self.made, measures)
        from caravan.report.records import to_depth

        shown = to_depth(metrics)
        if len(self.made) > 1:
            from caravan.report.summary import show_stages

            show_stages(shown)
        overall = "  ".join(f"{name} {value:.4f}" for name, value in shown["overall"].items())
        if shown["too_deep"]:
            log.info(
                "%s is %d deep, so it is not scored by %s",
                *(shown["system"], shown["depth"], ", ".join(shown["too_deep"])),
            )
        log.info(
            "%s on %s %s: %s",
            *(metrics["system"], metrics["collection"]["name"], metrics["split"], overall),
        )
        log.info("%s", averaged(metrics))
        run_dir = self.stages.run_dir
        log.info("run %s, figures %s", run_dir / metrics["run"], run_dir / "metrics.json")
        return metrics


Step = Callable[[Stages, list[Stage], dict[str, Any]], Stage]
"""Makes the next stage of a collection, from those before and the collection's settings."""


class _Steps:
    """What an evaluation does with a collection, in order."""

    def __init__(self, cfg: Any) -> None:
        lengths = {key: cfg[key] for key in _LENGTHS if cfg[key] is not None}
        self._fuse = build(cfg, "fuse")["fuse"]
        build(cfg, "index", "bm25")  # a wrong setting is told before anything starts
        self._cfg = cfg
        settings = (cfg.precision, lengths, cfg.token_budget, cfg.block, cfg.num_workers)
        self.folders = Folders(*settings, cfg.attention, cfg.trust_remote_code)
        names = [cfg.retriever] if isinstance(cfg.retriever, str) else list(cfg.retriever)
        self.folders.refuse_lengths(names, cfg.reranker, cfg.rerank)
        number = len(names)
        self._steps: list[Step] = [partial(self._retrieved, number=i) for i in range(number)]
        if number > 1:
            self._steps.append(self._fused)
        if cfg.reranker is not None:
            self._steps.append(self._reranked)

    def __iter__(self) -> Iterator[Step]:
        return iter(self._steps)

    def __len__(self) -> int:
        return len(self._steps)

    def _retrieved(
        self, stages: Stages, made: list[Stage], settings: dict[str, Any], number: int
    ) -> Stage:
        """The stage that a name stands for: bm25, a model folder, or a run file."""
        asked = settings["retriever"]
        name = str(asked[number] if isinstance(asked, list) else asked)
        if name == "bm25":
            return stages.bm25(self._fresh("bm25"), settings["bm25"])
        path = Path(name)
        if path.is_file() and path.name != FILE:
            return stages.given(path)
        if not path.exists():
            raise InputError(f"retriever={name}: there is no model folder and no run file {name}")
        return stages.dense(path, self._fresh("index"), settings["index"])

    def _fresh(self, part: str) -> Any:
        """An index of its own for each search: that of another collection is gone by then."""
        return build(self._cfg, part)[part]

    def _fused(self, stages: Stages, made: list[Stage], settings: dict[str, Any]) -> Stage:
        return stages.fused(self._fuse, settings["fuse"], made)

    def _reranked(self, stages: Stages, made: list[Stage], settings: dict[str, Any]) -> Stage:
        return stages.reranked(Path(settings["reranker"]), settings["rerank"], made[-1])


def _write_config(cfg: Any, inputs: dict[str, Any]) -> None:
    if is_main_process():
        config = record_of(Path(cfg.run_dir))
        manifests.write(config, inputs)
        with replacing(config) as scratch:
            scratch.write_text(recorded(cfg), "utf-8")


def _write_metrics(path: Path, metrics: dict[str, Any], scored_from: dict[str, Any]) -> None:
    manifests.remove(path)
    manifests.write_json(path, metrics)
    manifests.write(path, scored_from, {"xxh3": manifests.content_digest(path)})


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


def averaged(metrics: dict[str, Any]) -> str:
    """What the mean of an evaluation counts, in one line."""
    zero = {
        "without a relevant passage": metrics["without_relevant"],
        "without a passage in the run": metrics["missing"] - metrics["unknown_queries"],
        "unknown to the collection": metrics["unknown_queries"],
    }
    counted = ", ".join(f"{count:,} {what}" for what, count in zero.items() if count)
    text = f"mean over {metrics['queries']:,} judged queries"
    if counted:
        text += f" ({counted}: these count 0)"
    if lost := metrics["unknown_passages"]:
        text += f"; {lost:,} judgements of passages unknown to the corpus count as not found"
    return text


def _scored(stages: Stages, made: list[Stage], measures: list[str]) -> dict[str, Any]:
    """Figures of all stages in metrics.json, unless they are there from the same runs."""
    path = stages.run_dir / "metrics.json"
    scored_from = {
        "stages": [{**stage.inputs, "stage": stage.name} for stage in made],
        "runs": [stage.digest for stage in made],
        "measures": measures,
        "versions": manifests.versions(("ir_measures",)),
        "mean": "all judged queries",  # metrics.json of versions that left some out is made anew
    }
    if manifests.matches(path, scored_from):
        written = (manifests.read(path) or {}).get("facts", {}).get("xxh3")
        if written == manifests.content_digest(path):
            return manifests.read_json(path)
        log.warning("%s is not as it was written; the runs are scored again", path)
    _write_metrics(path, _figures(stages, made, measures), scored_from)
    return manifests.read_json(path)


def _figures(stages: Stages, made: list[Stage], measures: list[str]) -> dict[str, Any]:
    from caravan.retrieval.metrics import deepest, depth_of, score_run

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
                "depth": depth_of(run, stage.depth),
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
