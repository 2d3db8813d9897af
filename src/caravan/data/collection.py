"""A collection: corpus, queries and graded qrels by integer row, in one folder on disk.

The texts are memory-mapped Arrow files, and the id index is a memory-mapped array of sorted 64-bit
hashes, so opening 8.8 million passages neither reads nor copies texts. Other modules use rows; ids
are looked up only when files are read and written.

    collection = Collection.open(folder); collection.corpus.get([0, 7]); collection.qrels("test")
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from caravan import manifests
from caravan.data.batch_file import JOURNAL
from caravan.data.qrels import Judgement, Qrels, RowLookup, Scored, Unknown, UnknownIds
from caravan.data.runs import Run, read_run, write_run
from caravan.data.texts import Place, Record, Texts, text_keys, write_texts
from caravan.errors import InputError, reading

FORMAT = 4
"""Version of the folder's layout; a part of the keys in the cache (`caravan.data.source`)."""

OWN = "data:"
"""Prefix of the name of a run that belongs to the collection, as in `data:negatives`."""

CACHED_RUN = 8 << 20
"""Smallest run file, in bytes, whose arrays are cached; it takes a second to parse."""
ARRAYS = ("query_rows", "offsets", "passage_rows", "scores")

SAMPLED_QUERIES = 64  # texts that `warn_if_queries_are_passages` compares

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Collection:
    """A test collection for training and evaluation: corpus, queries, and qrels of each split."""

    name: str
    digest: str  # hex, of all records and judgements in order; independent of paths and times
    folder: Path
    corpus: Texts
    queries: Texts
    splits: tuple[str, ...]
    runs: tuple[str, ...] = ()  # runs of the source: runs/<name>.trec
    relevant_from: dict[str, int] = field(default_factory=dict)
    """The lowest relevant grade by split, if not 1 (as in TREC DL's passage task)."""

    @classmethod
    def open(cls, folder: str | Path) -> Collection:
        """Open a folder that `write_collection` wrote.

        Raises:
            InputError: "damaged-collection", also of a folder that is no collection.
        """
        folder = Path(folder)
        with reading(folder, "no collection can be read from this folder", "damaged-collection"):
            record = json.loads((folder / "collection.json").read_text("utf-8"))
            return cls(
                name=record["name"],
                digest=record["digest"],
                folder=folder,
                corpus=Texts(folder, "corpus", record["digests"]["corpus"]),
                queries=Texts(folder, "queries", record["digests"]["queries"]),
                splits=tuple(record["splits"]),
                runs=tuple(record["runs"]),
                relevant_from=record["relevant_from"],
            )

    def __reduce__(self) -> tuple[Callable[[Path], Collection], tuple[Path]]:
        return Collection.open, (self.folder,)

    def qrels(self, split: str) -> Qrels:
        """The judgements of a split; raises "unknown-split"."""
        if split not in self.splits:
            there = f"its splits are {', '.join(self.splits)}" if self.splits else "it has no qrels"
            raise InputError(
                "unknown-split",
                f"collection {self.name} has no split {split!r}: {there}; choose one of them"
                " (data.train_split, data.dev_split, data.split), or hold out some of the training"
                " queries (data.held_out=0.1)",
            )
        with np.load(self.folder / "qrels" / f"{split}.npz") as stored:
            unknown = Unknown(
                stored["unknown_query_rows"],
                stored["unknown_grades"],
                tuple(stored["unknown_queries"].tolist()),
            )
            return Qrels(stored["query_rows"], stored["passage_rows"], stored["grades"], unknown)

    def run_path(self, name: str | Path) -> Path:
        """The file of a run: a path, or `data:<name>` of the collection; raises "unknown-run"."""
        if not str(name).startswith(OWN):
            return Path(name)
        own = str(name).removeprefix(OWN)
        if own not in self.runs:
            there = ", ".join(f"{OWN}{run}" for run in self.runs) or "none"
            problem = f"collection {self.name} has no run {name}; its runs: {there}"
            raise InputError("unknown-run", problem)
        return self.folder / "runs" / f"{own}.trec"

    def read_run(self, name: str | Path, depth: int | None = None) -> Run:
        """Read a run; arguments and errors as for `run_path` and `caravan.data.runs.read_run`.

        A long file is parsed once for all processes and commands: its arrays are kept in the folder
        of the collection by the digest of the file, and memory-mapped. A hundred million lines take
        minutes to parse, and as arrays 1.2 GB that all ranks share. Where the folder cannot be
        written, the file is parsed.
        """
        path = self.run_path(name)
        is_large = path.is_file() and path.stat().st_size >= CACHED_RUN
        if not is_large or not os.access(self.folder, os.W_OK):
            return read_run(path, self.queries, self.corpus, depth)
        inputs = {"run": manifests.content_digest(path), "depth": depth}

        def build(folder: Path) -> None:
            run = read_run(path, self.queries, self.corpus, depth)
            for name in (*ARRAYS, "tag"):
                np.save(folder / f"{name}.npy", getattr(run, name))

        folder = self.folder / "parsed" / manifests.digest(inputs)
        manifests.ensure(folder, inputs, build)
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ARRAYS}
        return Run(**arrays, tag=str(np.load(folder / "tag.npy")))


def write_collection(
    folder: str | Path,
    name: str,
    corpus: Iterable[Record],
    queries: Iterable[Record],
    qrels: Mapping[str, Iterable[Judgement]],
    *,
    where: Place | None = None,
    unknown_ids: UnknownIds = "refuse",
    runs: Mapping[str, Iterable[Scored]] | None = None,
    relevant_from: Mapping[str, int] | None = None,
    resumes: bool = False,
) -> Collection:
    """Stream records into a new collection folder and open it.

    Only judgements, runs and hashes of ids are held in memory.

    Args:
        folder: new or empty, unless `resumes`; `cached_collection` gives one.
        corpus, queries: (id, title, text), ids unique within each (see `caravan.data.texts`).
        qrels: judgements of each split, `{"test": [(query id, passage id, grade), ...]}`.
        where: the place of the n-th record of a part ("corpus", "queries", "qrels/test",
            "runs/negatives") for messages, such as "corpus.jsonl:12".
        unknown_ids: "refuse" judgements with unknown ids, or "count" them in the metrics.
        runs: lines of the source's runs; repeated pairs keep the best score.
        relevant_from: the lowest relevant grade by split, if not 1.
        resumes: keep the texts that an interrupted process has written into the folder, from the
            same records in the same order. A corpus of which it has written all is not iterated, so
            the iterable has no side effects that the rest needs.

    Raises:
        InputError: "empty-corpus", or an error of `write_texts` or `RowLookup`.
    """
    folder = Path(folder)
    place = where or (lambda part, n: f"{part}, record {n + 1}")
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    if not resumes:
        _remove_journals(folder)
    digests, texts, spaced = {}, {}, 0
    for part, records in (("corpus", corpus), ("queries", queries)):
        written = write_texts(folder, part, records, place)
        texts[part], digests[part] = Texts(folder, part), written.digest
        spaced += written.spaced
    if not len(texts["corpus"]):
        problem = f"the corpus of {name} is empty ({place('corpus', 0)}): add passages"
        raise InputError("empty-corpus", problem)
    if spaced:
        log.warning(
            "%s: %d ids have white space such as U+00A0; trec_eval reads runs with such ids,"
            " but Python tools that split lines at any white space (ir_measures) do not",
            name, spaced,
        )  # fmt: skip
    lookup = RowLookup(texts["corpus"], texts["queries"], place, unknown_ids)
    for split, judgements in qrels.items():
        found = lookup.qrels(f"qrels/{split}", judgements)
        digests[f"qrels/{split}"] = _write_qrels(folder, split, found)
    written_runs = []
    for own, scored in (runs or {}).items():
        if (run := lookup.run(own, scored)) is not None:
            write_run(folder / "runs" / f"{own}.trec", run, texts["queries"], texts["corpus"])
            written_runs.append(own)
    content = hashlib.blake2b(json.dumps(digests, sort_keys=True).encode(), digest_size=16)
    record = {
        "name": name,
        "digest": content.hexdigest(),
        "digests": digests,
        "splits": list(qrels),
        "runs": written_runs,
        "relevant_from": dict(relevant_from or {}),
    }
    manifests.write_json(folder / "collection.json", record)
    _remove_journals(folder)
    return Collection.open(folder)


def _remove_journals(folder: Path) -> None:
    for part in ("corpus", "queries"):
        (folder / f"{part}.arrow{JOURNAL}").unlink(missing_ok=True)


def _write_qrels(folder: Path, split: str, qrels: Qrels) -> str:
    """Write `qrels/<split>.npz` and return its digest."""
    unknown = qrels.unknown
    np.savez(
        folder / "qrels" / f"{split}.npz",
        query_rows=qrels.query_rows, passage_rows=qrels.passage_rows, grades=qrels.grades,
        unknown_query_rows=unknown.query_rows, unknown_grades=unknown.grades,
        unknown_queries=np.array(unknown.queries, dtype=np.str_),
    )  # fmt: skip
    content = hashlib.blake2b(digest_size=16)
    for values in (qrels.query_rows, qrels.passage_rows, qrels.grades, *unknown[:2]):
        content.update(values.astype(values.dtype.newbyteorder("<")).tobytes())
    content.update("\n".join(unknown.queries).encode(errors="surrogatepass"))
    return content.hexdigest()


def own_passages(collection: Collection, queries: np.ndarray) -> np.ndarray:
    """The row of the passage with each query's id, [Q] int64; -1 if there is none."""
    return collection.corpus.rows(collection.queries.ids(queries))


def warn_if_queries_are_passages(collection: Collection, queries: np.ndarray) -> None:
    """Warn if queries have the id and the text of a passage, and would retrieve themselves.

    In BEIR's ArguAna each query is an argument of the corpus, and the task is to find its
    counterargument. BEIR's code drops the passage with the query's id in every collection
    (`ignore_identical_ids`, Thakur et al. 2021, arXiv 2104.08663). In other collections equal ids
    are often just equal numbers, and the passage may be relevant, so dropping it is a setting.
    """
    own = own_passages(collection, queries)
    both = np.flatnonzero(own >= 0)
    sample = both[:: -(-len(both) // SAMPLED_QUERIES) or 1]
    asked = text_keys([("", text) for _, text in collection.queries.get(queries[sample])])
    passages = collection.corpus.get(own[sample])
    same = asked == text_keys(passages)
    same |= asked == text_keys([("", text) for _, text in passages])
    if same.any() and 2 * same.sum() >= len(sample):
        log.warning(
            "%s: %d of %d queries have the id of a passage, often with the same text; to drop these"
            " passages from the results, as BEIR does, set ignore_identical_ids=true",
            collection.name, len(both), len(queries),
        )  # fmt: skip
