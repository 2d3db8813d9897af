"""Several collections in one training: their settings, and the collections once they are open.

    python train.py data=mixture 'data.entries={squad: {source: {_target_: ..., path: ...}}, ...}'

`caravan.data.mixing` draws the batches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt

from caravan.data.collection import Collection
from caravan.data.negatives import Sampler
from caravan.data.source import Source
from caravan.encoding import Encoding
from caravan.errors import InputError


@dataclass(frozen=True)
class Entry:
    """One collection of a mixture; None stands for the setting of the whole training.

    Attributes:
        source: a data source; its splits and held-out queries are used.
        weight: of the collection among the others, times its size ** `alpha`. With 0 it is only
            validated.
        instruction: text of `{instruction}` in the templates.
        number, runs: negatives per query, and runs to draw them from (`sampler`).
        in_batch: False if the other queries' passages are no negatives, as in classification.
        validation_run: as `validation.run`.
    """

    source: Any
    weight: NonNegativeFloat = 1.0
    instruction: str | None = None
    number: NonNegativeInt | None = None
    runs: list[str] | None = None
    in_batch: bool | None = None
    validation_run: str | None = None


@dataclass
class Mixture(Source):
    """Collections to train on together.

    Args:
        entries: by the names that logs and metrics use.
        alpha: a collection is drawn with a probability proportional to weight * size ** alpha,
            where the size is its number of training queries: 0 draws by weight alone, 1 by size.
        mixed: draw each query of a batch, instead of the collection of a batch.
        name: what logs call the mixture.
    """

    entries: dict[str, Entry]
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    mixed: bool = False
    name: str = "mixture"
    train_split: str = field(default="", init=False)  # those of the entries' sources are used
    dev_split: str = field(default="", init=False)
    split: str = field(default="", init=False)

    def __post_init__(self) -> None:
        given: Mapping[str, Any] = self.entries
        self.entries = {
            name: one if isinstance(one, Entry) else Entry(**one) for name, one in given.items()
        }
        for name, entry in self.entries.items():
            if not re.fullmatch(r"[\w.-]+", name):
                raise _invalid(f"entries: the name {name!r} is not of letters, digits, _ . and -")
            if entry.source is None or isinstance(entry.source, Mixture):
                raise _invalid(f"entries.{name}.source must be a data source of one collection")
        if not any(entry.weight for entry in self.entries.values()):
            raise _invalid("entries has no collection to train on: give one a weight above 0")

    def collection(self, cache_dir: str | Path) -> Collection:
        """Refused: only a training reads several collections together."""
        raise InputError(
            "several-collections",
            "data=mixture is for train.py; evaluate the collections one by one, or together with"
            " collections=[...]",
        )


def _invalid(problem: str) -> InputError:
    return InputError("invalid-mixture", f"data.{problem}")


@dataclass(frozen=True)
class Part:
    """One of the collections that a training reads, opened.

    Attributes:
        name: in logs; "" for the only one of a training.
        entry: settings of the collection; those of the whole training without a mixture.
        sampler: draws its negatives; None for unlabelled text.
    """

    name: str
    collection: Collection
    entry: Entry
    sampler: Any

    @property
    def train_split(self) -> str:
        return str(self.entry.source.train_split)

    @property
    def dev_split(self) -> str:
        return str(self.entry.source.dev_split)


def open_parts(source: Any, cache_dir: Path, sampler: Sampler | None) -> list[Part]:
    """Open the collections of a training: one, or those of a `Mixture`.

    Raises:
        InputError: "invalid-mixture" if two collections have one name but other instructions.
    """
    if not isinstance(source, Mixture):
        return [Part("", source.collection(cache_dir), Entry(source), sampler)]
    parts = []
    instructions: dict[str, str | None] = {}
    for name, entry in source.entries.items():
        collection, own = entry.source.collection(cache_dir), sampler
        if own is not None:
            own = own.variant(entry.runs, entry.number)
        if instructions.setdefault(collection.name, entry.instruction) != entry.instruction:
            raise _invalid(
                f"entries.{name}.instruction: another entry with other instructions has a"
                f" collection named {collection.name}; set entries.{name}.source.name"
            )
        parts.append(Part(name, collection, entry, own))
    return parts


def instructed(encoding: Encoding, parts: Sequence[Part]) -> Encoding:
    """The encoding with the instructions that the entries give their collections."""
    own = {
        part.collection.name: part.entry.instruction
        for part in parts
        if part.entry.instruction is not None
    }
    return replace(encoding, instructions={**encoding.instructions, **own}) if own else encoding


class Tables:
    """Texts of several collections, one after the other."""

    def __init__(self, tables: Sequence[Any]) -> None:
        self.tables = tables
        self.starts = np.cumsum([0, *map(len, tables)])

    def __len__(self) -> int:
        return int(self.starts[-1])

    def get(self, rows: slice) -> list[tuple[str, str]]:
        """(title, text) of a range of rows."""
        start, stop, _ = rows.indices(len(self))
        parts = zip(self.tables, self.starts.tolist(), strict=False)
        return [
            text
            for table, first in parts
            for text in table.get(slice(max(start - first, 0), max(stop - first, 0)))
        ]


@dataclass(frozen=True)
class Texts:
    """What a tokenizer is trained on: the texts of all collections."""

    corpus: Any
    queries: Any


def texts_of(parts: Sequence[Part]) -> Any:
    """The collection of a training, or the texts of several."""
    found = [part.collection for part in parts]
    if len(found) < 2:
        return found[0] if found else None
    return Texts(Tables([one.corpus for one in found]), Tables([one.queries for one in found]))
