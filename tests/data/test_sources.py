"""BEIR folders, whole and broken: every mistake is reported with its file, line and remedy."""

import gzip
import os
from pathlib import Path

import pytest
from tests.refusals import refused

from caravan.data.collection import Collection
from caravan.data.readers.labelled import Beir

CORPUS = (
    b'{"_id": "a", "title": "A", "text": "first"}\n'
    b'{"_id": "b", "text": "sec\\u2028ond\xe2\x80\xa8\\r\\nline", "metadata": {}}\n'
    b"\n"
    b'{"_id": 3, "title": null, "text": ""}\r\n'
)
QUERIES = b'\xef\xbb\xbf{"_id": "1", "text": "one"}\n{"_id": "2", "text": "two"}'
QRELS = b"query-id\tcorpus-id\tscore\n1\ta\t1\n2\t3\t2\n2\tb\t0\n"


def folder(path: Path, zipped: bool = False, **changes: bytes | None) -> Path:
    """A BEIR folder; `corpus=None` leaves a file out, a key is a file's name up to the dot."""
    parts = {"corpus": CORPUS, "queries": QUERIES, "qrels_test": QRELS, **changes}
    for part, content in parts.items():
        if content is not None:
            name = part.replace("_", "/") + (".tsv" if part.startswith("qrels_") else ".jsonl")
            file = path / "set" / (name + (".gz" if zipped else ""))
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(gzip.compress(content) if zipped else content)
    return path / "set"


def build(path: Path, unknown_ids: str = "refuse") -> Collection:
    return Beir(str(path), unknown_ids=unknown_ids).collection(path.parent / "cache")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_is_read_line_by_line(tmp_path: Path, zipped: bool) -> None:
    found = build(folder(tmp_path, zipped, qrels_dev=b"1 0 b 3\n"))
    assert found.name == "set"
    assert found.corpus.ids([0, 1, 2]) == ["a", "b", "3"]
    assert found.corpus.get([0, 1, 2]) == [
        ("A", "first"), ("", "sec\u2028ond\u2028\r\nline"), ("", ""),
    ]  # fmt: skip
    assert found.queries.get([0, 1]) == [("", "one"), ("", "two")]
    assert found.splits == ("dev", "test")
    assert found.qrels("test").passage_rows.tolist() == [0, 1, 2]
    assert found.qrels("test").grades.tolist() == [1, 0, 2]
    assert found.qrels("dev").grades.tolist() == [3]  # four columns, as TREC has them
    assert found.facts["empty_passages"] == 1


def test_plain_and_zipped_are_the_same_collection(tmp_path: Path) -> None:
    plain, zipped = folder(tmp_path / "1"), folder(tmp_path / "2", zipped=True)
    assert build(plain).digest == build(zipped).digest


def test_qrels_are_optional(tmp_path: Path) -> None:
    found = build(folder(tmp_path, qrels_test=None))
    assert found.splits == ()
    with refused("unknown-split", "data.train_split"):
        found.qrels("test")


LINE = b'{"_id": "z", "text": "x"}\n'


@pytest.mark.parametrize(
    ("changes", "code", "place"),
    [
        ({"corpus": None}, "file-not-found", "corpus.jsonl"),
        ({"queries": None}, "file-not-found", "queries.jsonl"),
        ({"corpus": b""}, "empty-corpus", "corpus.jsonl"),
        ({"corpus": b"\n \n"}, "empty-corpus", "corpus.jsonl"),
        ({"corpus": LINE + b"\n{oops\n"}, "malformed-line", "corpus.jsonl:3"),
        ({"corpus": LINE + b'["z"]'}, "malformed-line", "corpus.jsonl:2"),
        ({"corpus": b'{"text": "x"}'}, "malformed-line", "corpus.jsonl:1"),
        ({"corpus": b'{"_id": 1.5, "text": "x"}'}, "malformed-line", "corpus.jsonl:1"),
        ({"corpus": b'{"_id": "a"}'}, "malformed-line", "corpus.jsonl:1"),
        ({"corpus": b'{"_id": "a", "text": ["x"]}'}, "malformed-line", "corpus.jsonl:1"),
        ({"corpus": b'{"_id": "a", "title": 1, "text": ""}'}, "malformed-line", "corpus.jsonl:1"),
        ({"corpus": b'{"_id": "a b", "text": "x"}'}, "invalid-id", "corpus.jsonl:1"),
        ({"corpus": LINE + b'{"_id": "\xff"}'}, "not-utf8", "corpus.jsonl:2"),
        ({"corpus": LINE + b"\n" + LINE}, "duplicate-id", "corpus.jsonl:3"),
        ({"queries": LINE * 2}, "duplicate-id", "queries.jsonl:2"),
        ({"qrels_test": QRELS + b"1\ta"}, "malformed-line", "test.tsv:5"),
        ({"qrels_test": b"1\ta\n"}, "malformed-line", "test.tsv:1"),
        ({"qrels_test": QRELS + b"1\tb\thigh"}, "invalid-grade", "test.tsv:5"),
        ({"qrels_test": QRELS + b"1\tb\t1.0"}, "invalid-grade", "test.tsv:5"),
        ({"qrels_test": b"1\ta\tx\n"}, "invalid-grade", "test.tsv:1"),  # not taken for a header
        (
            {"qrels_test": b"query-id\tscore\tcorpus-id\n1\t1\t0\n"},
            "unknown-column",
            "test.tsv:1",
        ),
        ({"qrels_test": QRELS + b"1\tnone\t1"}, "unknown-id", "test.tsv:5"),
        ({"qrels_test": QRELS + b"\n9\ta\t1"}, "unknown-id", "test.tsv:6"),
        ({"qrels_test": QRELS + b"1\ta\t0"}, "conflicting-judgements", "test.tsv:5"),
        ({"qrels_test": QRELS + b"1\t\xfc\t0"}, "not-utf8", "test.tsv:5"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_and_line(
    tmp_path: Path, changes: dict[str, bytes | None], code: str, place: str
) -> None:
    with refused(code, place) as caught:
        build(folder(tmp_path, **changes))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache" / "collections").glob("[!.]*"))


def test_unknown_ids_can_be_counted(tmp_path: Path) -> None:
    found = build(folder(tmp_path, qrels_test=QRELS + b"1\tnone\t1\n9\ta\t1\n"), "count")
    assert found.facts["unknown_ids"] == 2
    assert len(found.qrels("test")) == 3


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with refused("folder-not-found", "data.path"):
        build(tmp_path / "nowhere")


def test_a_cut_gz_file_is_named(tmp_path: Path) -> None:
    path = folder(tmp_path, zipped=True)
    file = path / "corpus.jsonl.gz"
    file.write_bytes(file.read_bytes()[:-12])
    with refused("damaged-file", "corpus.jsonl.gz:4"):
        build(path)


def test_two_files_for_one_part_are_refused(tmp_path: Path) -> None:
    folder(tmp_path, zipped=True)
    with refused("ambiguous-files", "corpus.jsonl"):
        build(folder(tmp_path))


def test_a_second_use_opens_and_a_changed_file_or_setting_builds_anew(tmp_path: Path) -> None:
    path = folder(tmp_path)
    first = build(path)
    made = (first.folder / "collection.json").stat().st_mtime_ns
    again = build(path)
    assert again.folder == first.folder
    assert (again.folder / "collection.json").stat().st_mtime_ns == made
    assert build(path, "count").folder != first.folder
    size = (path / "queries.jsonl").stat().st_size
    (path / "queries.jsonl").write_bytes(QUERIES.replace(b"two", b"too"))
    assert (path / "queries.jsonl").stat().st_size == size
    changed = build(path)
    assert changed.folder != first.folder
    assert changed.digest != first.digest


def test_a_touched_or_moved_folder_is_found_again(tmp_path: Path) -> None:
    path = folder(tmp_path)
    first = build(path)
    os.utime(path / "queries.jsonl", ns=(0, 0))
    assert build(path).folder == first.folder
    moved = path.rename(tmp_path / "elsewhere")
    found = Beir(str(moved), name="set").collection(tmp_path / "cache")
    assert found.folder == first.folder
