"""Rows of sentence-transformers, NeMo and your own columns, in jsonl, csv, parquet and datasets."""

from __future__ import annotations

import csv
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from datasets import Dataset
from pyarrow import parquet
from tests.files import judged, put, records
from tests.refusals import refused

from caravan.data.collection import Collection
from caravan.data.readers.rows import Columns, id_of_text, row_of
from caravan.data.readers.training_rows import TrainingRows

Rows = list[dict[str, Any]]
TRIPLETS: Rows = [
    {"anchor": "what is in a hump", "positive": "Fat, mostly.", "negative": "Dunes move."},
    {"anchor": "what moves", "positive": "Dunes move.", "negative": 'Salt, "white"\nand dry.'},
]


def rows(path: Path, **settings: Any) -> Collection:
    return TrainingRows(str(path), **settings).collection(path.parent / "cache")


def write(path: Path, rows: Rows) -> Path:
    """Rows in the format of a file's name, or as a dataset in a folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        Dataset.from_list(rows).save_to_disk(str(path))
    return path


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows"])
def test_every_format_gives_the_same_collection(name: str, tmp_path: Path) -> None:
    found = rows(write(tmp_path / name, TRIPLETS), name="rows")
    texts = [row[side] for row in TRIPLETS for side in ("positive", "negative")]
    assert records(found.corpus) == [(id_of_text(t), "", t) for t in dict.fromkeys(texts)]
    assert [text for _, _, text in records(found.queries)] == [row["anchor"] for row in TRIPLETS]
    assert judged(found, "train") == {
        (id_of_text(row["anchor"]), id_of_text(row["positive"])): 1 for row in TRIPLETS
    }
    assert found.runs == ("negatives",)


def _texts(fields: dict[str, Any], **columns: Any) -> tuple[str, list[str], list[str]]:
    row = row_of("x", fields, Columns(columns), has_corpus=True)
    sides = ([one.text or one.id for one in side] for side in (row.positives, row.negatives))
    return row.query, *sides


@pytest.mark.parametrize(
    ("fields", "columns", "positives", "negatives"),
    [
        ({"question": "q", "answer": "a"}, {}, ["a"], []),
        (
            {"query": "q", "negative_10": "d", "positive": "a", "negative_2": "c", "negative": "b"},
            {},
            ["a"],
            ["b", "c", "d"],
        ),
        ({"query": "q", "positive": "a", "negative_1": "b", "negative_2": None}, {}, ["a"], ["b"]),
        ({"query": "q", "positive": "a", "negative_1": "", "negative_2": "c"}, {}, ["a"], ["c"]),
        ({"sentence1": "q", "sentence2": "a", "label": 1}, {}, ["a"], []),
        ({"sentence1": "q", "sentence2": "a", "label": "0"}, {}, [], ["a"]),
        ({"query": "q", "docs": ["a", "b", "c"], "labels": [0, 1, 0]}, {}, ["b"], ["a", "c"]),
        ({"question": "q", "pos_doc": "a", "neg_doc": ["b", "c"]}, {}, ["a"], ["b", "c"]),
        (
            {"question": "q", "pos_doc": [{"id": "p1"}], "neg_doc": [{"id": 2}, {"text": "b"}]},
            {},
            ["p1"],
            ["2", "b"],
        ),
        (
            {"q": "q", "good": "a", "hard_1": "b", "hard_2": "c", "score": 3},
            {"query": "q", "positive": "good", "negative": ["hard_2", "hard_1"], "score": None},
            ["a"],
            ["c", "b"],
        ),
        ({"query": "q", "gold_ids": ["p"], "x": 1}, {"positive": "gold_ids"}, ["p"], []),
    ],
)
def test_columns_become_positives_and_negatives(
    fields: dict[str, Any], columns: dict[str, Any], positives: list[str], negatives: list[str]
) -> None:
    assert _texts(fields, **columns) == ("q", positives, negatives)


def test_scores_of_a_row_are_those_of_a_teacher() -> None:
    fields = {"query": "q", "positive": "a", "negative_1": "b", "score": [2, "0.5"]}
    row = row_of("x", fields)
    assert [one.score for one in (*row.positives, *row.negatives)] == [2.0, 0.5]
    assert row_of("x", {**fields, "score": None}).positives[0].score is None
    pair = row_of("x", {"sentence1": "q", "sentence2": "a", "label": 0, "score": 0.25})
    assert pair.negatives[0].score == 0.25


def test_rows_of_one_query_are_merged(tmp_path: Path) -> None:
    pairs: Rows = [
        {"sentence1": "what moves", "sentence2": text, "label": label}
        for text, label in (("Dunes.", 1), ("Salt.", 0), ("Stars.", 1), ("Tents.", 0))
    ]
    found = rows(write(tmp_path / "pairs.parquet", pairs))
    query = id_of_text("what moves")
    assert judged(found, "train") == {(query, id_of_text(text)): 1 for text in ("Dunes.", "Stars.")}


def test_ids_of_nemo_are_those_of_a_corpus(tmp_path: Path) -> None:
    nemo: Rows = [
        {"question_id": "q1", "question": "q", "pos_doc": [{"id": "p1"}], "neg_doc": [{"id": "p2"}]}
    ]
    corpus = "".join(json.dumps({"id": f"p{i}", "text": f"text {i}"}) + "\n" for i in range(4))
    folder = put(tmp_path / "set", {"corpus.jsonl": corpus})
    write(folder / "train.jsonl", nemo)
    found = rows(folder)
    assert judged(found, "train") == {("q1", "p1"): 1}
    assert len(found.corpus) == 4
    with refused("missing-corpus", "train.jsonl:1"):
        rows(folder / "train.jsonl")


@pytest.mark.parametrize(
    ("change", "columns", "code", "place"),
    [
        ({"anchor": 1}, {}, "malformed-line", "anchor"),
        ({"positive": None}, {}, "malformed-line", "positive"),
        ({"positive": ""}, {}, "malformed-line", "positive"),
        ({"positive": ["a", 2]}, {}, "malformed-line", "positive"),
        ({"score": [1.0]}, {}, "malformed-line", "score"),
        ({"score": ["x", 1]}, {}, "invalid-score", "'x'"),
        ({"label": 0.7}, {}, "invalid-label", "label"),
        ({"label": None}, {}, "invalid-label", "label"),
        ({}, {"positive": "answer"}, "malformed-line", "answer"),
        ({}, {"query": None}, "malformed-line", "query"),
    ],
)
def test_a_wrong_row_is_named_with_its_place(
    change: dict[str, Any], columns: dict[str, Any], code: str, place: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [TRIPLETS[0], {**TRIPLETS[1], **change}])
    line = 1 if columns else 2
    with refused(code, f"rows.jsonl:{line}", place):
        rows(path, columns=columns)


def test_a_score_without_a_label_is_no_judgement(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.csv", [{"sentence1": "q", "sentence2": "a", "score": 0.2}])
    with refused("malformed-line", "pairs.csv:2", "score"):
        rows(path)
    assert judged(rows(path, columns={"score": None}), "train")


def test_a_date_is_no_score() -> None:
    with refused("invalid-score", "x", "2026"):
        row_of("x", {**TRIPLETS[0], "score": [1, date(2026, 1, 2)]})


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    put(tmp_path, {"rows.csv": "anchor,positive,positive\na,b,c\n"})
    names = ["anchor", "positive", "positive"]
    table = pyarrow.Table.from_arrays([pyarrow.array([name]) for name in names], names=names)
    parquet.write_table(table, tmp_path / "rows.parquet")
    for name in ("rows.csv", "rows.parquet"):
        with refused("malformed-line", name, "'positive'"):
            rows(tmp_path / name)


def test_two_values_of_one_key_are_refused(tmp_path: Path) -> None:
    good = json.dumps(TRIPLETS[0])
    inner = '{"query": "q", "positive_passages": [{"docid": "1", "text": "a", "text": "b"}]}'
    for line, key in ((good.replace('"negative"', '"positive"'), "'positive'"), (inner, "'text'")):
        put(tmp_path, {"rows.jsonl": f"{good}\n{line}\n"})
        with refused("malformed-line", "rows.jsonl:2", key):
            rows(tmp_path / "rows.jsonl")


@pytest.mark.parametrize(
    ("more", "remedies"),
    [
        ({"hard_negative": "b"}, ["{negative: hard_negative}", "{negative: null}"]),
        (
            {"negative_2": "b", "negativ_1": "c", "negatives": ["d"]},
            ["{negative: [negative_2, negativ_1, negatives]}", "{negative: negative_2}"],
        ),
        ({"hardNegTexts": [{"text": "b"}]}, ["{negative: hardNegTexts}"]),
        ({"positives": ["b"]}, ["{positive: positives}", "{positive: positive}"]),
        ({"task_instruction": "find"}, ["{instruction: task_instruction}"]),
        ({"negative": "b", "similarity_score": [2, "1"]}, ["{score: similarity_score}"]),
        ({"Label": 0}, ["{label: Label}", "{label: null}"]),
    ],
)
def test_a_column_that_looks_like_a_part_and_is_not_read_is_refused(
    more: dict[str, Any], remedies: list[str]
) -> None:
    fields = {"query": "q", "positive": "a", **more}
    with refused("unknown-column", "x: ", *remedies):
        row_of("x", fields)
    for remedy in remedies:
        row_of("x", fields, Columns(yaml.safe_load(remedy)))


def test_other_columns_are_metadata() -> None:
    texts = "_id id title url source negative_id positive_title query_type label_name post prompts"
    metadata = {**dict.fromkeys(texts.split(), "b"), "num_negatives": "3", "negative_score": [1.0]}
    metadata |= {"negatives": None, "ce_score": 0.5, "prompts": ""}
    fields = {**TRIPLETS[0], "score": [2, 1]}
    assert row_of("x", {**fields, **metadata}) == row_of("x", fields)
    words = dict.fromkeys(["introduction", "native", "instructor"], "b")
    of_triplet = {
        "quality_score": 0.5,
        "positive_score": 1,
        "negative_score": 0.1,
        "Labels": [1, 0],
    }
    assert row_of("x", {**TRIPLETS[0], **words, **of_triplet}) == row_of("x", TRIPLETS[0])


def test_files_that_are_no_tables_are_named(tmp_path: Path) -> None:
    for name, text, code, place in (
        ("a.csv", "query,positive\nq\n", "malformed-line", "a.csv:2"),
        ("b.csv", "query,positive\nq,a,b\n", "malformed-line", "b.csv:2"),
        ("c.csv", "", "empty-file", "c.csv"),
        ("d.parquet", "PAR1", "damaged-file", "d.parquet"),
    ):
        path = put(tmp_path, {name: text}) / name
        with refused(code, place):
            rows(path)
    with refused("unknown-column", "data.columns.passage"):
        rows(path, columns={"passage": "text"})
    (tmp_path / "f.csv").write_bytes(b"query,positive\n\xff,a\n")
    with refused("not-utf8", "f.csv"):
        rows(tmp_path / "f.csv")
