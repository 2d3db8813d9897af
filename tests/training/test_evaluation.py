"""Validation callbacks and the mean over queries: in parts, over ranks, with ranks without any."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.two_ranks import TwoRanks

from caravan.data.collection import Collection, Qrels
from caravan.data.runs import Run, read_run
from caravan.data.segments import Cut
from caravan.retrieval.exact import Exact
from caravan.training.evaluation import (
    PASSAGES,
    QUERIES,
    RerankingEvaluation,
    RetrievalEvaluation,
)

MEASURES = ["MRR@10", "nDCG@10", "R@100"]
COUNT = 7


@pytest.mark.parametrize("parts", [[[5, 7], [0, 1, 2]], [[0, 1, 2], [5, 7], [0, 1, 2]]])
@pytest.mark.parametrize(("relevant_from", "mrr"), [(1, 1.0), (2, 0.5)])
def test_passages_are_searched_once_in_any_order_and_low_grades_do_not_count(
    parts: list[list[int]], relevant_from: int, mrr: float, collection: Collection, tmp_path: Path
) -> None:
    logged: dict[str, float] = {}
    module: Any = SimpleNamespace(
        device=torch.device("cpu"), log=lambda name, value, **_: logged.update({name: float(value)})
    )
    data = SimpleNamespace(
        collection=collection,
        name="",
        qrels=Qrels(np.array([3, 3]), np.array([7, 5]), np.array([1, 2])),
        relevant_from=relevant_from,
        ignore_identical_ids=False,
        without_own=lambda run, depth: run.top(depth),
        read=Cut(collection.corpus, np.arange(8)),
    )
    trainer: Any = SimpleNamespace(
        sanity_checking=False,
        datamodule=SimpleNamespace(validations=[data]),
        global_rank=0,
        world_size=1,
        is_global_zero=True,
    )
    evaluation = RetrievalEvaluation(Exact(k=4), ["MRR@10"], str(tmp_path / "run.trec"))
    batches = [(QUERIES, [3], [[1.0, 0.0]])]
    batches += [(PASSAGES, rows, [[float(row), 1.0] for row in rows]) for rows in parts]
    for loader, rows, vectors in batches:
        out = {"rows": torch.tensor(rows), "vectors": torch.tensor(vectors)}
        batch = SimpleNamespace(texts=SimpleNamespace(tokens=2))
        evaluation.on_validation_batch_end(trainer, module, out, batch, 0, loader)
    evaluation.on_validation_epoch_end(trainer, module)
    assert logged == {"val/MRR@10": mrr}
    run = read_run(tmp_path / "run.trec", collection.queries, collection.corpus)
    assert run.of(3)[0].tolist() == [7, 5, 2, 1]


def logged(queries: list[int]) -> dict[str, float]:
    """What a rank logs that has some of seven queries, with a random run and judgements."""
    rng = np.random.default_rng(0)
    rows = np.array([rng.permutation(50) for _ in range(COUNT)])
    scores = -np.sort(-rng.random((COUNT, 50)))
    run = Run.from_topk(np.array(queries, dtype=np.int64), scores[queries], rows[queries])
    qrels = Qrels(np.arange(COUNT), rng.integers(0, 50, COUNT), np.ones(COUNT))
    module = SimpleNamespace(device=torch.device("cpu"))
    collection = SimpleNamespace(corpus=None)  # no scores tie
    data: Any = SimpleNamespace(relevant_from=1, qrels=qrels, collection=collection)
    found = RerankingEvaluation(MEASURES, "").means(run, np.array(queries), data, module)
    return {name: float(value) for name, value in found.items()}


def on_rank() -> tuple[dict[str, float], dict[str, float]]:
    rank = dist.get_rank()
    return logged([[0, 1, 2, 3, 4], [5, 6]][rank]), logged([3] if rank else [])


def test_two_ranks_log_the_mean_over_all_queries(two_ranks: TwoRanks) -> None:
    one, other = two_ranks(on_rank)
    assert one == other
    assert one[0] == pytest.approx(logged(list(range(COUNT))), abs=1e-6)
    # The mean of the ranks' means is another number.
    means = [logged(part)["MRR@10"] for part in ([0, 1, 2, 3, 4], [5, 6])]
    assert abs(one[0]["MRR@10"] - np.mean(means)) > 1e-3
    assert one[1]["R@100"] == 1  # a rank without queries does not lower the mean
