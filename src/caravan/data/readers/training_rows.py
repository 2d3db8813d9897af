"""Training rows, a query with its own positives and negatives each: to a collection and its runs.

Other toolkits train on files of such rows. The positives become judgements, and what else a row
says becomes runs beside the collection, which take the place of any other run:

    data:negatives    the negatives in the order of the row    sampler.runs=[data:negatives]
    data:teacher      the scores of positives and negatives    sampler.teacher=data:teacher

Rows are read once. While their passages stream into the corpus (each once, however many rows have
it), the rest waits in a scratch folder on disk.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

import numpy as np
import xxhash

from caravan.data.byid import Judgement, Scored
from caravan.data.collection import OWN, Collection, write_collection
from caravan.data.readers.held_out import DEV, TRAIN, is_held_out
from caravan.data.seen import Seen
from caravan.data.texts import Place, Record
from caravan.errors import InputError
from caravan.progress import track

BATCH = 4096  # passages whose ids are looked up at once
LARGEST = float(np.finfo(np.float32).max)  # of a score, which a run holds in float32
NEGATIVES, TEACHER = "negatives", "teacher"

T = TypeVar("T")

log = logging.getLogger(__name__)


class Passage(NamedTuple):
    """A passage of a row; its text is None where it is in a corpus of its own."""

    id: str
    title: str
    text: str | None
    score: float | None  # a teacher's


class Row(NamedTuple):
    """One line of training data."""

    place: str  # such as train.jsonl:12
    id: str
    query: str
    positives: list[Passage]
    negatives: list[Passage]  # the hardest first, where the row has an order


Rows = Callable[[], Iterator[Row]]


@dataclass(frozen=True)
class TrainingRows:
    """What a collection is made of.

    Args:
        name: of the collection.
        rows: of each split; read once.
        corpus: (place, passage) of each, where the rows have only ids.
        held_out: the share of the training queries, by a hash of their ids, that become the split
            dev; then the rows may have no such split.
        unknown_ids: "refuse" passages that the corpus lacks, or "count" them: training leaves them
            out, measures count them as not found.
    """

    name: str
    rows: Mapping[str, Rows]
    corpus: Callable[[], Iterator[tuple[str, Record]]] | None = None
    held_out: float = 0.0
    unknown_ids: str = "refuse"

    @property
    def splits(self) -> list[str]:
        """Those of the rows, and the one that is held out."""
        return [*self.rows, *([DEV] if self.held_out else [])]

    def build(self, folder: Path) -> Collection:
        """Write the collection."""
        scratch = folder.with_name(f".{folder.name}.rows")
        shutil.rmtree(scratch, ignore_errors=True)  # of one that was killed
        scratch.mkdir(parents=True)
        try:
            return self._build(folder, _Spool(scratch, self))
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _build(self, folder: Path, spool: _Spool) -> Collection:
        facts = spool.facts

        def corpus() -> Iterator[Record]:
            if self.corpus is None:
                records = spool.passages()
            else:
                records = (record for _, record in self.corpus())
            for record in records:
                facts["empty_passages"] += not (record[1] or record[2]).strip()
                yield record

        def queries() -> Iterator[Record]:
            if self.corpus is not None:
                for _ in spool.passages():
                    pass  # rows with a corpus have none: this reads them
            for name, text in spool.queries():
                yield name, "", text

        found = write_collection(
            folder,
            self.name,
            corpus(),
            queries(),
            {split: spool.judgements(split) for split in self.splits},
            facts=facts,
            where=self._where(spool),
            unknown_ids=self.unknown_ids,
            runs={run: spool.scored(run) for run in (NEGATIVES, TEACHER)},
        )
        for run in found.runs:
            use = (
                f"sampler.runs=[{OWN}{run}]" if run == NEGATIVES else f"sampler.teacher={OWN}{run}"
            )
            log.info("%s: the rows' own %s, for %s", self.name, run, use)
        return found

    def _where(self, spool: _Spool) -> Place:
        def place(part: str, n: int) -> str:
            if part != "corpus" or self.corpus is None:
                return spool.place(part, n)
            found = next(itertools.islice(self.corpus(), n, None), None)
            return "the corpus" if found is None else found[0]

        return place


class _Spool:
    """What rows say beside their passages' texts, as lines in files."""

    def __init__(self, folder: Path, source: TrainingRows) -> None:
        self.folder, self.source = folder, source
        self.facts: Counter[str] = Counter(
            rows=0, repeated_queries=0, without_positive=0, empty_passages=0
        )

    def passages(self) -> Iterator[Record]:
        """Read all rows, and give the passages that they bring along, each once."""
        with ExitStack() as files:
            self._files: dict[str, IO[str]] = {
                part: files.enter_context(open(self._path(part), "w", encoding="utf-8"))
                for part in ("rows", "passages")
            }
            seen = Seen()
            waiting: list[tuple[str, Passage]] = []
            for split, rows in self.source.rows.items():
                for row in self._told(rows(), split):
                    self._take(row, split)
                    waiting += [(row.place, one) for one in (*row.positives, *row.negatives)]
                    if len(waiting) >= BATCH:
                        yield from self._new(waiting, seen)
                        waiting = []
            yield from self._new(waiting, seen)

    def _told(self, rows: Iterator[Row], split: str) -> Iterator[Row]:
        """The rows, with a progress bar where that of their passages shows none."""
        return rows if self.source.corpus is None else track(rows, f"rows of {split}", unit="rows")

    def _new(self, waiting: list[tuple[str, Passage]], seen: Seen) -> Iterator[Record]:
        inline = [(place, one) for place, one in waiting if one.text is not None]
        if self.source.corpus is not None or not inline:
            return
        ids = [one.id for _, one in inline]
        new, other = seen.add(ids, [f"{one.title}\0{one.text}" for _, one in inline])
        for at, (place, one) in enumerate(inline):
            if other[at]:
                raise InputError(
                    f"{place}: the passage {one.id!r} has another title or text than in a row "
                    "before: one id is one passage, so correct it or give a corpus (data.corpus)"
                )
            if new[at]:
                self._write("passages", place)
                yield one.id, one.title, str(one.text)

    def _take(self, row: Row, split: str) -> None:
        self.facts["rows"] += 1
        self.facts["without_positive"] += not row.positives
        if split == TRAIN and self.source.held_out:
            split = DEV if is_held_out(row.id, self.source.held_out) else TRAIN
        sides = [[one.id for one in side] for side in (row.positives, row.negatives)]
        scores = [one.score for one in (*row.positives, *row.negatives)]
        self._write("rows", row.place, split, row.id, row.query, *sides, scores)

    def queries(self) -> Iterator[tuple[str, str]]:
        """Each query once."""
        for name, text, _ in self._asked():
            yield name, text

    def _asked(self) -> Iterator[tuple[str, str, str]]:
        seen = Seen()
        lines = self._queries()
        self.facts["repeated_queries"] = 0
        while batch := list(itertools.islice(lines, BATCH)):
            new, other = seen.add([one[0] for one in batch], [one[1] for one in batch])
            for at, (name, text, place) in enumerate(batch):
                if other[at]:
                    first = next(one[2] for one in self._queries() if one[0] == name)
                    raise InputError(
                        f"{place}: the query {name!r} has another text than at {first}: one id is "
                        "one query, so correct it"
                    )
                if new[at]:
                    yield name, text, place
                else:
                    self.facts["repeated_queries"] += 1

    def _queries(self) -> Iterator[tuple[str, str, str]]:
        for place, _, name, query, *_ in self._read("rows"):
            yield name, query, place

    def judgements(self, split: str) -> Iterator[Judgement]:
        """The positives of a split."""
        for query, passage, _ in self._positives(split):
            yield query, passage, 1

    def _positives(self, split: str) -> Iterator[tuple[str, str, str]]:
        for place, of, query, _, positives, *_ in self._read("rows"):
            if of == split:
                for passage in positives:
                    yield query, passage, place

    def scored(self, run: str) -> Iterator[Scored]:
        """The lines of a run."""
        for query, passage, score, _ in self._scored(run):
            yield query, passage, score

    def _scored(self, run: str) -> Iterator[tuple[str, str, float, str]]:
        for place, _, query, _, positives, negatives, scores in self._read("rows"):
            if run == NEGATIVES:
                for rank, passage in enumerate(negatives, 1):
                    yield query, passage, 1 / rank, place
            else:
                for passage, score in zip([*positives, *negatives], scores, strict=True):
                    if score is not None:
                        yield query, passage, score, place

    def place(self, part: str, n: int) -> str:
        """Where the n-th record of a part came from."""
        for file in self._files.values():
            if not file.closed:
                file.flush()
        kind, _, name = part.partition("/")
        lines: dict[str, Callable[[], Iterator[Any]]] = {
            "corpus": lambda: self._read("passages"),
            "queries": self._asked,
            "qrels": lambda: self._positives(name),
            "runs": lambda: self._scored(name),
        }
        found = next(itertools.islice(lines[kind](), n, None), None)
        return "the rows" if found is None else str(found[-1])

    def _write(self, part: str, *fields: object) -> None:
        self._files[part].write(json.dumps(fields) + "\n")

    def _read(self, part: str) -> Iterator[Any]:
        with open(self._path(part), encoding="utf-8") as file:
            yield from map(json.loads, file)

    def _path(self, part: str) -> Path:
        return self.folder / f"{part}.jsonl"


def some(rows: Iterator[T], source: str, remedy: str) -> Iterator[T]:
    """The rows of a source, which must have one.

    Args:
        remedy: ends the message: what a row should be.
    """
    first = next(rows, None)
    if first is None:
        raise InputError(f"there is no row in {source}: {remedy}")
    yield first
    yield from rows


def id_of_text(text: str) -> str:
    """The id of what has none: a hash of the text, so that equal texts are one."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def score_of(place: str, value: Any, remedy: str) -> float | None:
    """A teacher's score; None where there is none."""
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not abs(value) <= LARGEST:
        raise InputError(
            f"{place}: the score {value!r} is not a finite number in float32: {remedy}"
        )
    return float(value)
