"""A run: ranked passages with scores for each query, in memory and as a TREC file.

In memory it is four flat arrays over integer rows; ids are strings only in the file. Equal scores
are ordered as trec_eval orders them (passage id, descending), once, here, so that every measure and
every reader sees one ranking. `caravan.data.run_files` reads the columns of a file.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from caravan.data.run_files import Ids, column_blocks
from caravan.errors import InputError
from caravan.files import replacing

LINES = 1 << 18  # formatted or merged at once

Lines = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Query rows, passage rows and scores, one entry a line."""


class IdTable(Protocol):
    """Ids by row and rows by id, such as `caravan.data.texts.Texts`."""

    def __len__(self) -> int: ...

    def ids(self, rows: np.ndarray) -> list[str]:
        """The id of each row."""

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """The row of each id, int64; -1 where the id is unknown."""


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
        """`(passage_rows, scores)` of one query, best first; empty if the run lacks the query."""
        i = int(np.searchsorted(self.query_rows, query_row))
        if i == len(self.query_rows) or self.query_rows[i] != query_row:
            return self.passage_rows[:0], self.scores[:0]
        span = slice(self.offsets[i], self.offsets[i + 1])
        return self.passage_rows[span], self.scores[span]

    def top(self, k: int) -> Run:
        """The `k` best passages of each query."""
        rank = np.arange(len(self.passage_rows)) - np.repeat(self.offsets[:-1], self.counts)
        return self.where(rank < k)

    def only(self, query_rows: np.ndarray) -> Run:
        """The run of some of its queries."""
        kept = np.isin(self.query_rows, query_rows)
        lines = np.repeat(kept, self.counts)
        offsets = _offsets(self.counts[kept])
        columns = self.passage_rows[lines], self.scores[lines]
        return Run(self.query_rows[kept], offsets, *columns, self.tag)

    def without(self, queries: np.ndarray, passages: np.ndarray) -> Run:
        """The run without one passage of each query.

        Args:
            queries: rows [Q], ascending; those of the run are among them.
            passages: the row to leave out for each, [Q]; -1 for none.
        """
        at = np.repeat(np.searchsorted(queries, self.query_rows), self.counts)
        return self.where(self.passage_rows != passages[at])

    def where(self, lines: np.ndarray) -> Run:
        """The run of some of its lines, [N] bool; all queries stay."""
        kept = np.concatenate(([0], np.cumsum(lines)))[self.offsets]
        return Run(self.query_rows, kept, self.passage_rows[lines], self.scores[lines], self.tag)

    @classmethod
    def from_topk(
        cls,
        query_rows: np.ndarray,  # [Q], unique, any order
        scores: np.ndarray,  # [Q, k]
        passage_rows: np.ndarray,  # [Q, k]; -1 where the index found nothing
    ) -> Run:
        """A run from what an index returns; rows of -1 are dropped."""
        found = passage_rows >= 0
        lines = np.repeat(np.asarray(query_rows), found.sum(axis=1))
        return cls.from_flat(lines, passage_rows[found], scores[found], all_queries=query_rows)

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
            InputError: "invalid-score", a score is NaN or infinite.
        """
        query_rows = np.asarray(query_rows, dtype=np.int64)
        passage_rows = np.asarray(passage_rows, dtype=np.int64)
        with np.errstate(over="ignore"):  # overflow gives infinity, which is refused below
            scores = np.asarray(scores).astype(np.float32)
        bad = ~np.isfinite(scores)
        if bad.any():
            raise InputError(
                "invalid-score",
                f"{int(bad.sum())} of {len(scores)} scores of run '{tag}' are NaN or infinite (the"
                f" first for query row {int(query_rows[int(bad.argmax())])}); check that the model"
                " has not diverged",
            )
        step = np.diff(query_rows)
        if not ((step > 0) | ((step == 0) & (scores[1:] <= scores[:-1]))).all():
            order = np.lexsort((-scores, query_rows))
            query_rows, passage_rows, scores = query_rows[order], passage_rows[order], scores[order]
        unique = query_rows[np.diff(query_rows, prepend=-1) != 0]
        if all_queries is not None:
            unique = np.unique(all_queries).astype(np.int64)
            if len(unique) != len(all_queries):
                raise ValueError(f"all_queries of run '{tag}' has a query twice")
        counts = np.bincount(np.searchsorted(unique, query_rows), minlength=len(unique))
        return cls(unique, _offsets(counts), passage_rows, scores, tag)


def canonical(run: Run, corpus: IdTable) -> Run:
    """The run in trec_eval's order: float32 score descending, ties by passage id descending.

    Ids are looked up only for passages whose scores tie, so a dense run costs no lookup.
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
    group = np.cumsum(np.concatenate(([True], ~ties)))[places]  # of equal scores
    rows, inverse = np.unique(run.passage_rows[places], return_inverse=True)
    ids = corpus.ids(rows)
    rank = np.empty(len(rows), dtype=np.int64)
    rank[sorted(range(len(ids)), key=ids.__getitem__, reverse=True)] = np.arange(len(rows))
    passage_rows = run.passage_rows.copy()
    passage_rows[places] = run.passage_rows[places[np.lexsort((rank[inverse], group))]]
    # scores stay: within a group they are equal (0.0 and -0.0 too, which print differently)
    return Run(run.query_rows, run.offsets, passage_rows, run.scores, run.tag)


def write_run(path: Path | str, run: Run, queries: IdTable, corpus: IdTable) -> None:
    """Write a TREC file (`qid Q0 pid rank score tag`) in canonical order; gzip if it ends in .gz.

    Scores are printed with nine digits, from which float32 is read back exactly. The file
    appears under its name only when it is complete. Raises "invalid-tag".
    """
    path = Path(path)
    if run.tag.split() != [run.tag]:
        raise InputError("invalid-tag", f"the tag {run.tag!r} of a run has white space, or none")
    run = canonical(run, corpus)
    with replacing(path) as scratch, scratch.open("wb") as raw:
        if path.suffix == ".gz":
            # no time and no name in the header: the same run gives the same bytes
            with gzip.GzipFile("", "wb", 6, raw, mtime=0) as out:
                _write_lines(out.write, run, queries, corpus)
        else:
            _write_lines(raw.write, run, queries, corpus)


def _write_lines(
    write: Callable[[bytes], object], run: Run, queries: IdTable, corpus: IdTable
) -> None:
    line = f"%s Q0 %s %d %.9g {run.tag.replace('%', '%%')}\n"
    for start in range(0, len(run.scores), LINES):
        lines = np.arange(start, min(start + LINES, len(run.scores)))
        query = np.searchsorted(run.offsets, lines, side="right") - 1
        fields = (
            _names(queries, run.query_rows[query]),
            _names(corpus, run.passage_rows[lines]),
            (lines - run.offsets[query] + 1).tolist(),
            run.scores[lines].tolist(),
        )
        write("".join(map(line.__mod__, zip(*fields, strict=True))).encode())


def _names(table: IdTable, rows: np.ndarray) -> list[str]:
    """The id of each row, each looked up once."""
    unique, inverse = np.unique(rows, return_inverse=True)
    names = table.ids(unique)
    return [names[at] for at in inverse.tolist()]


def read_run(path: Path | str, queries: IdTable, corpus: IdTable, depth: int | None = None) -> Run:
    """Read a run, plain or gzipped, into canonical order.

    Where there are scores, ranks are ignored, as in trec_eval; where there are only ranks, the
    score is 1 / rank.

    Args:
        depth: keep this many passages of each query, as `Run.top` would; only these lines are held
            in memory (and 16 bytes of each other line).

    Raises:
        InputError: "unknown-id", "duplicate-line", or what `column_blocks` raises, with file and
            line.
    """
    path = Path(path)
    tag = ""
    pairs, numbers = [], []  # of every line
    best: list[Lines] = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    for columns in column_blocks(path):
        tag = columns.tag
        sides = (("query", columns.queries, queries), ("passage", columns.passages, corpus))
        query_rows, passage_rows = (_rows(path, columns.lines, *side) for side in sides)
        numbers.append(columns.lines)
        pairs.append(query_rows * len(corpus) + passage_rows)
        lines = query_rows, passage_rows, columns.scores
        best.append(lines if depth is None else _deepest([lines], depth))
        waiting = sum(len(rows) for rows, _, _ in best[1:])
        if depth is not None and waiting > max(len(best[0][0]), LINES):
            best = [_deepest(best, depth)]
    _refuse_duplicates(path, np.concatenate(pairs), np.concatenate(numbers), queries, corpus)
    query_rows, passage_rows, scores = map(np.concatenate, zip(*best, strict=True))
    run = canonical(Run.from_flat(query_rows, passage_rows, scores, tag), corpus)
    return run if depth is None else run.top(depth)


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


def _rows(path: Path, lines: np.ndarray, kind: str, ids: Ids, table: IdTable) -> np.ndarray:
    """The row of each line's id, [n] int64, each looked up once; raises "unknown-id"."""
    rows = table.rows(ids.names)[ids.codes]
    if (rows < 0).any():
        i = int((rows < 0).argmax())
        raise InputError(
            "unknown-id",
            f"{path}:{lines[i]} has the {kind} '{ids.names[ids.codes[i]]}', which is not in the"
            " collection; check that the run was made on this collection, or remove such lines",
        )
    return rows


def _refuse_duplicates(
    path: Path, pairs: np.ndarray, numbers: np.ndarray, queries: IdTable, corpus: IdTable
) -> None:
    ordered = np.sort(pairs)
    if (ordered[1:] != ordered[:-1]).all():
        return
    order = np.argsort(pairs, kind="stable")
    repeated = order[1:][pairs[order][1:] == pairs[order][:-1]]
    i = int(repeated.min())
    first = numbers[int((pairs == pairs[i]).argmax())]
    query, passage = (np.array([row]) for row in divmod(int(pairs[i]), len(corpus)))
    raise InputError(
        "duplicate-line",
        f"{path}:{numbers[i]} has passage '{corpus.ids(passage)[0]}' for query"
        f" '{queries.ids(query)[0]}' again (first at line {first}); remove one of the two lines",
    )
