"""Tevatron's rows, both layouts, beside plain json; their negatives and scores as runs."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.files import judged, put, records
from tests.refusals import refused

from caravan import progress
from caravan.data.collection import Collection
from caravan.data.negatives import Negatives
from caravan.data.readers.training_rows import Tevatron
from caravan.data.runs import Run, read_run


def passage(i: int, **more: Any) -> dict[str, Any]:
    return {"docid": f"p{i}", "title": f"T{i}" if i % 2 else "", "text": f"camel {i}\n\t", **more}


INLINE: list[dict[str, Any]] = [
    {
        "query_id": "q1",
        "query": "what is in a hump",
        "answers": ["fat"],
        "positive_passages": [passage(1)],
        "negative_passages": [passage(3), passage(2)],
    },
    {
        "query_id": 2,
        "query": "where is salt",
        "positive_passages": [passage(2), passage(4)],
        "negative_passages": [passage(1), passage(3), passage(5), passage(3)],
    },
    {"query_id": "q3", "query": "neither", "positive_passages": [], "negative_passages": []},
]
BY_ID: list[dict[str, Any]] = [
    {
        "query_id": str(row["query_id"]),
        "query_text": row["query"],
        "positive_document_ids": [one["docid"] for one in row["positive_passages"]],
        "negative_document_ids": [one["docid"] for one in row["negative_passages"]],
    }
    for row in INLINE
]
CORPUS = [passage(i) for i in range(8)]


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def build(path: Path, cache: Path, **settings: Any) -> Collection:
    return Tevatron(str(path), **settings).collection(cache)


def run_of(found: Collection, name: str) -> dict[str, list[tuple[str, float]]]:
    run: Run = read_run(found.run_path(f"data:{name}"), found.queries, found.corpus)
    listed = {}
    for row, query in zip(run.query_rows, found.queries.ids(run.query_rows), strict=True):
        rows, scores = run.of(int(row))
        listed[query] = list(zip(found.corpus.ids(rows), scores.tolist(), strict=True))
    return listed


NEGATIVES = {"q1": ["p3", "p2"], "2": ["p1", "p3", "p5"]}


@pytest.mark.parametrize("zipped", [False, True])
def test_texts_inline_are_read_as_json_reads_them(tmp_path: Path, zipped: bool) -> None:
    put(tmp_path, {"rows.jsonl": jsonl(INLINE)}, zipped)
    file = tmp_path / f"rows.jsonl{'.gz' if zipped else ''}"
    found = build(file, tmp_path)
    every = [
        one for row in INLINE for one in (*row["positive_passages"], *row["negative_passages"])
    ]
    expected = {one["docid"]: (one["docid"], one["title"], one["text"]) for one in every}
    assert records(found.corpus) == list(expected.values())
    assert records(found.queries) == [(str(r["query_id"]), "", r["query"]) for r in INLINE]
    assert found.splits == ("train",)
    assert judged(found, "train") == {
        (str(row["query_id"]), one["docid"]): 1
        for row in INLINE
        for one in row["positive_passages"]
    }
    assert {q: [p for p, _ in ranked] for q, ranked in run_of(found, "negatives").items()} == (
        NEGATIVES
    )
    assert found.runs == ("negatives",)
    assert (found.facts["rows"], found.facts["without_positive"]) == (3, 1)


def test_ids_beside_a_corpus_give_the_same_collection(tmp_path: Path) -> None:
    folder = put(
        tmp_path / "set",
        {"train.jsonl": jsonl(BY_ID), "dev.jsonl": jsonl(BY_ID[:1]), "corpus.jsonl": jsonl(CORPUS)},
    )
    found = build(folder, tmp_path)
    assert [name for name, _, _ in records(found.corpus)] == [one["docid"] for one in CORPUS]
    assert found.splits == ("dev", "train")
    assert judged(found, "dev") == {("q1", "p1"): 1}
    assert {q: [p for p, _ in ranked] for q, ranked in run_of(found, "negatives").items()} == (
        NEGATIVES
    )
    assert found.facts["repeated_queries"] == 1
    inline = put(
        tmp_path / "inline", {"train.jsonl": jsonl(INLINE), "dev.jsonl": jsonl(INLINE[:1])}
    )
    put(inline, {"corpus.jsonl": jsonl(CORPUS)})
    assert build(inline, tmp_path, name="set").digest == found.digest


def test_rows_beside_a_corpus_show_their_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", -1.0)
    monkeypatch.setattr(progress.time, "monotonic", itertools.count().__next__)
    files = {"train.jsonl": jsonl(BY_ID), "corpus.jsonl": jsonl(CORPUS)}
    with caplog.at_level(logging.INFO):
        build(put(tmp_path / "set", files), tmp_path)
    logged = [line.partition(" in ")[0] for line in caplog.messages]
    assert {"corpus: 8 passages", "rows of train: 3 rows", "queries: 3 queries"} <= set(logged)


@pytest.mark.parametrize("saved", ["parquet", "disk"])
def test_datasets_of_the_same_columns_are_read(tmp_path: Path, saved: str) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{**row, "query_id": str(row["query_id"]), "answers": []} for row in INLINE]
    folder = tmp_path / "dataset"
    if saved == "parquet":
        (folder / "data").mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(str(folder / "data" / "train-00000.parquet"))
        Dataset.from_list(rows[:1]).to_parquet(str(folder / "data" / "validation-00000.parquet"))
    else:
        parts = {"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows[:1])}
        DatasetDict(parts).save_to_disk(str(folder))
    subsets = {"train": "train", "dev": "validation"}
    found = build(folder, tmp_path, subsets=subsets)
    file = put(tmp_path, {"rows.jsonl": jsonl(INLINE)}) / "rows.jsonl"
    assert records(found.corpus) == records(build(file, tmp_path).corpus)
    assert judged(found, "dev") == {("q1", "p1"): 1}
    with refused("dataset-not-loaded"):
        build(folder, tmp_path, subsets={"train": "test"})


def test_a_dataset_saved_without_splits_is_no_other_split(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{**row, "query_id": str(row["query_id"]), "answers": []} for row in INLINE]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "dataset"))
    assert build(tmp_path / "dataset", tmp_path).splits == ("train",)
    with refused("dataset-not-loaded", "validation"):
        build(tmp_path / "dataset", tmp_path, subsets={"train": "train", "dev": "validation"})


def test_subsets_choose_among_the_files_of_a_folder(tmp_path: Path) -> None:
    files = {"train.jsonl": jsonl(INLINE), "validation.jsonl": jsonl(INLINE[:1]), "x.jsonl": "{"}
    folder = put(tmp_path / "set", files)
    found = build(folder, tmp_path, subsets={"train": "train", "dev": "validation"})
    assert found.splits == ("train", "dev")
    assert judged(found, "dev") == {("q1", "p1"): 1}
    with refused("unknown-split", "data.subsets"):
        build(folder, tmp_path, subsets={"train": "train", "dev": "dev"})
    with refused("unknown-split", "data.subsets"):
        build(folder / "train.jsonl", tmp_path, subsets={"train": "train", "dev": "validation"})


def test_a_file_of_a_dataset_is_distinguished_from_a_file_of_rows(tmp_path: Path) -> None:
    file = put(tmp_path, {"train.parquet": "PAR1"}) / "train.parquet"
    with refused("file-of-dataset", "train.parquet"):
        build(file, tmp_path)


def test_scores_are_a_teachers_run_and_train_as_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = json.loads(json.dumps(INLINE))
    for at, one in enumerate([*rows[0]["positive_passages"], *rows[0]["negative_passages"]]):
        one["score"] = 0.5 - at / 8
    file = put(tmp_path, {"rows.jsonl": jsonl(rows)}) / "rows.jsonl"
    found = build(file, tmp_path)
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
    second = sampler.group(1, epoch=0, position=1)
    assert set(found.corpus.ids(second[1:])) <= set(NEGATIVES["2"])
    assert "not used" not in caplog.text
    Negatives(number=1).open(found, found.qrels("train"), seed=0)
    assert "set sampler.runs=[data:negatives]" in caplog.text
    with refused("unknown-run", "rows.jsonl"):
        Negatives(runs=["data:bm25"], number=2).open(found, found.qrels("train"), seed=0)


def test_a_share_of_the_queries_may_be_held_out(tmp_path: Path) -> None:
    rows = [{**INLINE[0], "query_id": f"q{i}", "query": f"query {i}"} for i in range(200)]
    file = put(tmp_path, {"rows.jsonl": jsonl(rows)}) / "rows.jsonl"
    found = build(file, tmp_path, held_out=0.2)
    assert found.splits == ("train", "dev")
    train, dev = (set(found.qrels(split).queries.tolist()) for split in ("train", "dev"))
    assert 20 < len(dev) < 60
    assert train | dev == set(range(200))
    assert not train & dev
    again = build(file, tmp_path / "again", held_out=0.2)
    assert np.array_equal(again.qrels("dev").queries, found.qrels("dev").queries)
    folder = put(tmp_path / "set", {"train.jsonl": jsonl(INLINE), "dev.jsonl": jsonl(INLINE)})
    with refused("invalid-setting", "data.held_out"):
        build(folder, tmp_path, held_out=0.2)
    with refused("invalid-setting", "data.held_out"):
        build(file, tmp_path, held_out=1.5)


def changed(row: int, **fields: Any) -> list[dict[str, Any]]:
    rows = [dict(row) for row in INLINE]
    rows[row].update(fields)
    return rows


@pytest.mark.parametrize(
    ("rows", "code", "place"),
    [
        (changed(1, query=None), "malformed-line", "rows.jsonl:2"),
        (changed(1, query_id=1.5), "malformed-line", "rows.jsonl:2"),
        (changed(1, query_id="q 2"), "invalid-id", "rows.jsonl:2"),
        (changed(1, query_id="q1"), "conflicting-texts", "rows.jsonl:2"),
        (changed(1, positive_passages={}), "malformed-line", "rows.jsonl:2"),
        (
            changed(1, negative_passages=["p"]),
            "malformed-line",
            "rows.jsonl:2",
        ),
        (changed(1, positive_passages=[{"docid": "p"}]), "malformed-line", "rows.jsonl:2"),
        (
            changed(1, positive_passages=[{"docid": "p", "text": "x", "title": 0}]),
            "malformed-line",
            "rows.jsonl:2",
        ),
        (
            changed(2, negative_passages=[{**passage(1), "text": "x"}]),
            "conflicting-texts",
            "rows.jsonl:3",
        ),
        (
            changed(2, negative_passages=[passage(1, docid="a b")]),
            "invalid-id",
            "rows.jsonl:3",
        ),
        (
            changed(2, negative_passages=[passage(1, score="x")]),
            "invalid-score",
            "rows.jsonl:3",
        ),
        ([{"query_id": "1", "query": "x"}], "malformed-line", "rows.jsonl:1"),
        (
            BY_ID,
            "missing-corpus",
            "rows.jsonl:1",
        ),
    ],
)
def test_a_wrong_row_is_reported_with_its_line(
    tmp_path: Path, rows: list[dict[str, Any]], code: str, place: str
) -> None:
    file = put(tmp_path, {"rows.jsonl": jsonl(rows)}) / "rows.jsonl"
    with refused(code, place) as caught:
        build(file, tmp_path)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "collections").iterdir() if path.is_dir()]


def test_a_missing_corpus_is_reported(tmp_path: Path) -> None:
    file = put(tmp_path, {"rows.jsonl": jsonl(BY_ID)}) / "rows.jsonl"
    with refused("file-not-found", "absent.jsonl"):
        build(file, tmp_path, corpus=str(tmp_path / "absent.jsonl"))


def test_an_id_that_the_corpus_lacks_is_reported_or_counted(tmp_path: Path) -> None:
    folder = put(tmp_path / "set", {"train.jsonl": jsonl(BY_ID), "corpus.jsonl": jsonl(CORPUS[:5])})
    with refused("unknown-id", "train.jsonl:2"):
        build(folder, tmp_path)
    found = build(folder, tmp_path, unknown_ids="count")
    assert [p for p, _ in run_of(found, "negatives")["2"]] == ["p1", "p3"]
    assert found.facts["unknown_ids"] == 1
    put(folder, {"corpus.jsonl": jsonl([*CORPUS, CORPUS[0]])})
    with refused("duplicate-id", "corpus.jsonl:9"):
        build(folder, tmp_path)
