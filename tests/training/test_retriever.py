"""The retriever's scores, masks and gradients against a loop over queries and passages."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.fitting import assert_loss_and_gradient
from tests.refusals import refused
from tests.tiny import tiny_backbone
from torch import Tensor

from caravan.data.batch import TrainBatch, pack
from caravan.data.batching import Groups
from caravan.data.collection import write_collection
from caravan.data.negatives import Negatives
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding
from caravan.training.losses import (
    BCE,
    KL,
    InfoNCE,
    MarginMSE,
    RankNet,
    Sum,
    compute,
    false_negatives,
)
from caravan.training.optim import AdamW
from caravan.training.retriever import Retriever


def batch_of(passage_rows: list[list[int]], positives: list[list[int]]) -> TrainBatch:
    """Queries and passages of random tokens; a passage row always has the same tokens."""

    def text(row: int) -> list[int]:
        rng = np.random.default_rng(row)
        return rng.integers(5, 300, 3 + row % 9).tolist()

    queries = range(1000, 1000 + len(passage_rows))
    most = max(map(len, positives))
    filled = [rows + rows[:1] * (most - len(rows)) for rows in positives]
    return TrainBatch(
        texts=pack([text(row) for row in (*queries, *chain(*passage_rows))], 64),
        passage_rows=torch.tensor(passage_rows),
        passage_keys=torch.tensor(passage_rows),
        excluded_keys=torch.tensor(filled),
    )


def module_of(tokenizer: Any, encoding: Encoding, loss: Any = None, **settings: Any) -> Retriever:
    loss = loss or InfoNCE(0.05)
    module = Retriever(
        tiny_backbone(), None, tokenizer, encoding, loss, AdamW(), seed=0, **settings
    )
    module.configure_model()
    return module


def _scores(module: Retriever, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    scores, targets, _ = module.scores(*batch.sides(module.network.embed(batch.texts)), batch)
    return scores[-1], targets


def _naive_scores(module: Retriever, batch: TrainBatch, dim: int) -> Tensor:
    """Similarities of embeddings cut to `dim` and scaled again, pair by pair, in float64."""
    queries, passages = (
        [vector[:dim] / vector[:dim].norm() for vector in vectors.double()]
        for vectors in batch.sides(module.network.embed(batch.texts))
    )
    rows, group = batch.passage_rows.reshape(-1).tolist(), batch.passage_rows.shape[1]
    scores = []
    for i, query in enumerate(queries):
        positives = set(batch.excluded_keys[i].tolist())
        if module.in_batch:
            columns, target = range(len(rows)), i * group
        else:
            columns, target = range(i * group, i * group + group), i * group
        scores += [
            query @ passages[j]
            if j == target or rows[j] not in positives
            else query.new_tensor(-torch.inf)
            for j in columns
        ]
    return torch.stack(scores).view(len(queries), -1)


def naive_loss(module: Retriever, batch: TrainBatch, margin: float | None = None) -> Tensor:
    """RepLLaMA's loss query by query, in float64.

    Passages more similar than the positive by more than a margin do not count.
    """
    losses = []
    for i, scores in enumerate(_naive_scores(module, batch, 32)):
        target = i * batch.passage_rows.shape[1]
        kept = scores <= scores[target] + (torch.inf if margin is None else margin)
        kept[target] = True
        losses.append(torch.logsumexp(scores[kept] / 0.05, 0) - scores[target] / 0.05)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("margin", [None, 0.02, -0.02])
def test_loss_and_gradient_equal_a_naive_reference(
    tokenizer: Any, encoding: Encoding, margin: float | None
) -> None:
    # Query 0 has two positives (1, 8), 8 stands in query 1's group; 2 is positive of query 2 and
    # a negative of query 0; the group of query 2 repeats query 1's positive.
    batch = batch_of([[1, 2, 3], [4, 8, 6], [2, 4, 9]], [[1, 8], [4], [2]])
    module = module_of(tokenizer, encoding)
    scores, targets = _scores(module, batch)
    objective = InfoNCE(0.05, margin)
    loss, reference = compute(objective, scores, targets, None), naive_loss(module, batch, margin)
    masked = false_negatives(objective, scores, targets)
    assert (masked is None) == (margin is None)
    if masked is not None:
        assert 0 < masked.sum() < scores.isfinite().sum() - 3, scores
    assert_loss_and_gradient(module, loss, reference, atol=1e-5, rtol=1e-4)


def test_copies_by_text_and_the_querys_own_passage_are_not_negatives_in_thebatch_of(
    tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    """`copy` has the text of q0's positive, and passage q1 the id of query q1."""
    texts = {"right": "salt", "copy": "salt", "q1": "gold", "other": "sand"}
    corpus = [(name, "", text) for name, text in texts.items()]
    judged = [("q0", "right", 1), ("q1", "copy", 1), ("q2", "q1", 1), ("q3", "other", 1)]
    queries = [(query, "", "camel") for query, _, _ in judged]
    found = write_collection(tmp_path / "own", "own", corpus, queries, {"train": judged})
    templates, negatives = Templates(tokenizer, encoding), Negatives(number=0)
    groups = Groups(found, found.qrels("train"), negatives, templates, token_budget=64, seed=0)
    groups.open()
    with torch.no_grad():
        batch = groups[(0, np.arange(4))].packed()
        scores, targets = _scores(module_of(tokenizer, encoding), batch)
    order = groups.permutation(0).tolist()
    masked = {(order[row], order[column]) for row, column in scores.isinf().nonzero().tolist()}
    assert masked == {(0, 1), (1, 0), (1, 2)}
    assert targets.tolist() == [0, 1, 2, 3]


def test_similarities_are_float32_under_bf16_autocast(
    tokenizer: Any, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(tokenizer, encoding)
    batch = batch_of([[1, 2, 3], [4, 8, 6]], [[1], [4]])
    seen: list[Tensor] = []

    def measured(scores: list[Tensor], *_: Any) -> dict[str, Tensor]:
        seen.extend(scores)
        return {"loss": scores[0].sum()}

    monkeypatch.setattr(module, "measured", measured)
    embedded = torch.randn(8, 32)
    monkeypatch.setattr(module, "rows_of", lambda texts: embedded)
    with torch.autocast("cpu", torch.bfloat16):
        module.training_step(batch, 0)
    queries, passages = embedded[:2].double(), embedded[2:].double()
    torch.testing.assert_close(seen[0].double(), queries @ passages.T, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        InfoNCE(0.05, dims=[8, 16]),
        InfoNCE(0.05, 0.02, dims=[8]),
        BCE(temperature=0.5, dims=[8]),
        RankNet(temperature=0.5, dims=[8]),
        KL(temperature=0.05, dims=[4, 8, 16]),
        MarginMSE(0.5, dims=[8, 32]),
        Sum([InfoNCE(1.0), KL(temperature=1.0)], temperature=0.05, dims=[8]),
    ],
    ids=["infonce", "masked", "bce", "ranknet", "kl", "margin_mse", "sum"],
)
@pytest.mark.parametrize("in_batch", [True, False])
def test_with_dims_the_loss_is_the_sum_over_cut_and_whole_embeddings(
    tokenizer: Any, encoding: Encoding, loss: Any, in_batch: bool
) -> None:
    module = module_of(tokenizer, encoding, loss, in_batch=in_batch)
    batch = batch_of([[1, 2, 3], [4, 8, 6], [2, 4, 9]], [[1, 8], [4], [2]])
    batch = replace(batch, teacher=torch.tensor([[3.0, 1, torch.nan], [2, 2, 0], [1, 0, 5]]))
    found = module.training_step(batch, 0)
    expected = torch.zeros((), dtype=torch.float64)
    for dim in sorted({*loss.dims, 32}):
        scores = _naive_scores(module, batch, dim)
        targets, teacher = torch.arange(3) * (3 if in_batch else 0), batch.teacher
        if in_batch:
            teacher = torch.full((3, 9), torch.nan)
            for i, own in enumerate(batch.teacher):
                teacher[i, 3 * i : 3 * i + 3] = own
        expected = expected + compute(loss, scores, targets, teacher.double())
    assert_loss_and_gradient(module, found, expected)


def test_dims_above_the_size_of_an_embedding_are_refused(
    tokenizer: Any, encoding: Encoding
) -> None:
    with refused("dim-too-large", "loss.dims", "64", "32"):
        module_of(tokenizer, encoding, InfoNCE(dims=[16, 64]))
