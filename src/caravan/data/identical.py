"""A query that is itself a passage of the corpus must not find itself.

In BEIR's ArguAna each query is an argument of the corpus, under the same id, and the task is to
find its counterargument. BEIR's own code leaves a passage out where its id is the query's, in every
collection (`ignore_identical_ids` of beir/retrieval/evaluation.py, Thakur et al. 2021, arXiv
2104.08663). Elsewhere ids are often just numbers, and a passage that happens to have the query's
may be a good answer; so evaluation and the validation of a training have a setting, and a warning
names it where queries have the text of the passage as well. As a negative such a passage is never
drawn (`caravan.data.negatives`): one passage less changes nothing where the ids mean nothing.

    python evaluate.py retriever=bm25 data=beir data.path=/data/arguana ignore_identical_ids=true
    python train.py data=beir data.path=/data/arguana ignore_identical_ids=true
"""

from __future__ import annotations

import logging

import numpy as np

from caravan.data.collection import Collection
from caravan.data.runs import Run

log = logging.getLogger(__name__)

LOOK = 64
"""Queries whose texts are compared, to tell whether equal ids are the same text."""


def own_passages(collection: Collection, queries: np.ndarray) -> np.ndarray:
    """The row of the passage with each query's id, [Q] int64; -1 where there is none."""
    return collection.corpus.rows(collection.queries.ids(queries))


def without(run: Run, queries: np.ndarray, own: np.ndarray) -> Run:
    """The run without one passage of each query.

    Args:
        queries: rows [Q], ascending; those of the run are among them.
        own: the passage row of each, [Q]; -1 leaves out none.
    """
    query_rows = np.repeat(run.query_rows, run.counts)
    kept = run.passage_rows != own[np.searchsorted(queries, query_rows)]
    return Run.from_flat(
        query_rows[kept],
        run.passage_rows[kept],
        run.scores[kept],
        run.tag,
        all_queries=run.query_rows,
    )


def tell_if_queries_are_passages(collection: Collection, queries: np.ndarray) -> None:
    """Warn where queries have the id and the text of a passage, and would find themselves."""
    own = own_passages(collection, queries)
    both = np.flatnonzero(own >= 0)
    looked = both[:: -(-len(both) // LOOK)] if len(both) else both
    asked = [text for _, text in collection.queries.get(queries[looked])]
    there = collection.corpus.get(own[looked])
    same = sum(
        " ".join(query.split()) in (" ".join(text.split()), " ".join(f"{title} {text}".split()))
        for query, (title, text) in zip(asked, there, strict=True)
    )
    if same and 2 * same >= len(looked):
        log.warning(
            "%s: %d of %d queries are passages of the corpus themselves, under the same id; leave"
            " these out, as BEIR does: ignore_identical_ids=true",
            *(collection.name, len(both), len(queries)),
        )
