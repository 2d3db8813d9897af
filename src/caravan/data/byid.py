"""Judgements and runs by ids, as rows of a collection; errors name the place in the source.

Judgements and lines of a run name a query and a passage by their ids; a collection has rows
alone. Unknown ids are refused or counted, repeated lines are kept once.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from caravan.data.runs import Run
from caravan.data.texts import Place, Texts
from caravan.errors import InputError
from caravan.progress import track

RUN_LINES = 1 << 16  # looked up at once

Judgement = tuple[str, str, int]
"""(query id, passage id, grade)."""

Scored = tuple[str, str, float]
"""(query id, passage id, score), a line of a run."""


class Unknown(NamedTuple):
    """Judgements whose query or passage the collection does not have.

    Nothing can be found for them, but trec_eval counts them: a relevant passage that the corpus
    lacks is part of the ideal ranking and of recall's denominator, a query without a text scores 0.
    """

    query_rows: np.ndarray = np.empty(0, np.int64)  # [M] of judgements of unknown passages
    grades: np.ndarray = np.empty(0, np.int32)  # [M]
    queries: tuple[str, ...] = ()  # ids of judged queries that are unknown


class ById:
    """Looks ids up in corpus and queries.

    Args:
        place: names the place of the n-th record of a part, for messages.
        unknown_ids: "refuse" an id that is nowhere, or "count" it and go on.

    Attributes:
        skipped: how many lines were left out, and why.
    """

    def __init__(self, corpus: Texts, queries: Texts, place: Place, unknown_ids: str) -> None:
        self.corpus, self.queries, self.place = corpus, queries, place
        self.unknown_ids = unknown_ids
        self.skipped = {"unknown_ids": 0, "repeated_judgements": 0}

    def judgements(
        self, part: str, judgements: Iterable[Judgement]
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, Unknown]:
        """Query rows, passage rows and grades [N] of a split, by query and passage; the unknown.

        Raises:
            InputError: an unknown id, or two grades for one passage of a query.
        """
        triples = list(judgements)
        query_rows = self.queries.rows([query for query, _, _ in triples])
        passage_rows = self.corpus.rows([passage for _, passage, _ in triples])
        grades = np.fromiter((grade for _, _, grade in triples), np.int32, len(triples))
        self._known(part, query_rows, passage_rows, triples, 0)
        # unknown ids get rows beyond the tables, so that their repetitions are found as well
        queries = _beyond(query_rows, [query for query, _, _ in triples], len(self.queries))
        _beyond(passage_rows, [passage for _, passage, _ in triples], len(self.corpus))
        order = np.lexsort((np.arange(len(triples)), passage_rows, query_rows))
        same = (np.diff(query_rows[order]) == 0) & (np.diff(passage_rows[order]) == 0)
        for low in np.flatnonzero(same):
            first, second = (int(at) for at in order[low : low + 2])
            if grades[first] != grades[second]:
                query, passage, grade = triples[second]
                raise InputError(
                    f"{self.place(part, second)}: query {query!r} and passage {passage!r} get grade"
                    f" {grade}, but {grades[first]} at {self.place(part, first)}: keep one of the "
                    "two judgements"
                )
        order = order[np.concatenate([[True], ~same])] if len(order) else order
        self.skipped["repeated_judgements"] += int(same.sum())
        query_rows, passage_rows, grades = query_rows[order], passage_rows[order], grades[order]
        searched, there = query_rows < len(self.queries), passage_rows < len(self.corpus)
        known = searched & there
        lost = searched & ~there
        unknown = Unknown(query_rows[lost], grades[lost], tuple(queries))
        return query_rows[known], passage_rows[known], grades[known], unknown

    def run(self, name: str, lines: Iterable[Scored]) -> Run | None:
        """A run of these lines, the best where a query has a passage twice; None if there is none.

        Held in memory: 20 bytes a line.
        """
        columns, done = [], 0
        iterator = iter(track(lines, f"run {name}", unit="lines"))
        while block := list(itertools.islice(iterator, RUN_LINES)):
            query_rows = self.queries.rows([query for query, _, _ in block])
            passage_rows = self.corpus.rows([passage for _, passage, _ in block])
            scores = np.fromiter((score for _, _, score in block), np.float32, len(block))
            known = self._known(f"runs/{name}", query_rows, passage_rows, block, done)
            columns.append((query_rows[known], passage_rows[known], scores[known]))
            done += len(block)
        if not any(len(block[0]) for block in columns):
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
        """Which lines name a query and a passage that there are."""
        unknown = (query_rows < 0) | (passage_rows < 0)
        if self.unknown_ids == "refuse" and unknown.any():
            at = int(np.argmax(unknown))
            query, passage, _ = lines[at]
            kind, name = ("query", query) if query_rows[at] < 0 else ("passage", passage)
            of = "split" if part.startswith("qrels/") else "run"
            raise InputError(
                f"{self.place(part, before + at)}: the {kind} id {name!r} is unknown (unknown ids "
                f"in this {of}: {int(unknown.sum())}): correct it, or set unknown_ids=count to "
                "accept such lines"
            )
        self.skipped["unknown_ids"] += int(unknown.sum())
        return ~unknown


def _beyond(rows: np.ndarray, ids: list[str], start: int) -> dict[str, int]:
    """Number unknown ids (row -1) from `start` on, in place; returns the row of each."""
    numbered: dict[str, int] = {}
    for at in np.flatnonzero(rows < 0).tolist():
        rows[at] = numbered.setdefault(ids[at], start + len(numbered))
    return numbered
