"""Rows of Tevatron and FlagEmbedding beside plain json; their negatives and scores as runs."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import xxhash
from datasets import Dataset, DatasetDict
from tests.files import judged, put, records
from tests.refusals import refused

from caravan import progress
from caravan.data.collection import Collection
from caravan.data.negatives import Negatives
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
NEGATIVES = {"q1": ["p3", "p2"], "2": ["p1", "p3", "p5"]}


def jsonl(rows: Rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def tevatron(path: Path, **settings: Any) -> Collection:
    return TrainingRows(str(path), **settings).collection(path.parent / "cache")


def flagembedding(path: Path, **settings: Any) -> Collection:
    return TrainingRows(str(path), **settings).collection(path.parent / "cache")


def file_of(folder: Path, rows: Rows, zipped: bool = False) -> Path:
    put(folder, {"rows.jsonl": jsonl(rows)}, zipped)
    return folder / f"rows.jsonl{'.gz' if zipped else ''}"


def run_of(found: Collection, name: str) -> dict[str, list[tuple[str, float]]]:
    run = read_run(found.run_path(f"data:{name}"), found.queries, found.corpus)
    listed = {}
    for at, query in zip(run.query_rows, found.queries.ids(run.query_rows), strict=True):
        rows, scores = run.of(int(at))
        listed[query] = list(zip(found.corpus.ids(rows), scores.tolist(), strict=True))
    return listed


def negatives_of(found: Collection) -> dict[str, list[str]]:
    return {query: [name for name, _ in of] for query, of in run_of(found, "negatives").items()}


@pytest.mark.parametrize("zipped", [False, True])
def test_texts_inline_are_read_as_json_reads_them(tmp_path: Path, zipped: bool) -> None:
    found = tevatron(file_of(tmp_path, INLINE, zipped))
    every = [
        one for row in INLINE for one in (*row["positive_passages"], *row["negative_passages"])
    ]
    expected = {one["docid"]: (one["docid"], one["title"], one["text"]) for one in every}
    assert records(found.corpus) == list(expected.values())
    assert records(found.queries) == [(str(r["query_id"]), "", r["query"]) for r in INLINE]
    assert (found.splits, found.runs) == (("train",), ("negatives",))
    assert judged(found, "train") == {
        (str(row["query_id"]), one["docid"]): 1
        for row in INLINE
        for one in row["positive_passages"]
    }
    assert negatives_of(found) == NEGATIVES


def test_ids_beside_a_corpus_give_the_same_collection(tmp_path: Path) -> None:
    files = {"dev.jsonl": jsonl(BY_ID[:1]), "corpus.jsonl": jsonl(CORPUS)}
    found = tevatron(put(tmp_path / "set", {"train.jsonl": jsonl(BY_ID), **files}))
    assert [name for name, _, _ in records(found.corpus)] == [one["docid"] for one in CORPUS]
    assert found.splits == ("dev", "train")
    assert judged(found, "dev") == {("q1", "p1"): 1}
    assert negatives_of(found) == NEGATIVES
    inline = put(tmp_path / "inline", {"train.jsonl": jsonl(INLINE), **files})
    assert tevatron(inline, name="set").digest == found.digest


def test_rows_beside_a_corpus_show_their_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "DELAY_S", -1.0)
    monkeypatch.setattr(progress.time, "monotonic", itertools.count().__next__)
    with caplog.at_level(logging.INFO):
        tevatron(put(tmp_path, {"train.jsonl": jsonl(BY_ID), "corpus.jsonl": jsonl(CORPUS)}))
    lines = {line.partition(" in ")[0] for line in caplog.messages}
    assert {"corpus: 8 passages", "rows of train: 3 rows", "queries: 3 queries"} <= lines


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_rows_without_ids_are_read_as_json_reads_them(
    tmp_path: Path, zipped: bool, folder: bool
) -> None:
    files = {"1.jsonl": jsonl(TEXTS[:1]), "2.json": jsonl(TEXTS[1:])}
    path = tmp_path / "rows"
    put(path, files if folder else {"all.jsonl": jsonl(TEXTS)}, zipped)
    found = flagembedding(path if folder else next(path.iterdir()))

    def name_of(text: str) -> str:
        return xxhash.xxh3_128_hexdigest(text.encode())

    texts = dict.fromkeys(text for row in TEXTS for text in (*row["pos"], *row["neg"]))
    assert records(found.corpus) == [(name_of(text), "", text) for text in texts]
    prompt = TEXTS[0]["prompt"]  # the instruction of its query
    hump = name_of(f"{prompt}\nwhat is in a hump")
    moves = name_of("what moves")
    queries = [(hump, prompt, "what is in a hump"), (moves, "", "what moves")]
    assert records(found.queries) == queries
    assert judged(found, "train") == {
        (moves if "moves" in row["query"] else hump, name_of(text)): 1
        for row in TEXTS
        for text in row["pos"]
    }
    first = [name_of(text) for text in (*TEXTS[0]["pos"], *TEXTS[0]["neg"])]
    scored = list(zip(first, [9, 7.5, -2.25, -8], strict=True))
    assert run_of(found, "teacher") == {hump: scored}
    assert negatives_of(found) == {hump: first[2:], moves: first[:1]}


@pytest.mark.parametrize("saved", ["parquet", "disk"])
def test_datasets_of_the_same_columns_are_read(tmp_path: Path, saved: str) -> None:
    rows = [{**row, "query_id": str(row["query_id"]), "answers": []} for row in INLINE]
    parts = {"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows[:1])}
    folder, plain = tmp_path / "tevatron", tmp_path / "flag"
    if saved == "parquet":
        (folder / "data").mkdir(parents=True)
        for split, part in parts.items():
            part.to_parquet(str(folder / "data" / f"{split}-00000.parquet"))
        plain.mkdir()
        Dataset.from_list(TEXTS[1:]).to_parquet(str(plain / "train-00000.parquet"))
    else:
        DatasetDict(parts).save_to_disk(str(folder))
        Dataset.from_list(TEXTS[1:]).save_to_disk(str(plain))  # beside rows that are none
    found = tevatron(folder, subsets={"train": "train", "dev": "validation"})
    assert records(found.corpus) == records(tevatron(file_of(tmp_path, INLINE)).corpus)
    assert judged(found, "dev") == {("q1", "p1"): 1}
    with refused("dataset-not-loaded"):
        tevatron(folder, subsets={"train": "test"})
    expected = flagembedding(file_of(tmp_path, TEXTS[1:]))
    assert flagembedding(plain).digest == expected.digest


def test_a_dataset_saved_without_splits_has_one(tmp_path: Path) -> None:
    rows = [{**row, "query_id": str(row["query_id"]), "answers": []} for row in INLINE]
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "dataset"))
    assert tevatron(tmp_path / "dataset").splits == ("train",)
    with refused("dataset-not-loaded", "validation"):
        tevatron(tmp_path / "dataset", subsets={"train": "train", "dev": "validation"})


def test_subsets_choose_among_the_files_of_a_folder(tmp_path: Path) -> None:
    files = {"train.jsonl": jsonl(INLINE), "validation.jsonl": jsonl(INLINE[:1]), "x.jsonl": "{"}
    folder = put(tmp_path / "set", files)
    found = tevatron(folder, subsets={"train": "train", "dev": "validation"})
    assert found.splits == ("train", "dev")
    assert judged(found, "dev") == {("q1", "p1"): 1}
    for path, subset in ((folder, "dev"), (folder / "train.jsonl", "validation")):
        with refused("unknown-split", "data.subsets.dev"):
            tevatron(path, subsets={"train": "train", "dev": subset})


def test_scores_are_a_teachers_run_and_train_as_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = json.loads(json.dumps(INLINE))
    for at, one in enumerate([*rows[0]["positive_passages"], *rows[0]["negative_passages"]]):
        one["score"] = 0.5 - at / 8
    found = tevatron(file_of(tmp_path, rows))
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
    rows = [{**INLINE[0], "query_id": f"q{i}", "query": f"query {i}"} for i in range(200)]
    file = file_of(tmp_path, rows)
    found = tevatron(file, held_out=0.2)
    assert found.splits == ("train", "dev")
    train, dev = (set(found.qrels(split).queries.tolist()) for split in ("train", "dev"))
    assert 20 < len(dev) < 60
    assert train | dev == set(range(200))
    assert not train & dev
    other = file_of(tmp_path / "other", TEXTS)
    given = flagembedding(other, dev=str(file_of(tmp_path / "dev", TEXTS[:1])))
    assert given.splits == ("train", "dev")
    assert len(given.qrels("dev")) == 2
    assert flagembedding(other, held_out=0.99).digest != given.digest
    folder = put(tmp_path / "set", {"train.jsonl": jsonl(INLINE), "dev.jsonl": jsonl(INLINE)})
    for path, share in ((folder, 0.2), (file, 1.5)):
        with refused("invalid-setting", "data.held_out"):
            tevatron(path, held_out=share)


def changed(row: int, **fields: Any) -> Rows:
    rows = [dict(row) for row in INLINE]
    rows[row].update(fields)
    return rows


@pytest.mark.parametrize(
    ("rows", "code", "line"),
    [
        (changed(1, query=None), "malformed-line", 2),
        (changed(1, query_id=1.5), "malformed-line", 2),
        (changed(1, query_id="q 2"), "invalid-id", 2),
        (changed(1, query_id="q1"), "conflicting-texts", 2),
        (changed(1, positive_passages={}), "malformed-line", 2),
        (changed(1, negative_passages=["p"]), "malformed-line", 2),
        (changed(1, positive_passages=[{"docid": "p"}]), "malformed-line", 2),
        (changed(1, positive_passages=[passage(9, title=0)]), "malformed-line", 2),
        (changed(2, negative_passages=[passage(1, text="x")]), "conflicting-texts", 3),
        (changed(2, negative_passages=[passage(1, docid="a b")]), "invalid-id", 3),
        (changed(2, negative_passages=[passage(1, score="x")]), "invalid-score", 3),
        ([{"query_id": "1", "query": "x"}], "malformed-line", 1),
        (BY_ID, "missing-corpus", 1),
        ([{"pos": ["x"]}], "malformed-line", 1),
        ([{"query": "x", "pos": "y"}], "malformed-line", 1),
        ([{"query": "x", "pos": ["y"], "prompt": 1}], "malformed-line", 1),
        ([{"query": "x", "pos": ["y"], "neg": [1]}], "malformed-line", 1),
        ([{"query": "x", "pos": ["y"], "pos_scores": [1, 2]}], "malformed-line", 1),
        ([{"query": "x", "pos": ["y"], "pos_scores": ["1"]}], "invalid-score", 1),
        ([{"query": "x", "pos": ["y"], "pos_scores": [float("nan")]}], "invalid-score", 1),
        ([{"query": "x", "pos": ["y"], "pos_scores": [10**400]}], "invalid-score", 1),
        ([{"query": "x", "pos": ["y"], "pos_scores": [1e39]}], "invalid-score", 1),
    ],
)
def test_a_wrong_row_is_reported_with_its_line(
    tmp_path: Path, rows: Rows, code: str, line: int
) -> None:
    read = flagembedding if "pos" in rows[0] else tevatron
    with refused(code, f"rows.jsonl:{line}") as caught:
        read(file_of(tmp_path, rows))
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache/collections").iterdir() if path.is_dir()]


def test_files_that_hold_no_rows_are_named(tmp_path: Path) -> None:
    with refused("file-not-found", "absent.jsonl"):
        tevatron(file_of(tmp_path, BY_ID), corpus=str(tmp_path / "absent.jsonl"))
    (tmp_path / "empty").mkdir()
    with refused("dataset-not-loaded", "empty"):
        flagembedding(tmp_path / "empty")


def test_an_id_that_the_corpus_lacks_is_refused_or_counted(tmp_path: Path) -> None:
    files = {"train.jsonl": jsonl(BY_ID), "corpus.jsonl": jsonl(CORPUS[:5])}
    folder = put(tmp_path / "set", files)
    with refused("unknown-id", "train.jsonl:2"):
        tevatron(folder)
    found = tevatron(folder, unknown_ids="count")
    assert negatives_of(found)["2"] == ["p1", "p3"]
    assert found.facts["unknown_ids"] == 1
    put(folder, {"corpus.jsonl": jsonl([*CORPUS, CORPUS[0]])})
    with refused("duplicate-id", "corpus.jsonl:9"):
        tevatron(folder)
