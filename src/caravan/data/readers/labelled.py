"""Corpus, queries and qrels in files of their own, whatever their formats: to a collection.

A layout (`sources.Beir`, `msmarco`, `tsv`) is a `Folder`: it finds the files and says how a record
is read. `Labelled` streams them into the memory-mapped form, once for each content of the files.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from caravan.data.cached import cache_key, cached_collection
from caravan.data.collection import Collection, write_collection
from caravan.data.readers.held_out import check_held_out, is_held_out
from caravan.data.readers.lines import digests
from caravan.data.readers.qrels import Judgement, judgements
from caravan.data.seen import Seen
from caravan.data.texts import Record
from caravan.errors import InputError

BATCH = 8192

Reader = Callable[[Path], Iterator[tuple[int, Record]]]
"""From a file to (line number, (id, title, text)); plain or .gz."""


@dataclass
class Folder(ABC):
    """A folder that holds a collection in some layout.

    Args:
        path: the folder.
        name: what reports call the collection; the folder's name by default.
        train_split, dev_split, split: qrels to train on, to validate on, and to score.
        unknown_ids: "refuse" judgements of unknown queries or passages, or "count" them: training
            leaves them out, measures count them as not found.
    """

    path: str
    name: str | None = None
    train_split: str = "train"
    dev_split: str = "dev"
    split: str = "test"
    unknown_ids: str = "refuse"

    def collection(self, cache_dir: str | Path) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Raises:
            InputError: a file is missing or wrong; says which, at which line, and what to do.
        """
        folder = Path(self.path)
        found = self.files(folder)
        name = self.name or folder.resolve().name
        return found.collection(cache_dir, name, self.unknown_ids)

    @abstractmethod
    def files(self, folder: Path) -> Labelled:
        """The files of the folder, and how they are read."""


@dataclass
class WithHeldOut(Folder):
    """A folder that may lack a split to validate on.

    Args:
        held_out: the share of the training queries, by a hash of their ids, that makes it up.
    """

    held_out: float = 0.0

    def _share(self) -> HeldOut | None:
        if not self.held_out:
            return None
        return HeldOut(self.held_out, self.train_split, self.dev_split)


class HeldOut(NamedTuple):
    """A share of the queries of one split that makes up another one."""

    share: float
    train: str
    dev: str


@dataclass(frozen=True)
class Labelled:
    """The files of a collection.

    A query that is in several files is one query; its text must be the same.
    """

    layout: tuple[Any, ...]  # its name, and the options that shape what is read
    corpus: Path
    passages: Reader
    queries: Sequence[Path]
    asked: Reader
    qrels: Mapping[str, Path]  # by split
    relevant_from: Mapping[str, int] = field(default_factory=dict)  # by split, where it is not 1
    held_out: HeldOut | None = None

    def collection(self, cache_dir: str | Path, name: str, unknown_ids: str) -> Collection:
        """Open the collection, or build it under `cache_dir` first."""
        shaped: tuple[Any, ...] = ()
        if self.held_out is not None:
            check_held_out(self.held_out.share, self.qrels, *self.held_out[1:])
            shaped = self.held_out
        contents = digests([self.corpus, *self.queries, *self.qrels.values()], cache_dir)
        key = cache_key(
            *(self.layout, contents, list(self.qrels), unknown_ids, dict(self.relevant_from)),
            *shaped,
        )

        def build(folder: Path) -> Collection:
            return self._build(folder, name, unknown_ids)

        return cached_collection(cache_dir, name, key, build)

    def _build(self, folder: Path, name: str, unknown_ids: str) -> Collection:
        self._refuse_empty()
        facts: Counter[str] = Counter(empty_passages=0, repeated_queries=0)

        def corpus() -> Iterator[Record]:
            for _, record in self.passages(self.corpus):
                facts["empty_passages"] += not (record[1] or record[2]).strip()
                yield record

        return write_collection(
            folder,
            name,
            corpus(),
            (record for _, record in self._asked(facts)),
            {split: (one for _, one in self._judged(split)) for split in self._splits()},
            facts=facts,
            where=self._where,
            unknown_ids=unknown_ids,
            relevant_from=self.relevant_from,
        )

    def _refuse_empty(self) -> None:
        """Name a file without a query or a judgement, before a corpus of any size is read.

        Else the qrels would be told to be wrong where their queries are not there, and a split
        without judgements would be found out by whoever asks for it, who knows no file.
        """
        for split, file in self.qrels.items():
            if next(judgements(file), None) is None:
                raise InputError(
                    f"{file} holds no judgement: put those of the split {split} there, or remove"
                    " the file"
                )
        for split in self._splits():
            if self.held_out is not None and next(self._judged(split), None) is None:
                raise InputError(
                    f"data.held_out={self.held_out.share} leaves no query for the split {split}:"
                    " give another share"
                )
        for file in self.queries if self.qrels else ():
            if next(self.asked(file), None) is None:
                judged = next(iter(self.qrels.values()))
                raise InputError(
                    f"{file} holds no query, and {judged} judges some: put their ids and texts"
                    f" into {file.name}"
                )

    def _splits(self) -> list[str]:
        return [*self.qrels, *([] if self.held_out is None else [self.held_out.dev])]

    def _file_of(self, split: str) -> Path:
        if self.held_out is not None and split == self.held_out.dev:
            split = self.held_out.train
        return self.qrels[split]

    def _judged(self, split: str) -> Iterator[tuple[int, Judgement]]:
        """(line, judgement) of each of a split, of which a share may be another split."""
        held_out = self.held_out
        if held_out is None or split not in held_out[1:]:
            yield from judgements(self._file_of(split))
            return
        for number, one in judgements(self._file_of(split)):
            if is_held_out(one[0], held_out.share) == (split == held_out.dev):
                yield number, one

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
        if part == "corpus":
            file = self.corpus
            numbered: Iterator[tuple[int, Any]] = self.passages(file)
        else:
            split = part.removeprefix("qrels/")
            file, numbered = self._file_of(split), self._judged(split)
        found = next(itertools.islice(numbered, n, None), None)
        return str(file) if found is None else f"{file}:{found[0]}"


def _tell_other_text(place: str, record: Record, again: Iterator[tuple[str, Record]]) -> None:
    first = next(where for where, one in again if one[0] == record[0])
    raise InputError(
        f"{place}: the query {record[0]!r} has another text than at {first}: one id is one query, "
        "so correct it or leave out one of the files"
    )
