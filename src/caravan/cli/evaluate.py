"""The task of `evaluate.py`: build an evaluation from the config, run it and print its metrics.

`searcher_of` builds what `python -m caravan.search` answers queries with.

    python evaluate.py retriever=<model folder>|bm25|<run file> data=beir data.path=<folder>
    python evaluate.py retriever=[bm25,<model folder>] fuse=rrf reranker=<model folder>
    python evaluate.py retriever=bm25 data=beir data.path=/data/beir 'collections=[scifact,quora]'

With `collections`, `data.path` is the folder of several collections. An entry is the name of a
folder or a pattern (`*`), optionally with a split (`msmarco:dev`). A folder of collections (BEIR's
cqadupstack) is expanded to all of them, which count as one in the mean.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from caravan.cli.check import Config, Rule, measures_are_computed, model_folder, neighbour
from caravan.cli.schema import build, recorded
from caravan.data.segments import Reading
from caravan.distributed import world_size
from caravan.errors import InputError
from caravan.files import listed
from caravan.report import records
from caravan.report.summary import stages_table, suites_section
from caravan.report.tables import show
from caravan.retrieval import peers, pipeline
from caravan.retrieval.inference import Models
from caravan.retrieval.interactive import Searcher, open_searcher
from caravan.retrieval.pipeline import Evaluation
from caravan.retrieval.rerank import Reranking
from caravan.retrieval.stages import Stages
from caravan.retrieval.store import Engine, Store
from caravan.retrieval.systems import Systems

CORPUS = ("corpus.jsonl", "corpus.jsonl.gz")
log = logging.getLogger(__name__)


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate with a composed and checked config; returns the content of metrics.json.

    Raises:
        InputError: If the data, a model or run_dir is invalid. With several collections, it is
            raised at the end, with those that failed.
    """
    peers.join()
    models, engine = models_of(cfg), engine_of(cfg)
    systems_of(cfg).check_settings(models)
    if cfg.collections is None:
        evaluation = _open(cfg, models, engine)
        metrics = pipeline.evaluate(evaluation)
        if metrics:
            _report(evaluation, metrics)
        return metrics
    configs = each(cfg)
    metrics = pipeline.evaluate_suite(
        Path(cfg.run_dir),
        {member.folder: partial(_open, one, models, engine) for member, one in configs.items()},
        {member.folder: member.group for member in configs},
        recorded(cfg),
        _report,
    )
    if metrics.get("collections"):
        section, _ = suites_section({Path(cfg.run_dir): records.Suite.model_validate(metrics)})
        show(section)
    if failed := metrics.get("failed"):
        lines = "\n".join(f"  {name}: {reason}" for name, reason in failed.items())
        raise InputError(
            "collections-failed",
            f"{len(failed)} of {len(configs)} collections failed and are not in the mean:\n"
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
    parts = ("bm25", "index", "fuse")
    for name in parts:
        build(cfg, name)
    names = settings["retriever"]
    return Systems(
        retrievers=names if isinstance(names, list) else [names],
        make=partial(build, cfg),
        settings={name: settings[name] for name in parts},
        reranker=None if cfg.reranker is None else Path(cfg.reranker),
        rerank=Reranking(**settings["rerank"]),
        reading=Reading(**{one.name: settings[one.name] for one in fields(Reading)}),
        dim=cfg.dim,
        block=cfg.block,
    )


def searcher_of(cfg: DictConfig, reuse: Path) -> Searcher:
    """The search of a config, with all models loaded and the corpus indexed.

    Args:
        reuse: a folder; embeddings and indexes of the evaluations below it are used.

    Raises:
        InputError: "several-processes", "several-collections", "run-in-search", or as
                `evaluate`.
    """
    if world_size() > 1:
        problem = f"a search is one process, but {world_size()} were started"
        raise InputError("several-processes", f"{problem}; start it without torchrun or srun")
    if cfg.collections is not None:
        raise InputError(
            "several-collections",
            "collections: a search has one collection; set it to null, and data.path to a folder",
        )
    collection = build(cfg, "data").collection(Path(cfg.cache_dir))
    store = Store(Path(cfg.store), reuse)
    return open_searcher(collection, systems_of(cfg), store, models_of(cfg))


def engine_of(cfg: DictConfig) -> Engine | None:
    """What computes the shards of the store; None for the processes of this command."""
    if cfg.engine == "local":
        return None
    try:
        from caravan.retrieval.cluster import Cluster
    except ModuleNotFoundError:
        raise InputError(
            "missing-extra", "engine=ray needs Ray; run: pip install 'caravan-retrieval[ray]'"
        ) from None
    return Cluster()


def _open(cfg: DictConfig, models: Models, engine: Engine | None) -> Evaluation:
    data = build(cfg, "data")
    stages = Stages(
        collection=data.collection(Path(cfg.cache_dir)),
        split=data.split,
        run_dir=Path(cfg.run_dir),
        store=Store(Path(cfg.store), engine=engine),
        systems=systems_of(cfg),
        models=models,
        ignore_identical_ids=cfg.ignore_identical_ids,
    )
    return Evaluation(stages, list(cfg.measures), recorded(cfg))


def _report(evaluation: Evaluation, metrics: dict[str, Any]) -> None:
    """Print the metrics of a collection."""
    shown = records.Evaluation.model_validate(metrics)
    if len(shown.stages) > 1:
        show(stages_table(shown))
    overall = "  ".join(f"{name} {value:.4f}" for name, value in shown.overall.items())
    log.info(f"{shown.system} on {shown.where}: {overall or 'no measure'}")
    zero = {
        "without a relevant passage": metrics["without_relevant"],
        "without a passage in the run": metrics["missing"] - metrics["unknown_queries"],
        "unknown to the collection": metrics["unknown_queries"],
    }
    counted = ", ".join(f"{count:,} {what}" for what, count in zero.items() if count)
    text = f"mean over {metrics['queries']:,} judged queries"
    text += f" ({counted}: these score 0)" if counted else ""
    if lost := metrics["unknown_passages"]:
        text += f"; {lost:,} judgements of passages unknown to the corpus count as not found"
    log.info(text)
    run_dir = evaluation.stages.run_dir
    log.info("run %s, metrics %s", run_dir / metrics["run"], run_dir / "metrics.json")


@dataclass(frozen=True)
class Member:
    """One of several collections."""

    name: str  # its folder, relative to data.path
    split: str | None  # None: data.split
    group: str  # the folder that counts as one in the mean; `name` if it is a collection itself
    folder: str  # folder of its evaluation, relative to run_dir


def members(base: Path, entries: list[str]) -> list[Member]:
    """Expand the entries of `collections`, without duplicates.

    A name without a folder is kept, so that opening it raises an error; a pattern without matches
    is dropped.
    """
    found: dict[tuple[str, str], str] = {}
    for entry in entries:
        text, _, split = entry.partition(":")
        for name in _named(base, text.strip("/")):
            for part in _parts(base, name) or [name]:
                found.setdefault((part, split), name)
    names = [name for name, _ in found]
    several = {name for name in names if names.count(name) > 1}  # splits, with a folder each
    return [
        Member(name, split or None, group, f"{name}.{split}" if split and name in several else name)
        for (name, split), group in found.items()
    ]


def each(cfg: DictConfig) -> dict[Member, DictConfig]:
    """The config of each collection: with its path, name, split and folders.

    Interpolations of `data.name` and `data.split`, such as in the path of a run, are resolved per
    collection.
    """
    base = Path(cfg.data.path)
    configs = {}
    for member in members(base, list(cfg.collections)):
        one = copy.deepcopy(cfg)
        with open_dict(one):
            one.collections = None
            one.run_dir = str(Path(cfg.run_dir) / member.folder)
            one.store = str(Path(cfg.store) / member.name)
            one.data.path = str(base / member.name)
            one.data.name = member.name
            if member.split is not None:
                one.data.split = member.split
        configs[member] = one
    return configs


def _named(base: Path, text: str) -> list[str]:
    """The folders that match a name or a pattern."""
    if not set("*?[") & set(text):
        return [text]
    paths = sorted(path for path in base.glob(text) if not path.name.startswith("."))
    return [name for path in paths if _parts(base, name := str(path.relative_to(base)))]


def _parts(base: Path, name: str) -> list[str]:
    """A collection itself, or the collections in a folder."""
    if _is_collection(base / name):
        return [name]
    inside = listed(base / name) if (base / name).is_dir() else []
    return [f"{name}/{path.name}" for path in inside if _is_collection(path)]


def _is_collection(folder: Path) -> bool:
    return any((folder / file).is_file() for file in CORPUS)


def retrievers_can_search(config: Config) -> None:
    """Each run has a weight if any has; models are there, and fit their stage."""
    given, weights = config.get("retriever"), config.get("fuse.weights")
    if weights is not None and isinstance(given, list) and len(given) not in (1, len(weights)):
        text = f"there are {len(weights)} weights for {len(given)} runs; give one for each"
        config.add("fuse.weights", text)
    model_folder(config, "retriever", "retriever")
    model_folder(config, "reranker", "reranker")


def collections_are_there(config: Config) -> None:
    """Each entry of `collections` is a folder in data.path, or a pattern that matches some."""
    entries, path = config.get("collections") or [], config.get("data.path")
    data = config.get("data")
    if entries and data and "path" not in data:
        text = "the data is one collection; choose data=beir data.path=<the folder of them all>"
        config.add("collections", text)
    if not isinstance(path, str) or not Path(path).is_dir():
        return
    for i, name in enumerate(entries):
        found = members(Path(path), [name])
        if ".." in Path(name).parts or Path(name).is_absolute():
            # Its metrics would be elsewhere too.
            text = f"{name} is not in {path}; set data.path to a folder above all of them"
            config.add(f"collections[{i}]", text)
        elif not found or not all(Path(path, one.name).is_dir() for one in found):
            near = neighbour(Path(path, name))
            hint = f"; did you mean {near}?" if near else ""
            text = f"there is no collection {path}/{name} (a folder with corpus.jsonl){hint}"
            config.add(f"collections[{i}]", text, "folder")


RULES: list[Rule] = [
    measures_are_computed,
    retrievers_can_search,
    collections_are_there,
]
