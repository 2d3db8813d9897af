"""One row of training data: the columns with the query, its positives and its negatives.

    query_id, query, positive_passages, negative_passages: lists of {docid, title, text, score}
    query_id, query_text, positive_document_ids, negative_document_ids      Tevatron
    query, pos, neg, pos_scores, neg_scores, prompt                         FlagEmbedding
    question, pos_doc, neg_doc: texts, or objects with a text or an id      NeMo
    anchor or query, positive or answer, negative, negative_1, ..., score   sentence-transformers
    sentence1, sentence2, label; query, docs, labels                        its labelled pairs

`Columns` maps other names to these. A column whose name ends with `_id` or `_ids` has ids of a
corpus; elsewhere a passage is a text or an object. The id of a text without one is its hash.

Errors are raised without a place, for `caravan.data.readers.lines.parsed`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import xxhash

from caravan.data.readers.lines import ID_KEYS, TEXTS, id_of, string, text_of
from caravan.errors import InputError

LARGEST = float(np.finfo(np.float32).max)  # a run holds scores in float32
NAMES: dict[str, Sequence[str]] = {
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
NUMBERED = re.compile(r"negative_(\d+)")
SUGGESTED = re.compile(
    r"(?P<positive>pos(i?tiv\w*)?s?)|(?P<negative>neg(a?tiv\w*)?s?)"
    r"|(?P<instruction>(instruct(ion)?|prompt)s?)|(?P<score>scores?)|(?P<label>labels?)"
)
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
        self.given = {
            part: [names] if isinstance(names, str) else list(names or ())
            for part, names in (given or {}).items()
        }
        if unknown := sorted(self.given.keys() - NAMES.keys()):
            raise InputError(
                "unknown-column",
                f"data.columns.{unknown[0]}: no such part; the parts are {', '.join(NAMES)}",
            )
        self.names = {**NAMES, **self.given}

    def of(self, fields: Mapping[str, Any]) -> dict[str, list[str]]:
        """The columns of a row that have each part: one at most, but any number of negatives.

        Raises:
            ValueError: a column is missing.
            InputError: "unknown-column", a column looks like a part, but is not read.
        """
        found = {}
        for part, names in self.names.items():
            found[part] = [name for name in names if name in fields]
            if part != "negative":
                found[part] = found[part][:1]
                if not found[part] and (part in ("query", "positive") or self.given.get(part)):
                    there = ", ".join(map(str, fields)) or "none"
                    wanted = ", ".join(names)
                    raise ValueError(f"no column for the {part} ({wanted}); there are {there}")
        if "negative" not in self.given:
            numbered = filter(NUMBERED.fullmatch, fields)
            found["negative"] += sorted(numbered, key=lambda name: int(name.rpartition("_")[2]))
        self._refuse_unread(fields, found)
        return found

    def _refuse_unread(self, fields: Mapping[str, Any], found: Mapping[str, list[str]]) -> None:
        """Refuse columns whose name and value suggest a part, but which are not read."""
        sides = [*found["positive"], *found["negative"]]
        read = {*sides, *(f"{name}_scores" for name in sides)}
        # The score of a whole triplet is not a score of a passage.
        numbers = {"score": _count(fields, sides), "label": _count(fields, found["positive"])}
        for column, value in fields.items():
            part = suggested(column)
            if part is None or part in self.given or column in {*read, *NAMES[part]}:
                continue
            values = _values(value)
            if found[part] and part not in ("positive", "negative"):
                continue
            if part in numbers and len(values) != numbers[part]:
                continue
            first = _number(values[0]) if values else ""
            kind = int | float if part in numbers else str | dict
            if first != "" and isinstance(first, kind):
                raise InputError(
                    "unknown-column",
                    f"the column {column} looks like the {part} and is not read: set"
                    f" data.columns={{{part}: ...}} with all columns to read as {part}, or null",
                )


@functools.cache
def suggested(column: str) -> str | None:
    """The part that the name of a column suggests.

    >>> suggested("hard_negative"), suggested("negativ_1"), suggested("negative_id")
    ('negative', 'negative', None)
    """
    words = [word.casefold() for word in _WORDS.findall(column)]
    while words and words[-1].removesuffix("s") in {*TEXTS, "doc"}:
        words.pop()
    match = SUGGESTED.fullmatch(words[-1]) if words else None
    return match.lastgroup if match else None


def row_of(fields: dict[str, Any], columns: Columns) -> Row:
    """A row in any of the layouts.

    Raises:
        ValueError: a column is missing, or a value has another type.
        InputError: "unknown-column", "invalid-score", "invalid-label".
    """
    names = columns.of(fields)
    given = {part: fields[there[0]] if there else None for part, there in names.items()}
    query = string(given["query"], names["query"][0])
    instruction = string(given["instruction"] or "", "prompt")
    hashed = id_of_text(f"{instruction}\n{query}" if instruction else query)
    name = id_of(given["id"] if names["id"] else hashed, "query_id")
    if not isinstance(given["positive"], list) and not _values(given["positive"]):
        raise ValueError(f"{names['positive'][0]} is null or empty")
    positives, negatives = (_side(fields, names[side]) for side in ("positive", "negative"))
    if given["score"] is not None:
        every = _scored([*positives, *negatives], given["score"], bool(names["label"]))
        positives, negatives = every[: len(positives)], every[len(positives) :]
    if names["label"]:
        relevant = _labels(given["label"], len(positives))
        marked = list(zip(positives, relevant, strict=True))
        positives = [one for one, label in marked if label]
        negatives = [*(one for one, label in marked if not label), *negatives]
    return Row(name, query, instruction, positives, negatives)


def _side(fields: Mapping[str, Any], names: Iterable[str]) -> list[Passage]:
    """The passages of some columns."""
    found = []
    for name in names:
        values = _values(fields[name])
        scores = fields.get(f"{name}_scores")
        scores = [None] * len(values) if scores is None else scores
        if not isinstance(scores, list) or len(scores) != len(values):
            raise ValueError(f"{name}_scores is not a list of {len(values)} numbers, as in {name}")
        found += [_passage(name, *pair) for pair in zip(values, scores, strict=True)]
    return found


def _passage(name: str, value: Any, score: Any) -> Passage:
    if name.endswith(("_id", "_ids")):
        return Passage(id_of(value, "a document id"), _score(score))
    if not isinstance(value, dict):
        if name.endswith("_passages"):
            raise ValueError(f"a passage of {name} is not an object")
        text = string(value, f"a text of {name}")
        return Passage(id_of_text(text), _score(score), "", text)
    key = next((key for key in ID_KEYS if key in value), None)
    own = id_of(value[key], key) if key else None
    score = _score(value.get("score", score))
    if own is not None and "text" not in value:
        return Passage(own, score)
    title, text = text_of(value)
    if own is None:
        own = id_of_text(f"{title}\n{text}" if title else text)
    return Passage(own, score, title, text)


def _scored(passages: list[Passage], scores: Any, has_label: bool) -> list[Passage]:
    """The passages of a row with its scores."""
    given = scores if isinstance(scores, list) else [scores]
    if len(given) != len(passages) or (len(given) == 1 and not has_label):
        raise InputError(
            "malformed-line",
            f"the score is {scores!r}; it must be a number for each of the {len(passages)} passages"
            " of the row, and a single passage needs a label that says whether it is relevant:"
            " add them, or leave the score out (data.columns={score: null})",
        )
    pairs = zip(passages, map(_number, given), strict=True)
    return [one._replace(score=_score(value)) for one, value in pairs]


def _labels(labels: Any, count: int) -> list[Any]:
    """Whether each positive of a row is relevant, 0 or 1."""
    given = list(map(_number, labels if isinstance(labels, list) else [labels]))
    if len(given) != count or any(one not in (0, 1) for one in given):
        raise InputError(
            "invalid-label",
            f"the label is {labels!r}; it must be 0 or 1 for each of {count} passages, or be left"
            " out (data.columns={label: null})",
        )
    return given


def id_of_text(text: str) -> str:
    """A hash, as the id of a text that has none; equal texts have equal ids."""
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))


def _values(value: Any) -> list[Any]:
    """The values of a column; one that is null or empty has none."""
    if isinstance(value, list):
        return value
    return [] if value in (None, "") else [value]


def _count(fields: Mapping[str, Any], names: Iterable[str]) -> int:
    return sum(len(_values(fields[name])) for name in names)


def _number(value: Any) -> Any:
    """Convert a number in a csv file, where every value is a text; keep other values."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _score(value: Any) -> float | None:
    """A teacher's score; None if there is none."""
    if value is None:
        return None
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    if not number or not abs(value) <= LARGEST:
        problem = f"the score {value!r} is not a finite float32 number; correct it"
        raise InputError("invalid-score", problem)
    return float(value)
