"""Small files in the formats that readers read."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from caravan.data.collection import Collection, Qrels
from caravan.data.runs import Run, read_run


def put(folder: Path, files: dict[str, str], zipped: bool = False) -> Path:
    """A folder of text files, gzipped on request."""
    for name, text in files.items():
        path = folder / (f"{name}.gz" if zipped else name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if zipped else text.encode())
    return folder


def judged(collection: Collection, split: str) -> dict[tuple[str, str], int]:
    """The judgements of a split by their ids."""
    qrels: Qrels = collection.qrels(split)
    queries = collection.queries.ids(qrels.query_rows)
    passages = collection.corpus.ids(qrels.passage_rows)
    return dict(zip(zip(queries, passages, strict=True), qrels.grades.tolist(), strict=True))


def random_run(collection: Collection, split: str, depth: int | None = None, seed: int = 0) -> Run:
    """A run of passages in random order for each query of the split: so many, or all of them."""
    rng = np.random.default_rng(seed)
    queries = collection.qrels(split).queries
    rows = np.stack([rng.permutation(len(collection.corpus))[:depth] for _ in queries])
    return Run.from_topk(queries, rng.normal(size=rows.shape), rows)


def ranked(run: Path, collection: Collection) -> dict[int, dict[int, float]]:
    """By the row of each query, the rows of the passages of a run file with scores, best first."""
    found = read_run(run, collection.queries, collection.corpus)
    columns = {row: [part.tolist() for part in found.of(row)] for row in found.query_rows.tolist()}
    return {row: dict(zip(*of, strict=True)) for row, of in columns.items()}


def records(texts: object) -> list[tuple[str, str, str]]:
    """(id, title, text) of each, in order."""
    rows = range(len(texts))  # type: ignore[arg-type]
    pairs = zip(texts.ids(rows), texts.get(rows), strict=True)  # type: ignore[attr-defined]
    return [(name, *text) for name, text in pairs]
