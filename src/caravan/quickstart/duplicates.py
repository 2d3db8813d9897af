"""Copies, near-copies and shared queries among docstrings, for clean judgements and splits.

Passages with the same words become one, near-copies are dropped, and passages that are related or
share a query become a family, which stays in one split.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from caravan.data.texts import NEAR_COPY, resemblance, shingles
from caravan.progress import track

MAX_POSITIVES = 5  # a query with more relevant passages ("Perform a step.") is too general
MAX_QUERIES = 3  # a passage with more different queries is too general
MIN_SHINGLES = 8  # a passage with fewer consists of numbers and its own name
RELATED = 0.4  # passages that share this fraction stay in the same split

FUNCTION_WORDS = {
    "a", "an", "and", "as", "be", "by", "for", "from", "if", "in", "is", "it", "its", "of", "on",
    "or", "that", "the", "this", "to", "with",
}  # fmt: skip
PIECE = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")  # of camelCase and snake_case names


@dataclass(frozen=True, slots=True)
class Pair:
    """A docstring in two parts. Keys are the words alone, in lower case."""

    name: str  # module:Class.method
    query: str
    text: str
    query_key: str
    text_key: str


@dataclass(frozen=True, slots=True)
class Query:
    """A query and the groups (by number) whose passage is relevant to it."""

    pair: Pair  # the first with this query
    answers: list[int]


def merge_passages(pairs: Iterable[Pair]) -> list[list[Pair]]:
    """Pairs with the same passage in one group: one passage, several queries."""
    groups: dict[str, dict[str, Pair]] = defaultdict(dict)
    for pair in pairs:
        groups[pair.text_key].setdefault(pair.query_key, pair)
    return [list(group.values()) for group in groups.values() if len(group) <= MAX_QUERIES]


def gather_queries(groups: Sequence[list[Pair]], families: Families) -> list[Query]:
    """The queries of all groups, each once, with every group that is relevant to it.

    Groups that share a query, or have queries of the same words, become a family.
    """
    queries: dict[str, Query] = {}
    for at, group in enumerate(groups):
        for pair in group:
            query = queries.setdefault(pair.query_key, Query(pair, []))
            query.answers.append(at)
            families.join(groups[query.answers[0]][0].name, group[0].name)
    kept = [query for query in queries.values() if len(query.answers) <= MAX_POSITIVES]
    same_words: dict[frozenset[str], str] = {}  # in another order or form
    for query in kept:
        words = query.pair.query_key.split()
        bag = frozenset(word.rstrip("s") for word in words if word not in FUNCTION_WORDS)
        name = groups[query.answers[0]][0].name
        if bag:
            families.join(name, same_words.setdefault(bag, name))
    return kept


def drop_near_duplicates(groups: Iterable[list[Pair]], families: Families) -> list[list[Pair]]:
    """Drop groups whose passage nearly equals an earlier one, apart from own names and numbers.

    Their queries are dropped too: a query may depend on just those names and numbers. Passages
    that are only related become a family, which stays in one split.
    """
    kept: list[list[Pair]] = []
    sketches: list[set[int]] = []
    holders: dict[int, list[int]] = defaultdict(list)  # a shingle -> the first groups that have it
    numbers: dict[str, int] = {}
    for group in track(groups, "comparing passages", unit="passages"):
        sketch = _shingles(group[0], numbers)
        if len(sketch) < MIN_SHINGLES:
            continue
        step = 4 if len(sketch) > 64 else 1  # a quarter of a long passage is enough
        sample = [shingle for shingle in sketch if shingle % step == 0]
        common: Counter[int] = Counter()
        for shingle in sample:
            common.update(holders.get(shingle, ()))
        others = (other for other, _ in common.most_common(6))
        shares = {other: resemblance(sketch, sketches[other]) for other in others}
        nearest = max(shares, key=shares.__getitem__, default=0)
        likeness = shares.get(nearest, 0.0)
        if likeness >= NEAR_COPY:
            continue
        if likeness >= RELATED:
            families.join(kept[nearest][0].name, group[0].name)
        for shingle in sample:
            if len(holders[shingle]) < 256:  # a common phrase is no evidence
                holders[shingle].append(len(kept))
        kept.append(group)
        sketches.append(sketch)
    return kept


class Families:
    """Names that must stay in one split: a union-find, named by the first in order."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def of(self, name: str) -> str:
        while (parent := self._parent.get(name, name)) != name:
            self._parent[name] = self._parent.get(parent, parent)
            name = parent
        return name

    def join(self, one: str, other: str) -> None:
        first, second = sorted((self.of(one), self.of(other)))
        self._parent[second] = first


def _shingles(pair: Pair, numbers: dict[str, int]) -> set[int]:
    """The `shingles` of a passage; own names and numbers become one blank."""
    own = {piece.lower() for piece in PIECE.findall(pair.name) if len(piece) > 2}
    pieces = (piece.lower() for piece in PIECE.findall(pair.text))
    blanked = ["" if piece in own or piece[0].isdigit() else piece for piece in pieces]
    pairs = zip(blanked, [None, *blanked], strict=False)  # a run of blanks is one
    return shingles([word for word, before in pairs if word or before != ""], numbers)
