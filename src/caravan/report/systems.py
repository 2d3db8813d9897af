"""The systems of a report, and the judgements and texts that they are scored with.

A system is the run directory of an evaluation (its last stage counts) or a run file, TREC's or MS
MARCO's. `metrics.json` names its collection by a digest, by which the collection is found in the
cache of the run, so a comparison uses the judgements of the evaluation.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from caravan import manifests
from caravan.data.collection import Collection
from caravan.data.qrels import Qrels, RowLookup
from caravan.data.readers.labelled import judgements
from caravan.data.runs import Run, read_run
from caravan.errors import InputError
from caravan.report.records import (
    Evaluation,
    Scored,
    distinct,
    path_names,
    read_metrics,
    refuse_repeated,
)


@dataclass(frozen=True)
class System:
    """A run file, and what its evaluation recorded of it, if any."""

    name: str
    run: Path
    home: Path | None = None  # the run directory
    evaluation: Evaluation | None = None
    scored: Scored = field(default_factory=lambda: Scored(overall={}))
    """The evaluation, or its stage that wrote the run; without scores for a run file alone."""

    @property
    def depth(self) -> int | None:
        """The depth of the run in its evaluation; None for a run file alone."""
        stages = self.evaluation.stages if self.evaluation else []
        return next((one.depth for one in stages if Path(one.run).name == self.run.name), None)


class Ids:
    """Rows for ids in the order they are met, for a comparison without a collection.

    Has the methods of `caravan.data.texts.Texts` with which runs are read and scored.
    """

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}

    def __len__(self) -> int:
        return 1 << 31  # rows must stay below the length, and there are never so many

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        found = (self._rows.setdefault(name, len(self._rows)) for name in ids)
        return np.fromiter(found, np.int64, len(ids))

    def ids(self, rows: np.ndarray) -> list[str]:
        names = list(self._rows)
        return [names[row] for row in rows.tolist()]


@dataclass(frozen=True)
class Judged:
    """Judged queries, of a collection or, without texts, of a file."""

    title: str  # the collection and its split, or the file
    queries: Any  # caravan.data.texts.Texts, or Ids
    corpus: Any
    qrels: Qrels
    relevant_from: int = 1  # the lowest relevant grade
    collection: Collection | None = None

    def read_run(self, path: Path, depth: int) -> Run:
        """The `depth` best of each query; raises as `caravan.data.runs.read_run`."""
        if self.collection is not None:
            return self.collection.read_run(path, depth)
        return read_run(path, self.queries, self.corpus, depth)


def read_system(path: Path) -> System:
    """The system behind a run directory or a run file.

    Raises:
        InputError: If there is neither, or the directory has no evaluation of one collection.
    """
    if path.is_dir():
        record = read_metrics(path)
        if not isinstance(record, Evaluation) or not record.run:
            message = (
                f"{path} is not the run directory of an evaluation of one collection; name one, or"
                " a run file"
            )
            raise InputError("no-evaluation", message)
        return System(path.resolve().name, path / record.run, path, record, record)
    if not path.is_file():
        message = f"there is no run directory and no run file {path}; check the path"
        raise InputError("file-not-found", message)
    stem = Path(path.name.removesuffix(".gz")).stem
    home = path.parent.parent
    record = read_metrics(home) if path.parent.name == "runs" else None
    if not isinstance(record, Evaluation) or not record.run:
        return System(stem, path)
    stages = {stage.run: stage for stage in record.stages}
    name = stem.removesuffix(f".{record.split}")
    scored = stages.get(f"runs/{path.name}", Scored(overall={}))
    return System(name, path, home, record, scored)


def with_distinct_names(systems: Sequence[System]) -> list[System]:
    """The systems, with the folders above them in the names that would be equal.

    Raises:
        InputError: If a run is given twice.
    """
    refuse_repeated([one.run for one in systems])
    candidates = []
    for one in systems:
        run = one.run.resolve()
        home = run.parent if one.home is None else one.home.resolve()
        is_home = one.home is not None and one.name == home.name
        candidates.append([*path_names(home if is_home else home / one.name), str(run)])
    return [replace(one, name=n) for one, n in zip(systems, distinct(candidates), strict=True)]


def read_judged(systems: Sequence[System], qrels: Path | None = None) -> Judged:
    """The judgements and texts that all of the systems are scored with.

    Args:
        qrels: a file of judgements, TREC's or BEIR's, instead of the collection's; then there are
            no texts.

    Raises:
        InputError: If the systems are of different collections or splits, or of an unknown one.
    """
    if qrels is not None:
        return _from_file(qrels)
    known = {one.name: one.evaluation for one in systems if one.evaluation is not None}
    if len({(one.collection.digest, one.split) for one in known.values()}) > 1:
        each = ", ".join(
            f"{name} ({one.where}, digest {one.collection.digest[:12]})"
            for name, one in known.items()
        )
        raise InputError(
            "mixed-collections",
            f"these are of different collections or splits: {each}; evaluate all of them on one"
            " (evaluate.py data.split=...)",
        )
    homes = [one.home for one in systems if one.home is not None]
    if not homes:
        message = (
            f"the collection of {systems[0].run} is unknown; add the run directory of an"
            " evaluation, or --qrels and a file of judgements"
        )
        raise InputError("unknown-collection", message)
    first = next(iter(known.values()))
    found, split = find(first.collection.digest, homes[0]), first.split
    relevant_from = found.relevant_from.get(split, 1)
    texts = found.queries, found.corpus
    return Judged(f"{found.name} {split}", *texts, found.qrels(split), relevant_from, found)


def find(digest: str, home: Path) -> Collection:
    """The collection with this digest, from the cache of the run that read it.

    Args:
        home: the run directory; its config.yaml names the cache, relative to where it was started.

    Raises:
        InputError: If it is no longer there.
    """
    cache = str(_value(home / "config.yaml", "cache_dir", yaml.safe_load) or ".cache")
    for base in dict.fromkeys((Path(), *home.absolute().parents)):
        for path in sorted((base / cache / "collections").glob("*/collection.json")):
            is_it = _value(path, "digest", json.loads) == digest
            if is_it and manifests.changed(path.parent) is None:
                return Collection.open(path.parent)
    message = (
        f"the collection of {home} (digest {digest[:12]}) is no longer in {cache}/collections; run"
        " its evaluation again, or use --qrels and a file of judgements"
    )
    raise InputError("collection-not-found", message)


def _value(path: Path, key: str, load: Callable[[bytes], Any]) -> Any:
    """A value of a mapping in a file; None if it cannot be read."""
    try:
        return load(path.read_bytes())[key]
    except (OSError, ValueError, LookupError, TypeError, RecursionError, yaml.YAMLError):
        return None


def _from_file(path: Path) -> Judged:
    queries, corpus = Ids(), Ids()
    placed = list(judgements(path))
    lookup = RowLookup(corpus, queries, lambda _, n: placed[n][0], "count")
    qrels = lookup.qrels("qrels", (judgement for _, judgement in placed))
    return Judged(path.name, queries, corpus, qrels)
