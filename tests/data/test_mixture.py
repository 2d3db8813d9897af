"""Several collections in one training: the draw of batches, the shares of ranks, mixed batches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.refusals import refused

from caravan.data.batch import TrainBatch
from caravan.data.batching import Groups
from caravan.data.collection import Collection
from caravan.data.mixture import Entry, MixedSet, Mixture, MixtureOrder, Part, open_parts
from caravan.data.negatives import Negatives
from caravan.data.readers.labelled import Beir
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding

SIZES, WEIGHTS = [40, 7, 20], [1, 0.5, 2]
EPOCH = 12  # batches


def lengths(batch: TrainBatch) -> tuple[list[int], list[int]]:
    """Tokens of the queries and of the passages."""
    rows = torch.cat([chunk.attention_mask.sum(dim=1) for chunk in batch.texts.chunks])
    queries, passages = batch.sides(batch.texts.restore(rows))
    return queries.tolist(), passages.tolist()


def drawn(first: int, end: int, mixed: bool, rank: int = 0, world: int = 1, seed: int = 0) -> Any:
    """The batches of some steps, as lists of (entry, epoch, position)."""
    order = MixtureOrder(SIZES, WEIGHTS, 6, seed, mixed, rank, world)
    assert len(order) == EPOCH
    found = []
    while first < end:
        order.epoch, order.start = divmod(first, EPOCH)
        batches = [batch.tolist() for batch in order][: end - first]
        found += batches
        first += len(batches)
    return found


@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_is_a_function_of_seed_and_step(mixed: bool) -> None:
    whole = drawn(0, 2100, mixed)  # beyond two blocks of draws
    for step in (2099, 1024, 1023, 17, 0):
        assert drawn(step, step + 1, mixed) == whole[step : step + 1]
    assert drawn(0, 20, mixed, seed=1) != whole[:20]


@pytest.mark.parametrize("mixed", [False, True])
def test_each_epoch_of_a_collection_has_each_query_once(mixed: bool) -> None:
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    batches = np.zeros(3)
    smallest = MixtureOrder(SIZES, WEIGHTS, 6, 0, mixed).smallest
    assert smallest == (6 if mixed else 3)
    for batch in drawn(0, 600, mixed):
        assert smallest <= len(batch) <= 6
        entries = [entry for entry, _, _ in batch]
        assert mixed or len(set(entries)) == 1
        for entry in entries if mixed else entries[:1]:
            batches[entry] += 1
        for entry, epoch, position in batch:
            found[entry, epoch].append(position)
    last = {entry: max(epoch for one, epoch in found if one == entry) for entry, _ in found}
    for (entry, epoch), positions in found.items():
        rest = epoch < last[entry]
        assert positions == list(range(SIZES[entry] if rest else len(positions)))
    np.testing.assert_allclose(batches / batches.sum(), np.array(WEIGHTS) / 3.5, atol=0.06)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_batches_of_one_process(mixed: bool, world: int) -> None:
    ranks = [drawn(0, 30, mixed, rank, world) for rank in range(world)]
    shares = list(zip(*ranks, strict=True))
    assert [list(chain(*batch)) for batch in shares] == drawn(0, 30, mixed)
    sizes = [list(map(len, batch)) for batch in shares]
    assert all(max(each) - min(each) <= 1 and min(each) for each in sizes)


@pytest.fixture
def sources(suite: Path) -> dict[str, Beir]:
    return {name: Beir(str(suite / name)) for name in ("one", "two")}


Opened = tuple[MixedSet, list[Groups]]


@pytest.fixture
def opened(tokenizer: Any, encoding: Encoding, tmp_path: Path) -> Callable[[Mixture], Opened]:
    def open_sets(source: Mixture) -> Opened:
        templates = Templates(tokenizer, encoding)
        parts = open_parts(source, tmp_path, Negatives(number=2))
        sets = [
            Groups(of.collection, of.collection.qrels("train"), of.sampler, templates, 128, seed=0)
            for of in parts
        ]
        found = MixedSet(source, parts, sets, seed=0)
        found.open()
        return found, sets

    return open_sets


def test_a_batch_has_the_groups_of_its_collection_and_its_settings(
    sources: dict[str, Beir], opened: Callable[[Mixture], Opened]
) -> None:
    entries = {
        "one": Entry(sources["one"], number=1),
        "two": Entry(sources["two"], in_batch=False),
    }
    whole, sets = opened(Mixture(entries, alpha=0))
    seen = set()
    for item in whole.order(6):
        entry, epoch, _ = item[0].tolist()
        batch, own = whole[item].packed(), sets[entry][epoch, item[:, 2]].packed()
        assert batch.passage_rows.tolist() == own.passage_rows.tolist()
        assert batch.passage_rows.shape[1] == (2, 3)[entry]
        assert batch.in_batch is not None
        assert batch.in_batch.tolist() == [entry == 0] * len(item)
        seen.add(entry)
    assert seen == {0, 1}
    assert "50.0% one: 16 training queries of one" in whole.summary("mixture", 6, 1)


def test_a_mixed_batch_joins_the_queries_of_several_collections(
    sources: dict[str, Beir], opened: Callable[[Mixture], Opened]
) -> None:
    entries = {name: Entry(one) for name, one in sources.items()}
    whole, sets = opened(Mixture(entries, mixed=True))
    item = next(queries for queries in whole.order(6) if len(set(queries[:, 0])) == 2)
    batch = whole[item].packed()
    parts = [sets[entry][0, item[item[:, 0] == entry, 2]].packed() for entry in (0, 1)]
    assert batch.in_batch is None
    sides = zip(*map(lengths, parts), strict=True)
    assert list(lengths(batch)) == [list(chain(*of_parts)) for of_parts in sides]
    for name in ("passage_rows", "passage_keys"):
        rows = [row for part in parts for row in getattr(part, name).tolist()]
        assert getattr(batch, name).tolist() == rows
    excluded = [set(row) for part in parts for row in part.excluded_keys.tolist()]
    assert [set(row) for row in batch.excluded_keys.tolist()] == excluded
    uneven = {"one": Entry(sources["one"], number=1), "two": Entry(sources["two"])}
    with refused("uneven-negatives", "data.mixed"):
        opened(Mixture(uneven, mixed=True))


def test_a_collection_with_fewer_queries_than_ranks_is_refused(collection: Collection) -> None:
    parts = [Part(name, collection, Entry(None), None) for name in ("few", "many")]
    sets: list[Any] = [range(1), range(40)]
    source: Any = SimpleNamespace(alpha=0.5, mixed=False)
    few = MixedSet(source, parts, sets, 0)
    assert len(few.order(6)) == 7
    with refused("too-few-texts", "few: a batch of 1 queries"):
        few.order(6, 0, 2)


@pytest.mark.parametrize(
    ("entries", "place"),
    [
        ({}, "data.entries"),
        ({"a/b": {"source": 1}}, "'a/b'"),
        ({"a": {"source": None}}, "data.entries.a.source"),
        ({"a": {"source": 1, "weight": 0}}, "data.entries"),
    ],
)
def test_entries_that_cannot_be_mixed_are_refused(entries: dict[str, Any], place: str) -> None:
    with refused("invalid-mixture", place):
        Mixture(entries)


def test_two_instructions_of_one_collection_are_refused(
    sources: dict[str, Beir], tmp_path: Path
) -> None:
    entries = {name: Entry(sources["one"], instruction=name) for name in ("find", "verify")}
    with refused("invalid-mixture", "data.entries.verify.instruction"):
        open_parts(Mixture(entries), tmp_path, None)
    with refused("several-collections", "train.py"):
        Mixture(entries).collection(tmp_path)
