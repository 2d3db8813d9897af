from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.refusals import refused

from caravan.data.batch import Packed, TokenIds, TrainBatch, Unpacked, pack
from caravan.data.batching import Groups, QueryOrder, TextBatches
from caravan.data.collection import Collection
from caravan.data.texts import text_keys


def _texts(packed: Packed) -> list[list[int]]:
    """The token ids of packed texts, in the order of the texts."""
    chunks = [zip(chunk.input_ids, chunk.attention_mask, strict=True) for chunk in packed.chunks]
    rows = [ids[mask.bool()].tolist() for chunk in chunks for ids, mask in chunk]
    return [rows[at] for at in packed.restore(torch.arange(len(rows))).tolist()]


@pytest.mark.parametrize("longest", [20, 500])
@pytest.mark.parametrize("budget", [1, 40, 1000, 10_000])
def test_packing_keeps_every_text_and_its_place(budget: int, longest: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        texts = [rng.integers(1, 99, rng.integers(1, longest)).tolist() for _ in range(50)]
        packed = pack(texts, budget)
        assert _texts(packed) == texts
        assert packed.tokens == sum(map(len, texts))
        assert packed.padded == sum(chunk.input_ids.numel() for chunk in packed.chunks)
        assert packed.padded <= packed.tokens / 0.9 or budget > 4096 or longest > 20
        for chunk in packed.chunks:
            rows, width = chunk.input_ids.shape
            assert width <= max(map(len, texts))
            assert rows == 1 or rows * width <= budget
            assert chunk.full == bool(chunk.attention_mask.all())


def test_texts_without_a_token_are_padded_to_one() -> None:
    chunks = pack([[], []], 10).chunks
    assert [chunk.input_ids.shape for chunk in chunks] == [(1, 1), (1, 1)]
    assert not any(chunk.attention_mask.any() for chunk in chunks)


@pytest.mark.parametrize("queries", [4, 16, 128])
def test_a_chunk_has_4096_tokens_before_padding_ends_it(queries: int) -> None:
    rng = np.random.default_rng(0)
    sides = [rng.lognormal(np.log(mean), 0.4, n).astype(int).clip(1, 196)
             for mean, n in ((10, queries), (70, 16 * queries))]  # fmt: skip
    fields: Any = {"texts": tuple(TokenIds.of([[7] * n for n in side]) for side in sides)}
    given = [np.zeros((queries, 1), np.int64)] * 3
    fields |= dict(zip(("passage_rows", "passage_keys", "excluded_keys"), given, strict=True))
    texts = Unpacked(TrainBatch, fields, 32_768, 0).packed().texts
    sizes = [chunk.input_ids.numel() for chunk in texts.chunks]
    assert all(size >= 4096 for size in sizes[:-1])
    assert _texts(texts) == [[7] * n for n in np.concatenate(sides)]
    on_a_cpu = Unpacked(TrainBatch, fields, 4096, 0).packed().texts
    assert on_a_cpu.padded < 1.2 * on_a_cpu.tokens


def test_without_padding_only_the_budget_ends_a_chunk() -> None:
    lengths = np.random.default_rng(0).integers(1, 30, 60).tolist()
    texts = [[7] * n for n in lengths]
    packed = TokenIds.of(texts).packed(200, pads=False)
    assert _texts(packed) == texts
    sizes = [int(chunk.attention_mask.sum()) for chunk in packed.chunks]
    assert (sizes, packed.padded) == (packed.sizes, sum(lengths))
    *full, last = sizes
    assert all(200 - 30 < size <= 200 for size in full)
    assert last <= 200
    wide = TokenIds.of([[7] * 50, *[[7]] * 20]).packed(200, pads=False)
    assert [chunk.input_ids.numel() for chunk in wide.chunks] == [400, 13]


def test_packed_pairs_have_token_types() -> None:
    (chunk,) = pack([[2, 5, 3, 6, 3], [2, 5, 5, 3, 6, 3]], 100, seconds=[3, 4]).chunks
    assert chunk.token_types is not None
    assert chunk.token_types.tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]


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


def test_a_teacher_scores_all_queries_of_a_batch_or_none(
    groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scores(row: int, group: np.ndarray) -> np.ndarray | None:
        return np.zeros(len(group), np.float32) if row % 2 else None

    monkeypatch.setattr(groups.negatives, "teacher_scores", scores)
    with refused("teacher-missing", "Negatives"):
        groups[0, np.arange(6)]


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
    # a last batch with fewer queries than ranks is left out
    assert (len(QueryOrder(17, 8)), len(QueryOrder(17, 8, 0, world))) == (3, 2)


def test_every_epoch_has_its_own_order_and_all_queries(groups: Groups) -> None:
    first, second = groups.permutation(0).copy(), groups.permutation(1).copy()
    assert sorted(first) == sorted(second) == sorted(groups.query_rows)
    assert first.tolist() != second.tolist()
    assert groups.permutation(0).tolist() == first.tolist()


def test_text_blocks_cover_their_rows(groups: Groups, collection: Collection) -> None:
    templates: Any = groups.templates
    rows = np.arange(3, 50)
    blocks = TextBatches(collection.corpus, rows, templates, "passage", 20, 256)
    batches = [blocks[i].packed() for i in range(len(blocks))]
    assert [len(batch.rows) for batch in batches] == [20, 20, 7]
    assert torch.cat([batch.rows for batch in batches]).tolist() == rows.tolist()
    assert _texts(batches[2].texts) == templates.passages(collection.corpus.get(rows[40:]))
