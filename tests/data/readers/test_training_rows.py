"""Training rows in every format; their negatives and scores as runs.

`tests/fuzz/test_data_files.py` compares what is read with plain json.
"""

from __future__ import annotations

import csv
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet
from tests.files import judged, put, records
from tests.refusals import refused

from caravan import files, progress
from caravan.data import texts
from caravan.data.batch_file import BatchFile
from caravan.data.collection import Collection
from caravan.data.negatives import Negatives
from caravan.data.readers import training_rows
from caravan.data.readers.rows import id_of_text
from caravan.data.readers.training_rows import TrainingRows
from caravan.data.runs import read_run

Rows = list[dict[str, Any]]


def passage(i: int, **more: Any) -> dict[str, Any]:
    return {"docid": f"p{i}", "title": f"T{i}" if i % 2 else "", "text": f"camel {i}\n\t", **more}


def row(name: Any, query: str, positives: list[int], negatives: list[int]) -> dict[str, Any]:
    sides = {"positive_passages": positives, "negative_passages": negatives}
    passages = {side: list(map(passage, numbers)) for side, numbers in sides.items()}
    return {"query_id": name, "query": query, **passages}


INLINE = [
    {**row("q1", "what is in a hump", [1], [3, 2]), "answers": ["fat"]},
    row(2, "where is salt", [2, 4], [1, 3, 5, 3]),
    row("q3", "neither", [], []),
]
BY_ID: Rows = [
    {
        "query_id": str(row["query_id"]),
        "query_text": row["query"],
        "positive_document_ids": [one["docid"] for one in row["positive_passages"]],
        "negative_document_ids": [one["docid"] for one in row["negative_passages"]],
    }
    for row in INLINE
]
SAVED: Rows = [{**row, "query_id": str(row["query_id"]), "answers": []} for row in INLINE]
CORPUS = [passage(i) for i in range(8)]
TEXTS: Rows = [
    {
        "query": "what is in a hump",
        "pos": ["Camels store fat.", "Fat, mostly."],
        "neg": ["Salt is a mineral.", "Dunes move."],
        "pos_scores": [9, 7.5],
        "neg_scores": [-2.25, -8],
        "prompt": "Represent this sentence for searching relevant passages: ",
    },
    {"query": "what moves", "pos": ["Dunes move."], "neg": ["Camels store fat."]},
    {"query": "what moves", "pos": ["Stars, too.\n"], "neg": []},
]
TRIPLETS: Rows = [
    {"anchor": "what is in a hump", "positive": "Fat, mostly.", "negative": "Dunes move."},
    {"anchor": "what moves", "positive": "Dunes move.", "negative": 'Salt, "white"\nand dry.'},
]


def jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read(path: Path, **settings: Any) -> Collection:
    return TrainingRows(str(path), **settings).collection(path.parent / "cache")


def file_of(folder: Path, rows: Rows) -> Path:
    return put(folder, {"rows.jsonl": jsonl(rows)}) / "rows.jsonl"


def run_of(found: Collection, name: str) -> dict[str, list[tuple[str, float]]]:
    run = read_run(found.run_path(f"data:{name}"), found.queries, found.corpus)
    listed = {}
    for at, query in zip(run.query_rows, found.queries.ids(run.query_rows), strict=True):
        rows, scores = run.of(int(at))
        listed[query] = list(zip(found.corpus.ids(rows), scores.tolist(), strict=True))
    return listed


def negatives_of(found: Collection) -> dict[str, list[str]]:
    return {query: [name for name, _ in of] for query, of in run_of(found, "negatives").items()}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows"])
def test_every_format_gives_the_same_collection(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if path.suffix == ".parquet":
        Dataset.from_list(TRIPLETS).to_parquet(str(path))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(TRIPLETS[0]))
            writer.writeheader()
            writer.writerows(TRIPLETS)
    elif path.suffix:
        file_of(tmp_path, TRIPLETS)
    else:
        Dataset.from_list(TRIPLETS).save_to_disk(str(path))
    found = read(path, name="rows")
    texts = [row[side] for row in TRIPLETS for side in ("positive", "negative")]
    assert records(found.corpus) == [(id_of_text(t), "", t) for t in dict.fromkeys(texts)]
    assert [text for _, _, text in records(found.queries)] == [row["anchor"] for row in TRIPLETS]
    assert judged(found, "train") == {
        (id_of_text(row["anchor"]), id_of_text(row["positive"])): 1 for row in TRIPLETS
    }
    assert found.runs == ("negatives",)


def test_ids_beside_a_corpus_give_the_same_collection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", -1.0)
    monkeypatch.setattr(progress.time, "monotonic", itertools.count().__next__)
    files = {"dev.jsonl": jsonl(BY_ID[:1]), "corpus.jsonl": jsonl(CORPUS)}
    folder = put(tmp_path / "set", {"train.jsonl": jsonl(BY_ID), **files})
    with caplog.at_level(logging.INFO):
        found = read(folder)
    lines = {line.partition(" in ")[0] for line in caplog.messages}
    assert {"corpus: 8 passages", "rows of train: 3 rows", "queries: 3 queries"} <= lines
    assert [name for name, _, _ in records(found.corpus)] == [one["docid"] for one in CORPUS]
    assert found.splits == ("dev", "train")
    assert judged(found, "dev") == {("q1", "p1"): 1}
    assert judged(found, "train") == {("q1", "p1"): 1, ("2", "p2"): 1, ("2", "p4"): 1}
    assert negatives_of(found) == {"q1": ["p3", "p2"], "2": ["p1", "p3", "p5"]}
    inline = put(tmp_path / "inline", {"train.jsonl": jsonl(INLINE), **files})
    assert read(inline, name="set").digest == found.digest
    nemo = {"question_id": "q1", "question": "what is in a hump", "pos_doc": [{"id": "p1"}]}
    nemo |= {"neg_doc": [{"id": "p3"}, {"id": "p2"}]}
    put(folder, {"train.jsonl": jsonl([nemo])})
    assert judged(read(folder), "train") == {("q1", "p1"): 1}
    with refused("missing-corpus", "train.jsonl:1"):
        read(folder / "train.jsonl")


def test_files_of_rows_without_ids_are_read_as_one(tmp_path: Path) -> None:
    files = {"1.jsonl": jsonl(TEXTS[:1]), "2.json": jsonl(TEXTS[1:])}
    found = read(put(tmp_path / "rows", files))

    prompt = TEXTS[0]["prompt"]  # the instruction of its query
    hump = id_of_text(f"{prompt}\nwhat is in a hump")
    moves = id_of_text("what moves")  # two rows are one query
    queries = [(hump, prompt, "what is in a hump"), (moves, "", "what moves")]
    assert records(found.queries) == queries
    assert judged(found, "train") == {
        (moves if "moves" in row["query"] else hump, id_of_text(text)): 1
        for row in TEXTS
        for text in row["pos"]
    }
    first = [id_of_text(text) for text in (*TEXTS[0]["pos"], *TEXTS[0]["neg"])]
    scored = list(zip(first, [9, 7.5, -2.25, -8], strict=True))
    assert run_of(found, "teacher") == {hump: scored}
    assert negatives_of(found) == {hump: first[2:], moves: first[:1]}


@pytest.mark.parametrize("saved", ["parquet", "disk"])
def test_splits_of_a_dataset_are_read(tmp_path: Path, saved: str) -> None:
    parts = {"train": Dataset.from_list(SAVED), "validation": Dataset.from_list(SAVED[:1])}
    folder = tmp_path / "tevatron"
    if saved == "parquet":
        (folder / "data").mkdir(parents=True)
        for split, part in parts.items():
            part.to_parquet(str(folder / "data" / f"{split}-00000.parquet"))
    else:
        DatasetDict(parts).save_to_disk(str(folder))
    found = read(folder, subsets={"train": "train", "dev": "validation"})
    assert records(found.corpus) == records(read(file_of(tmp_path, INLINE)).corpus)
    assert judged(found, "dev") == {("q1", "p1"): 1}
    with refused("dataset-not-loaded", "test"):
        read(folder, subsets={"train": "test"})
    Dataset.from_list(SAVED, split="validation").save_to_disk(str(tmp_path / "one"))
    assert read(tmp_path / "one", subsets={"train": "validation"}).splits == ("train",)


def test_subsets_choose_among_the_files_of_a_folder(tmp_path: Path) -> None:
    files = {"train.jsonl": jsonl(INLINE), "validation.jsonl": jsonl(INLINE[:1]), "x.jsonl": "{"}
    folder = put(tmp_path / "set", files)
    found = read(folder, subsets={"train": "train", "dev": "validation"})
    assert found.splits == ("train", "dev")
    assert judged(found, "dev") == {("q1", "p1"): 1}
    for path, subset in ((folder, "dev"), (folder / "train.jsonl", "validation")):
        with refused("unknown-split", "data.subsets.dev"):
            read(path, subsets={"train": "train", "dev": subset})


def test_scores_are_a_teachers_run_and_train_as_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = json.loads(json.dumps(INLINE))
    for at, one in enumerate([*rows[0]["positive_passages"], *rows[0]["negative_passages"]]):
        one["score"] = 0.5 - at / 8
    found = read(file_of(tmp_path, rows))
    assert found.runs == ("negatives", "teacher")
    assert run_of(found, "teacher") == {"q1": [("p1", 0.5), ("p3", 0.375), ("p2", 0.25)]}
    sampler = Negatives(
        runs=["data:negatives"], number=2, choose="top", depth=5, teacher="data:teacher"
    )
    sampler.open(found, found.qrels("train"), seed=0)
    group = sampler.group(0, epoch=0, position=0)
    assert found.corpus.ids(group) == ["p1", "p3", "p2"]
    scores = sampler.teacher_scores(0, group)
    assert scores is not None
    assert scores.tolist() == [0.5, 0.375, 0.25]
    assert "not used" not in caplog.text
    Negatives(number=1).open(found, found.qrels("train"), seed=0)
    assert "set sampler.runs=[data:negatives]" in caplog.text
    with refused("unknown-run", "rows.jsonl"):
        Negatives(runs=["data:bm25"], number=2).open(found, found.qrels("train"), seed=0)


def test_rows_to_validate_on_are_given_or_held_out(tmp_path: Path) -> None:
    rows = [{**INLINE[0], "query_id": f"q{i}", "query": f"query {i}"} for i in range(40)]
    file = file_of(tmp_path, rows)
    found = read(file, held_out=0.5)
    assert found.splits == ("train", "dev")
    train, dev = (found.qrels(split).queries.tolist() for split in ("train", "dev"))
    assert sorted(train + dev) == list(range(40))
    given = read(file, dev=str(file_of(tmp_path / "dev", TEXTS[:1])))
    assert given.splits == ("train", "dev")
    assert len(given.qrels("dev")) == 2
    folder = put(tmp_path / "set", {"train.jsonl": jsonl(INLINE), "dev.jsonl": jsonl(INLINE)})
    for path, share in ((folder, 0.2), (file, 1.5)):
        with refused("invalid-setting", "data.held_out"):
            read(path, held_out=share)


GOOD = json.dumps(TRIPLETS[0])
INNER = '{"query": "q", "positive_passages": [{"docid": "1", "text": "a", "text": "b"}]}'


@pytest.mark.parametrize(
    ("line", "code", "place"),
    [
        (GOOD.replace('"negative"', '"positive"'), "malformed-line", "'positive'"),
        (INNER, "malformed-line", "'text'"),
        ({"query": "q"}, "malformed-line", "positive"),
        ({**INLINE[1], "query_id": "q 2"}, "invalid-id", "'q 2'"),
        ({**INLINE[1], "query_id": "q1"}, "conflicting-texts", "'q1'"),
        ({**INLINE[2], "negative_passages": [passage(1, text="x")]}, "conflicting-texts", "'p1'"),
        ({**INLINE[2], "negative_passages": [passage(1, docid="a b")]}, "invalid-id", "'a b'"),
        (BY_ID[1], "missing-corpus", "data.corpus"),
    ],
)
def test_a_wrong_row_is_reported_with_its_line(
    tmp_path: Path, line: Any, code: str, place: str
) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    put(tmp_path, {"rows.jsonl": f"{jsonl(INLINE[:1])}{text}\n"})
    with refused(code, "rows.jsonl:2", place) as caught:
        read(tmp_path / "rows.jsonl")
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache/collections").iterdir() if path.is_dir()]


def test_files_that_are_no_tables_are_named(tmp_path: Path) -> None:
    names = ["anchor", "positive", "positive"]
    table = pyarrow.Table.from_arrays([pyarrow.array([name]) for name in names], names=names)
    parquet.write_table(table, tmp_path / "e.parquet")
    (tmp_path / "f.csv").write_bytes(b"query,positive\n\xff,a\n")
    texts = {"a.csv": "query,positive\nq\n", "b.csv": "query,positive\nq,a,b\n", "c.csv": ""}
    put(tmp_path, {**texts, "d.parquet": "PAR1", "g.csv": "anchor,positive,positive\na,b,c\n"})
    (tmp_path / "empty").mkdir()
    for name, code, place in (
        ("a.csv", "malformed-line", "a.csv:2"),
        ("b.csv", "malformed-line", "b.csv:2"),
        ("c.csv", "empty-file", "c.csv"),
        ("d.parquet", "damaged-file", "d.parquet"),
        ("e.parquet", "malformed-line", "'positive'"),
        ("f.csv", "not-utf8", "f.csv:2"),
        ("g.csv", "malformed-line", "'positive'"),
        ("absent.jsonl", "file-not-found", "absent.jsonl"),
        ("empty", "dataset-not-loaded", "empty"),
    ):
        with refused(code, place):
            read(tmp_path / name)


def test_an_id_that_the_corpus_lacks_is_refused_or_left_out(tmp_path: Path) -> None:
    files = {"train.jsonl": jsonl(BY_ID), "corpus.jsonl": jsonl(CORPUS[:5])}
    folder = put(tmp_path / "set", files)
    with refused("unknown-id", "train.jsonl:2"):
        read(folder)
    found = read(folder, unknown_ids="count")
    assert negatives_of(found)["2"] == ["p1", "p3"]
    put(folder, {"corpus.jsonl": jsonl([*CORPUS, CORPUS[0]])})
    with refused("duplicate-id", "corpus.jsonl:9"):
        read(folder)


def test_an_interrupted_build_does_not_read_the_rows_of_a_finished_corpus_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_of(tmp_path, INLINE)
    whole = TrainingRows(str(tmp_path)).collection(tmp_path / "whole")

    def interrupted(self: Any) -> Any:
        raise KeyboardInterrupt
        yield

    with monkeypatch.context() as patch:
        patch.setattr(training_rows._Spool, "_queries", interrupted)
        with pytest.raises(KeyboardInterrupt):
            TrainingRows(str(tmp_path)).collection(tmp_path / "cache")
    (spool,) = (tmp_path / "cache").rglob("rows.jsonl")
    assert len(spool.read_text().splitlines()) == len(INLINE)
    monkeypatch.setattr(training_rows._Spool, "_written", interrupted)
    found = TrainingRows(str(tmp_path)).collection(tmp_path / "cache")
    assert found.digest == whole.digest
    assert sorted(path.name for path in found.folder.iterdir()) == sorted(
        path.name for path in whole.folder.iterdir()
    )


def test_a_corpus_is_not_finished_before_its_rows_are_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_of(tmp_path, INLINE)
    monkeypatch.setattr(texts, "BATCH_ROWS", 1)
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", _interrupt)
        with pytest.raises(KeyboardInterrupt):
            TrainingRows(str(tmp_path)).collection(tmp_path / "cache")
    (journal,) = (tmp_path / "cache").rglob("corpus.arrow.journal")
    with BatchFile(journal.with_suffix(""), texts.COLUMNS) as corpus:
        assert not corpus.is_whole


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt
