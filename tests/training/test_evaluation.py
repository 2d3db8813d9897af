"""What the evaluation searches is every row once, in whatever order the parts came."""

from __future__ import annotations

import pytest
import torch

from caravan.training.evaluation import PASSAGES, RetrievalEvaluation


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
