"""Graded judgements by row, and the lookup of ids in judgements and runs of a source."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

from caravan.data.runs import IdTable, Run
from caravan.data.texts import Place
from caravan.errors import InputError
from caravan.progress import track

RUN_LINES = 1 << 16  # looked up at once

Judgement = tuple[str, str, int]
"""(query id, passage id, grade)."""

Scored = tuple[str, str, float]
"""(query id, passage id, score), a line of a run."""


UnknownIds = Literal["refuse", "count"]
"""What becomes of judgements and run lines with ids that the collection does not have."""


class Unknown(NamedTuple):
    """Judgements whose query or passage the collection does not have.

    They cannot be retrieved, but trec_eval counts them: a relevant passage that the corpus lacks is
    part of the ideal ranking and of recall's denominator, and a query without a text scores 0.
    """

    query_rows: np.ndarray = np.empty(0, np.int64)  # [M] of judgements of unknown passages
    grades: np.ndarray = np.empty(0, np.int32)  # [M]
    queries: tuple[str, ...] = ()  # ids of judged queries that are unknown


@dataclass(frozen=True)
class Qrels:
    """Graded judgements by row, sorted by (query_row, passage_row)."""

    query_rows: np.ndarray  # [N] int64
    passage_rows: np.ndarray  # [N] int64
    grades: np.ndarray  # [N] int32; relevant from 1 on, negative grades are allowed
    unknown: Unknown = field(default_factory=Unknown)
    """Judgements of ids that are not in the collection; only metrics count them."""

    def __post_init__(self) -> None:
        queries = np.asarray(self.query_rows, dtype=np.int64)
        passages = np.asarray(self.passage_rows, dtype=np.int64)
        order = np.lexsort((passages, queries))
        object.__setattr__(self, "query_rows", queries[order])
        object.__setattr__(self, "passage_rows", passages[order])
        object.__setattr__(self, "grades", np.asarray(self.grades, dtype=np.int32)[order])

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

    @cached_property
    def relevant(self) -> Qrels:
        """The judgements with a grade of at least 1 of passages that are known."""
        lines = self.grades >= 1
        return Qrels(self.query_rows[lines], self.passage_rows[lines], self.grades[lines])

    def of(self, query_row: int) -> tuple[np.ndarray, np.ndarray]:
        """(passage_rows, grades) of one query; empty if it is not judged."""
        low, high = np.searchsorted(self.query_rows, [query_row, query_row + 1])
        return self.passage_rows[low:high], self.grades[low:high]

    def positives(self, query_row: int) -> np.ndarray:
        """The passage rows judged relevant (grade >= 1) for one query."""
        return self.relevant.of(query_row)[0]


class RowLookup:
    """Turns judgements and run lines by id into `Qrels` and `Run`.

    Args:
        place: the place of the n-th record of a part, for error messages.
        unknown_ids: "refuse" lines with unknown ids, or "count" them.
    """

    def __init__(
        self, corpus: IdTable, queries: IdTable, place: Place, unknown_ids: UnknownIds
    ) -> None:
        self.corpus, self.queries, self.place = corpus, queries, place
        self.unknown_ids = unknown_ids

    def qrels(self, part: str, judgements: Iterable[Judgement]) -> Qrels:
        """The judgements of a split; raises "unknown-id" or "conflicting-judgements"."""
        triples = list(judgements)
        query_ids, passage_ids = [q for q, _, _ in triples], [p for _, p, _ in triples]
        query_rows, passage_rows = self.queries.rows(query_ids), self.corpus.rows(passage_ids)
        grades = np.fromiter((grade for _, _, grade in triples), np.int32, len(triples))
        self._known(part, query_rows, passage_rows, triples, 0)
        # unknown ids get rows beyond the tables, so that their repetitions are found as well
        unknown_queries = _number_unknown(query_rows, query_ids, len(self.queries))
        _number_unknown(passage_rows, passage_ids, len(self.corpus))
        pairs = query_rows * (1 + passage_rows.max(initial=0)) + passage_rows
        _, firsts, inverse = np.unique(pairs, return_index=True, return_inverse=True)
        conflicts = grades != grades[firsts[inverse]]
        if conflicts.any():
            second = int(conflicts.argmax())
            first = int(firsts[inverse[second]])
            raise InputError(
                "conflicting-judgements",
                f"{self.place(part, second)}: query {query_ids[second]!r} and passage"
                f" {passage_ids[second]!r} have grade {grades[second]}, but {grades[first]} at"
                f" {self.place(part, first)}; keep one of the two judgements",
            )
        query_rows, passage_rows, grades = query_rows[firsts], passage_rows[firsts], grades[firsts]
        has_text, in_corpus = query_rows < len(self.queries), passage_rows < len(self.corpus)
        known, lost = has_text & in_corpus, has_text & ~in_corpus
        unknown = Unknown(query_rows[lost], grades[lost], tuple(unknown_queries))
        return Qrels(query_rows[known], passage_rows[known], grades[known], unknown)

    def run(self, name: str, lines: Iterable[Scored]) -> Run | None:
        """A run of these lines, the best score where a pair is repeated; None without any line."""
        columns, done = [], 0
        iterator = iter(track(lines, f"run {name}", unit="lines"))
        while batch := list(itertools.islice(iterator, RUN_LINES)):
            query_rows = self.queries.rows([query for query, _, _ in batch])
            passage_rows = self.corpus.rows([passage for _, passage, _ in batch])
            scores = np.fromiter((score for _, _, score in batch), np.float32, len(batch))
            known = self._known(f"runs/{name}", query_rows, passage_rows, batch, done)
            columns.append((query_rows[known], passage_rows[known], scores[known]))
            done += len(batch)
        if not any(len(rows) for rows, _, _ in columns):
            return None
        query_rows, passage_rows, scores = map(np.concatenate, zip(*columns, strict=True))
        best = np.lexsort((-scores, passage_rows, query_rows))
        pairs = query_rows[best] * len(self.corpus) + passage_rows[best]
        best = best[np.diff(pairs, prepend=-1) != 0]
        return Run.from_flat(query_rows[best], passage_rows[best], scores[best], name)

    def _known(
        self,
        part: str,
        query_rows: np.ndarray,
        passage_rows: np.ndarray,
        lines: list[Judgement] | list[Scored],
        before: int,
    ) -> np.ndarray:
        """Lines whose query and passage are known, bool [n]."""
        unknown = (query_rows < 0) | (passage_rows < 0)
        if self.unknown_ids != "count" and unknown.any():
            at = int(np.argmax(unknown))
            query, passage, _ = lines[at]
            kind, name = ("query", query) if query_rows[at] < 0 else ("passage", passage)
            raise InputError(
                "unknown-id",
                f"{self.place(part, before + at)}: the {kind} id {name!r} is unknown (lines with"
                f" unknown ids in {part}: {int(unknown.sum())}); correct it, or set"
                " data.unknown_ids=count to accept such lines",
            )
        return ~unknown


def _number_unknown(rows: np.ndarray, ids: list[str], start: int) -> dict[str, int]:
    """Number unknown ids (row -1) from `start` on, in place; returns the row of each."""
    numbered: dict[str, int] = {}
    for at in np.flatnonzero(rows < 0).tolist():
        rows[at] = numbered.setdefault(ids[at], start + len(numbered))
    return numbered
