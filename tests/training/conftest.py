from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.commands import SHORT, train
from tests.files import random_run
from tests.fitting import Fit
from tests.models.small import saved_base

from caravan.data.collection import Collection
from caravan.data.runs import write_run
from caravan.encoding import Encoding


@pytest.fixture(scope="session")
def candidates(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("candidates") / "random.trec"
    write_run(path, random_run(collection, "dev"), collection.queries, collection.corpus)
    return path


@pytest.fixture
def fit(
    collection: Collection, tokenizer: Any, encoding: Encoding, candidates: Path, tmp_path: Path
) -> Fit:
    return Fit(collection, tokenizer, encoding, candidates, tmp_path)


@pytest.fixture(scope="module")
def module_fit(
    collection: Collection,
    tokenizer: Any,
    encoding: Encoding,
    candidates: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Fit:
    """For fits that several tests compare with."""
    return Fit(collection, tokenizer, encoding, candidates, tmp_path_factory.mktemp("whole"))


@pytest.fixture
def saved(tokenizer: Any, tmp_path: Path) -> str:
    """A tiny Llama in a folder of its own, which adapters can name as their base."""
    return str(saved_base(tokenizer, tmp_path / "base"))


@pytest.fixture(scope="session")
def short(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two updates, with a validation and a checkpoint after each."""
    run_dir = tmp_path_factory.mktemp("short") / "run"
    train(beir, run_dir, *SHORT)
    return run_dir


@pytest.fixture
def copied(short: Path, tmp_path: Path) -> Path:
    shutil.copytree(short, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def killed(copied: Path) -> Path:
    """The same, killed before its model folder was written."""
    shutil.rmtree(copied / "model")
    (copied / "model.manifest.json").unlink()
    return copied
