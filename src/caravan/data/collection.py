"""A collection: corpus, queries and graded qrels by integer row, in one folder on disk.

The texts are Arrow files (of `datasets`) that are memory-mapped, the id index is a memory-mapped
array of sorted 64-bit hashes, so that opening 8.8 million passages reads no text and copies none.
Strings never travel between processes: everything downstream speaks of rows, and ids are looked
up at the two ends. A folder is complete or absent: it is written beside and renamed.

    collection = Collection.open(folder); collection.corpus.get([0, 7]); collection.qrels("test")
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from caravan.errors import InputError

FORMAT = 1
"""Version of the folder's layout; a folder of another version is built anew."""

BATCH_ROWS = 16_384
BATCH_BYTES = 64 * 2**20  # long texts: a record batch is closed early, whatever its rows

Record = tuple[str, str, str]
"""(id, title, text) of a passage; a query has an empty title."""

Judgement = tuple[str, str, int]
"""(query id, passage id, grade)."""

Rows = Sequence[int] | slice | np.ndarray

log = logging.getLogger(__name__)
T = TypeVar("T")


class Texts:
    """Texts by row and rows by id, both read from memory-mapped files.

    Cheap to open, to fork and to pickle (only the path travels). `digest` is that of the records
    in their order, so that what was computed from a corpus can be tied to it.
    """

    def __init__(self, folder: Path, part: str, digest: str = "") -> None:
        from datasets import Dataset

        self.folder, self.part, self.digest = Path(folder), part, digest
        table = Dataset.from_file(str(self.folder / f"{part}.arrow")).data.table
        self._batches = table.to_batches()
        sizes = [batch.num_rows for batch in self._batches]
        self._starts = np.cumsum([0, *sizes])
        index = np.load(self.folder / f"{part}.ids.npy", mmap_mode="r")
        self._hashes, self._hash_rows = index[0], index[1]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[Texts], tuple[Path, str, str]]:
        return Texts, (self.folder, self.part, self.digest)

    def get(self, rows: Rows) -> list[tuple[str, str]]:
        """(title, text) of each row, in the order asked for; any order, repeats allowed."""
        titles, texts = self._columns(rows, ("title", "text"))
        return list(zip(titles, texts, strict=True))

    def ids(self, rows: Rows) -> list[str]:
        """The id of each row."""
        return self._columns(rows, ("id",))[0]

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64 [len(ids)]; -1 where the id is unknown.

        A hash finds the row, the stored string confirms it: two ids with one hash stay apart.
        """
        wanted = np.fromiter((id_hash(i) for i in ids), dtype=np.uint64, count=len(ids))
        order = np.argsort(wanted, kind="stable")  # neighbours in the file are read together
        first = np.empty(len(ids), np.int64)
        first[order] = np.searchsorted(self._hashes, wanted[order], side="left")
        found = np.full(len(ids), -1, np.int64)
        open_ = np.arange(len(ids))
        while len(open_):  # a second turn is needed only where hashes collide
            open_ = open_[first[open_] < len(self)]
            open_ = open_[self._hashes[first[open_]] == wanted[open_]]
            rows = self._hash_rows[first[open_]].astype(np.int64)
            same = np.fromiter(
                (ids[at] == known for at, known in zip(open_, self.ids(rows), strict=True)),
                dtype=bool,
                count=len(open_),
            )
            found[open_[same]] = rows[same]
            open_ = open_[~same]
            first[open_] += 1
        return found

    def _columns(self, rows: Rows, names: Sequence[str]) -> list[list[str]]:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        rows = np.asarray(rows, dtype=np.int64)
        columns: list[list[str]] = [[] for _ in names]
        if not len(rows):
            return columns
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"row {rows.min()} or {rows.max()} is not in 0..{len(self) - 1}")
        order = None
        if np.any(rows[1:] < rows[:-1]):
            order = np.argsort(rows, kind="stable")
            rows = rows[order]
        batch_of = np.searchsorted(self._starts, rows, side="right") - 1
        edges = [0, *(np.flatnonzero(np.diff(batch_of)) + 1).tolist(), len(rows)]
        for low, high in zip(edges, edges[1:], strict=False):
            batch = self._batches[batch_of[low]]
            local = rows[low:high] - self._starts[batch_of[low]]
            contiguous = np.all(np.diff(local) == 1)
            part = batch.slice(local[0], high - low) if contiguous else batch.take(local)
            for column, name in zip(columns, names, strict=True):
                column.extend(part.column(name).to_pylist())
        if order is not None:
            back = np.empty_like(order)
            back[order] = np.arange(len(order))
            columns = [[column[at] for at in back.tolist()] for column in columns]
        return columns


@dataclass(frozen=True)
class Qrels:
    """Graded judgements by row, sorted by (query_row, passage_row); sorted here if they are not."""

    query_rows: np.ndarray  # [N] int64
    passage_rows: np.ndarray  # [N] int64
    grades: np.ndarray  # [N] int32; relevant from 1 on, negative grades are allowed

    def __post_init__(self) -> None:
        queries = np.asarray(self.query_rows, dtype=np.int64)
        passages = np.asarray(self.passage_rows, dtype=np.int64)
        grades = np.asarray(self.grades, dtype=np.int32)
        order = np.lexsort((passages, queries))
        object.__setattr__(self, "query_rows", queries[order])
        object.__setattr__(self, "passage_rows", passages[order])
        object.__setattr__(self, "grades", grades[order])

    def __len__(self) -> int:
        return len(self.query_rows)

    @cached_property
    def queries(self) -> np.ndarray:
        """[Q] int64, the judged query rows, each once, ascending."""
        return np.unique(self.query_rows)

    def of(self, query_row: int) -> tuple[np.ndarray, np.ndarray]:
        """(passage_rows, grades) of one query; empty if it is not judged."""
        low, high = np.searchsorted(self.query_rows, [query_row, query_row + 1])
        return self.passage_rows[low:high], self.grades[low:high]

    def positives(self, query_row: int) -> np.ndarray:
        """The passage rows judged relevant (grade >= 1) for one query."""
        rows, grades = self.of(query_row)
        return rows[grades >= 1]


@dataclass(frozen=True)
class Collection:
    """What a retriever is trained and scored on: corpus, queries, qrels of each split."""

    name: str
    digest: str  # hex, of every record and judgement in order; independent of paths and times
    folder: Path
    corpus: Texts
    queries: Texts
    splits: tuple[str, ...]
    facts: dict[str, Any] = field(default_factory=dict)  # counts, what was skipped or unknown

    @classmethod
    def open(cls, folder: str | Path) -> Collection:
        """Open a folder that `write_collection` wrote.

        Raises:
            InputError: the folder is not a collection, is broken, or is of another version.
        """
        folder = Path(folder)
        remedy = "delete the folder and start again to build it anew"
        try:
            manifest = json.loads((folder / "collection.json").read_text("utf-8"))
            if manifest["version"] != FORMAT:
                raise InputError(
                    f"the collection in {folder} has format version {manifest['version']}, "
                    f"this Caravan reads version {FORMAT}: {remedy}"
                )
            digests = manifest["digests"]
            corpus = Texts(folder, "corpus", digests["corpus"])
            queries = Texts(folder, "queries", digests["queries"])
            counts = (manifest["facts"]["passages"], manifest["facts"]["queries"])
            if (len(corpus), len(queries)) != counts:
                raise InputError(
                    f"the collection in {folder} holds {len(corpus)} passages and {len(queries)} "
                    f"queries where its manifest says {counts[0]} and {counts[1]}: {remedy}"
                )
            return cls(
                name=manifest["name"],
                digest=manifest["digest"],
                folder=folder,
                corpus=corpus,
                queries=queries,
                splits=tuple(manifest["splits"]),
                facts=manifest["facts"],
            )
        except FileNotFoundError as error:
            raise InputError(
                f"{folder} is not a complete collection, {error.filename or error} is missing: "
                f"{remedy}"
            ) from None
        except (KeyError, json.JSONDecodeError) as error:
            raise InputError(f"{folder}/collection.json is broken ({error!r}): {remedy}") from None

    def __reduce__(self) -> tuple[Callable[[Path], Collection], tuple[Path]]:
        return Collection.open, (self.folder,)

    def qrels(self, split: str) -> Qrels:
        """The judgements of a split.

        Raises:
            InputError: there is no such split; names those there are.
        """
        if split not in self.splits:
            there = f"its splits are {', '.join(self.splits)}" if self.splits else "it has no qrels"
            raise InputError(f"collection {self.name} has no split {split!r}: {there}")
        with np.load(self.folder / "qrels" / f"{split}.npz") as stored:
            return Qrels(stored["query_rows"], stored["passage_rows"], stored["grades"])


def write_collection(
    folder: str | Path,
    name: str,
    corpus: Iterable[Record],
    queries: Iterable[Record],
    qrels: Mapping[str, Iterable[Judgement]],
    *,
    facts: Mapping[str, Any] | None = None,
    where: Callable[[str, int], str] | None = None,
    unknown_ids: str = "refuse",
) -> Collection:
    """Stream records into a new collection folder and open it.

    Nothing but ids' hashes and the judgements is held in memory. The folder appears at the end,
    by a rename; a kill before leaves only a hidden sibling.

    Args:
        folder: must not exist yet.
        corpus, queries: (id, title, text), ids unique within each and free of white space.
        qrels: judgements of each split, `{"test": [(query id, passage id, grade), ...]}`.
        facts: anything countable about the source; read at the end, so a generator may fill it.
        where: names the place of the n-th record of a part ("corpus", "queries", "qrels/test"),
            for messages, such as "corpus.jsonl:12".
        unknown_ids: "refuse" a judgement of an id that is nowhere, or "count" it and go on.

    Raises:
        InputError: empty corpus, duplicate id, id with white space, unknown or contradictory
            judgement, existing folder.
    """
    folder = Path(folder)
    place = where or (lambda part, n: f"{part}, record {n + 1}")
    if unknown_ids not in ("refuse", "count"):
        raise InputError(f"unknown_ids is {unknown_ids!r}: it must be 'refuse' or 'count'")
    if folder.exists():
        raise InputError(f"{folder} exists already: choose another folder or delete it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    draft.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their owner alone
    try:
        known: dict[str, Any] = {}
        digests: dict[str, str] = {}
        texts = {}
        for part, records in (("corpus", corpus), ("queries", queries)):
            digests[part], count = _write_texts(draft, part, records, place)
            known["passages" if part == "corpus" else part] = count
            texts[part] = Texts(draft, part)
        if not known["passages"]:
            raise InputError(f"the corpus of {name} is empty ({place('corpus', 0)}): add passages")
        (draft / "qrels").mkdir()
        known["judgements"] = {}
        skipped = {"unknown_ids": 0, "repeated_judgements": 0}
        for split, judgements in qrels.items():
            digests[f"qrels/{split}"], known["judgements"][split] = _write_qrels(
                draft, split, judgements, texts["corpus"], texts["queries"], place,
                unknown_ids, skipped,
            )  # fmt: skip
        manifest = {
            "format": "caravan collection",
            "version": FORMAT,
            "name": name,
            "digest": hashlib.blake2b(
                json.dumps(digests, sort_keys=True).encode(), digest_size=16
            ).hexdigest(),
            "digests": digests,
            "splits": list(qrels),
            "facts": {**known, **skipped, **(facts or {})},
        }
        with open(draft / "collection.json", "w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Collection.open(folder)


def cached_collection(
    cache_dir: str | Path, name: str, key: str, build: Callable[[Path], Collection]
) -> Collection:
    """`cache_dir/collections/<name>-<key>`: opened if it is there, else built by `build(folder)`.

    One process builds while the others (ranks, a sweep's jobs) wait for it; a lock that dies with
    its process guards this, so a killed build blocks nobody and its remains are swept away.
    """
    from filelock import FileLock

    folder = Path(cache_dir) / "collections" / f"{name}-{key}"
    if folder.exists():
        return Collection.open(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if folder.exists():
            return Collection.open(folder)
        for remains in folder.parent.glob(f".{folder.name}.*"):
            if remains.is_dir():
                shutil.rmtree(remains, ignore_errors=True)
        started = time.monotonic()
        log.info("building collection %s in %s", name, folder)
        collection = build(folder)
        log.info(
            "built collection %s: %d passages, %d queries, %.1f s",
            name, len(collection.corpus), len(collection.queries), time.monotonic() - started,
        )  # fmt: skip
        return collection


def id_hash(text: str) -> int:
    """The 64-bit hash under which an id is indexed."""
    import xxhash

    return int(xxhash.xxh3_64_intdigest(text.encode()))


def track(
    items: Iterable[T], what: str, total: int | None = None, unit: str = "records"
) -> Iterator[T]:
    """Pass items on, with a progress bar (count, rate) on a terminal once a second has gone by.

    Away from a terminal nothing is drawn: two log lines say that it runs and how long it took.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    started = time.monotonic()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} " + unit),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    bar, task, done, shown = Progress(*columns, console=console), None, 0, started
    try:
        for item in items:
            yield item
            done += 1
            if done % 256 and total is None:
                continue
            now = time.monotonic()
            if now - started < 1.0 or now - shown < 0.1:
                continue
            shown = now
            rate = f"{done / (now - started):,.0f}/s"
            if task is None:
                task = bar.add_task(what, total=total, rate=rate)
                if sys.stderr.isatty():
                    bar.start()
                else:
                    log.info("%s: running", what)
            bar.update(task, completed=done, rate=rate)
    finally:
        if task is not None:
            bar.update(task, completed=done)
            bar.stop()
            log.info("%s: %d %s in %.1f s", what, done, unit, time.monotonic() - started)


def _write_texts(
    folder: Path, part: str, records: Iterable[Record], place: Callable[[str, int], str]
) -> tuple[str, int]:
    """Write `<part>.arrow` and `<part>.ids.npy`; return digest and number of records."""
    import pyarrow as pa
    from datasets import Features, Value
    from datasets.arrow_writer import ArrowWriter

    names = ("id", "title", "text")
    schema = pa.schema([(column, pa.large_string()) for column in names])
    features = Features({column: Value("large_string") for column in names})
    content, hashes, count = hashlib.blake2b(digest_size=16), array("Q"), 0
    batch: list[Record] = []
    size = 0
    with ArrowWriter(features=features, path=str(folder / f"{part}.arrow")) as writer:

        def flush() -> None:
            columns = [
                pa.array(column, pa.large_string()) for column in zip(*batch, strict=True)
            ] or [pa.array([], pa.large_string())] * 3
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), BATCH_ROWS)
            batch.clear()

        unit = "passages" if part == "corpus" else part
        for record in track(records, part, unit=unit):
            if not record[0] or any(c in record[0] for c in " \t\n\r\f\v"):
                raise InputError(
                    f"{place(part, count)}: the id {record[0]!r} is empty or contains white space, "
                    "which a TREC file cannot hold: rename it"
                )
            fields = [value.encode() for value in record]
            content.update(b"%d,%d,%d;" % tuple(len(value) for value in fields))
            content.update(b"".join(fields))
            hashes.append(id_hash(record[0]))
            batch.append(record)
            size += sum(len(value) for value in fields)
            count += 1
            if len(batch) == BATCH_ROWS or size > BATCH_BYTES:
                flush()
                size = 0
        if batch or not count:
            flush()
        writer.finalize()
    values = np.frombuffer(hashes, dtype=np.uint64) if count else np.empty(0, np.uint64)
    order = np.argsort(values, kind="stable")
    index = np.stack([values[order], order.astype(np.uint64)])
    np.save(folder / f"{part}.ids.npy", index)
    _refuse_duplicates(Texts(folder, part), index, place)
    return content.hexdigest(), count


def _refuse_duplicates(texts: Texts, index: np.ndarray, place: Callable[[str, int], str]) -> None:
    """Equal hashes are neighbours in the index; equal strings among them are duplicates."""
    again = np.flatnonzero(np.diff(index[0]) == 0)
    rows = np.unique(np.concatenate([index[1][again], index[1][again + 1]])).astype(np.int64)
    seen: dict[str, int] = {}
    for row, name in zip(rows.tolist(), texts.ids(rows), strict=True):
        if name in seen:
            raise InputError(
                f"{place(texts.part, row)}: the id {name!r} was used before, at "
                f"{place(texts.part, seen[name])}: make the ids unique"
            )
        seen[name] = row


def _write_qrels(
    folder: Path,
    split: str,
    judgements: Iterable[Judgement],
    corpus: Texts,
    queries: Texts,
    place: Callable[[str, int], str],
    unknown_ids: str,
    skipped: dict[str, int],
) -> tuple[str, int]:
    """Write `qrels/<split>.npz`; return digest and number of judgements kept."""
    part = f"qrels/{split}"
    triples = list(judgements)
    query_rows = queries.rows([query for query, _, _ in triples])
    passage_rows = corpus.rows([passage for _, passage, _ in triples])
    grades = np.fromiter((grade for _, _, grade in triples), np.int32, len(triples))
    unknown = (query_rows < 0) | (passage_rows < 0)
    if unknown_ids == "refuse" and unknown.any():
        at = int(np.argmax(unknown))
        kind, name = (
            ("query", triples[at][0]) if query_rows[at] < 0 else ("passage", triples[at][1])
        )
        raise InputError(
            f"{place(part, at)}: the {kind} id {name!r} is unknown ({int(unknown.sum())} such "
            "judgements in this split): correct it, or set unknown_ids=count to leave them out"
        )
    at_line = np.flatnonzero(~unknown)
    order = np.lexsort((at_line, passage_rows[at_line], query_rows[at_line]))
    at_line = at_line[order]
    same = (np.diff(query_rows[at_line]) == 0) & (np.diff(passage_rows[at_line]) == 0)
    for low in np.flatnonzero(same):
        first, second = (int(at) for at in at_line[low : low + 2])
        if grades[first] != grades[second]:
            query, passage, grade = triples[second]
            raise InputError(
                f"{place(part, second)}: query {query!r} and passage {passage!r} get grade {grade}, "
                f"but {grades[first]} at {place(part, first)}: keep one of the two lines"
            )
    at_line = at_line[np.concatenate([[True], ~same])] if len(at_line) else at_line
    skipped["unknown_ids"] += int(unknown.sum())
    skipped["repeated_judgements"] += int(same.sum())
    kept = Qrels(query_rows[at_line], passage_rows[at_line], grades[at_line])
    np.savez(
        folder / "qrels" / f"{split}.npz",
        query_rows=kept.query_rows, passage_rows=kept.passage_rows, grades=kept.grades,
    )  # fmt: skip
    content = hashlib.blake2b(digest_size=16)
    for values in (kept.query_rows, kept.passage_rows, kept.grades):
        content.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    return content.hexdigest(), len(kept)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
