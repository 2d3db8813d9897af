"""Relabelling: passages that a teacher scores high become judged as relevant.

RLHN (arXiv 2505.16967) relabels the false negatives that a strong judge finds among the hard
negatives, which raises nDCG@10 on BEIR. Here the judge is a run with scores that can be compared
across queries, such as a reranker's, and one threshold, which is chosen on held-out judgements.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from caravan.data.collection import Collection
from caravan.data.qrels import Qrels
from caravan.data.runs import Run
from caravan.errors import InputError
from caravan.files import replacing

LEAST = 20
"""Held-out passages above a threshold; the precision of fewer is mostly chance."""


class Threshold(NamedTuple):
    """The lowest teacher score that is relevant, and what it selects of the held-out passages."""

    score: float
    precision: float
    recall: float  # of all relevant passages, retrieved or not
    selected: int


def choose_threshold(run: Run, qrels: Qrels, precision: float, relevant_from: int = 1) -> Threshold:
    """The lowest score from which on the share of relevant passages is at least `precision`.

    A passage without a judgement counts as not relevant, so the share is a lower bound.

    Args:
        run: the teacher's, over held-out queries.
        qrels: the held-out judgements.
        relevant_from: the lowest relevant grade.

    Raises:
        InputError: "no-threshold", there is none.
    """
    run = run.only(qrels.queries)
    keys, relevant = _keys(run), qrels.grades >= relevant_from
    known = qrels.query_rows[relevant] << 32 | qrels.passage_rows[relevant]
    order = np.argsort(-run.scores, kind="stable")
    scores, hits = run.scores[order], np.cumsum(np.isin(keys, known)[order])
    selected = np.arange(1, len(scores) + 1)
    shares = hits / selected
    possible = np.append(scores[1:] < scores[:-1], True) & (selected >= LEAST)  # ties stay together
    chosen = np.flatnonzero(possible & (shares >= precision))
    if not len(chosen):
        best = shares[possible].max(initial=0.0)
        raise InputError(
            "no-threshold",
            f"no threshold reaches a precision of {precision:g} on {LEAST} held-out passages or"
            f" more (the best is {best:.3f}); lower --precision, or use a better teacher",
        )
    at = int(chosen[-1])
    recall = float(hits[at] / max(relevant.sum(), 1))
    return Threshold(float(scores[at]), float(shares[at]), recall, int(selected[at]))


def relabel(run: Run, qrels: Qrels, own: np.ndarray, threshold: float) -> tuple[Qrels, int]:
    """The passages from the threshold on that have no judgement, as judgements of grade 1.

    Only queries with a judgement get more. Every judgement stays, also one of a passage that is
    not relevant.

    Args:
        run: the teacher's, over the queries of `qrels`.
        own: the passage with the id of each judged query, [Q], -1 for none; it is left out.

    Returns:
        The new judgements, and how many passages from the threshold on are judged not relevant.
    """
    run = run.only(qrels.queries)
    run = run.where(run.scores >= np.float32(threshold)).without(qrels.queries, own)
    keys, judged = _keys(run), qrels.query_rows << 32 | qrels.passage_rows
    new = keys[~np.isin(keys, judged)]
    against = int(np.isin(keys, judged[qrels.grades < 1]).sum())
    return Qrels(new >> 32, new & 0xFFFFFFFF, np.ones(len(new), dtype=np.int32)), against


def write_qrels(path: Path, parts: list[Qrels], collection: Collection) -> None:
    """Write judgements in BEIR's form, a part after the other; unknown ids are left out."""
    lines = ["query-id\tcorpus-id\tscore\n"]
    for part in parts:
        queries = collection.queries.ids(part.query_rows)
        passages = collection.corpus.ids(part.passage_rows)
        fields = zip(queries, passages, part.grades.tolist(), strict=True)
        lines += [f"{query}\t{passage}\t{grade}\n" for query, passage, grade in fields]
    with replacing(path) as scratch:
        scratch.write_text("".join(lines), "utf-8")


def _keys(run: Run) -> np.ndarray:
    """A pair of query and passage as one integer, [N] int64."""
    return np.repeat(run.query_rows, run.counts) << 32 | run.passage_rows
