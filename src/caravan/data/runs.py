"""A run: ranked passages with scores for each query, in memory and as a TREC file.

A run is the only thing that passes between the stages of retrieval: BM25, the retriever and the
reranker write it; negatives, rerank candidates and figures are read from it. In memory it is four
flat arrays over integer rows; ids are strings only in the file. Equal scores are ordered as
trec_eval orders them (passage id, descending), once, here, so that every measure and every reader
sees one ranking. Importing this loads numpy alone (pyarrow comes with the first file read).
"""

from __future__ import annotations

import gzip
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from caravan.errors import InputError
from caravan.files import replacing

if TYPE_CHECKING:
    from caravan.data.collection import Texts

log = logging.getLogger(__name__)

BLOCK_LINES = 1 << 18  # formatted at once while writing

Lines = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Query rows, passage rows and scores, a line of a run each."""


@dataclass(frozen=True, eq=False)
class Run:
    """Ranked passages of each query; a query may have none."""

    query_rows: np.ndarray  # [Q] int64, ascending, unique
    offsets: np.ndarray  # [Q + 1] int64
    passage_rows: np.ndarray  # [N] int64, best first within a query
    scores: np.ndarray  # [N] float32, non-increasing within a query
    tag: str = "caravan"

    def __len__(self) -> int:
        return len(self.query_rows)

    @property
    def counts(self) -> np.ndarray:
        """Passages of each query, [Q] int64."""
        return np.diff(self.offsets)

    def of(self, query_row: int) -> tuple[np.ndarray, np.ndarray]:
        """`(passage_rows, scores)` of one query, best first; empty if the run does not have it."""
        i = int(np.searchsorted(self.query_rows, query_row))
        if i == len(self.query_rows) or self.query_rows[i] != query_row:
            return self.passage_rows[:0], self.scores[:0]
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.passage_rows[span], self.scores[span]

    def top(self, k: int) -> Run:
        """The run cut to its `k` best passages a query."""
        counts = np.minimum(self.counts, k)
        rank = np.arange(len(self.passage_rows)) - np.repeat(self.offsets[:-1], self.counts)
        keep = rank < k
        return Run(
            self.query_rows, _offsets(counts), self.passage_rows[keep], self.scores[keep], self.tag
        )

    def only(self, query_rows: np.ndarray) -> Run:
        """The run of some of its queries."""
        kept = np.isin(self.query_rows, query_rows)
        lines = np.repeat(kept, self.counts)
        return Run(
            self.query_rows[kept],
            _offsets(self.counts[kept]),
            self.passage_rows[lines],
            self.scores[lines],
            self.tag,
        )

    @classmethod
    def from_topk(
        cls,
        query_rows: np.ndarray,  # [Q], unique, any order
        scores: np.ndarray,  # [Q, k]
        passage_rows: np.ndarray,  # [Q, k]; -1 where the index found nothing
        tag: str = "caravan",
    ) -> Run:
        """A run from what an index returns; rows of -1 are dropped."""
        found = passage_rows >= 0
        return cls.from_flat(
            np.repeat(np.asarray(query_rows), found.sum(axis=1)),
            passage_rows[found],
            scores[found],
            tag,
            all_queries=query_rows,
        )

    @classmethod
    def from_flat(
        cls,
        query_rows: np.ndarray,  # [N], any order
        passage_rows: np.ndarray,  # [N]
        scores: np.ndarray,  # [N]
        tag: str = "caravan",
        all_queries: np.ndarray | None = None,  # [Q] queries to keep even with no passage
    ) -> Run:
        """A run from one (query, passage, score) a line; sorted by query, then score descending.

        Lines of equal score keep their order; `canonical` breaks such ties by passage id.

        Raises:
            InputError: A score is NaN or infinite (a diverged model gives these).
        """
        query_rows = np.asarray(query_rows, dtype=np.int64)
        passage_rows = np.asarray(passage_rows, dtype=np.int64)
        with np.errstate(over="ignore"):  # what overflows float32 is infinite, refused below
            scores = np.asarray(scores).astype(np.float32)
        bad = ~np.isfinite(scores)
        if bad.any():
            raise InputError(
                f"{int(bad.sum())} of {len(scores)} scores of run '{tag}' are NaN or infinite "
                f"(the first for query row {int(query_rows[int(bad.argmax())])}); "
                "check that the model has not diverged"
            )
        if not _is_sorted(query_rows, scores):
            order = np.lexsort((-scores, query_rows))
            query_rows, passage_rows = query_rows[order], passage_rows[order]
            scores = scores[order]
        unique = query_rows[np.diff(query_rows, prepend=-1) != 0]
        if all_queries is not None:
            unique = np.unique(all_queries).astype(np.int64)
            if len(unique) != len(all_queries):
                raise ValueError(f"run '{tag}' is given a query twice")
        counts = np.bincount(np.searchsorted(unique, query_rows), minlength=len(unique))
        return cls(unique, _offsets(counts), passage_rows, scores, tag)


def canonical(run: Run, corpus: Texts) -> Run:
    """The run in trec_eval's order: float32 score descending, ties by passage id descending.

    Ids are looked up only for passages whose score ties, so a dense run costs no look-up.
    """
    if len(run.scores) < 2:
        return run
    queries = np.repeat(np.arange(len(run)), run.counts)
    ties = (run.scores[1:] == run.scores[:-1]) & (queries[1:] == queries[:-1])
    if not ties.any():
        return run
    tied = np.zeros(len(run.scores), dtype=bool)
    tied[1:] |= ties
    tied[:-1] |= ties
    places = np.flatnonzero(tied)
    starts = np.concatenate(([True], ~ties))  # a new block of equal scores begins here
    block = np.cumsum(starts)[places]
    rows, inverse = np.unique(run.passage_rows[places], return_inverse=True)
    ids = corpus.ids(rows)
    rank = np.empty(len(rows), dtype=np.int64)
    rank[sorted(range(len(ids)), key=ids.__getitem__, reverse=True)] = np.arange(len(rows))
    passage_rows = run.passage_rows.copy()
    passage_rows[places] = run.passage_rows[places[np.lexsort((rank[inverse], block))]]
    # scores stay: within a block they are equal (0.0 and -0.0 too, which print differently)
    return Run(run.query_rows, run.offsets, passage_rows, run.scores, run.tag)


def write_run(path: Path | str, run: Run, queries: Texts, corpus: Texts) -> None:
    """Write a TREC file (`qid Q0 pid rank score tag`) in canonical order; gzip if it ends in .gz.

    Scores are printed with nine digits, from which float32 is read back exactly. The file
    appears under its name only when it is whole.

    Raises:
        InputError: The tag is empty or holds white space (ids cannot, collections refuse that).
    """
    path = Path(path)
    if run.tag.split() != [run.tag]:
        raise InputError(f"the tag {run.tag!r} is empty or has white space: a TREC file needs one")
    run = canonical(run, corpus)
    with replacing(path) as scratch, scratch.open("wb") as raw:
        if path.suffix == ".gz":
            # no time and no name in the header: the same run gives the same bytes
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) as out:
                _write_lines(out.write, run, queries, corpus)
        else:
            _write_lines(raw.write, run, queries, corpus)


def read_run(
    path: Path | str,
    queries: Texts,
    corpus: Texts,
    unknown_ids: Literal["refuse", "count"] = "refuse",
    depth: int | None = None,
) -> Run:
    """Read a run, plain or gzipped, into canonical order.

    `caravan.data.run_layouts` lists the layouts. Where there are scores, ranks are ignored, as in
    trec_eval; where there are ranks alone, the score is 1 / rank.
    With `unknown_ids="count"` lines whose query or passage is not in the collection are left out
    and their number is logged. With a `depth` the result is that of `.top(depth)`, and while the
    file is read only the lines of that depth are held (and 16 bytes of each other line).

    Raises:
        InputError: What is wrong with the file, with file and line.
    """
    path = Path(path)
    if unknown_ids not in ("refuse", "count"):
        raise InputError(f"unknown_ids={unknown_ids!r} must be 'refuse' or 'count'")
    if depth is not None:
        best = _read_best(path, queries, corpus, depth)
        if best is not None:
            return best
        # The message needs the number of the line: the file is read whole.
        return read_run(path, queries, corpus, unknown_ids).top(depth)
    from caravan.data.trec import read_columns

    tag, query_column, passage_column, scores, lines = read_columns(path)
    query_rows, query_ids = _rows(query_column, queries)
    passage_rows, passage_ids = _rows(passage_column, corpus)
    known = (query_rows >= 0) & (passage_rows >= 0)
    if not known.all():
        i = int(known.argmin())
        what, id_ = ("query", query_ids(i)) if query_rows[i] < 0 else ("passage", passage_ids(i))
        unknown = f"{path}:{lines[i]} names {what} '{id_}'"
        if unknown_ids == "refuse" or not known.any():
            raise InputError(
                f"{unknown}, which the collection does not have (as do "
                f"{int((~known).sum())} of {len(known)} lines); check that the run was made on "
                "this collection, or remove such lines"
            )
        log.warning(
            "%s: left out %d of %d lines, their ids are not in the collection (the first: %s)",
            path.name,
            int((~known).sum()),
            len(known),
            unknown,
        )
        query_rows, passage_rows, scores, lines = (
            column[known] for column in (query_rows, passage_rows, scores, lines)
        )
    _refuse_duplicates(path, query_rows, passage_rows, lines, queries, corpus)
    return canonical(Run.from_flat(query_rows, passage_rows, scores, tag), corpus)


def _read_best(path: Path, queries: Texts, corpus: Texts, depth: int) -> Run | None:
    """The `depth` best of each query, read block by block; None if an id is unknown or repeated."""
    from caravan.data.trec import column_blocks

    tag, pairs = "", []
    best: Lines = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    waiting: list[Lines] = []
    for columns in column_blocks(path):
        tag = columns.tag
        query_rows = _rows(columns.query_ids, queries)[0]
        passage_rows = _rows(columns.passage_ids, corpus)[0]
        if min(query_rows.min(), passage_rows.min()) < 0:
            return None
        pairs.append(query_rows * len(corpus) + passage_rows)
        waiting.append(_deepest([(query_rows, passage_rows, columns.scores)], depth))
        if sum(len(part[0]) for part in waiting) > max(len(best[0]), BLOCK_LINES):
            best = _deepest([best, *waiting], depth)
            waiting = []
    every = np.concatenate(pairs)
    every.sort()
    if (every[1:] == every[:-1]).any():
        return None
    best = _deepest([best, *waiting], depth)
    return canonical(Run.from_flat(*best, tag), corpus).top(depth)


def _deepest(parts: list[Lines], depth: int) -> Lines:
    """The lines that may be among the `depth` best of their query; ties at the cut stay."""
    query_rows, passage_rows, scores = map(np.concatenate, zip(*parts, strict=True))
    order = np.lexsort((-scores, query_rows))
    query_rows, passage_rows, scores = query_rows[order], passage_rows[order], scores[order]
    starts = np.flatnonzero(np.diff(query_rows, prepend=-1))
    counts = np.diff(np.append(starts, len(query_rows)))
    keep = scores >= np.repeat(scores[starts + np.minimum(counts, depth) - 1], counts)
    return query_rows[keep], passage_rows[keep], scores[keep]


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _is_sorted(query_rows: np.ndarray, scores: np.ndarray) -> bool:
    step = np.diff(query_rows)
    return bool(((step > 0) | ((step == 0) & (scores[1:] <= scores[:-1]))).all())


def _write_lines(write: Callable[[bytes], object], run: Run, queries: Texts, corpus: Texts) -> None:
    start = 0
    while start < len(run):
        stop = int(np.searchsorted(run.offsets, run.offsets[start] + BLOCK_LINES, side="right")) - 1
        stop = min(max(stop, start + 1), len(run))
        span = slice(int(run.offsets[start]), int(run.offsets[stop]))
        counts = run.counts[start:stop]
        query_ids = queries.ids(run.query_rows[start:stop])
        rows, inverse = np.unique(run.passage_rows[span], return_inverse=True)
        passage_ids = corpus.ids(rows)
        ranks = np.arange(span.start, span.stop) - np.repeat(run.offsets[start:stop], counts) + 1
        fields: list[object] = [None] * (4 * len(inverse))
        fields[0::4] = [
            q for q, n in zip(query_ids, counts.tolist(), strict=True) for _ in range(n)
        ]
        fields[1::4] = map(passage_ids.__getitem__, inverse.tolist())
        fields[2::4] = ranks.tolist()
        fields[3::4] = run.scores[span].tolist()
        line = f"%s Q0 %s %d %.9g {run.tag.replace('%', '%%')}\n"
        write(((line * len(inverse)) % tuple(fields)).encode())
        start = stop


def _rows(ids: Any, texts: Texts) -> tuple[np.ndarray, Callable[[int], str]]:
    """Rows of the ids, [n] int64 (-1 where unknown), each looked up once; and the id of a line."""
    unique, index = ids.dictionary.to_pylist(), ids.indices.to_numpy()
    return texts.rows(unique)[index], lambda line: unique[index[line]]


def _refuse_duplicates(
    path: Path,
    query_rows: np.ndarray,
    passage_rows: np.ndarray,
    lines: np.ndarray,
    queries: Texts,
    corpus: Texts,
) -> None:
    pairs = query_rows * (int(passage_rows.max()) + 1) + passage_rows
    ordered = np.sort(pairs)
    if (ordered[1:] != ordered[:-1]).all():
        return
    order = np.argsort(pairs, kind="stable")
    again = order[1:][pairs[order][1:] == pairs[order][:-1]]
    i = int(again[np.argmin(lines[again])])
    first = int(lines[int((pairs == pairs[i]).argmax())])
    raise InputError(
        f"{path}:{lines[i]} gives passage '{corpus.ids(passage_rows[i : i + 1])[0]}' to query "
        f"'{queries.ids(query_rows[i : i + 1])[0]}' again (first at line {first}); "
        "a run names a passage once for a query, so remove one of the two lines"
    )
