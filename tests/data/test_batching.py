from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.refusals import refused

from caravan.data.batch import TokenIds, pack
from caravan.data.batching import Groups, QueryOrder, TextBatches
from caravan.data.collection import Collection
from caravan.data.negatives import Negatives
from caravan.data.texts import text_keys
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding


@pytest.fixture
def groups(collection: Collection, tokenizer: Any, encoding: Encoding) -> Groups:
    qrels, negatives = collection.qrels("train"), Negatives(number=2)
    negatives.open(collection, qrels, seed=0)
    return Groups(collection, qrels, negatives, Templates(tokenizer, encoding), 128, seed=0)


def test_a_teacher_scores_all_queries_of_a_batch_or_none(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(row: int, group: np.ndarray) -> np.ndarray | None:
        return np.zeros(len(group), np.float32) if row % 2 else None

    monkeypatch.setattr(groups.negatives, "teacher_scores", scores)
    with refused("teacher-missing", "Negatives"):
        groups[0, np.arange(6)]


def test_texts_without_a_token_are_padded_to_one() -> None:
    chunks = pack([[], []], 10).chunks
    assert [chunk.input_ids.shape for chunk in chunks] == [(1, 1), (1, 1)]
    assert not any(chunk.attention_mask.any() for chunk in chunks)


def test_a_chunk_is_no_wider_than_the_longest_text_nor_larger_than_the_budget() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = rng.integers(1, 500, 60)
        packed = pack([[7] * n for n in lengths], 1000)
        for chunk in packed.chunks:
            rows, width = chunk.input_ids.shape
            real = chunk.attention_mask.sum(dim=1)
            assert width <= lengths.max()
            assert rows == 1 or rows * width <= 1000
            assert chunk.full == bool((real == width).all())


def _texts(packed: Any) -> list[list[int]]:
    """The token ids of packed texts, in the order of the texts."""
    rows: list[list[int]] = []
    for chunk in packed.chunks:
        for ids, mask in zip(chunk.input_ids, chunk.attention_mask, strict=True):
            rows.append(ids[mask.bool()].tolist())
    restored: list[list[int]] = [[] for _ in rows]
    for row, position in zip(rows, packed.order.tolist(), strict=True):
        restored[position] = row
    return restored


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_packing_keeps_every_text_and_its_place(budget: int) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, 99, rng.integers(1, 20)).tolist() for _ in range(50)]
    packed = pack(texts, budget)
    assert _texts(packed) == texts
    assert packed.tokens == sum(map(len, texts))
    assert packed.padded == sum(chunk.input_ids.numel() for chunk in packed.chunks)
    assert all(c.input_ids.numel() <= max(budget, c.input_ids.shape[1]) for c in packed.chunks)
    assert packed.padded <= packed.tokens / 0.9 or budget > 4096
    assert all(c.full == bool(c.attention_mask.all()) for c in packed.chunks)


def test_padding_ends_no_chunk_that_is_too_small_for_a_gpu() -> None:
    rng = np.random.default_rng(0)
    for mean, texts in ((10, 128), (70, 64), (70, 2048)):
        lengths = rng.lognormal(np.log(mean), 0.4, texts).astype(int).clip(1, 196)
        chunks = pack([[7] * n for n in lengths], 32_768).chunks
        assert all(chunk.input_ids.numel() > 4000 for chunk in chunks[:-1])  # a text less than 4096


def test_without_padding_only_the_budget_ends_a_chunk() -> None:
    rng = np.random.default_rng(0)
    lengths = [int(n) for n in rng.integers(1, 30, 60)]
    texts = [[7] * n for n in lengths]
    packed = TokenIds.of(texts).packed(200, pads=False)
    assert _texts(packed) == texts
    sizes = [int(chunk.attention_mask.sum()) for chunk in packed.chunks]
    assert (max(sizes), packed.padded) == (packed.largest, sum(lengths))
    *full, last = sizes
    assert all(200 - 30 < size <= 200 for size in full)
    assert last <= 200
    wide = TokenIds.of([[7] * 50, *[[7]] * 20]).packed(200, pads=False)
    assert [chunk.input_ids.numel() for chunk in wide.chunks] == [400, 13]


def test_packed_pairs_have_token_types() -> None:
    (chunk,) = pack([[2, 5, 3, 6, 3], [2, 5, 5, 3, 6, 3]], 100, seconds=[3, 4]).chunks
    assert chunk.token_types is not None
    assert chunk.token_types.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]


def test_restore_undoes_the_order_of_packing() -> None:
    packed = pack([[1], [1, 2, 3], [1, 2]], 4)
    lengths = torch.cat([chunk.attention_mask.sum(dim=1) for chunk in packed.chunks])
    assert packed.restore(lengths).tolist() == [1, 3, 2]


def test_a_batch_holds_each_query_with_its_own_group(
    groups: Groups, collection: Collection
) -> None:
    batch = groups[(0, np.arange(5))].packed()
    rows = groups.permutation(0)[:5]
    flat = batch.passage_rows.reshape(-1).numpy()
    assert _texts(batch.texts) == [
        *groups.templates.queries(collection.queries.get(rows)),
        *groups.templates.passages(collection.corpus.get(flat)),
    ]
    keys = text_keys(collection.corpus.get(slice(None)))
    assert np.array_equal(batch.passage_keys, keys[batch.passage_rows])
    for row, group, excluded in zip(rows, batch.passage_rows, batch.excluded_keys, strict=True):
        positives = groups.qrels.positives(int(row))
        assert group[0] in positives
        ((_, asked),) = collection.queries.get([int(row)])
        own_text = text_keys([("", asked)]).tolist()
        assert set(excluded.tolist()) == {*keys[positives].tolist(), *own_text}


def test_groups_do_not_shift_in_a_short_last_batch(groups: Groups) -> None:
    order = QueryOrder(len(groups), 6)
    sizes = [len(positions) for _, positions in order]
    assert sizes[-1] == len(groups) % 6 != 0
    whole = groups[(0, np.arange(len(groups)))].packed()
    *_, last = (groups[item].packed() for item in order)
    assert last.passage_rows.tolist() == whole.passage_rows[-sizes[-1] :].tolist()


@pytest.mark.parametrize("world", [2, 3])
def test_the_ranks_batches_are_the_one_process_batch(world: int) -> None:
    alone = [positions.tolist() for _, positions in QueryOrder(22, 8)]
    ranks = [[p.tolist() for _, p in QueryOrder(22, 8, r, world)] for r in range(world)]
    assert [[p for part in parts for p in part] for parts in zip(*ranks, strict=True)] == alone


def test_a_last_batch_with_fewer_queries_than_ranks_is_left_out() -> None:
    assert len(QueryOrder(17, 8, 0, 2)) == 2
    assert len(QueryOrder(17, 8)) == 3


def test_every_epoch_has_its_own_order_and_all_queries(groups: Groups) -> None:
    first, second = groups.permutation(0).copy(), groups.permutation(1).copy()
    assert sorted(first) == sorted(second) == sorted(groups.query_rows)
    assert first.tolist() != second.tolist()
    assert groups.permutation(0).tolist() == first.tolist()


def test_text_blocks_cover_their_rows(
    collection: Collection, tokenizer: Any, encoding: Encoding
) -> None:
    templates, rows = Templates(tokenizer, encoding), np.arange(3, 50)
    blocks = TextBatches(collection.corpus, rows, templates, "passage", 20, 256)
    batches = [blocks[i].packed() for i in range(len(blocks))]
    assert [len(batch.rows) for batch in batches] == [20, 20, 7]
    assert torch.cat([batch.rows for batch in batches]).tolist() == rows.tolist()
    assert _texts(batches[2].texts) == templates.passages(collection.corpus.get(rows[40:]))
