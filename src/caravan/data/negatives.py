"""Samplers: choose the positive and the negatives of each query in each epoch.

Hard negatives are passages that a retriever ranks high and that are not judged relevant. RepLLaMA
blends the top 200 of two retrievers (arXiv 2310.08319, section 3.1). Any run can be used, and
several runs are blended. Without runs, or if a query has too few candidates, passages are drawn
from the corpus. A group is a pure function of (seed, epoch, position).

Never drawn are the positives of the query, the passage with the id of the query (in ArguAna and
Quora queries are also passages), and passages with the text of any of these or of the query. The
same rule masks passages of other queries in a batch (`excluded_keys`,
`caravan.training.retriever`).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from caravan.data.collection import OWN, Collection, own_passages
from caravan.data.mining import Rules, invalid, mine, values_of
from caravan.data.qrels import Qrels
from caravan.data.runs import Run
from caravan.data.texts import text_keys
from caravan.errors import InputError

log = logging.getLogger(__name__)


def run_over(
    collection: Collection, path: str | Path, qrels: Qrels, depth: int | None = None
) -> Run:
    """`Collection.read_run`; raises "other-queries" if it ranks none of the judged queries."""
    run = collection.read_run(path, depth)
    if not np.isin(qrels.queries, run.query_rows).any():
        raise InputError(
            "other-queries",
            f"{path} ranks none of the judged queries of its split; write one with evaluate.py"
            " over that split",
        )
    return run


class Sampler(Protocol):
    """The interface of a sampler; `docs/extending.md` has an example.

    The training set of a retriever or reranker (`caravan.data.batching.Groups`) uses it. `open` is
    called once in each process, before the workers (`batching.num_workers`) are forked; the other
    methods are called in the workers. They must be pure functions of their arguments and the seed,
    so that a resumed run and a run on another number of ranks train on the same groups.

    Rows are int64 rows of `Collection.queries` and `Collection.corpus`.

    Attributes:
        number: negatives per query, the same for all queries.
    """

    number: int

    def open(self, collection: Collection, qrels: Qrels, seed: int) -> None:
        """Read the files that `group` needs; `qrels` are those of the training split.

        Raises:
            InputError: If a file does not belong to the collection or the corpus is too small.
        """

    def group(self, query_row: int, epoch: int, position: int) -> np.ndarray:
        """Distinct passage rows [1 + number] of a query: a positive, then its negatives.

        Args:
            query_row: row of a query with a relevant passage.
            epoch: counted from 0.
            position: position of the query in the order of the epoch; unique within the epoch.
        """
        ...

    def excluded_keys(self, query_row: int) -> np.ndarray:
        """Keys of the texts that are never negatives of a query, [M] int64 with M >= 1.

        A retriever masks passages of other queries in the batch if their key
        (`caravan.data.texts.text_keys`) is among these.
        """
        ...

    def teacher_scores(self, query_row: int, rows: np.ndarray) -> np.ndarray | None:
        """A teacher's scores of a group, [1 + number] float32, NaN for passages without a score.

        Without a teacher it returns None for every query.
        """
        return None

    def facts(self) -> dict[str, Any]:
        """Facts about the negatives for the manifest of the training; called after `open`."""
        return {}

    def variant(self, runs: Sequence[str] | None, number: int | None) -> Sampler:
        """A copy, not yet opened, for a collection of a mixture that has other runs or numbers.

        None keeps the setting of the sampler.
        """
        if runs is not None or number is not None:
            raise InputError(
                "not-supported",
                f"sampler {type(self).__name__} cannot have other runs or another number for a"
                " collection; leave them out of data.entries, or define its method variant",
            )
        return copy.copy(self)


class Negatives(Sampler):
    """Chooses the group [positive, negative, ...] of a query, 1 + `number` passages.

    Args:
        runs: run files over the training queries, or data:negatives for the negatives that the
            collection includes; without runs, passages are drawn from the corpus.
        number: negatives per query.
        depth: passages per query that are read from each run, from the top.
        choose: "random" samples from the candidates; "top" takes the best, interleaving the runs.
        absolute_margin, relative_margin, max_score, min_score, range_min, range_max: rules that
            leave probable positives out of each run (`caravan.data.mining.Rules`).
        teacher: a run with teacher scores for the loss; `evaluate.py` with a reranker and
            rerank.judged=true writes one.
        teacher_margin: a rule like `absolute_margin` by the teacher's scores.
    """

    def __init__(
        self,
        runs: Sequence[str] = (),
        number: int = 15,
        depth: int = 200,
        choose: Literal["random", "top"] = "random",
        absolute_margin: float | None = None,
        relative_margin: float | None = None,
        max_score: float | None = None,
        min_score: float | None = None,
        range_min: int = 0,
        range_max: int | None = None,
        teacher: str | None = None,
        teacher_margin: float | None = None,
    ) -> None:
        if number < 0 or depth <= range_min:
            raise invalid(
                f"number={number} must be 0 or more, and depth={depth} above range_min={range_min}"
            )
        if teacher_margin is not None and teacher is None:
            raise invalid("teacher_margin needs a run of scores: set sampler.teacher")
        self.rules = Rules(
            absolute_margin,
            relative_margin,
            max_score,
            min_score,
            teacher_margin,
            range_min,
            range_max,
        )
        self.paths = [Path(path) for path in runs]
        self.teacher_path = teacher and Path(teacher)
        self._teacher: Run | None = None
        self.number = number
        self.depth = depth
        self.choose = choose
        self._runs: list[Run] = []
        self._facts: dict[str, Any] = {}

    def open(self, collection: Collection, qrels: Qrels, seed: int) -> None:
        """Read the runs. Must be called once before `group`.

        Raises:
            InputError: "other-queries" if a run ranks none of the training queries;
                "no-positive-scores" if it has no positive that a margin could compare with.
        """
        self._qrels, self._collection, self._seed = qrels, collection, seed
        self._own = own_passages(collection, qrels.queries)
        positives = np.unique(qrels.relevant.query_rows, return_counts=True)[1]
        others = len(collection.corpus) - int(positives.max(initial=0))
        if self.number > others:
            raise InputError(
                "corpus-too-small",
                f"sampler.number={self.number}: the positives of one query leave {others} of the"
                f" {len(collection.corpus)} passages; set it to {others} or less",
            )
        self._runs = [run_over(collection, path, qrels, self.depth) for path in self.paths]
        if not self.paths and self.number and "negatives" in collection.runs:
            log.warning(
                "%s includes negatives, which are not used; to use them, set"
                " sampler.runs=[%snegatives]",
                collection.name, OWN,
            )  # fmt: skip
        if self.teacher_path:
            self._teacher = run_over(collection, self.teacher_path, qrels)
        if self.rules.names:
            for i, (path, run) in enumerate(zip(self.paths, self._runs, strict=True)):
                self._runs[i], self._facts[str(path)] = mine(
                    run, qrels, self._own, self.rules, str(path), self._teacher
                )

    def facts(self) -> dict[str, Any]:
        """Of each run, how many candidates the rules removed (`caravan.data.mining.mine`)."""
        return self._facts

    def variant(self, runs: Sequence[str] | None, number: int | None) -> Negatives:
        """See `Sampler`."""
        other = copy.copy(self)
        other.number = self.number if number is None else number
        other.paths = self.paths if runs is None else [Path(path) for path in runs]
        other._facts = {}
        return other

    def excluded(self, query_row: int) -> np.ndarray:
        """Passage rows that are never negatives of a query: its positives, then own passage."""
        positives = self._qrels.positives(query_row)
        own = self._own[np.searchsorted(self._qrels.queries, query_row)]
        return positives if own < 0 or own in positives else np.append(positives, own)

    def excluded_keys(self, query_row: int) -> np.ndarray:
        """The `text_keys` of the passages in `excluded` and of the query itself."""
        texts = self._collection.corpus.get(self.excluded(query_row))
        ((_, asked),) = self._collection.queries.get([query_row])
        return text_keys([*texts, ("", asked)])

    def group(self, query_row: int, epoch: int, position: int) -> np.ndarray:
        """See `Sampler`; raises "corpus-too-small" if the corpus has too few other texts."""
        rng = np.random.default_rng((self._seed, epoch, position))
        positives = self._qrels.positives(query_row)
        positive = int(positives[rng.integers(len(positives))])
        taken = self.excluded(query_row)
        keys = self.excluded_keys(query_row)
        pool = self.candidates(query_row, taken)
        chosen = np.empty(0, dtype=np.int64)
        # Read only the drawn passages: copies are rare, and comparing the texts of all candidates
        # would cost a hundred times as much.
        while len(chosen) < self.number:
            drawn = self._drawn(self.number - len(chosen), query_row, pool, taken, rng)
            pool = pool[~np.isin(pool, drawn)]
            taken = np.concatenate((taken, drawn))
            copies = np.isin(text_keys(self._collection.corpus.get(drawn)), keys)
            chosen = np.concatenate((chosen, drawn[~copies]))
        return np.concatenate(([positive], chosen))

    def teacher_scores(self, query_row: int, rows: np.ndarray) -> np.ndarray | None:
        """See `Sampler`. All scores are NaN if the teacher has no score for the positive."""
        if self._teacher is None:
            return None
        known, scores = self._teacher.of(query_row)
        found = values_of(known, scores, rows)
        return np.full(len(rows), np.nan, np.float32) if np.isnan(found[0]) else found

    def candidates(self, query_row: int, excluded: np.ndarray) -> np.ndarray:
        """All passage rows that can be hard negatives of a query, ordered by rank in the runs.

        They may include copies of the positives, which `group` drops.
        """
        ranked = [run.of(query_row)[0] for run in self._runs]
        ranked = [rows[~np.isin(rows, excluded)] for rows in ranked]
        if not ranked:
            return np.empty(0, dtype=np.int64)
        rank = np.concatenate([np.arange(len(rows)) for rows in ranked])
        blended = np.concatenate(ranked)[np.argsort(rank, kind="stable")]
        first = np.unique(blended, return_index=True)[1]
        return blended[np.sort(first)]

    def _drawn(
        self,
        number: int,
        query_row: int,
        pool: np.ndarray,
        taken: np.ndarray,
        rng: np.random.Generator,
    ) -> np.ndarray:
        """Draw `number` rows from the pool, then from the corpus except the rows in `taken`."""
        if self.choose == "random" and len(pool) > number:
            pool = rng.choice(pool, number, replace=False)
        rows = pool[:number].tolist()
        size = len(self._collection.corpus)
        known = {*rows, *taken.tolist()}
        if size - len(known) < number - len(rows):
            (name,) = self._collection.queries.ids([query_row])
            raise InputError(
                "corpus-too-small",
                f"sampler.number={self.number} is too large for query {name!r}: the corpus of"
                f" {size} passages has too few that are not its positives or copies of them; lower"
                " it",
            )
        while len(rows) < number:
            row = int(rng.integers(size))
            if row not in known:
                known.add(row)
                rows.append(row)
        return np.array(rows, dtype=np.int64)
