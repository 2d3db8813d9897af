"""Damaged model folders: each loads with the numbers of its files, or is refused in a sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fuzz.mutations import (
    Mutant,
    amounts,
    exchanged,
    file_mutants,
    noted,
    outcome,
    put,
    sampled,
)
from tests.models.released import save_base
from tests.models.small import save_adapter

from caravan.api import Retriever
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import folder
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder

FILES = {
    "whole": (
        *("config.json", "tokenizer.json", "tokenizer_config.json"),
        *("caravan.json", "model.safetensors"),
    ),
    "adapter": ("adapter_config.json", "adapter_model.safetensors", "caravan.json"),
}
CASES = [(kind, file) for kind, files in FILES.items() for file in files]
TEXTS = ["camel caravan", "salt route 7", ""]


@pytest.fixture(scope="module")
def folders(
    tokenizer: Any, encoding: Encoding, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A model folder of whole weights, and one of an adapter on a base beside it."""
    to = tmp_path_factory.mktemp("fuzzed")
    base = save_base(to / "base", tokenizer)
    whole = BiEncoder(Pretrained(str(base)).model(tokenizer), encoding)
    folder.save(to / "whole", whole, tokenizer, encoding, {})
    save_adapter(base, to / "adapter", tokenizer, encoding)
    return {kind: to / kind for kind in FILES}


def _embedded(path: Path) -> np.ndarray:
    return Retriever(path, precision="float32").encode_queries(TEXTS)


def _means_the_same(path: Path, data: bytes, mutant: Mutant) -> bool:
    """Whether a mutant that loads must give the numbers of the undamaged file."""
    if mutant.data is None:
        return False
    if path.suffix != ".json":
        return mutant.data == data
    try:
        return bool(json.loads(mutant.data) == json.loads(data))
    except (ValueError, RecursionError):
        return False


@amounts(19, 1000)  # of about 1,500 in all
@pytest.mark.parametrize(("kind", "file"), CASES)
def test_a_damaged_folder_loads_or_is_refused_in_a_sentence(
    kind: str, file: str, number: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    path = shutil.copytree(folders[kind], tmp_path / kind) / file
    data, expected = path.read_bytes(), _embedded(path.parent)
    mutants = [*file_mutants(path, data, depth=3, number=8), *exchanged(path)]
    for mutant in sampled(mutants, number, seed=1):
        put(path, mutant)
        with noted(f"{kind}/{file}: {mutant.name}"):
            found = outcome(lambda: _embedded(path.parent))
            if isinstance(found, InputError):
                named = (str(path), path.name, str(path.parent), "encoding.")
                assert any(name in str(found) for name in named), found
                continue
            assert np.isfinite(found).all()
            if _means_the_same(path, data, mutant):
                np.testing.assert_array_equal(found, expected)


def test_a_folder_whose_files_are_those_of_another_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    mixed = shutil.copytree(folders["adapter"], tmp_path / "mixed")
    shutil.copy(folders["whole"] / "caravan.json", mixed / "caravan.json")
    assert isinstance(outcome(lambda: _embedded(mixed)), InputError)
