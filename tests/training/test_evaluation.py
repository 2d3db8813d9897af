"""What the evaluation searches is every row once, in whatever order the parts came."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from caravan.data.collection import Collection, Qrels
from caravan.data.runs import Run
from caravan.training.evaluation import PASSAGES, RetrievalEvaluation, own_figures


@pytest.mark.parametrize(
    "parts", [[[0, 1, 2], [5, 7]], [[5, 7], [0, 1, 2]], [[0, 1, 2], [5, 7], [0, 1, 2]]]
)
def test_rows_are_gathered_once_and_ascending_and_the_parts_are_let_go(
    parts: list[list[int]],
) -> None:
    evaluation = RetrievalEvaluation(None, ["MRR@10"], "run.trec")
    for part in parts:
        rows = torch.tensor(part)
        evaluation._parts[PASSAGES].append((rows, rows[:, None] * torch.ones(3)))
    rows, vectors = evaluation._gathered(PASSAGES, torch.device("cpu"))
    assert rows.tolist() == [0, 1, 2, 5, 7]
    assert vectors.tolist() == [[row] * 3 for row in rows]
    assert not evaluation._parts[PASSAGES]


def test_a_split_that_is_relevant_from_grade_two_on_is_validated_so(
    collection: Collection,
) -> None:
    qrels = Qrels(np.array([0, 0]), np.array([5, 6]), np.array([1, 2]))
    run = Run.from_flat(np.array([0, 0]), np.array([5, 6]), np.array([2.0, 1.0]))
    for relevant_from, value in ((1, 1.0), (2, 0.5)):
        data: Any = SimpleNamespace(
            collection=collection, dev_qrels=qrels, relevant_from=relevant_from
        )
        figures = own_figures(run, np.array([0]), data, ["MRR@10", "nDCG@10"])
        assert figures["MRR@10"].tolist() == [value]
        assert list(figures) == ["MRR@10", "nDCG@10"]
