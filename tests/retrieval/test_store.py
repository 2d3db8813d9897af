"""Products of a store: resumed, verified, shared; damaged or foreign files."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.refusals import refused

from caravan.data.collection import Collection
from caravan.retrieval import store as store_module
from caravan.retrieval.bm25 import BM25, index_inputs, open_index
from caravan.retrieval.store import Shards, Store

INPUTS = {"model": "a"}


def compute(numbers: list[int]) -> Iterator[np.ndarray]:
    for number in numbers:
        yield np.full((4, 3), number, dtype=np.float16)


def never(numbers: list[int]) -> Iterator[np.ndarray]:
    pytest.fail(f"computed again: {numbers}")


def read(folder: Path, inputs: Any = INPUTS, make: Any = compute) -> list[np.ndarray]:
    return [np.array(one) for one in Store(folder).shards("passages", inputs, 4, make)]


def product(folder: Path, inputs: Any = INPUTS) -> Shards:
    return Store(folder).shards("passages", inputs, 4, compute)


def test_an_interrupted_product_resumes_and_has_the_same_bytes(tmp_path: Path) -> None:
    whole = product(tmp_path / "whole")

    def interrupted(numbers: list[int]) -> Iterator[np.ndarray]:
        yield from compute(numbers[:2])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read(tmp_path / "cut", make=interrupted)
    computed: list[int] = []
    read(tmp_path / "cut", make=lambda numbers: (computed.extend(numbers), compute(numbers))[1])
    assert computed == [2, 3]
    cut = product(tmp_path / "cut")
    assert {path.name for path in cut.folder.iterdir()} == {f"{i:08d}.npy" for i in range(4)}
    assert all(cut.path(i).read_bytes() == whole.path(i).read_bytes() for i in range(4))


def test_a_finished_product_is_reused_and_other_inputs_get_another_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    first = product(tmp_path)
    assert not caplog.records
    read(tmp_path, make=never)
    other = product(tmp_path, {"model": "b"})
    assert other.folder != first.folder
    assert f"{tmp_path} has passages from other models" in caplog.text
    read(tmp_path, make=never)


def flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "truncated": lambda own, _: own[:-10],
    "without its record": lambda own, _: own[: -store_module.RECORD_BYTES],
    "longer": lambda own, _: own + b"x",
    "empty": lambda own, _: b"",
    "zeros": lambda own, _: bytes(len(own)),
    "another shard": lambda _, other: other,
    "of other inputs": lambda own, _: own[:-256] + own[-256:].replace(b"inputs", b"outputs"),
    "another array with this record": lambda own, other: other[:-256] + own[-256:],
    "a bit of the header": lambda own, _: flip(own, 20),
    "a bit of the array": lambda own, _: flip(own, 135),
    "a bit of the record": lambda own, _: flip(own, len(own) - 250),
    "objects": lambda *_: npy(np.array([{}])),
    "deep JSON": lambda own, _: own[:-256] + b"[" * 256,
}


def test_a_damaged_shard_is_computed_again(tmp_path: Path) -> None:
    shards = product(tmp_path)
    path, other = shards.path(1), shards.path(0)
    before = path.read_bytes()
    for damage in DAMAGES.values():
        path.write_bytes(damage(before, other.read_bytes()))
        np.testing.assert_array_equal(read(tmp_path), list(compute([0, 1, 2, 3])))
        assert path.read_bytes() == before


def test_links_are_not_followed_and_foreign_files_stay(
    collection: Collection, tmp_path: Path
) -> None:
    shards, precious = product(tmp_path), tmp_path / "thesis.tex"
    precious.write_text("precious")
    (shards.folder / "notes.txt").write_text("precious")
    shards.path(0).unlink()
    shards.path(0).symlink_to(precious)
    np.testing.assert_array_equal(read(tmp_path), list(compute([0, 1, 2, 3])))
    assert precious.read_text() == (shards.folder / "notes.txt").read_text() == "precious"

    link = Store(tmp_path).path("bm25", index_inputs(collection, {}))
    link.symlink_to(shards.folder)
    with refused("link-in-store", str(link)):
        open_index(BM25(), {}, collection, Store(tmp_path))


def index_files(collection: Collection, folder: Path) -> dict[Path, bytes]:
    open_index(BM25(), {}, collection, Store(folder))
    index = Store(folder).path("bm25", index_inputs(collection, {}))
    return {path: path.read_bytes() for path in index.iterdir()}


def test_a_damaged_file_of_an_index_is_built_again(
    collection: Collection, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    right = index_files(collection, tmp_path)
    for damage in ("flip", "empty", "missing"):
        for path, content in right.items():
            path.unlink()
            if damage != "missing":
                path.write_bytes(content[:-9] + b"1" + content[-8:] if damage == "flip" else b"")
            assert index_files(collection, tmp_path) == right
            assert f"{path} is missing or damaged" in caplog.text
