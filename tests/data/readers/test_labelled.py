"""BEIR folders and plain .tsv: what is read, and the file and line of each mistake.

`tests/fuzz/test_data_files.py` compares what is read with plain Python.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tests.files import judged, put, records
from tests.refusals import refused
from tests.tiny import write_beir

from caravan.data.collection import Collection
from caravan.data.readers.labelled import Beir, Tsv

BEIR = {
    "corpus.jsonl": '{"_id": "a", "title": "A", "text": "first"}\n'
    '{"_id": "b", "text": "sec\\u2028ond\u2028\\r\\nline", "metadata": {}}\n\n'
    '{"_id": 3, "title": null, "text": ""}\r\n',
    "queries.jsonl": '\ufeff{"_id": "1", "text": "one"}\n{"_id": "2", "text": "two"}',
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\n1\ta\t1\n2\t3\t2\n2\tb\t0\n",
}
TSV = {
    "corpus.tsv": 'a\tCamels\tStore "fat".\nb\t\tSalt, and silk.\n',
    "queries.tsv": "1\twhat do camels store\n2\twhat was traded\n",
    "qrels.train.tsv": "1\ta\t1\n",
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\n2\tb\t2\n2\ta\t0\n",
}
LINE = '{"_id": "z", "text": "x"}\n'
QRELS = BEIR["qrels/test.tsv"]


def beir(folder: Path, changes: dict[str, str] = {}, **settings: Any) -> Collection:  # noqa: B006
    return Beir(str(put(folder / "set", BEIR | changes)), **settings).collection(folder / "cache")


def tsv(folder: Path, changes: dict[str, str] = {}) -> Collection:  # noqa: B006
    return Tsv(str(put(folder / "set", TSV | changes))).collection(folder / "cache")


def test_a_beir_folder_is_read_line_by_line(tmp_path: Path) -> None:
    found = beir(tmp_path, {"qrels/dev.tsv": "1 0 b 3\n"})
    assert found.name == "set"
    assert records(found.corpus) == [
        ("a", "A", "first"), ("b", "", "sec\u2028ond\u2028\r\nline"), ("3", "", ""),
    ]  # fmt: skip
    assert records(found.queries) == [("1", "", "one"), ("2", "", "two")]
    assert found.splits == ("dev", "test")
    assert judged(found, "test") == {("1", "a"): 1, ("2", "3"): 2, ("2", "b"): 0}
    assert judged(found, "dev") == {("1", "b"): 3}  # four columns, as TREC has them


def test_each_split_may_have_queries_of_its_own(tmp_path: Path) -> None:
    found = tsv(tmp_path, {"queries.dev.tsv": "3\tthird\n1\twhat do camels store\n"})
    assert [name for name, _, _ in records(found.queries)] == ["1", "2", "3"]
    assert found.splits == ("test", "train")
    assert judged(found, "test") == {("2", "b"): 2, ("2", "a"): 0}


@pytest.mark.parametrize(
    ("name", "text", "code", "line"),
    [
        ("corpus.jsonl", LINE + "\n{oops\n", "malformed-line", ":3"),
        ("corpus.jsonl", LINE + '["z"]', "malformed-line", ":2"),
        ("corpus.jsonl", '{"text": "x"}', "malformed-line", ":1"),
        ("corpus.jsonl", '{"_id": 1.5, "text": "x"}', "malformed-line", ":1"),
        ("corpus.jsonl", '{"_id": "a"}', "malformed-line", ":1"),
        ("corpus.jsonl", '{"_id": "1", "docid": "17", "text": "x"}', "malformed-line", ":1"),
        ("corpus.jsonl", '{"_id": "a", "text": ["x"]}', "malformed-line", ":1"),
        ("corpus.jsonl", '{"_id": "a", "title": 1, "text": ""}', "malformed-line", ":1"),
        ("corpus.jsonl", '{"_id": "a b", "text": "x"}', "invalid-id", ":1"),
        ("corpus.jsonl", LINE + '{"_id": "\udcff"}', "not-utf8", ":2"),
        ("corpus.jsonl", LINE + "\n" + LINE, "duplicate-id", ":3"),
        ("queries.jsonl", LINE * 2, "duplicate-id", ":2"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "empty-file", ""),
        ("qrels/test.tsv", QRELS + "1\ta", "malformed-line", ":5"),
        ("qrels/test.tsv", QRELS + "1\t0\ta\t1", "malformed-line", ":5"),
        ("qrels/test.tsv", QRELS + "1\tb\thigh", "invalid-grade", ":5"),
        ("qrels/test.tsv", QRELS + "1\tb\t1.0", "invalid-grade", ":5"),
        ("qrels/test.tsv", "1\ta\tx\n", "invalid-grade", ":1"),  # not taken for a header
        ("qrels/test.tsv", QRELS.splitlines()[0] + "\n" + QRELS, "invalid-grade", ":2"),
        ("qrels/test.tsv", "query-id\tscore\tcorpus-id\n1\t1\t0\n", "unknown-column", ":1"),
        ("qrels/test.tsv", QRELS + "1\tnone\t1", "unknown-id", ":5"),
        ("qrels/test.tsv", QRELS + "\n9\ta\t1", "unknown-id", ":6"),
        ("qrels/test.tsv", QRELS + "1\ta\t0", "conflicting-judgements", ":5"),
        ("qrels/test.tsv", QRELS + "1\t\udcfc\t0", "not-utf8", ":5"),
        ("corpus.tsv", "a\n", "malformed-line", ":1"),
        ("corpus.tsv", "a\tb\na\tb\tc\n", "malformed-line", ":2"),
        ("queries.tsv", "1\tx\n1\ty\n", "duplicate-id", ":2"),
        ("queries.tsv", "1\tcamel\t\n", "malformed-line", ":1"),
        ("queries.dev.tsv", "1\ty\n", "conflicting-texts", ":1"),
        ("qrels.train.tsv", "1\tz\t1\n", "unknown-id", ":1"),
        ("qrels.test.tsv", "2\tb\t1\n", "ambiguous-files", ""),
        ("qrels.tsv", "2\tb\t1\n", "unnamed-split", ""),
        ("corpus.tsv", "id\tabstract\ttitle\na\tfat\tCamels\n", "unknown-column", ":1"),
        ("corpus.tsv", "id\ttext\ttext\na\tfat\tCamels\n", "unknown-column", ":1"),
        ("corpus.tsv", "id\ttext\t\na\tfat\t\n", "unknown-column", ":1"),
        ("queries.tsv", "qid\tlanguage\n1\ten\n", "unknown-column", ":1"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_and_line(
    tmp_path: Path, name: str, text: str, code: str, line: str
) -> None:
    path = put(tmp_path / "set", BEIR if name in BEIR else TSV)
    (path / name).write_bytes(text.encode(errors="surrogateescape"))
    with refused(code, f"{path / name}{line}") as caught:
        (Beir if name in BEIR else Tsv)(str(path)).collection(tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("collections/[!.]*"))


@pytest.mark.parametrize(
    ("corpus", "queries"),
    [
        ("id\ttext\ttitle\na\tStore fat.\tCamels\n", "qid\tquery\n1\tcamel\n"),
        ("docid\tTitle\tcontents\na\tCamels\tStore fat.\n", "query-id\ttext\n1\tcamel\n"),
        ("text\ttitle\tid\nStore fat.\tCamels\ta\n", "question\tid\ncamel\t1\n"),
        ("a\tCamels\tStore fat.\n", "1\tcamel\n"),
    ],
)
def test_a_header_names_the_columns_and_is_no_record(
    tmp_path: Path, corpus: str, queries: str
) -> None:
    found = Tsv(str(put(tmp_path / "set", {"corpus.tsv": corpus, "queries.tsv": queries})))
    read = found.collection(tmp_path / "cache")
    assert records(read.corpus) == [("a", "Camels", "Store fat.")]
    assert records(read.queries) == [("1", "", "camel")]
    assert read.splits == ()  # qrels are optional


def test_a_tab_at_the_end_of_every_line_keeps_the_text(tmp_path: Path) -> None:
    text = "a\tStore fat.\t\nb\tSalt.\t\r\n"
    found = tsv(tmp_path, {"corpus.tsv": text})
    assert records(found.corpus) == [("a", "", "Store fat."), ("b", "", "Salt.")]
    text += "c\tDunes\tThey move.\n"  # then the others have titles and no text
    found = tsv(tmp_path / "titled", {"corpus.tsv": text})
    assert records(found.corpus)[1:] == [("b", "Salt.", ""), ("c", "Dunes", "They move.")]


@pytest.mark.parametrize("name", ["corpus.tsv", "queries.tsv"])
def test_a_file_that_is_missing_or_there_twice_is_named(tmp_path: Path, name: str) -> None:
    folder = put(tmp_path / "set", TSV)
    put(folder, {name: TSV[name]}, zipped=True)
    with refused("ambiguous-files", name):
        tsv(tmp_path)
    (folder / name).unlink()
    (folder / f"{name}.gz").unlink()
    with refused("file-not-found", name):
        Tsv(str(folder)).collection(tmp_path)
    with refused("folder-not-found", "data.path"):
        Tsv(str(tmp_path / "absent")).collection(tmp_path)


def test_a_second_use_opens_and_a_changed_file_or_setting_builds_again(tmp_path: Path) -> None:
    first = beir(tmp_path)
    made = (first.folder / "collection.json").stat().st_mtime_ns
    os.utime(tmp_path / "set/queries.jsonl", ns=(0, 0))
    assert beir(tmp_path).folder == first.folder
    assert (first.folder / "collection.json").stat().st_mtime_ns == made
    assert beir(tmp_path, unknown_ids="count").folder != first.folder
    moved = (tmp_path / "set").rename(tmp_path / "elsewhere")
    found = Beir(str(moved), name="set").collection(tmp_path / "cache")
    assert found.folder == first.folder
    changed = beir(tmp_path, {"queries.jsonl": BEIR["queries.jsonl"].replace("two", "too")})
    assert changed.folder != first.folder
    assert changed.digest != first.digest


def test_a_share_of_the_training_queries_is_the_dev_split(tmp_path: Path) -> None:
    folder = write_beir(tmp_path / "published", passages=230, queries=108)
    (folder / "qrels/dev.tsv").unlink()

    def ids(share: float, split: str) -> set[str]:
        found = Beir(str(folder), held_out=share).collection(tmp_path)
        return set(found.queries.ids(found.qrels(split).queries))

    dev = ids(0.2, "dev")
    assert ids(0, "train") == ids(0.2, "train") | dev
    assert not ids(0.2, "train") & dev
    assert 10 <= len(dev) <= 30  # of 100
    assert dev < ids(0.4, "dev")
    assert ids(0.2, "test") == ids(0, "test")
    with refused("unknown-split", "data.held_out"):
        ids(0, "dev")
    for share, code in ((1.5, "invalid-setting"), (-1, "invalid-setting"), (1e-9, "empty-split")):
        with refused(code, "data.held_out"):
            ids(share, "dev")
    with refused("invalid-setting", "data.held_out"):
        beir(tmp_path, {"qrels/dev.tsv": "1 0 b 3\n", "qrels/train.tsv": QRELS}, held_out=0.1)
    file = folder / "qrels/train.tsv"
    lines = file.read_text().splitlines()
    lines[41] = lines[41].rpartition("\t")[0].rpartition("\t")[0] + "\tnobody\t1"
    file.write_text("\n".join(lines) + "\n")
    with refused("unknown-id", "train.tsv:42"):
        ids(0.2, "dev")
