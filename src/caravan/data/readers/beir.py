"""A BEIR folder: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, each plain or .gz.

It becomes a `Collection`, built on first use and opened later: found again by what the files hold,
not by where they lie. Whatever is wrong in a file is told in one sentence with file and line.
Other layouts are read by `msmarco`, `tsv`, `tevatron`, `flagembedding`, `irds`.

    python train.py data=beir data.path=/data/scifact
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from caravan.data.readers.jsonl import records
from caravan.data.readers.labelled import Labelled, WithHeldOut
from caravan.data.readers.lines import by_stem, one_of
from caravan.data.texts import Record
from caravan.errors import InputError

LAYOUT = "a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/<split>.tsv"
QRELS_SUFFIXES = (".tsv", ".txt", ".qrels")


@dataclass
class Beir(WithHeldOut):
    """A folder in the layout of BEIR (Thakur et al. 2021, arXiv 2104.08663)."""

    def files(self, folder: Path) -> Labelled:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder: set data.path to one, {LAYOUT}")
        corpus, queries = (_part(folder, part) for part in ("corpus", "queries"))
        qrels = by_stem(folder / "qrels", QRELS_SUFFIXES)
        return Labelled(
            ("beir",), corpus, _records, [queries], _records, qrels, held_out=self._share()
        )


def _part(folder: Path, part: str) -> Path:
    file = one_of(folder, [f"{part}.jsonl"])
    if file is None:
        raise InputError(f"{folder}/{part}.jsonl (or .gz) is missing: {LAYOUT}")
    return file


def _records(file: Path) -> Iterator[tuple[int, Record]]:
    return records(file, ids=("_id",), texts=("text",))
