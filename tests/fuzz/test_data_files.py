"""Damaged data files: each is refused in a sentence, or read as plain Python reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.files import judged, put, records
from tests.fuzz import naive
from tests.fuzz.mutations import amounts, sampled, text_mutants
from tests.fuzz.mutations import put as put_mutant
from tests.layouts import SOURCES, files_of

from caravan.data.collection import Collection

TREC_COLUMNS = ("qid", "Q0", "pid", "rank", "score", "tag")


def _splits(folder: Path, pattern: str, prefix: str = "") -> dict[str, Any]:
    """The judgements of each qrels file that is there."""
    return {
        file.name.removeprefix(prefix).partition(".")[0]: naive.qrels(file)
        for file in sorted(folder.glob(pattern))
    }


def _beir(folder: Path) -> naive.Read:
    corpus, queries = (
        naive.jsonl(folder / f"{part}.jsonl", "_id") for part in ("corpus", "queries")
    )
    return naive.collection(corpus, [(i, "", t) for i, _, t in queries], _splits(folder, "qrels/*"))


def _tsv(folder: Path) -> naive.Read:
    queries = naive.tsv(folder / "queries.tsv")
    naive.need(not any(title for _, title, _ in queries), "three columns")
    splits = _splits(folder, "qrels.*", "qrels.")
    return naive.collection(naive.tsv(folder / "corpus.tsv"), queries, splits)


def _marco(reader: Callable[[Path], list[naive.Record]], names: dict[str, tuple[str, str]]) -> Any:
    def read(folder: Path) -> naive.Read:
        corpus = next(
            iter(sorted(folder.glob("*collection*")) + sorted(folder.glob("*docs.*"))), None
        )
        naive.need(corpus, "no corpus")
        splits, queries = {}, list[naive.Record]()
        for split, (asked, own) in names.items():
            if (folder / own).exists():
                splits[split] = naive.qrels(folder / own)
                queries += naive.tsv(folder / asked)
        queries = list(dict.fromkeys(queries))  # one that is in several files is one query
        assert corpus is not None
        return naive.collection(reader(corpus), queries, splits)

    return read


PLAIN: dict[str, Callable[[Path], naive.Read]] = {
    "beir": _beir,
    "tsv with headers": _tsv,
    "tsv without titles": _tsv,
    "msmarco passages": _marco(
        naive.tsv,
        {
            "dev": ("queries.dev.small.tsv", "qrels.dev.small.tsv"),
            "dl19": ("msmarco-test2019-queries.tsv", "2019qrels-pass.txt"),
        },
    ),
    "msmarco documents": _marco(
        naive.documents_tsv, {"dev": ("msmarco-docdev-queries.tsv", "msmarco-docdev-qrels.tsv")}
    ),
    "tevatron": lambda to: naive.tevatron(to / "train.jsonl"),
    "tevatron beside a corpus": lambda to: naive.tevatron(to / "train.jsonl", to / "corpus.jsonl"),
    "flagembedding": lambda to: naive.flagembedding(to / "train.jsonl"),
}
"""How plain Python reads each layout."""


def _read(source: Any, cache: Path) -> naive.Read:
    found: Collection = source.collection(cache)
    runs = {}
    for name in found.runs:
        ids = ({i for i, _, _ in records(part)} for part in (found.queries, found.corpus))
        runs[name] = naive.run(found.run_path(f"data:{name}"), TREC_COLUMNS, *ids)
    splits = {split: judged(found, split) for split in found.splits}
    return naive.Read(records(found.corpus), records(found.queries), splits, runs)


@amounts(2, 80)  # of about 130 of each file
@pytest.mark.parametrize(
    ("layout", "zipped"), [*((layout, False) for layout in PLAIN), ("beir", True)]
)
def test_damaged_collections_are_refused_or_read_whole(
    layout: str, zipped: bool, number: int, tmp_path: Path
) -> None:
    files = files_of(layout)
    there = put(tmp_path / "data", files, zipped)

    def compared(name: str) -> bool:
        return naive.agrees(
            name,
            lambda: PLAIN[layout](there),
            lambda: _read(SOURCES[layout](str(there)), tmp_path / "cache"),
        )

    assert compared("the undamaged files")
    for file in files:
        path = there / (f"{file}.gz" if zipped else file)
        data = path.read_bytes()
        for mutant in sampled(text_mutants(file, data, seed=0), number, seed=1):
            put_mutant(path, mutant)
            read = compared(f"{file}: {mutant.name}")
            assert read or mutant.name not in naive.HARMLESS or zipped, f"{file}: {mutant.name}"
        path.write_bytes(data)
