from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.tiny import tiny_backbone
from torch import Tensor
from torch.nn import functional

from caravan.data.batch import TrainBatch, pack
from caravan.data.batching import Groups
from caravan.data.collection import write_collection
from caravan.data.negatives import Negatives
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding
from caravan.models.adapters import LoRA, settle_precisions
from caravan.models.backbone import Pretrained
from caravan.training.losses import InfoNCE
from caravan.training.optim import AdamW
from caravan.training.retriever import Retriever, no_negative


def _batch(passage_rows: list[list[int]], positives: list[list[int]]) -> TrainBatch:
    """Queries and passages of random tokens; a passage row always has the same tokens."""

    def text(row: int) -> list[int]:
        rng = np.random.default_rng(row)
        return rng.integers(5, 300, 3 + row % 9).tolist()

    most = max(map(len, positives))
    filled = [rows + rows[:1] * (most - len(rows)) for rows in positives]
    return TrainBatch(
        queries=pack([text(1000 + i) for i in range(len(passage_rows))], 64),
        passages=pack([text(row) for group in passage_rows for row in group], 64),
        passage_rows=torch.tensor(passage_rows),
        passage_keys=torch.tensor(passage_rows),
        excluded_keys=torch.tensor(filled),
    )


def _module(tokenizer: Any, encoding: Encoding, **settings: Any) -> Retriever:
    module = Retriever(
        tiny_backbone(), None, tokenizer, encoding, InfoNCE(0.05), AdamW(), seed=0, **settings
    )
    module.configure_model()
    return module


def _naive_loss(module: Retriever, batch: TrainBatch) -> Tensor:
    """RepLLaMA's loss query by query and passage by passage, in float64."""
    queries = module.model.embed(batch.queries).double()
    passages = module.model.embed(batch.passages).double()
    rows, group = batch.passage_rows.reshape(-1).tolist(), batch.passage_rows.shape[1]
    losses = []
    for i, query in enumerate(queries):
        positives = set(batch.excluded_keys[i].tolist())
        kept = [j for j, row in enumerate(rows) if j == i * group or row not in positives]
        scores = torch.stack([query @ passages[j] for j in kept]) / 0.05
        losses.append(torch.logsumexp(scores, 0) - scores[kept.index(i * group)])
    return torch.stack(losses).mean()


def _gradients(module: Retriever, loss: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def test_loss_and_gradient_equal_a_naive_reference(tokenizer: Any, encoding: Encoding) -> None:
    # Query 0 has two positives (1, 8), 8 stands in query 1's group; 2 is positive of query 2 and
    # a negative of query 0; the group of query 2 repeats query 1's positive.
    batch = _batch([[1, 2, 3], [4, 8, 6], [2, 4, 9]], [[1, 8], [4], [2]])
    module = _module(tokenizer, encoding)
    scores, targets, _ = module.scores(
        module.model.embed(batch.queries), module.model.embed(batch.passages), batch
    )
    assert scores.dtype == torch.float32
    loss = InfoNCE(0.05)(scores, targets)
    reference = _naive_loss(module, batch)
    torch.testing.assert_close(loss.double(), reference, atol=1e-5, rtol=1e-5)
    ours, theirs = _gradients(module, loss), _gradients(module, _naive_loss(module, batch))
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-5, rtol=1e-4, msg=name)


def test_other_positives_and_duplicates_of_the_positive_are_no_negatives(
    tokenizer: Any, encoding: Encoding
) -> None:
    batch = _batch([[1, 2], [8, 1]], [[1, 8], [8]])
    module = _module(tokenizer, encoding)
    with torch.no_grad():
        scores, targets, _ = module.scores(
            module.model.embed(batch.queries), module.model.embed(batch.passages), batch
        )
    assert targets.tolist() == [0, 2]
    assert scores.isinf().tolist() == [[False, False, True, True], [False, False, False, False]]


def test_copies_of_a_positive_and_the_querys_own_passage_are_no_negatives_in_the_batch(
    tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    """`copy` has the text of q0's positive, and passage q1 the id of query q1."""
    texts = {"right": "salt", "copy": "salt", "q1": "gold", "other": "sand"}
    corpus = [(name, "", text) for name, text in texts.items()]
    judged = [("q0", "right", 1), ("q1", "copy", 1), ("q2", "q1", 1), ("q3", "other", 1)]
    queries = [(query, "", "camel") for query, _, _ in judged]
    found = write_collection(tmp_path / "own", "own", corpus, queries, {"train": judged})
    groups = Groups(
        *(found, found.qrels("train"), Negatives(number=0), Templates(tokenizer, encoding)),
        token_budget=64,
        seed=0,
    )
    groups.open()
    batch = groups[(0, np.arange(4))].packed()
    order = groups.permutation(0).tolist()
    module = _module(tokenizer, encoding)
    with torch.no_grad():
        embedded = module.model.embed(batch.queries), module.model.embed(batch.passages)
        scores, targets, _ = module.scores(*embedded, batch)
    masked = {
        (row, order[column])
        for row, of in zip(order, scores.isinf().tolist(), strict=True)
        for column, out in enumerate(of)
        if out
    }
    assert masked == {(0, 1), (1, 0), (1, 2)}
    assert targets.tolist() == [0, 1, 2, 3]


def test_a_target_is_never_masked() -> None:
    columns = torch.tensor([[1, 2, 1, 3]])
    masked = no_negative(columns, torch.tensor([[1, 3, 1]]), torch.tensor([2]))
    assert masked.tolist() == [[True, False, False, True]]


def test_without_in_batch_negatives_a_query_sees_its_own_group(
    tokenizer: Any, encoding: Encoding
) -> None:
    batch = _batch([[1, 2, 3], [4, 5, 6]], [[1], [4]])
    module = _module(tokenizer, encoding, in_batch=False)
    with torch.no_grad():
        queries, passages = module.model.embed(batch.queries), module.model.embed(batch.passages)
        scores, targets, _ = module.scores(queries, passages, batch)
    assert scores.shape == (2, 3)
    assert targets.tolist() == [0, 0]
    expected = queries[1] @ passages[3:].T
    torch.testing.assert_close(scores[1], expected)


def test_scores_stay_float32_under_bf16_autocast(tokenizer: Any, encoding: Encoding) -> None:
    module = _module(tokenizer, encoding)
    batch = _batch([[1, 2, 3], [4, 8, 6]], [[1], [4]])
    with torch.autocast("cpu", torch.bfloat16):
        queries, passages = module.model.embed(batch.queries), module.model.embed(batch.passages)
        assert queries.dtype == torch.float32
        with torch.autocast("cpu", enabled=False):
            scores, _, _ = module.scores(queries, passages, batch)
    exact = (queries.double() @ passages.double().T).float()
    torch.testing.assert_close(scores, exact, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(4, 8), (1, 1)])
def test_infonce_is_the_mean_cross_entropy_of_the_target(shape: tuple[int, int]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    targets = torch.zeros(shape[0], dtype=torch.int64)
    expected = -functional.log_softmax(scores.double(), dim=1)[:, 0].mean()
    torch.testing.assert_close(InfoNCE(1.0)(scores, targets).double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_frozen_base_is_loaded_as_its_file_has_it_and_trained_as_ever(
    stored: torch.dtype, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    """Four bytes a weight would not fit where two of each linear layer do."""
    tiny_backbone().model(tokenizer).to(stored).save_pretrained(tmp_path)
    built = []
    for bf16 in (True, False):
        backbone, adapters = Pretrained(str(tmp_path)), LoRA(rank=2, alpha=4)
        module = Retriever(backbone, adapters, tokenizer, encoding, InfoNCE(), AdamW(), seed=0)
        module.bf16 = bf16
        module.configure_model()
        assert backbone.dtype == ("auto" if bf16 else torch.float32)
        built.append(module.model)
    settle_precisions(built[1], bf16=True)
    weights, expected = (dict(model.named_parameters()) for model in built)
    assert {p.dtype for p in weights.values()} == {torch.bfloat16, torch.float32}
    for name, weight in weights.items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name
