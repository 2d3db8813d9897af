"""The tiny Llama's tokenizer in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import tiny_backbone

from caravan.data.collection import Collection


@pytest.mark.parametrize("damage", ["other merges", "empty", "cut"])
def test_a_tokenizer_that_is_not_as_it_was_written_is_trained_again(
    damage: str, tmp_path: Path, collection: Collection
) -> None:
    backbone = tiny_backbone()
    first = backbone.tokenizer(collection, tmp_path)
    path = tmp_path / "tokenizers" / f"bpe-400-{collection.digest[:16]}.json"
    written = path.read_text()
    planted = {"empty": "", "cut": written[:99], "other merges": written.replace("Ġ", "G")}
    path.write_text(planted[damage])
    again = backbone.tokenizer(collection, tmp_path)
    assert path.read_text() == written
    assert again.get_vocab() == first.get_vocab()
