"""What a comparison is made of: run files, and the qrels and texts they are judged by.

A system is named by the run directory of an evaluation (its last stage counts) or by a run file,
TREC's or MS MARCO's, of any system. Which collection it is of stands in the `metrics.json` beside
it; the collection itself lies in the cache that the run has built it in, and is opened by its
digest, so that what is compared is what was evaluated.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from caravan.data.collection import Collection, Qrels
from caravan.errors import InputError
from caravan.report.records import has_scores, listed, read_metrics, refuse_partial


@dataclass(frozen=True)
class System:
    """A run file, and the evaluation that it belongs to, if any."""

    name: str
    run: Path
    home: Path | None = None  # the run directory
    collection: tuple[str, str] | None = None  # name and digest
    split: str | None = None
    measures: tuple[str, ...] = ()
    depth: int | None = None  # of the search that made the run; None if unknown


@dataclass(frozen=True)
class Judged:
    """Judged queries, with their texts or by their ids alone."""

    name: str
    split: str
    queries: Any  # caravan.data.texts.Texts, or Ids
    corpus: Any
    qrels: Qrels
    relevant_from: int = 1  # the lowest grade that is relevant

    @property
    def has_texts(self) -> bool:
        return not isinstance(self.corpus, Ids)


class Ids:
    """The rows of ids, given out as ids come up, where there is no collection to look them up in.

    Speaks as `caravan.data.texts.Texts` does, so that a run is read and scored in the same way.
    """

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._ids: list[str] = []

    def __len__(self) -> int:
        return 1 << 31  # more than there will be; rows must stay below it while it grows

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        for name in ids:
            if name not in self._rows:
                self._rows[name] = len(self._ids)
                self._ids.append(name)
        return np.fromiter((self._rows[name] for name in ids), np.int64, len(ids))

    def ids(self, rows: np.ndarray) -> list[str]:
        return [self._ids[row] for row in rows.tolist()]


def system(path: Path) -> System:
    """The system behind a run directory or a run file.

    Raises:
        InputError: there is neither; a directory without an evaluation.
    """
    if path.is_dir():
        own = read_metrics(path) or {}
        if "collections" in own:
            inside = next(iter(own["collections"]), "<collection>")
            raise InputError(
                f"{path} is an evaluation of several collections; compare one of them, such as"
                f" {path / inside}, or see them all with python -m caravan.report collections"
            )
        if not has_scores(own):
            raise InputError(
                f"{path} is not the run directory of an evaluation (no scores in metrics.json);"
                " give one, or a run file"
            )
        return _of(path.resolve().name, path / own["run"], path, own)
    if not path.is_file():
        raise InputError(f"there is no run directory and no run file {path}; check the path")
    home = path.parent.parent
    record = read_metrics(home) if path.parent.name == "runs" else None
    if record is None or not has_scores(record) or "collections" in record:
        return System(_stem(path), path)
    return _of(_stem(path).removesuffix(f".{record['split']}"), path, home, record)


def _of(name: str, run: Path, home: Path, record: dict[str, Any]) -> System:
    refuse_partial(home, record)
    of = record["collection"]
    stages = {stage["run"]: stage for stage in record.get("stages", ())}
    # The requested measures, whether or not the run is deep enough for them.
    measures = (*record["overall"], *record["too_deep"])
    depth = stages.get(f"runs/{run.name}", {}).get("depth")
    return System(name, run, home, (of["name"], of["digest"]), record["split"], measures, depth)


def told_apart(systems: Sequence[System]) -> list[System]:
    """The systems with names that differ: those that do not get the folders before them.

    Raises:
        InputError: a run is given twice.
    """
    paths = [one.run.resolve() for one in systems]
    for path in paths:
        if paths.count(path) > 1:
            raise InputError(f"the run {path} is given twice; give runs that differ")
    names = [one.name for one in systems]
    above = [_above(one) for one in systems]
    for depth in range(1, 1 + max(map(len, above))):
        again = [i for i, name in enumerate(names) if names.count(name) > 1]
        for i in again:
            names[i] = "/".join([*above[i][-depth:], systems[i].name])
    if len(set(names)) < len(names):  # they differ by what follows the name, such as .gz
        names = list(map(str, paths))
    return [replace(one, name=name) for one, name in zip(systems, names, strict=True)]


def _above(system: System) -> tuple[str, ...]:
    """The folders above what the system is named after."""
    place = system.run.resolve()
    if system.home is not None:
        home = system.home.resolve()
        place = home if system.name == home.name else home / place.name
    return place.parts[1:-1]


def judged(systems: Sequence[System], qrels: Path | None = None) -> Judged:
    """What all of the systems are judged by.

    Args:
        qrels: a file of judgements, TREC's or BEIR's, in place of the collection's; there are no
            texts then.

    Raises:
        InputError: they are of different collections or splits, or none says of which it is.
    """
    if qrels is not None:
        return _by_file(qrels)
    asked = {(s.collection, s.split): s for s in systems if s.collection is not None}
    if not asked:
        raise InputError(
            f"{systems[0].run} says nothing of its collection; give the run directory of an"
            " evaluation beside it, or --qrels and a file of judgements"
        )
    if len(asked) > 1:
        told = listed(
            [(s.name, *s.collection, s.split or "") for s in asked.values() if s.collection]
        )
        raise InputError(
            f"the runs are of different collections or splits: {told}; evaluate all of them on one"
            " (evaluate.py data.split=...)"
        )
    first = next(iter(asked.values()))
    assert first.home is not None
    assert first.collection is not None
    assert first.split is not None
    collection = find(first.collection[1], first.home)
    return Judged(
        collection.name,
        first.split,
        collection.queries,
        collection.corpus,
        collection.qrels(first.split),
        collection.relevant_from.get(first.split, 1),
    )


def find(digest: str, home: Path) -> Collection:
    """The collection of a digest, in the cache of the run that has read it.

    Args:
        home: the run directory; its config.yaml names the cache, from where it was started.
    """
    cache = Path(str(config(home).get("cache_dir", ".cache")))
    places = dict.fromkeys(
        base / cache / "collections" for base in (Path(), *home.absolute().parents)
    )
    for place in places:
        for path in sorted(place.glob("*/collection.json")):
            try:
                found = json.loads(path.read_text("utf-8"))
            except (OSError, ValueError, RecursionError):
                continue
            if isinstance(found, dict) and found.get("digest") == digest:
                return Collection.open(path.parent)
    raise InputError(
        f"the collection of {home} (digest {digest[:12]}) is no longer in {cache}/collections; run"
        " its evaluation again, or give --qrels and a file of judgements"
    )


def config(home: Path) -> dict[str, Any]:
    """The resolved config of a run; empty if it has none that can be read."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        loaded: Any = OmegaConf.to_container(OmegaConf.load(home / "config.yaml"))
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _by_file(path: Path) -> Judged:
    from caravan.data.qrels import RowLookup
    from caravan.data.readers.labelled import judgements

    queries: Any = Ids()
    corpus: Any = Ids()
    numbers, triples = [], []
    for number, judgement in judgements(path):
        numbers.append(number)
        triples.append(judgement)
    if not triples:
        raise InputError(f"{path} has no judgement; give a file with at least one")
    lookup = RowLookup(corpus, queries, lambda _, n: f"{path}:{numbers[n]}", "count")
    return Judged(path.name, "", queries, corpus, lookup.qrels("qrels", triples))


def _stem(path: Path) -> str:
    """`bm25.test` of runs/bm25.test.trec.gz."""
    name = path.name.removesuffix(".gz")
    return name.rsplit(".", 1)[0] if "." in name else name
