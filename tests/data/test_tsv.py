"""Plain .tsv, beside Python's own csv reader."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from tests.files import judged, put, records
from tests.refusals import refused

from caravan.data.collection import Collection
from caravan.data.readers.labelled import Tsv

FILES = {
    "corpus.tsv": 'a\tCamels\tStore "fat".\nb\t\tSalt, and silk.\n',
    "queries.tsv": "1\twhat do camels store\n2\twhat was traded\n",
    "qrels.train.tsv": "1\ta\t1\n",
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\n2\tb\t2\n2\ta\t0\n",
}


def build(folder: Path, unknown_ids: str = "refuse") -> Collection:
    return Tsv(str(folder), unknown_ids=unknown_ids).collection(folder.parent / "cache")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_folder_is_read_as_csv_reads_it(tmp_path: Path, zipped: bool) -> None:
    found = build(put(tmp_path / "set", FILES, zipped))

    def rows(name: str) -> list[list[str]]:
        return list(csv.reader(FILES[name].splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE))

    assert records(found.corpus) == [tuple(row) for row in rows("corpus.tsv")]
    assert records(found.queries) == [(name, "", text) for name, text in rows("queries.tsv")]
    assert found.splits == ("train", "test")
    test = {(query, passage): int(grade) for query, passage, grade in rows("qrels/test.tsv")[1:]}
    assert judged(found, "test") == test
    assert judged(found, "train") == {("1", "a"): 1}


def test_each_split_may_have_queries_of_its_own(tmp_path: Path) -> None:
    files = {**FILES, "queries.dev.tsv": "3\tthird\n1\twhat do camels store\n"}
    found = build(put(tmp_path / "set", files))
    assert [name for name, _, _ in records(found.queries)] == ["1", "2", "3"]
    del files["queries.tsv"]
    files["qrels.train.tsv"] = "3\ta\t1\n"
    del files["qrels/test.tsv"]
    assert len(build(put(tmp_path / "other", files)).queries) == 2


@pytest.mark.parametrize(
    ("changes", "code", "place"),
    [
        ({"corpus.tsv": ""}, "empty-corpus", "corpus.tsv"),
        ({"corpus.tsv": "a\n"}, "malformed-line", "corpus.tsv:1"),
        ({"queries.tsv": "1\tx\n1\ty\n"}, "duplicate-id", "queries.tsv:2"),
        (
            {"queries.dev.tsv": "1\ty\n"},
            "conflicting-texts",
            "queries.dev.tsv:1",
        ),
        ({"qrels.train.tsv": "1\tz\t1\n"}, "unknown-id", "qrels.train.tsv:1"),
    ],
)
def test_a_mistake_is_reported_with_its_line(
    tmp_path: Path, changes: dict[str, str], code: str, place: str
) -> None:
    with refused(code, place):
        build(put(tmp_path / "set", FILES | changes))


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
    found = build(put(tmp_path / "set", {"corpus.tsv": corpus, "queries.tsv": queries}))
    assert records(found.corpus) == [("a", "Camels", "Store fat.")]
    assert records(found.queries) == [("1", "", "camel")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("corpus.tsv", "id\tabstract\ttitle\na\tfat\tCamels\n"),
        ("corpus.tsv", "id\ttext\ttext\na\tfat\tCamels\n"),
        ("corpus.tsv", "id\ttext\t\na\tfat\t\n"),
        ("queries.tsv", "qid\tlanguage\n1\ten\n"),
    ],
)
def test_a_header_of_unknown_columns_is_refused(tmp_path: Path, name: str, text: str) -> None:
    with refused("unknown-column"):
        build(put(tmp_path / "set", FILES | {name: text}))


def test_a_tab_at_the_end_of_every_line_keeps_the_text(tmp_path: Path) -> None:
    files = {"corpus.tsv": "a\tStore fat.\t\nb\tSalt.\t\r\n", "queries.tsv": "1\tcamel\n"}
    found = build(put(tmp_path / "set", files))
    assert records(found.corpus) == [("a", "", "Store fat."), ("b", "", "Salt.")]
    files["corpus.tsv"] += "c\tDunes\tThey move.\n"  # then the others have titles and no text
    found = build(put(tmp_path / "other", files))
    assert records(found.corpus)[1:] == [("b", "Salt.", ""), ("c", "Dunes", "They move.")]
    with refused("malformed-line", "queries.tsv:1"):
        build(put(tmp_path / "third", files | {"queries.tsv": "1\tcamel\t\n"}))


@pytest.mark.parametrize("name", ["corpus.tsv", "queries.tsv"])
def test_a_file_that_is_missing_or_there_twice_is_named(tmp_path: Path, name: str) -> None:
    folder = put(tmp_path / "set", FILES)
    put(folder, {name: FILES[name]}, zipped=True)
    with refused("ambiguous-files"):
        build(folder)
    (folder / name).unlink()
    (folder / f"{name}.gz").unlink()
    with refused("file-not-found"):
        build(folder)
    with refused("folder-not-found", "data.path"):
        build(tmp_path / "absent")


def test_judgements_of_no_split_or_of_one_split_twice_are_refused(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", {**FILES, "qrels.test.tsv": "2\tb\t1\n"})
    with refused("ambiguous-files", "qrels.test.tsv"):
        build(folder)
    with refused("unnamed-split", "qrels.tsv"):
        build(put(tmp_path / "other", {**FILES, "qrels.tsv": "2\tb\t1\n"}))
