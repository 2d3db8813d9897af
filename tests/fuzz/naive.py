"""Readers of data files in plain Python, to compare Caravan's with: strict, slow, whole in memory.

They read what the documentation says that a file is, and raise `RefusedError` for anything else.
No code of Caravan's readers is used.
"""

from __future__ import annotations

import gzip
import json
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from tests.fuzz.mutations import noted, outcome

from caravan.errors import InputError

SPACE = " \t\n\r\v\f"
Record = tuple[str, str, str]
Judged = dict[tuple[str, str], int]
Ranked = dict[str, list[tuple[str, float]]]


class RefusedError(Exception): ...


class Read(NamedTuple):
    corpus: list[Record]
    queries: list[Record]
    qrels: dict[str, Judged]
    runs: dict[str, Ranked] = {}  # noqa: RUF012 - never changed


HARMLESS = (
    *("the last line without its end", "CRLF", "blank lines between"),
    "a byte order mark in front",
)
"""Mutants of text files that must be read."""
SECONDS = 10
"""The longest that Caravan may take for a mutant."""


def agrees(name: str, plain: Callable[[], Any], caravan: Callable[[], Any]) -> bool:
    """Check that Caravan reads what plain Python reads, or refuses; whether it reads.

    Args:
        name: of the mutant, for messages.
    """
    expected: Any
    try:
        expected = plain()
    except RefusedError as error:
        expected = error
    with noted(name):
        found = outcome(caravan, SECONDS)
    if isinstance(found, InputError):
        return False
    assert not isinstance(expected, RefusedError), f"{name}: read, in spite of: {expected}"
    assert found == expected, name
    return True


def rows(path: Path) -> list[str]:
    """The lines of a file, gzip or not, without their ends."""
    if not path.exists():
        path = path.with_name(f"{path.name}.gz")
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        text = data.decode("utf-8-sig")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise RefusedError(str(error)) from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return [line for line in lines if line.strip(SPACE)]


def words(line: str) -> list[str]:
    return re.findall(f"[^{SPACE}]+", line)


def need(condition: object, why: str) -> None:
    if not condition:
        raise RefusedError(why)


def objects(path: Path) -> Iterator[dict[str, Any]]:
    for line in rows(path):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RefusedError(str(error)) from None
        need(isinstance(found, dict), "no object")
        yield found


def jsonl(path: Path, name: str) -> list[Record]:
    """Objects with an id under `name`, a text, and perhaps a title."""
    found: list[Record] = []
    for row in objects(path):
        need(name in row and "text" in row, "a missing key")
        found.append((as_id(row[name]), as_title(row.get("title")), as_text(row["text"])))
    return found


def as_id(value: Any) -> str:
    """A string, or a whole number."""
    need(isinstance(value, str | int) and not isinstance(value, bool), "no id")
    return as_text(str(value))


def as_title(value: Any) -> str:
    return "" if value is None else as_text(value)


def as_text(value: Any) -> str:
    """A string; half a surrogate pair, which is no UTF-8, becomes U+FFFD."""
    need(isinstance(value, str), "no string")
    return re.sub("[\ud800-\udfff]", "\ufffd", value)


def table(path: Path, *layouts: tuple[str, ...]) -> list[dict[str, str]]:
    """Lines of cells between tabs, in the order of the layout or of a header line."""
    cells = [row.split("\t") for row in rows(path)]
    need(cells, "no line")
    names = next((layout for layout in layouts if len(layout) == len(cells[0])), ())
    if sorted(cells[0]) == sorted(names):
        names = tuple(cells.pop(0))
    need(all(len(row) == len(names) for row in cells), "another number of columns")
    return [dict(zip(names, row, strict=True)) for row in cells]


def tsv(path: Path) -> list[Record]:
    found = table(path, ("id", "text"), ("id", "title", "text"))
    if all(row.get("title") is not None and not row["text"] for row in found):
        return [(row["id"], "", row["title"]) for row in found]  # a tab ends each line
    return [(row["id"], row.get("title", ""), row["text"]) for row in found]


def documents_tsv(path: Path) -> list[Record]:
    found = table(path, ("id", "url", "title", "body"))
    return [(row["id"], f"{row['url']} {row['title']}".strip(), row["body"]) for row in found]


def qrels(path: Path) -> list[tuple[str, str, int]]:
    """Three columns (query, passage, grade) or TREC's four; a header may name them."""
    listed = (row.split("\t") if "\t" in row else words(row) for row in rows(path))
    cells = [[cell.strip(SPACE) for cell in row] for row in listed]
    if cells and cells[0][0].casefold().startswith("query"):
        need("corpus-id" not in cells[0] or cells[0][-2] == "corpus-id", "columns out of order")
        cells = cells[1:]
    need(cells and {len(row) for row in cells} in ({3}, {4}), "another number of columns")
    try:
        return [(row[0], row[-2], int(row[-1])) for row in cells]
    except ValueError as error:
        raise RefusedError(str(error)) from None


def collection(
    corpus: list[Record],
    queries: list[Record],
    judged: dict[str, list[tuple[str, str, int]]],
    runs: dict[str, list[tuple[str, str, float]]] | None = None,
) -> Read:
    """Check ids and judgements, and rank the lines of runs."""
    for part in (corpus, queries):
        names = [name for name, _, _ in part]
        need(len(set(names)) == len(names), "an id is there twice")
        need(all(re.fullmatch("[^\0- \x7f-\x9f\u2028\u2029]+", name) for name in names), "no id")
    asked, known = ({name for name, _, _ in part} for part in (queries, corpus))
    splits: dict[str, Judged] = {}
    for split, lines in judged.items():
        splits[split] = {}
        for query, passage, grade in lines:
            need(query in asked and passage in known, "an unknown id")
            before = splits[split].setdefault((query, passage), grade)
            need(before == grade, "two grades")
    ranked = {name: rank(lines) for name, lines in (runs or {}).items() if lines}
    return Read(corpus, queries, splits, ranked)


def rank(lines: Iterable[tuple[str, str, float]]) -> Ranked:
    """Passages of each query by score, equal ones by id, both descending; the best of doubles."""
    best: dict[str, dict[str, float]] = {}
    for query, passage, score in lines:
        of = best.setdefault(query, {})
        of[passage] = max(score, of.get(passage, -math.inf))
    return {
        query: sorted(of.items(), key=lambda one: (one[1], one[0]), reverse=True)
        for query, of in best.items()
    }


def single(value: Any) -> float:
    try:
        with np.errstate(over="ignore"):
            number = float(np.float32(float(value)))
    except (ValueError, OverflowError) as error:
        raise RefusedError(str(error)) from None
    need(math.isfinite(number), "no finite number")
    return number


def run(path: Path, names: tuple[str, ...], queries: set[str], passages: set[str]) -> Ranked:
    """A run whose columns are known, with a header or without.

    Args:
        names: of the columns: qid, pid, and rank, or more with score.
    """
    cells = list(map(words, rows(path)))
    if cells and sorted(cells[0]) == sorted(names):
        names = tuple(cells.pop(0))
    need(cells and all(len(row) == len(names) for row in cells), "another number of columns")
    lines = []
    for row in cells:
        query, passage = row[names.index("qid")], row[names.index("pid")]
        if "score" in names:
            score = single(row[names.index("score")])
        else:
            place = row[names.index("rank")]
            need(single(place).is_integer() and single(place) > 0, "no rank")
            score = single(1 / float(place))
        need(query in queries and passage in passages, "an unknown id")
        lines.append((query, passage, score))
    pairs = {(query, passage) for query, passage, _ in lines}
    need(lines and len(pairs) == len(lines), "a passage twice")
    return rank(lines)


class Passage(NamedTuple):
    id: str
    title: str
    text: str | None
    score: float | None


def tevatron(path: Path, corpus: Path | None = None) -> Read:
    """Rows with the texts of their passages, or with ids beside a corpus."""

    def passage(one: Any) -> Passage:
        if corpus is not None:
            return Passage(as_id(one), "", None, None)
        need(isinstance(one, dict), "no passage")
        title, text = as_title(one.get("title")), as_text(one.get("text"))
        name = one["docid"] if "docid" in one else _hashed(f"{title}\n{text}" if title else text)
        return Passage(as_id(name), title, text, _score(one.get("score")))

    ends = "passages" if corpus is None else "document_ids"
    found = []
    for row in objects(path):
        query = as_text(row.get("query", row.get("query_text")))
        name = as_id(row["query_id"] if "query_id" in row else _hashed(query))
        sides = _sides(row, f"positive_{ends}", f"negative_{ends}")
        found.append((name, "", query, *(list(map(passage, side)) for side in sides)))
    return _trained(found, None if corpus is None else jsonl(corpus, "docid"))


def flagembedding(path: Path) -> Read:
    found = []
    for row in objects(path):
        sides = []
        for side, texts in zip(("pos", "neg"), _sides(row, "pos", "neg"), strict=True):
            scores = row.get(f"{side}_scores")
            scores = [None] * len(texts) if scores is None else scores
            need(isinstance(scores, list) and len(scores) == len(texts), "not as many scores")
            given = zip(texts, map(as_text, texts), map(_score, scores), strict=True)
            sides.append([Passage(_hashed(raw), "", text, score) for raw, text, score in given])
        query, prompt = as_text(row.get("query")), as_text(row.get("prompt") or "")
        name = _hashed(f"{prompt}\n{query}" if prompt else query)
        found.append((name, prompt, query, *sides))
    return _trained(found, None)


def _sides(row: dict[str, Any], *names: str) -> list[list[Any]]:
    """The positives and the negatives: a list, one value, or (of negatives) none."""
    sides = [row.get(name) for name in names]
    need(sides[0] not in (None, ""), "no positive")
    sides = [[] if side in (None, "") else side for side in sides]
    return [side if isinstance(side, list) else [side] for side in sides]


def _trained(found: list[Any], corpus: list[Record] | None) -> Read:
    """What rows of (query id, prompt, query, positives, negatives) are as a collection."""
    need(found, "no row")
    texts: dict[str, Record] = {}
    queries: dict[str, Record] = {}
    judged, negatives, teacher = [], [], []
    for name, prompt, query, *sides in found:
        need(queries.setdefault(name, (name, prompt, query))[2] == query, "two texts of a query")
        for one in sides[0] + sides[1]:
            record = (one.id, one.title, one.text)
            need(texts.setdefault(one.id, record) == record, "two texts of a passage")
            if one.score is not None:
                teacher.append((name, one.id, one.score))
        judged += [(name, one.id, 1) for one in sides[0]]
        negatives += [(name, one.id, single(1 / at)) for at, one in enumerate(sides[1], 1)]
    own = list(texts.values()) if corpus is None else corpus
    need(not texts.keys() - {record[0] for record in own}, "an unknown id")
    runs = {"negatives": negatives, "teacher": teacher}
    return collection(own, list(queries.values()), {"train": judged}, runs)


def _score(value: Any) -> float | None:
    if value is None:
        return None
    need(isinstance(value, int | float) and not isinstance(value, bool), "no number")
    return single(value)


def _hashed(text: str) -> str:
    return xxhash.xxh3_128_hexdigest(text.encode("utf-8", "surrogatepass"))
