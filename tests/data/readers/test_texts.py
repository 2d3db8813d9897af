"""Unlabelled text from files and datasets, and the place of each mistake."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tests.files import put
from tests.refusals import refused

from caravan.data.readers.texts import UnlabelledTexts


def _texts(source: Any, cache: Path) -> list[tuple[str, str]]:
    collection = source.collection(cache)
    assert (len(collection.queries), collection.splits) == (0, ())
    found: list[tuple[str, str]] = collection.corpus.get(range(len(collection.corpus)))
    return found


def test_whole_texts_of_a_folder_are_read_in_the_order_of_their_names(tmp_path: Path) -> None:
    files = {"b.txt": "camel\n\n \ncaravan\n", "notes.md": "not read", "README.txt": "not read"}
    files["a.jsonl"] = '{"text": "salt", "title": "Trade"}\n{"text": " "}\n'
    folder = put(tmp_path / "texts", files)
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"dune\n"))
    expected = [("Trade", "salt"), ("", "camel\n\n \ncaravan\n"), ("", "dune\n")]
    assert _texts(UnlabelledTexts(str(folder)), tmp_path) == expected


def test_a_line_may_be_a_document_and_a_changed_file_is_read_again(tmp_path: Path) -> None:
    path = put(tmp_path, {"a.txt": "camel\n\nsalt\n"}) / "a.txt"
    source = UnlabelledTexts(str(path), documents="line")
    assert _texts(source, tmp_path) == [("", "camel"), ("", "salt")]
    put(tmp_path, {"a.txt": "caravan"})
    assert _texts(source, tmp_path) == [("", "caravan")]


@pytest.mark.parametrize(
    "line",
    ["{", '{"text": null}', '["salt"]', '{"text": "salt", "title": 3}', '{"text": ["salt"]}'],
)
def test_a_wrong_line_is_named(line: str, tmp_path: Path) -> None:
    file = put(tmp_path, {"a.jsonl": f'{{"text": "camel"}}\n{line}\n'}) / "a.jsonl"
    with refused("malformed-line", "a.jsonl:2"):
        UnlabelledTexts(str(file)).collection(tmp_path)
    assert not [path for path in (tmp_path / "collections").iterdir() if path.is_dir()]


def test_a_path_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with refused("dataset-not-loaded", "empty"):
        UnlabelledTexts(str(tmp_path / "empty")).collection(tmp_path)
    with refused("unreadable-file", "absent.txt"):
        UnlabelledTexts(str(tmp_path / "absent.txt")).collection(tmp_path)
    with refused("folder-not-found", "absent"):
        UnlabelledTexts(str(tmp_path / "absent")).collection(tmp_path)
    blank = put(tmp_path, {"blank.txt": "\n \n"}) / "blank.txt"
    with refused("empty-corpus", "blank.txt"):
        UnlabelledTexts(str(blank)).collection(tmp_path)


def test_texts_below_a_folder_are_not_read_line_by_line(tmp_path: Path) -> None:
    folder = put(tmp_path / "wiki", {"AA/x.txt": "first line\nsecond line\n"})
    for source in (
        UnlabelledTexts(str(folder)),
        UnlabelledTexts(str(folder / "AA"), subset="train"),
    ):
        with refused("texts-not-read", "AA/x.txt"):
            source.collection(tmp_path)


def _rows(count: int) -> str:
    rows = [{"body": f"camel {i}", "head": f"Title {i}"} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_columns_of_other_names_are_read_and_missing_ones_refused(tmp_path: Path) -> None:
    path = put(tmp_path, {"rows.jsonl": _rows(3)}) / "rows.jsonl"
    source = UnlabelledTexts(str(path), text="body", title="head", name="set")
    assert _texts(source, tmp_path) == [(f"Title {i}", f"camel {i}") for i in range(3)]
    untitled = UnlabelledTexts(str(path), text="body", title=None)
    assert _texts(untitled, tmp_path) == [("", f"camel {i}") for i in range(3)]
    for text, title in (("text", "title"), ("body", "haed")):
        with refused("unknown-column", "there are body, head"):
            UnlabelledTexts(str(path), text=text, title=title).collection(tmp_path)
    first = source.collection(tmp_path)
    source.path = str(path.rename(tmp_path / "moved.jsonl"))
    assert source.collection(tmp_path).folder == first.folder
    path.write_text('{"body": "salt", "head": null}\n{"body": " ", "head": ""}\n')
    source.path = str(path)
    assert _texts(source, tmp_path) == [("", "salt")]


def test_a_split_of_a_dataset_streams_into_a_collection(tmp_path: Path) -> None:
    files = {"train.jsonl": _rows(3), "validation.jsonl": _rows(2)}
    folder = str(put(tmp_path / "dataset", files))
    sizes = {
        subset: len(_texts(UnlabelledTexts(folder, text="body", subset=subset), tmp_path))
        for subset in (None, "train", "validation")
    }
    assert sizes == {None: 5, "train": 3, "validation": 2}
