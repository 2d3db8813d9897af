from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fitting import Fit, random_candidates
from tests.tiny import tiny_backbone

from caravan.data.collection import Collection
from caravan.encoding import Encoding


@pytest.fixture(scope="session")
def candidates(collection: Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_candidates(collection, tmp_path_factory.mktemp("candidates") / "random.trec")


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
    torch.manual_seed(0)
    tiny_backbone().model(tokenizer).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")
