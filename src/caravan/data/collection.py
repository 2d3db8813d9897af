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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from caravan import manifests
from caravan.data.byid import ById, Judgement, Scored, Unknown
from caravan.data.runs import write_run
from caravan.data.texts import Place, Record, Texts, write_texts
from caravan.errors import InputError
from caravan.files import scratch_folder

FORMAT = 2
"""Version of the folder's layout; a folder of another version is built anew."""

OWN = "data:"
"""What the name of a run begins with that came with the collection: `data:negatives`."""

log = logging.getLogger(__name__)


class DamagedError(InputError):
    """A collection's folder is incomplete, or not as it was written."""


@dataclass(frozen=True)
class Qrels:
    """Graded judgements by row, sorted by (query_row, passage_row); sorted here if they are not."""

    query_rows: np.ndarray  # [N] int64
    passage_rows: np.ndarray  # [N] int64
    grades: np.ndarray  # [N] int32; relevant from 1 on, negative grades are allowed
    unknown: Unknown = field(default_factory=Unknown)
    """Judgements of ids that are not in the collection: only measures count them."""

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
        return np.union1d(self.query_rows, self.unknown.query_rows)

    def only(self, query_rows: np.ndarray) -> Qrels:
        """The judgements of some of the queries."""
        own = np.isin(self.query_rows, query_rows)
        lost = np.isin(self.unknown.query_rows, query_rows)
        unknown = Unknown(self.unknown.query_rows[lost], self.unknown.grades[lost])
        return Qrels(self.query_rows[own], self.passage_rows[own], self.grades[own], unknown)

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
    runs: tuple[str, ...] = ()  # those that came with the source: runs/<name>.trec
    relevant_from: dict[str, int] = field(default_factory=dict)
    """The lowest grade that is relevant, of each split where it is not 1 (TREC DL's passages)."""

    @classmethod
    def open(cls, folder: str | Path) -> Collection:
        """Open a folder that `write_collection` wrote.

        Every file is compared with its digest, unless size and times show that nobody has written
        it since (`caravan.manifests.is_as_written`).

        Raises:
            DamagedError: the folder is not a collection, or is broken.
            InputError: it is of another version.
        """
        folder = Path(folder)
        remedy = "delete the folder and start again to build it anew"
        try:
            record = json.loads((folder / "collection.json").read_text("utf-8"))
            if record["version"] != FORMAT:
                raise InputError(
                    f"the collection in {folder} has format version {record['version']}, "
                    f"this Caravan reads version {FORMAT}: {remedy}"
                )
            if record.pop("seal") != manifests.digest(record):
                raise ValueError("collection.json is not as it was written")
            for name, written in record["files"].items():
                if not (folder / name).exists():
                    raise FileNotFoundError(2, "no such file", name)
                if not manifests.is_as_written(folder / name, written):
                    raise ValueError(f"{name} is not as it was written")
            digests = record["digests"]
            return cls(
                name=record["name"],
                digest=record["digest"],
                folder=folder,
                corpus=Texts(folder, "corpus", digests["corpus"]),
                queries=Texts(folder, "queries", digests["queries"]),
                splits=tuple(record["splits"]),
                facts=record["facts"],
                runs=tuple(record["runs"]),
                relevant_from=record["relevant_from"],
            )
        except FileNotFoundError as error:
            raise DamagedError(
                f"{folder} is not a complete collection, {error.filename or error} is missing: "
                f"{remedy}"
            ) from None
        except InputError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError, OSError) as error:
            # of JSON, Arrow and numpy alike
            raise DamagedError(
                f"the collection in {folder} is broken ({error}): {remedy}"
            ) from None

    def __reduce__(self) -> tuple[Callable[[Path], Collection], tuple[Path]]:
        return Collection.open, (self.folder,)

    def qrels(self, split: str) -> Qrels:
        """The judgements of a split.

        Raises:
            InputError: there is no such split; names those there are.
        """
        if split not in self.splits:
            there = f"its splits are {', '.join(self.splits)}" if self.splits else "it has no qrels"
            remedy = "name one of them (data.train_split, data.dev_split, data.split)"
            if "train" in self.splits and split == "dev":
                remedy += ", or let a share of the training queries be it (data.held_out=0.1)"
            raise InputError(f"collection {self.name} has no split {split!r}: {there}; {remedy}")
        with np.load(self.folder / "qrels" / f"{split}.npz") as stored:
            unknown = Unknown(
                stored["unknown_query_rows"],
                stored["unknown_grades"],
                tuple(stored["unknown_queries"].tolist()),
            )
            return Qrels(stored["query_rows"], stored["passage_rows"], stored["grades"], unknown)

    def run_path(self, name: str | Path) -> Path:
        """The file of a run: a path, or `data:<name>` for one that came with the collection.

        Raises:
            InputError: no such run came with it; names those that did.
        """
        if not str(name).startswith(OWN):
            return Path(name)
        own = str(name).removeprefix(OWN)
        if own not in self.runs:
            there = ", ".join(f"{OWN}{run}" for run in self.runs)
            told = f"there are {there}" if there else "it came without any; give a run file"
            raise InputError(f"collection {self.name} has no run {name}: {told}")
        return self.folder / "runs" / f"{own}.trec"


def write_collection(
    folder: str | Path,
    name: str,
    corpus: Iterable[Record],
    queries: Iterable[Record],
    qrels: Mapping[str, Iterable[Judgement]],
    *,
    facts: Mapping[str, Any] | None = None,
    where: Place | None = None,
    unknown_ids: str = "refuse",
    runs: Mapping[str, Iterable[Scored]] | None = None,
    relevant_from: Mapping[str, int] | None = None,
) -> Collection:
    """Stream records into a new collection folder and open it.

    Nothing but ids' hashes and the judgements is held in memory. The folder appears at the end,
    by a rename; a kill before leaves only a hidden sibling, which the next build removes.

    Args:
        folder: must not exist yet.
        corpus, queries: (id, title, text), ids unique within each (see `caravan.data.ids`).
        qrels: judgements of each split, `{"test": [(query id, passage id, grade), ...]}`.
        facts: anything countable about the source; read at the end, so a generator may fill it.
        where: names the place of the n-th record of a part ("corpus", "queries", "qrels/test",
            "runs/negatives"), for messages, such as "corpus.jsonl:12".
        unknown_ids: "refuse" a judgement of an unknown id, or "count" it: measures still have it.
        runs: lines of runs that come with the source; of a passage that a query has twice, the
            best score stays. A run without a line is left out.
        relevant_from: of a split, the lowest grade that is relevant, if it is not 1.

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
    with scratch_folder(folder) as draft:
        known: dict[str, Any] = {"repaired_texts": 0, "ids_with_spaces": 0}
        digests: dict[str, str] = {}
        texts = {}
        for part, records in (("corpus", corpus), ("queries", queries)):
            written = write_texts(draft, part, records, place)
            digests[part] = written.digest
            known["passages" if part == "corpus" else part] = written.count
            known["repaired_texts"] += written.repaired
            known["ids_with_spaces"] += written.spaced
            texts[part] = Texts(draft, part)
        if not known["passages"]:
            raise InputError(f"the corpus of {name} is empty ({place('corpus', 0)}): add passages")
        if known["ids_with_spaces"]:
            log.warning(
                "%s: %d ids have white space such as U+00A0; trec_eval reads runs with such ids,"
                " Python tools that split lines at any white space do not (ir_measures)",
                *(name, known["ids_with_spaces"]),
            )
        (draft / "qrels").mkdir()
        known["judgements"] = {}
        rows = ById(texts["corpus"], texts["queries"], place, unknown_ids)
        for split, judgements in qrels.items():
            kept = Qrels(*rows.judgements(f"qrels/{split}", judgements))
            digests[f"qrels/{split}"] = _write_qrels(draft, split, kept)
            known["judgements"][split] = len(kept)
        written_runs = []
        for own, scored in (runs or {}).items():
            if (run := rows.run(own, scored)) is not None:
                write_run(draft / "runs" / f"{own}.trec", run, texts["queries"], texts["corpus"])
                written_runs.append(own)
        _write_manifest(
            draft,
            name=name,
            digests=digests,
            splits=list(qrels),
            runs=written_runs,
            relevant_from=dict(relevant_from or {}),
            facts={**known, **rows.skipped, **(facts or {})},
        )
        draft.rename(folder)
    return Collection.open(folder)


def _write_manifest(folder: Path, *, digests: dict[str, str], **facts: Any) -> None:
    """Write `collection.json`, which has the digests of all records and files, and its own."""
    whole = hashlib.blake2b(json.dumps(digests, sort_keys=True).encode(), digest_size=16)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    record = {
        "format": "caravan collection",
        "version": FORMAT,
        "digest": whole.hexdigest(),
        "digests": digests,
        **json.loads(json.dumps(facts)),
        "files": {str(path.relative_to(folder)): manifests.content(path) for path in files},
    }
    record["seal"] = manifests.digest(record)
    with open(folder / "collection.json", "w", encoding="utf-8") as file:
        json.dump(record, file, indent=2, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())


def _write_qrels(folder: Path, split: str, kept: Qrels) -> str:
    """Write `qrels/<split>.npz`; return its digest."""
    unknown = kept.unknown
    np.savez(
        folder / "qrels" / f"{split}.npz",
        query_rows=kept.query_rows, passage_rows=kept.passage_rows, grades=kept.grades,
        unknown_query_rows=unknown.query_rows, unknown_grades=unknown.grades,
        unknown_queries=np.array(unknown.queries, dtype=np.str_),
    )  # fmt: skip
    content = hashlib.blake2b(digest_size=16)
    for values in (kept.query_rows, kept.passage_rows, kept.grades, *unknown[:2]):
        content.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    content.update("\n".join(unknown.queries).encode(errors="surrogatepass"))
    return content.hexdigest()
