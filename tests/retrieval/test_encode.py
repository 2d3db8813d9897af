from __future__ import annotations

import io
import itertools
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from caravan.retrieval.shards import shard
from tests.commands import ROOT, evaluate_arguments
from tests.tiny import WORDS, write_beir

from caravan import manifests, progress
from caravan.data.collection import Collection
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import folder as model_folder
from caravan.models.biencoder import BiEncoder
from caravan.retrieval import shards as shards_module
from caravan.retrieval.inference import Encoder, Shards

INPUTS = {"model": "a", "collection": "b"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any, encoding: Encoding) -> Path:
    from tests.tiny import tiny_backbone

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encode") / "model"
    encoder = BiEncoder(tiny_backbone().model(tokenizer), encoding)
    model_folder.save(folder, encoder, tokenizer, encoding, {})
    return folder


def _encoder(model: Path, **settings: Any) -> Encoder:
    settings = {
        "precision": "float32",
        "lengths": {},
        "token_budget": 128,
        "block": 16,
        "num_workers": 0,
        **settings,
    }
    return Encoder(model, **settings)


def _encode(
    model: Path, collection: Collection, folder: Path, inputs: Any = INPUTS, **settings: Any
) -> Shards:
    rows = np.arange(len(collection.corpus))
    encoder = _encoder(model, **settings)
    return encoder.encode(collection.corpus, rows, "passage", folder, inputs)


def test_shards_are_the_models_embeddings_in_row_order(
    model: Path, collection: Collection, tmp_path: Path
) -> None:
    shards = _encode(model, collection, tmp_path / "passages")
    assert (shards.rows, shards.dim) == (60, 32)
    assert [start for start, _ in shards] == [0, 16, 32, 48]
    assert all(vectors.dtype == np.float16 for _, vectors in shards)
    loaded, tokenizer, encoding, _ = model_folder.load(model)
    ids = Templates(tokenizer, encoding).passages(collection.corpus.get(np.arange(60)))
    for row, (vector, text) in enumerate(zip(shards.read(), ids, strict=True)):
        with torch.no_grad():
            alone = loaded(torch.tensor([text]), torch.ones(1, len(text)), True)[0]
        np.testing.assert_allclose(vector, alone.numpy(), atol=1e-3, err_msg=str(row))


def test_an_interrupted_encoding_goes_on_and_gives_the_same_bytes(
    model: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _encode(model, collection, tmp_path / "whole")
    write, written = shards_module._write, []

    def write_or_die(path: Path, vectors: np.ndarray, record: Any) -> None:
        if len(written) == 2:
            path.with_name(f".{path.name}.0123abcd.part").write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, vectors, record)

    monkeypatch.setattr(shards_module, "_write", write_or_die)
    with pytest.raises(KeyboardInterrupt):
        _encode(model, collection, tmp_path / "killed")
    monkeypatch.setattr(shards_module, "_write", lambda *a: (written.append(a[0].name), write(*a)))
    _encode(model, collection, tmp_path / "killed")
    assert written == [f"{i:08d}.npy" for i in range(4)]
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == written
    for number in range(4):
        whole, again = (shard(tmp_path / name, number) for name in ("whole", "killed"))
        assert whole.read_bytes() == again.read_bytes()


def test_finished_shards_are_not_encoded_again(
    model: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _encode(model, collection, tmp_path / "passages").read()
    monkeypatch.setattr(shards_module, "_write", lambda *_: pytest.fail("encoded again"))
    assert (_encode(model, collection, tmp_path / "passages").read() == first).all()


def test_shards_of_other_inputs_are_never_served(
    model: Path, collection: Collection, tmp_path: Path
) -> None:
    folder, other = tmp_path / "passages", {**INPUTS, "model": "other"}
    right = _encode(model, collection, tmp_path / "right", other, block=32).read()
    _encode(model, collection, folder)
    assert (_encode(model, collection, folder, other, block=32).read() == right).all()


def _flip(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


DAMAGES: dict[str, Callable[[bytes, bytes], bytes]] = {
    "truncated": lambda own, _: own[:-10],
    "without its record": lambda own, _: own[: -shards_module.RECORD_BYTES],
    "longer": lambda own, _: own + b"x",
    "empty": lambda own, _: b"",
    "zeros": lambda own, _: bytes(len(own)),
    "another shard": lambda _, other: other,
    "another array with this record": lambda own, other: other[:-256] + own[-256:],
    "a bit of the header": lambda own, _: _flip(own, 20),
    "a bit of the array": lambda own, _: _flip(own, 201),
    "a bit of the record": lambda own, _: _flip(own, len(own) - 250),
    "objects": lambda *_: _npy(np.array([{}])),
    "int8": lambda *_: _npy(np.zeros((16, 32), dtype=np.int8)),
    "other rows": lambda *_: _npy(np.zeros((15, 32), dtype=np.float16)),
    "other dimension": lambda *_: _npy(np.zeros((16, 31), dtype=np.float16)),
    "deep JSON": lambda own, _: own[:-256] + b"[" * 256,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_computed_again(
    damage: str, model: Path, collection: Collection, tmp_path: Path
) -> None:
    folder = tmp_path / "passages"
    right = _encode(model, collection, folder).read()
    path, other = shard(folder, 1), shard(folder, 0)
    before = path.read_bytes()
    path.write_bytes(DAMAGES[damage](before, other.read_bytes()))
    assert (_encode(model, collection, folder).read() == right).all()
    assert path.read_bytes() == before


def test_only_shards_that_are_read_are_verified(
    model: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _encode(model, collection, tmp_path / "passages")
    digest, verified = manifests.content_digest, list[str]()

    def counted(path: Path, *size: int) -> str:
        verified.append(path.name)
        return digest(path, *size)

    monkeypatch.setattr(manifests, "content_digest", counted)
    shards = _encode(model, collection, tmp_path / "passages")
    assert verified == ["00000000.npy"]  # for the dimension
    for _ in range(2):
        shards.read()
    assert verified == [f"{number:08d}.npy" for number in range(4)]


def test_a_link_in_a_store_is_not_followed(
    model: Path, collection: Collection, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("precious")
    (tmp_path / "passages").symlink_to(victim)
    with pytest.raises(InputError, match=r"passages is a symbolic link.*remove the link"):
        _encode(model, collection, tmp_path / "passages")
    assert [path.name for path in victim.iterdir()] == ["thesis.tex"]


def test_files_of_others_in_a_store_are_left_alone(
    model: Path, collection: Collection, tmp_path: Path
) -> None:
    folder = tmp_path / "passages"
    right = _encode(model, collection, folder).read()
    shard(folder, 0).rename(tmp_path / "elsewhere.npy")
    (tmp_path / "elsewhere.npy").write_text("precious")
    shard(folder, 0).symlink_to(tmp_path / "elsewhere.npy")
    (folder / "notes.txt").write_text("precious")
    assert (_encode(model, collection, folder, {**INPUTS, "model": "other"}).read() == right).all()
    assert (folder / "notes.txt").read_text() == "precious"
    assert (tmp_path / "elsewhere.npy").read_text() == "precious"


def test_lengths_can_be_overridden(model: Path, collection: Collection, tmp_path: Path) -> None:
    whole = _encode(model, collection, tmp_path / "whole").read()
    cut = _encode(model, collection, tmp_path / "cut", lengths={"passage_length": 8}).read()
    assert not np.allclose(whole, cut, atol=1e-2)


def test_encoding_logs_what_it_does_first_and_advances_by_chunk(
    model: Path,
    collection: Collection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = itertools.count(0, 5)
    monkeypatch.setattr(progress.time, "monotonic", clock.__next__)
    with caplog.at_level(logging.INFO, "caravan"):
        _encode(model, collection, tmp_path / "passages", block=1000)
    assert caplog.messages[0] == f"encode 60 passages with {model} on cpu, float32"
    steps = [message for message in caplog.messages if " of 60 texts, " in message]
    assert len(steps) >= 2  # in the only block
    again = len(caplog.messages)
    with caplog.at_level(logging.INFO, "caravan"):
        _encode(model, collection, tmp_path / "passages", block=1000)
    assert len(caplog.messages) == again


def test_workers_and_budget_change_nothing_but_rounding(
    model: Path, collection: Collection, tmp_path: Path
) -> None:
    one = _encode(model, collection, tmp_path / "one").read()
    other = _encode(model, collection, tmp_path / "two", token_budget=1000, num_workers=1).read()
    np.testing.assert_allclose(one, other, atol=1e-3)


def test_bf16_embeddings_are_close_to_float32(
    model: Path, collection: Collection, tmp_path: Path
) -> None:
    exact = _encode(model, collection, tmp_path / "float32").read()
    rounded = _encode(model, collection, tmp_path / "bf16", precision="bf16").read()
    assert (exact * rounded).sum(axis=1).min() > 0.999


def test_shards_of_an_interrupted_start_are_never_served_as_the_first_models(
    model: Path, collection: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, other = tmp_path / "passages", {**INPUTS, "model": "other"}
    first = _encode(model, collection, folder).read()
    write = shards_module._write

    def write_another_and_die(path: Path, vectors: np.ndarray, record: Any) -> None:
        write(path, -vectors, record)
        raise KeyboardInterrupt

    monkeypatch.setattr(shards_module, "_write", write_another_and_die)
    with pytest.raises(KeyboardInterrupt):
        _encode(model, collection, folder, other)
    monkeypatch.setattr(shards_module, "_write", write)
    np.testing.assert_array_equal(_encode(model, collection, folder).read(), first)


def test_processes_that_share_a_store_write_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, vectors = shard(tmp_path, 0), np.ones((2, 3), dtype=np.float16)
    scratches: list[str] = []
    replace_file = os.replace
    monkeypatch.setattr(
        os,
        "replace",
        lambda old, new: (scratches.append(Path(old).name), replace_file(old, new)),
    )
    for _ in range(2):  # by whichever process of whichever machine
        shards_module._write(path, vectors, {})
    assert len(set(scratches)) == 2
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize(("passages", "words"), [(16_384, 80), (1_500, 1_200)])
def test_an_evaluation_needs_few_file_descriptors_and_no_shared_memory(
    passages: int, words: int, model: Path, tmp_path: Path
) -> None:
    beir = write_beir(tmp_path / "data")
    with (beir / "corpus.jsonl").open("a") as file:
        for i in range(60, passages):
            text = " ".join(WORDS[(i * 7 + j) % len(WORDS)] for j in range(words // 2 + i % words))
            file.write(json.dumps({"_id": f"more{i}", "title": "", "text": text}) + "\n")
    settings = ("token_budget=1024", "num_workers=1", f"passage_length={min(4 * words, 1500)}")
    given = evaluate_arguments(beir, tmp_path / "run", str(model), *settings)
    command = shlex.join([sys.executable, str(ROOT / "evaluate.py"), *given])
    limited = f"ulimit -Sn 256 && ulimit -Hn 256 && exec {command}"
    # A mount of its own needs rights that not every machine gives.
    own = ["unshare", "-m", "true"]
    if shutil.which("unshare") and subprocess.run(own, capture_output=True).returncode == 0:
        limited = f"mount -t tmpfs -o size=1m tmpfs /dev/shm && {limited}"
        run = ["unshare", "-m", "bash", "-c", limited]
    else:
        run = ["bash", "-c", limited]
    done = subprocess.run(run, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr
