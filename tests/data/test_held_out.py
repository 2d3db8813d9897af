"""A split to validate on, made of a share of the training queries where a folder has none."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.refusals import refused
from tests.tiny import write_beir

from caravan.data.collection import Collection
from caravan.data.readers.labelled import Beir


@pytest.fixture
def without_dev(tmp_path: Path) -> Path:
    folder = write_beir(tmp_path / "published", passages=230, queries=108)
    (folder / "qrels/dev.tsv").unlink()
    return folder


def _ids(collection: Collection, split: str) -> set[str]:
    rows = collection.qrels(split).queries
    return set(collection.queries.ids(rows))


def test_a_share_of_the_training_queries_is_the_dev_split(
    without_dev: Path, tmp_path: Path
) -> None:
    whole = Beir(str(without_dev)).collection(tmp_path)
    shared = Beir(str(without_dev), held_out=0.2).collection(tmp_path)
    again = Beir(str(without_dev), held_out=0.4).collection(tmp_path)
    dev = _ids(shared, "dev")
    assert _ids(whole, "train") == _ids(shared, "train") | dev
    assert not _ids(shared, "train") & dev
    assert 10 <= len(dev) <= 30  # of 100
    assert dev < _ids(again, "dev")
    assert _ids(shared, "test") == _ids(whole, "test")


def test_a_mistake_in_a_shared_file_has_its_own_line(without_dev: Path, tmp_path: Path) -> None:
    file = without_dev / "qrels/train.tsv"
    lines = file.read_text().splitlines()
    lines[41] = lines[41].rpartition("\t")[0].rpartition("\t")[0] + "\tnobody\t1"
    file.write_text("\n".join(lines) + "\n")
    with refused("unknown-id", "train.tsv:42"):
        Beir(str(without_dev), held_out=0.2).collection(tmp_path)


@pytest.mark.parametrize(
    ("share", "code", "place"),
    [
        (1.5, "invalid-setting", "data.held_out"),
        (1e-9, "empty-split", "train.tsv"),
    ],
)
def test_a_share_that_cannot_be_is_refused(
    without_dev: Path, tmp_path: Path, share: float, code: str, place: str
) -> None:
    with refused(code, place):
        Beir(str(without_dev), held_out=share).collection(tmp_path)


def test_nothing_is_held_out_beside_a_dev_split(beir: Path, tmp_path: Path) -> None:
    with refused("invalid-setting", "data.held_out"):
        Beir(str(beir), held_out=0.1).collection(tmp_path)


def test_a_missing_split_is_reported_with_the_remedy(without_dev: Path, tmp_path: Path) -> None:
    with refused("unknown-split", "data.train_split"):
        Beir(str(without_dev)).collection(tmp_path).qrels("dev")
