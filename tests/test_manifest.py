from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from caravan import manifests
from caravan.errors import InputError
from caravan.report import jobs

INPUTS = {"model": "a", "bm25": {"k1": 0.9}}


def test_a_product_matches_the_inputs_it_was_made_from(tmp_path: Path) -> None:
    product = tmp_path / "run.trec"
    manifests.write(product, INPUTS, {"seconds": 1.5})
    assert not manifests.matches(product, INPUTS)  # the product itself is missing
    product.touch()
    assert manifests.matches(product, INPUTS)
    assert manifests.read(product) == {"inputs": INPUTS, "facts": {"seconds": 1.5}}
    assert not manifests.matches(product, {**INPUTS, "model": "b"})
    assert manifests.differences(product, {**INPUTS, "model": "b"}) == ["model: a -> b"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-5],
        lambda text: "[]",
        lambda text: "null",
        lambda text: "[" * 100_000,
        lambda text: text.replace("1.5", "2.5"),
        lambda text: text.replace("1.5", '"1.5"'),
        lambda text: text.replace('"facts"', '"fact"'),
        lambda text: json.dumps({**json.loads(text), "inputs": []}),
        lambda text: text.replace("{", "\x00"),
    ],
)
def test_a_damaged_manifest_counts_as_missing(damage: Callable[[str], str], tmp_path: Path) -> None:
    product = tmp_path / "run.trec"
    product.touch()
    manifests.write(product, INPUTS, {"seconds": 1.5})
    path = manifests.path_of(product)
    path.write_text(damage(path.read_text()))
    assert manifests.read(product) is None
    assert not manifests.matches(product, INPUTS)
    assert manifests.differences(product, INPUTS)


def test_versions_are_those_of_the_code_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import tokenizers
    import torch

    found = manifests.versions()
    assert set(found) == {"caravan", "torch", "transformers", "tokenizers"}
    # a wheel's version may lack the local part (+cu130) that torch itself reports
    assert torch.__version__.split("+")[0] == found["torch"].split("+")[0]
    assert found["tokenizers"] == tokenizers.__version__
    monkeypatch.setattr(sys.modules["caravan"], "__version__", "99.0")
    assert manifests.versions()["caravan"] == "99.0"
    assert manifests.versions(("nowhere",))["nowhere"] == "not installed"


def test_a_file_is_read_again_only_if_its_size_or_times_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "corpus.arrow"
    path.write_bytes(b"passages")
    record, times = manifests.content(path), path.stat()
    digest, read = manifests.content_digest, list[Path]()
    monkeypatch.setattr(manifests, "content_digest", lambda p: (read.append(p), digest(p))[1])
    assert manifests.is_as_written(path, record)
    assert not read
    path.touch()
    assert manifests.is_as_written(path, record)
    assert len(read) == 1
    path.write_bytes(b"PASSAGES")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as cp -p and rsync -t do
    assert not manifests.is_as_written(path, record)
    path.unlink()
    assert not manifests.is_as_written(path, record)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "[" * 100_000, '{"state": 1}', '{"state": "finished"}'),
        '{"state": "finished", "overrides": {"k1": []}, "error": null}',
        '{"state": "failed", "overrides": {}, "error": {}}',
    ],
)
def test_a_damaged_record_of_a_job_is_named(text: str, tmp_path: Path) -> None:
    jobs.write(tmp_path, ["bm25.k1=1"], jobs.FINISHED)
    ((_, record),) = jobs.read(tmp_path)
    assert record == {"overrides": {"bm25.k1": "1"}, "state": "finished", "error": None}
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(InputError, match=r"job\.json .*delete it"):
        list(jobs.read(tmp_path))
