"""FlagEmbedding's rows beside plain json; texts without ids, scores as a teacher's run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import xxhash
from tests.files import judged, put, records
from tests.refusals import refused

from caravan.data.collection import Collection
from caravan.data.readers.training_rows import FlagEmbedding
from caravan.data.runs import read_run

ROWS: list[dict[str, Any]] = [
    {
        "query": "what is in a hump",
        "pos": ["Camels store fat.", "Fat, mostly."],
        "neg": ["Salt is a mineral.", "Dunes move."],
        "pos_scores": [9, 7.5],
        "neg_scores": [-2.25, -8],
        "prompt": "Represent this sentence for searching relevant passages: ",
        "type": "normal",
    },
    {"query": "what moves", "pos": ["Dunes move."], "neg": ["Camels store fat."]},
    {"query": "what moves", "pos": ["Stars, too.\n"], "neg": []},
]


def name_of(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode())


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def build(path: Path, cache: Path, **settings: Any) -> Collection:
    return FlagEmbedding(str(path), **settings).collection(cache)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_rows_are_read_as_json_reads_them(tmp_path: Path, zipped: bool, folder: bool) -> None:
    files = {"1.jsonl": jsonl(ROWS[:1]), "2.json": jsonl(ROWS[1:])} if folder else {}
    put(tmp_path / "rows", files or {"all.jsonl": jsonl(ROWS)}, zipped)
    path = tmp_path / "rows"
    found = build(path if folder else next(path.iterdir()), tmp_path)
    texts = dict.fromkeys(text for row in ROWS for text in (*row["pos"], *row["neg"]))
    assert records(found.corpus) == [(name_of(text), "", text) for text in texts]
    queries = dict.fromkeys(row["query"] for row in ROWS)
    assert records(found.queries) == [(name_of(text), "", text) for text in queries]
    assert judged(found, "train") == {
        (name_of(row["query"]), name_of(text)): 1 for row in ROWS for text in row["pos"]
    }
    assert found.runs == ("negatives", "teacher")
    teacher = read_run(found.run_path("data:teacher"), found.queries, found.corpus)
    assert found.queries.ids(teacher.query_rows) == [name_of("what is in a hump")]
    rows, scores = teacher.of(0)
    assert found.corpus.ids(rows) == [name_of(t) for t in (*ROWS[0]["pos"], *ROWS[0]["neg"])]
    assert scores.tolist() == [9, 7.5, -2.25, -8]
    negatives = read_run(found.run_path("data:negatives"), found.queries, found.corpus)
    assert found.corpus.ids(negatives.of(0)[0]) == [name_of(text) for text in ROWS[0]["neg"]]
    assert found.corpus.ids(negatives.of(1)[0]) == [name_of("Camels store fat.")]


@pytest.mark.parametrize("saved", ["parquet", "disk"])
def test_a_dataset_of_the_same_columns_is_read(tmp_path: Path, saved: str) -> None:
    from datasets import Dataset

    (tmp_path / "set").mkdir()
    if saved == "parquet":
        Dataset.from_list(ROWS[1:]).to_parquet(str(tmp_path / "set" / "train-00000.parquet"))
    else:  # beside whose rows lie files of json that are none
        Dataset.from_list(ROWS[1:]).save_to_disk(str(tmp_path / "set"))
    file = put(tmp_path, {"a.jsonl": jsonl(ROWS[1:])}) / "a.jsonl"
    found, wanted = build(tmp_path / "set", tmp_path), build(file, tmp_path)
    assert (found.digest, found.runs) == (wanted.digest, ("negatives",))


def test_rows_to_validate_on_are_given_or_held_out(tmp_path: Path) -> None:
    file = put(tmp_path, {"a.jsonl": jsonl(ROWS), "b.jsonl": jsonl(ROWS[:1])}) / "a.jsonl"
    found = build(file, tmp_path, dev=str(tmp_path / "b.jsonl"))
    assert found.splits == ("train", "dev")
    assert len(found.qrels("dev")) == 2
    held = build(file, tmp_path, held_out=0.99)
    assert len(held.qrels("train")) + len(held.qrels("dev")) == 4
    assert held.digest != found.digest


@pytest.mark.parametrize(
    ("row", "code", "place"),
    [
        ({"pos": ["x"]}, "malformed-line", "a.jsonl:2"),
        ({"query": "x", "pos": "y"}, "malformed-line", "a.jsonl:2"),
        ({"query": "x", "pos": ["y"], "neg": [1]}, "malformed-line", "a.jsonl:2"),
        ({"query": "x", "pos": ["y"], "pos_scores": [1, 2]}, "malformed-line", "a.jsonl:2"),
        ({"query": "x", "pos": ["y"], "pos_scores": ["1"]}, "invalid-score", "a.jsonl:2"),
        ({"query": "x", "pos": ["y"], "pos_scores": [float("nan")]}, "invalid-score", "a.jsonl:2"),
        (
            {"query": "x", "pos": ["y"], "pos_scores": [10**400]},
            "invalid-score",
            "a.jsonl:2",
        ),
        (
            {"query": "x", "pos": ["y"], "pos_scores": [1e39]},
            "invalid-score",
            "a.jsonl:2",
        ),
    ],
)
def test_a_wrong_row_is_reported_with_its_line(
    tmp_path: Path, row: dict[str, Any], code: str, place: str
) -> None:
    file = put(tmp_path, {"a.jsonl": jsonl([ROWS[0], row])}) / "a.jsonl"
    with refused(code, place) as caught:
        build(file, tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / "empty").mkdir()
    with refused("file-not-found"):
        build(tmp_path / "empty", tmp_path)
