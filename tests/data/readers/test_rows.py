"""Rows of all layouts: what becomes query, positives and negatives, and what is refused."""

from __future__ import annotations

from datetime import date
from decimal import Decimal
from typing import Any

import pytest
import yaml
from tests.refusals import refused

from caravan.data.readers.lines import parsed
from caravan.data.readers.rows import REMEDY, Columns, Row, row_of

TRIPLET = {"anchor": "what is in a hump", "positive": "Fat, mostly.", "negative": "Dunes move."}
TEVATRON = {"query_id": "q", "query": "x", "positive_passages": [{"docid": "p", "text": "a"}]}
TEXTS = {"query": "x", "pos": ["a"], "neg": ["b"]}


def read(fields: dict[str, Any], **columns: Any) -> Row:
    ((_, row),) = parsed([("x:7", fields)], lambda of: row_of(of, Columns(columns)), REMEDY)
    return row


@pytest.mark.parametrize(
    ("fields", "columns", "positives", "negatives"),
    [
        ({"question": "q", "answer": "a"}, {}, ["a"], []),
        ({"query": "q", "pos": "a", "neg": None}, {}, ["a"], []),
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
    row = read(fields, **columns)
    sides = [[one.text or one.id for one in side] for side in (row.positives, row.negatives)]
    assert (row.query, *sides) == ("q", positives, negatives)


def test_scores_of_a_row_are_those_of_a_teacher() -> None:
    fields = {"query": "q", "positive": "a", "negative_1": "b", "score": [2, "0.5"]}
    row = read(fields)
    assert [one.score for one in (*row.positives, *row.negatives)] == [2.0, 0.5]
    assert read({**fields, "score": None}).positives[0].score is None
    assert read({**fields, "score": [Decimal("2.5"), 1]}).positives[0].score == 2.5
    pair = read({"sentence1": "q", "sentence2": "a", "label": 0, "score": 0.25})
    assert pair.negatives[0].score == 0.25
    unlabelled = {"sentence1": "q", "sentence2": "a", "score": 0.2}
    with refused("malformed-line", "x:7", "score"):  # it does not say what is relevant
        read(unlabelled)
    assert read(unlabelled, score=None).positives


@pytest.mark.parametrize(
    ("row", "change", "code", "place"),
    [
        (TRIPLET, {"anchor": 1}, "malformed-line", "anchor"),
        (TRIPLET, {"positive": None}, "malformed-line", "positive"),
        (TRIPLET, {"positive": ""}, "malformed-line", "positive"),
        (TRIPLET, {"positive": ["a", 2]}, "malformed-line", "positive"),
        (TRIPLET, {"score": [1.0]}, "malformed-line", "score"),
        (TRIPLET, {"score": ["x", 1]}, "invalid-score", "'x'"),
        (TRIPLET, {"score": [1, date(2026, 1, 2)]}, "invalid-score", "2026"),
        (TRIPLET, {"label": 0.7}, "invalid-label", "label"),
        (TRIPLET, {"label": None}, "invalid-label", "label"),
        (TEVATRON, {"query": None}, "malformed-line", "query"),
        (TEVATRON, {"query_id": 1.5}, "malformed-line", "query_id"),
        (TEVATRON, {"positive_passages": {}}, "malformed-line", "text"),
        (TEVATRON, {"negative_passages": ["p"]}, "malformed-line", "negative_passages"),
        (TEVATRON, {"positive_passages": [{"text": "a", "title": 0}]}, "malformed-line", "title"),
        (TEVATRON, {"positive_passages": [{"text": "a", "score": "x"}]}, "invalid-score", "'x'"),
        ({"query_id": "1", "query": "x"}, {}, "malformed-line", "positive"),
        ({"pos": ["x"]}, {}, "malformed-line", "query"),
        (TEXTS, {"prompt": 1}, "malformed-line", "prompt"),
        (TEXTS, {"neg": [1]}, "malformed-line", "neg"),
        (TEXTS, {"pos_scores": [1, 2]}, "malformed-line", "pos_scores"),
        (TEXTS, {"pos_scores": ["1"]}, "invalid-score", "'1'"),
        (TEXTS, {"pos_scores": [float("nan")]}, "invalid-score", "nan"),
        (TEXTS, {"pos_scores": [10**400]}, "invalid-score", "1000"),
        (TEXTS, {"pos_scores": [1e39]}, "invalid-score", "1e+39"),
    ],
)
def test_a_wrong_value_is_named_with_its_place(
    row: dict[str, Any], change: dict[str, Any], code: str, place: str
) -> None:
    with refused(code, "x:7", place) as caught:
        read({**row, **change})
    assert "\n" not in str(caught.value)


def test_a_column_that_is_set_and_missing_is_named() -> None:
    for columns, place in (({"positive": "answer"}, "answer"), ({"query": None}, "query")):
        with refused("malformed-line", "x:7", place):
            read(TRIPLET, **columns)
    with refused("unknown-column", "data.columns.passage"):
        Columns({"passage": "text"})


@pytest.mark.parametrize(
    ("more", "part", "remedies"),
    [
        ({"hard_negative": "b"}, "negative", ["hard_negative", "null"]),
        (
            {"negative_2": "b", "negativ_1": "c", "negatives": ["d"]},
            "negative",
            ["[negative_2, negativ_1, negatives]", "negative_2"],
        ),
        ({"hardNegTexts": [{"text": "b"}]}, "negative", ["hardNegTexts"]),
        ({"positives": ["b"]}, "positive", ["positives", "positive"]),
        ({"task_instruction": "find"}, "instruction", ["task_instruction"]),
        ({"negative": "b", "similarity_score": [2, "1"]}, "score", ["similarity_score"]),
        ({"Label": 0}, "label", ["Label", "null"]),
    ],
)
def test_a_column_that_looks_like_a_part_and_is_not_read_is_refused(
    more: dict[str, Any], part: str, remedies: list[str]
) -> None:
    fields = {"query": "q", "positive": "a", **more}
    with refused("unknown-column", "x:7", part, "data.columns"):
        read(fields)
    for columns in remedies:
        read(fields, **yaml.safe_load(f"{part}: {columns}"))


def test_other_columns_are_metadata() -> None:
    texts = "_id id title url source negative_id positive_title query_type label_name post prompts"
    metadata = {**dict.fromkeys(texts.split(), "b"), "num_negatives": "3", "negative_score": [1.0]}
    metadata |= {"negatives": None, "ce_score": 0.5, "prompts": ""}
    fields = {**TRIPLET, "score": [2, 1]}
    assert read({**fields, **metadata}) == read(fields)
    more = {**dict.fromkeys(["introduction", "native", "instructor"], "b"), "Labels": [1, 0]}
    more |= {"quality_score": 0.5, "positive_score": 1, "negative_score": 0.1}
    assert read({**TRIPLET, **more}) == read(TRIPLET)
