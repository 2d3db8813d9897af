"""Unlabelled text from files and datasets, and errors of wrong ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tests.refusals import refused

from caravan.data.readers.texts import HubTexts, TextFiles


def _texts(source: Any, cache: Path) -> list[tuple[str, str]]:
    collection = source.collection(cache)
    assert (len(collection.queries), collection.splits) == (0, ())
    found: list[tuple[str, str]] = collection.corpus.get(range(len(collection.corpus)))
    return found


def test_a_folder_of_texts_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "b.txt").write_text("camel\n\ncaravan\n")
    (folder / "a.jsonl").write_text('{"text": "salt", "title": "Trade"}\n{"text": " "}\n')
    with gzip.open(folder / "c.txt.gz", "wt") as file:
        file.write("dune\n")
    (folder / "notes.md").write_text("not read")
    expected = [("Trade", "salt"), ("", "camel\ncaravan\n"), ("", "dune\n")]
    assert _texts(TextFiles(str(folder)), tmp_path) == expected


def test_a_line_may_be_a_document(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    file.write_text("camel caravan\n\nsalt\n")
    source = TextFiles(str(file), documents="line")
    assert _texts(source, tmp_path) == [("", "camel caravan"), ("", "salt")]


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("camel")
    assert _texts(TextFiles(str(file)), tmp_path) == [("", "camel")]
    file.write_text("caravan")
    assert _texts(TextFiles(str(file)), tmp_path) == [("", "caravan")]


@pytest.mark.parametrize(
    ("line", "code", "place"),
    [
        ("{", "malformed-line", "a.jsonl:2"),
        ('{"body": "salt"}', "malformed-line", "a.jsonl:2"),
        ('["salt"]', "malformed-line", "a.jsonl:2"),
        ('{"text": "salt", "title": 3}', "malformed-line", "a.jsonl:2"),
        ('{"text": "salt", "title": []}', "malformed-line", "a.jsonl:2"),
    ],
)
def test_a_wrong_line_is_named(line: str, code: str, place: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "camel"}) + "\n" + line + "\n")
    with refused(code, place):
        TextFiles(str(file)).collection(tmp_path)
    assert not [path for path in (tmp_path / "collections").iterdir() if path.is_dir()]


def test_what_holds_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused("file-not-found"):
        TextFiles(str(tmp_path / "empty")).collection(tmp_path)
    with refused("file-not-found", "data.path"):
        TextFiles(str(tmp_path / "absent")).collection(tmp_path)
    (tmp_path / "blank.txt").write_text("\n \n")
    with refused("empty-corpus", "blank.txt"):
        TextFiles(str(tmp_path / "blank.txt")).collection(tmp_path)
    with refused("invalid-setting", "data.documents"):
        TextFiles("x", documents="page")


def test_a_dataset_streams_into_a_collection(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    rows = [{"body": f"camel {i}", "head": f"Title {i}"} for i in range(3)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = HubTexts(str(folder), text="body", title="head")
    assert _texts(source, tmp_path) == [(f"Title {i}", f"camel {i}") for i in range(3)]
    (folder / "train.jsonl").write_text('{"body": "salt", "head": null}\n{"body": " "}\n')
    assert _texts(source, tmp_path) == [("", "salt")]
    with refused("unknown-column", "text"):
        HubTexts(str(folder)).collection(tmp_path)
    with refused("folder-not-found", "absent"):
        HubTexts(str(tmp_path / "absent")).collection(tmp_path)


def test_a_dataset_that_was_moved_is_found_again(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/train.jsonl").write_text('{"text": "camel"}\n')
    first = HubTexts(str(tmp_path / "here"), name="set").collection(tmp_path)
    (tmp_path / "here").rename(tmp_path / "there")
    again = HubTexts(str(tmp_path / "there"), name="set").collection(tmp_path)
    assert again.folder == first.folder
