"""Batches of several collections: the draw, the shares of ranks, and mixed batches."""

from __future__ import annotations

from collections import defaultdict
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.refusals import refused
from tests.tiny import write_beir

from caravan.data.batch import TrainBatch
from caravan.data.batching import Groups
from caravan.data.collection import Collection
from caravan.data.mixing import BLOCK, Draw, MixedSet, MixtureOrder
from caravan.data.mixture import Entry, Mixture, Part, open_parts
from caravan.data.negatives import Negatives
from caravan.data.readers.labelled import Beir
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding

SIZES = [40, 7, 20]


def lengths(batch: TrainBatch) -> tuple[list[int], list[int]]:
    """Tokens of the queries and of the passages."""
    rows = torch.cat([chunk.attention_mask.sum(dim=1) for chunk in batch.texts.chunks])
    queries, passages = batch.sides(batch.texts.restore(rows))
    return queries.tolist(), passages.tolist()


def listed(queries: Any) -> list[tuple[int, int, list[int]]]:
    return [(entry, epoch, positions.tolist()) for entry, epoch, positions in queries]


@pytest.mark.parametrize("mixed", [False, True])
def test_a_batch_is_a_function_of_seed_and_step(mixed: bool) -> None:
    def draw(seed: int = 3) -> Draw:
        return Draw(SIZES, [1, 0.5, 2], 6, seed, mixed)

    steps = [0, 1, 17, BLOCK - 1, BLOCK, 3 * BLOCK + 5]
    whole = draw()
    expected = {step: listed(whole(step)) for step in range(3 * BLOCK + 6)}
    for step in reversed(steps):
        assert listed(draw()(step)) == expected[step]
        assert listed(whole(step)) == expected[step]
    assert any(listed(draw(4)(step)) != expected[step] for step in range(20))


@pytest.mark.parametrize("mixed", [False, True])
def test_each_epoch_of_a_collection_has_each_query_once(mixed: bool) -> None:
    draw = Draw(SIZES, [1, 0.5, 2], 6, 0, mixed)
    assert draw.smallest() == (6 if mixed else 3)
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    batches = np.zeros(3)
    for step in range(600):
        queries = draw(step)
        for entry, epoch, positions in queries:
            found[entry, epoch] += positions.tolist()
            batches[entry] += len(positions) if mixed else 1
        sizes = [len(positions) for _, _, positions in queries]
        assert draw.smallest() <= sum(sizes) <= 6
        assert mixed or len(sizes) == 1
    last = {entry: max(epoch for one, epoch in found if one == entry) for entry, _ in found}
    for (entry, epoch), positions in found.items():
        rest = epoch < last[entry]
        assert positions == list(range(SIZES[entry] if rest else len(positions)))
    np.testing.assert_allclose(batches / batches.sum(), np.array([1, 0.5, 2]) / 3.5, atol=0.06)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_batches_of_one_process_and_resume_anywhere(
    mixed: bool, world: int
) -> None:
    def orders() -> list[MixtureOrder]:
        return [MixtureOrder(Draw(SIZES, [1, 1, 1], 6, 0, mixed), r, world) for r in range(world)]

    def flat(parts: Any) -> list[tuple[int, int, int]]:
        return [(entry, epoch, at) for entry, epoch, of in listed(parts) for at in of]

    alone = MixtureOrder(Draw(SIZES, [1, 1, 1], 6, 0, mixed))
    for epoch in range(2):
        ranks = orders()
        for order in (*ranks, alone):
            order.epoch = epoch
        shares = list(zip(*ranks, strict=True))
        assert len(shares) == len(alone) == -(-sum(SIZES) // 6)
        together = [[query for share in batch for query in flat(share)] for batch in shares]
        assert together == list(map(flat, alone))
        sizes = [[len(flat(share)) for share in batch] for batch in shares]
        assert all(max(each) - min(each) <= 1 and min(each) for each in sizes)
        resumed = orders()[-1]
        resumed.epoch, resumed.start = epoch, 5
        again = [flat(batch) for batch in resumed]
        assert again == [flat(batch[-1]) for batch in shares[5:]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Beir]:
    home = tmp_path_factory.mktemp("mixed")
    return {
        name: Beir(str(write_beir(home / name, seed=seed)))
        for seed, name in enumerate(("one", "two"))
    }


def mixed_set(
    source: Mixture, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> tuple[MixedSet, list[Groups]]:
    templates = Templates(tokenizer, encoding)
    parts = open_parts(source, tmp_path, Negatives(number=2))
    sets = [
        Groups(one.collection, one.collection.qrels("train"), one.sampler, templates, 128, seed=0)
        for one in parts
    ]
    found = MixedSet(source, parts, sets, seed=0)
    found.open()
    return found, sets


def test_a_batch_has_the_groups_of_its_collection_and_its_settings(
    sources: dict[str, Beir], tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    entries = {
        "one": Entry(sources["one"], number=1),
        "two": Entry(sources["two"], in_batch=False),
    }
    source = Mixture(entries, alpha=0)
    whole, sets = mixed_set(source, tokenizer, encoding, tmp_path)
    seen = set()
    for item in whole.order(6):
        ((entry, epoch, positions),) = item
        batch, own = whole[item], sets[entry][epoch, positions]
        assert batch.packed().passage_rows.tolist() == own.packed().passage_rows.tolist()
        assert batch.packed().passage_rows.shape[1] == (2, 3)[entry]
        in_batch = batch.packed().in_batch
        assert in_batch is not None
        assert in_batch.tolist() == [entry == 0] * len(positions)
        seen.add(entry)
    assert seen == {0, 1}
    assert "50.0% one: 16 training queries of one" in whole.summary("mixture", 6, 1)


def test_a_mixed_batch_joins_the_queries_of_several_collections(
    sources: dict[str, Beir], tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    source = Mixture({name: Entry(one) for name, one in sources.items()}, mixed=True)
    whole, sets = mixed_set(source, tokenizer, encoding, tmp_path)
    item = next(parts for parts in whole.order(6) if len(parts) == 2)
    batch = whole[item].packed()
    parts = [sets[entry][epoch, positions].packed() for entry, epoch, positions in item]
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
        mixed_set(Mixture(uneven, mixed=True), tokenizer, encoding, tmp_path)


def test_a_collection_with_fewer_queries_than_ranks_is_refused(collection: Collection) -> None:
    parts = [
        Part("few", collection, Entry(None), None),
        Part("many", collection, Entry(None), None),
    ]
    sets: list[Any] = [range(1), range(40)]
    source: Any = SimpleNamespace(alpha=0.5, mixed=False)
    few = MixedSet(source, parts, sets, 0)
    assert len(few.order(6)) == 7
    with refused("too-few-texts", "few: 1 training queries"):
        few.order(6, 0, 2)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        ({"entries": {}}, "data.entries"),
        ({"entries": {"a/b": {"source": 1}}}, "'a/b'"),
        ({"entries": {"a": {"source": None}}}, "data.entries.a.source"),
        ({"entries": {"a": {"source": 1, "weight": 0}}}, "data.entries"),
    ],
)
def test_entries_that_cannot_be_mixed_are_refused(settings: dict[str, Any], place: str) -> None:
    with refused("invalid-mixture", place):
        Mixture(**settings)


def test_two_instructions_of_one_collection_are_refused(
    sources: dict[str, Beir], tmp_path: Path
) -> None:
    entries = {name: Entry(sources["one"], instruction=name) for name in ("find", "verify")}
    with refused("invalid-mixture", "data.entries.verify.instruction"):
        open_parts(Mixture(entries), tmp_path, None)
    with refused("several-collections", "train.py"):
        Mixture(entries).collection(tmp_path)
