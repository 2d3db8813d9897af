"""One row of training data: the columns with the query, its positives and its negatives.

    query_id, query, positive_passages, negative_passages: lists of {docid, title, text, score}
    query_id, query_text, positive_document_ids, negative_document_ids      Tevatron
    query, pos, neg, pos_scores, neg_scores, prompt                         FlagEmbedding
    question, pos_doc, neg_doc: texts, or objects with a text or an id      NeMo
    anchor or query, positive or answer, negative, negative_1, ..., score   sentence-transformers
    sentence1, sentence2, label; query, docs, labels                        its labelled pairs

`Columns` maps other names to these. A column whose name ends with `_id` or `_ids` has ids of a
corpus; elsewhere a passage is a text or an object. The id of a text without one is its hash.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import xxhash

from caravan.data.readers.lines import TEXTS, id_of, malformed, string, text_of
from caravan.errors import InputError

LARGEST = float(np.finfo(np.float32).max)  # a run holds scores in float32
NAMES: dict[str, tuple[str, ...]] = {
    "id": ("query_id", "question_id"),
    "query": ("query", "query_text", "question", "anchor", "sentence1"),
    "instruction": ("prompt",),
    "positive": (
        *("positive_passages", "positive_document_ids", "pos", "pos_doc"),
        *("positive", "answer", "docs", "sentence2"),
    ),
    "negative": ("negative_passages", "negative_document_ids", "neg", "neg_doc", "negative"),
    "score": ("score", "scores"),
    "label": ("label", "labels"),
}
"""The parts of a row, and the columns that may hold each, in order of preference."""
LISTS = {*NAMES["positive"][:3], *NAMES["negative"][:3]}
"""Columns of Tevatron and FlagEmbedding: always lists, in rows without a `score` or `label`."""
NUMBERED = re.compile(r"negative_(\d+)")
SUGGESTED = {
    "positive": re.compile(r"pos(i?tiv\w*)?s?"),
    "negative": re.compile(r"neg(a?tiv\w*)?s?"),
    "instruction": re.compile("(instruct(ion)?|prompt)s?"),
    "score": re.compile("scores?"),
    "label": re.compile("labels?"),
}
"""Parts by the last word of a column's name, not counting "text" and the like."""
_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
REMEDY = (
    "name the columns of your rows, such as data.columns={query: question, positive: answer,"
    " negative: [hard_1, hard_2]}"
)


class Passage(NamedTuple):
    """A passage of a row; its text is None if it is in a separate corpus."""

    id: str
    score: float | None  # of a teacher
    title: str = ""
    text: str | None = None


class Row(NamedTuple):
    """One row of training data."""

    id: str
    query: str
    instruction: str  # the prompt of a row, or ""
    positives: list[Passage]
    negatives: list[Passage]  # the hardest first, if the row has an order


class Columns:
    """The columns of a row's parts.

    Args:
        given: column or columns of a part, instead of those in `NAMES`; None leaves the part out.

    Raises:
        InputError: "unknown-column".
    """

    def __init__(self, given: Mapping[str, str | list[str] | None] | None = None) -> None:
        self.given = dict(given or {})
        if unknown := sorted(self.given.keys() - NAMES.keys()):
            raise InputError(
                "unknown-column",
                f"data.columns.{unknown[0]}: no such part; the parts are {', '.join(NAMES)}",
            )
        self._names = dict(NAMES)
        for part, names in self.given.items():
            self._names[part] = (names,) if isinstance(names, str) else tuple(names or ())

    def of(self, place: str, part: str, fields: Mapping[str, Any]) -> list[str]:
        """The columns of a row that have a part."""
        found = [name for name in self._names[part] if name in fields]
        if part == "negative" and part not in self.given:
            numbered = filter(NUMBERED.fullmatch, fields)
            found += sorted(numbered, key=lambda name: int(name.rpartition("_")[2]))
        missing = [name for name in self._names[part] if name not in found]
        if self.given.get(part) and part != "negative" and missing:
            raise malformed(
                place, f"no column {missing[0]}; the columns are {_listed(fields)}", REMEDY
            )
        return found if part == "negative" else found[:1]

    def refuse_unread(
        self, place: str, fields: Mapping[str, Any], names: Mapping[str, list[str]]
    ) -> None:
        """Refuse columns whose name and value suggest a part, but which are not read.

        Args:
            names: the columns that are read, of each part.

        Raises:
            InputError: "unknown-column".
        """
        sides = (*names["positive"], *names["negative"])
        read = {*sides, *(f"{name}_scores" for name in sides)}
        settled = {part for part in ("instruction", "score", "label") if names[part]}
        if names["positive"][0] in LISTS:
            settled |= {"score", "label"}  # rows in these layouts have neither
        # The score of a whole triplet is not a score of a passage.
        needed = {"score": _count(fields, sides), "label": _count(fields, names["positive"])}
        unread: dict[str, list[str]] = {}
        for column, value in fields.items():
            part = suggested(column)
            if part is None or part in {*settled, *self.given} or column in {*read, *NAMES[part]}:
                continue
            if part in needed and _count(fields, [column]) != needed[part]:
                continue
            first = _number(value[0] if isinstance(value, list) and value else value)
            kind = int | float if part in ("score", "label") else str | dict
            if first != "" and isinstance(first, kind):
                unread.setdefault(part, []).append(column)
        for part, columns in unread.items():
            more = [*names[part], *columns] if part == "negative" else columns[:1]
            raise InputError(
                "unknown-column",
                f"{place}: the column {columns[0]} looks like the {part} and is not read: set"
                f" 'data.columns={{{part}: {_value(more)}}}' to read it, or"
                f" 'data.columns={{{part}: {_value(names[part])}}}' to ignore it",
            )


def suggested(column: str) -> str | None:
    """The part that the name of a column suggests.

    >>> suggested("hard_negative"), suggested("negativ_1"), suggested("negative_id")
    ('negative', 'negative', None)
    """
    words = [word.casefold() for word in _WORDS.findall(column)]
    while words and words[-1].removesuffix("s") in {*TEXTS, "doc"}:
        words.pop()
    word = words[-1] if words else ""
    return next((part for part, name in SUGGESTED.items() if name.fullmatch(word)), None)


def row_of(
    place: str, fields: dict[str, Any], columns: Columns | None = None, has_corpus: bool = False
) -> Row:
    """A row in any of the layouts.

    Raises:
        InputError: "malformed-line", "unknown-column", "invalid-score", "invalid-label",
            "missing-corpus".
    """
    columns = columns or Columns()
    names = {part: columns.of(place, part, fields) for part in NAMES}
    for part in ("query", "positive"):
        if not names[part]:
            problem = f"no column for the {part}; the columns are {_listed(fields)}"
            raise malformed(place, problem, REMEDY)
    columns.refuse_unread(place, fields, names)

    def only(part: str, missing: Any = None) -> Any:
        return fields[names[part][0]] if names[part] else missing

    query = string(place, only("query"), names["query"][0], REMEDY)
    instruction = string(place, only("instruction") or "", "prompt", REMEDY)
    name = id_of_text(f"{instruction}\n{query}" if instruction else query)
    name = string(place, id_of(only("id", name)), "query_id", REMEDY)
    if only("positive") is None or (only("positive") == "" and names["positive"][0] not in LISTS):
        raise malformed(place, f"{names['positive'][0]} is null or empty", REMEDY)
    positives = _side(place, names["positive"], fields)
    negatives = _side(place, names["negative"], fields)
    if names["positive"][0] not in LISTS:
        positives, negatives = _marked(
            place, positives, negatives, only("score"), only("label"), names
        )
    if not has_corpus and any(one.text is None for one in (*positives, *negatives)):
        raise InputError(
            "missing-corpus",
            f"{place}: the row has ids of passages, but there is no corpus: set data.corpus to the"
            " file or dataset with these passages",
        )
    return Row(name, query, instruction, positives, negatives)


def _side(place: str, names: list[str], fields: Mapping[str, Any]) -> list[Passage]:
    """The passages of some columns; a column that is null or empty has none."""
    found = []
    for name in names:
        values = fields[name]
        if values is None or (values == "" and name not in LISTS):
            continue
        if not isinstance(values, list):
            if name in LISTS:
                raise malformed(place, f"{name} is not a list", REMEDY)
            values = [values]
        scores = fields.get(f"{name}_scores")
        scores = [None] * len(values) if scores is None else scores
        if not isinstance(scores, list) or len(scores) != len(values):
            problem = f"{name}_scores is not a list of {len(values)} numbers, one for each of"
            raise malformed(place, f"{problem} {name}", REMEDY)
        pairs = zip(values, scores, strict=True)
        found += [_passage(place, name, value, score) for value, score in pairs]
    return found


def _count(fields: Mapping[str, Any], names: Iterable[str]) -> int:
    """The number of values in some columns."""
    values = (fields[name] for name in names)
    return sum(
        len(value) if isinstance(value, list) else value not in (None, "") for value in values
    )


def _passage(place: str, name: str, value: Any, score: Any) -> Passage:
    if name.endswith(("_id", "_ids")):
        return Passage(string(place, id_of(value), "a document id", REMEDY), _score(place, score))
    if isinstance(value, dict) and name not in ("pos", "neg"):
        key = next((key for key in ("docid", "id", "_id") if key in value), "docid")
        score = _score(place, value.get("score", score))
        if "text" not in value and key in value and name not in LISTS:
            return Passage(string(place, id_of(value[key]), key, REMEDY), score)
        title, text = text_of(place, value, REMEDY)
        own = id_of(value.get(key, id_of_text(f"{title}\n{text}" if title else text)))
        return Passage(string(place, own, key, REMEDY), score, title, text)
    if name.endswith("_passages"):
        raise malformed(place, f"a passage of {name} is not an object", REMEDY)
    text = string(place, value, f"a text of {name}", REMEDY)
    return Passage(id_of_text(text), _score(place, score), "", text)


def _marked(
    place: str,
    positives: list[Passage],
    negatives: list[Passage],
    scores: Any,
    labels: Any,
    names: Mapping[str, list[str]],
) -> tuple[list[Passage], list[Passage]]:
    """Move positives with label 0 to the negatives, and set the scores of the row's passages."""
    if scores is not None:
        every = [*positives, *negatives]
        given = scores if isinstance(scores, list) else [scores]
        if len(given) != len(every) or (len(every) == 1 and not names["label"]):
            unlabelled = "the row has no label that says whether its passage is relevant"
            uneven = f"the number of passages is {len(every)}"
            raise malformed(
                place,
                f"{names['score'][0]} is {scores!r}, but"
                f" {unlabelled if len(given) == len(every) else uneven}",
                "give a label, or a score for each passage, or leave the scores out"
                " (data.columns={score: null})",
            )
        every = [
            one._replace(score=_score(place, _number(value)))
            for one, value in zip(every, given, strict=True)
        ]
        positives, negatives = every[: len(positives)], every[len(positives) :]
    if not names["label"]:
        return positives, negatives
    given = labels if isinstance(labels, list) else [labels]
    if len(given) != len(positives) or any(_number(one) not in (0, 1) for one in given):
        raise InputError(
            "invalid-label",
            f"{place}: {names['label'][0]} is {labels!r}; it must be 0 or 1 for each"
            f" passage of {names['positive'][0]}, or be left out (data.columns={{label: null}})",
        )
    marked = list(zip(positives, map(_number, given), strict=True))
    relevant = [one for one, label in marked if label]
    return relevant, [*(one for one, label in marked if not label), *negatives]


def id_of_text(text: str) -> str:
    """A hash, as the id of a text that has none; equal texts have equal ids."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _number(value: Any) -> Any:
    """Convert a number in a csv file, where every value is a text; keep other values."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _score(place: str, value: Any) -> float | None:
    """A teacher's score; None if there is none."""
    if value is None:
        return None
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not number or not abs(value) <= LARGEST:
        raise InputError(
            "invalid-score",
            f"{place}: the score {value!r} is not a finite float32 number; correct it",
        )
    return float(value)


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(map(str, list(fields)[:12])) or "none"


def _value(names: list[str]) -> str:
    """Columns as a value of `data.columns`."""
    return (names[0] if len(names) == 1 else f"[{', '.join(names)}]") if names else "null"
