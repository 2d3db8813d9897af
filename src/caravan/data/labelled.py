"""Corpus, queries and qrels in files of their own, whatever their formats: to a collection.

A reader of a layout (`sources.Beir`, `msmarco`, `tsv`) finds the files and says how a record is
read; this streams them into the memory-mapped form, once for each content of the files.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caravan.data.collection import Collection, cache_key, cached_collection, write_collection
from caravan.data.files import digests
from caravan.data.qrels import judgements
from caravan.data.seen import Seen
from caravan.data.texts import Record
from caravan.errors import InputError

BATCH = 8192

Reader = Callable[[Path], Iterator[tuple[int, Record]]]
"""From a file to (line number, (id, title, text)); plain or .gz."""


@dataclass(frozen=True)
class Labelled:
    """The files of a collection.

    A query that is in several files is one query; its text must be the same.
    """

    name: str
    corpus: Path
    passages: Reader
    queries: Sequence[Path]
    asked: Reader
    qrels: Mapping[str, Path]  # by split
    unknown_ids: str = "refuse"  # or "count"
    relevant_from: Mapping[str, int] = field(default_factory=dict)  # by split, where it is not 1

    def collection(self, cache_dir: str | Path, *settings: Any) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Args:
            settings: what shapes it beside the files: the layout's name, and options.
        """
        contents = digests([self.corpus, *self.queries, *self.qrels.values()], cache_dir)
        key = cache_key(
            *(settings, contents, list(self.qrels), self.unknown_ids, dict(self.relevant_from))
        )
        return cached_collection(cache_dir, self.name, key, self._build)

    def _build(self, folder: Path) -> Collection:
        facts: Counter[str] = Counter(empty_passages=0, repeated_queries=0)

        def corpus() -> Iterator[Record]:
            for _, record in self.passages(self.corpus):
                facts["empty_passages"] += not (record[1] or record[2]).strip()
                yield record

        return write_collection(
            folder,
            self.name,
            corpus(),
            (record for _, record in self._asked(facts)),
            {split: (one for _, one in judgements(file)) for split, file in self.qrels.items()},
            facts=facts,
            where=self._where,
            unknown_ids=self.unknown_ids,
            relevant_from=self.relevant_from,
        )

    def _asked(self, facts: Counter[str]) -> Iterator[tuple[str, Record]]:
        """(place, query) of each query, each once."""
        if len(self.queries) == 1:  # then an id that is there twice is a mistake
            yield from self._placed(self.queries[0])
            return
        seen = Seen()
        for file in self.queries:
            placed = self._placed(file)
            while batch := list(itertools.islice(placed, BATCH)):
                new, other = seen.add([r[0] for _, r in batch], [r[2] for _, r in batch])
                for at, (place, record) in enumerate(batch):
                    if other[at]:
                        _tell_other_text(place, record, self._placed_all())
                    if new[at]:
                        yield place, record
                    else:
                        facts["repeated_queries"] += 1

    def _placed_all(self) -> Iterator[tuple[str, Record]]:
        return itertools.chain.from_iterable(map(self._placed, self.queries))

    def _placed(self, file: Path) -> Iterator[tuple[str, Record]]:
        for number, (name, _, text) in self.asked(file):
            yield f"{file}:{number}", (name, "", text)

    def _where(self, part: str, n: int) -> str:
        if part == "queries":
            places: Iterator[str] = (place for place, _ in self._asked(Counter()))
            return next(itertools.islice(places, n, None), str(self.queries[0]))
        file = self.corpus if part == "corpus" else self.qrels[part.removeprefix("qrels/")]
        numbered: Iterator[tuple[int, Any]] = (
            self.passages(file) if part == "corpus" else judgements(file)
        )
        found = next(itertools.islice(numbered, n, None), None)
        return str(file) if found is None else f"{file}:{found[0]}"


def _tell_other_text(place: str, record: Record, again: Iterator[tuple[str, Record]]) -> None:
    first = next(where for where, one in again if one[0] == record[0])
    raise InputError(
        f"{place}: the query {record[0]!r} has another text than at {first}: one id is one query, "
        "so correct it or leave out one of the files"
    )
