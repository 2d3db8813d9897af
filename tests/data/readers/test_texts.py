"""Unlabelled text from files and datasets, and the place of each mistake."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tests.files import put
from tests.refusals import refused

from caravan.data.readers.texts import HubTexts, TextFiles


def _texts(source: Any, cache: Path) -> list[tuple[str, str]]:
    collection = source.collection(cache)
    assert (len(collection.queries), collection.splits) == (0, ())
    found: list[tuple[str, str]] = collection.corpus.get(range(len(collection.corpus)))
    return found


def test_whole_texts_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = {"b.txt": "camel\n\n \ncaravan\n", "notes.md": "not read"}
    files["a.jsonl"] = '{"text": "salt", "title": "Trade"}\n{"text": " "}\n'
    folder = put(tmp_path / "texts", files)
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"dune\n"))
    expected = [("Trade", "salt"), ("", "camel\n\n \ncaravan\n"), ("", "dune\n")]
    assert _texts(TextFiles(str(folder)), tmp_path) == expected


def test_a_line_may_be_a_document_and_a_changed_file_is_read_again(tmp_path: Path) -> None:
    source = TextFiles(str(put(tmp_path, {"a.txt": "camel\n\nsalt\n"}) / "a.txt"), documents="line")
    assert _texts(source, tmp_path) == [("", "camel"), ("", "salt")]
    put(tmp_path, {"a.txt": "caravan"})
    assert _texts(source, tmp_path) == [("", "caravan")]


@pytest.mark.parametrize(
    "line",
    ["{", '{"body": "salt"}', '["salt"]', '{"text": "salt", "title": 3}', '{"text": ["salt"]}'],
)
def test_a_wrong_line_is_named(line: str, tmp_path: Path) -> None:
    file = put(tmp_path, {"a.jsonl": f'{{"text": "camel"}}\n{line}\n'}) / "a.jsonl"
    with refused("malformed-line", "a.jsonl:2"):
        TextFiles(str(file)).collection(tmp_path)
    assert not [path for path in (tmp_path / "collections").iterdir() if path.is_dir()]


def test_a_path_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused("file-not-found", "empty"):
        TextFiles(str(tmp_path / "empty")).collection(tmp_path)
    with refused("file-not-found", "data.path"):
        TextFiles(str(tmp_path / "absent")).collection(tmp_path)
    with refused("empty-corpus", "blank.txt"):
        TextFiles(str(put(tmp_path, {"blank.txt": "\n \n"}) / "blank.txt")).collection(tmp_path)


def test_a_dataset_streams_into_a_collection(tmp_path: Path) -> None:
    rows = [{"body": f"camel {i}", "head": f"Title {i}"} for i in range(3)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    folder = put(tmp_path / "dataset", {"train.jsonl": text})
    source = HubTexts(str(folder), text="body", title="head", name="set")
    assert _texts(source, tmp_path) == [(f"Title {i}", f"camel {i}") for i in range(3)]
    put(folder, {"train.jsonl": '{"body": "salt", "head": null}\n{"body": " "}\n'})
    assert _texts(source, tmp_path) == [("", "salt")]
    for columns in ({}, {"text": "body", "title": "haed"}):
        with refused("unknown-column", "there are body, head"):
            HubTexts(str(folder), **columns).collection(tmp_path)
    with refused("folder-not-found", "absent"):
        HubTexts(str(tmp_path / "absent")).collection(tmp_path)
    first = source.collection(tmp_path)
    source.path = str(folder.rename(tmp_path / "moved"))
    assert source.collection(tmp_path).folder == first.folder
