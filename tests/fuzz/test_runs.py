"""Damaged runs of both layouts: each is refused in a sentence, or read as plain Python reads it."""

from __future__ import annotations

import gzip
from collections.abc import Iterable
from pathlib import Path

import pytest
from tests.files import put
from tests.fuzz import naive
from tests.fuzz.mutations import amounts, sampled, text_mutants
from tests.fuzz.mutations import put as put_mutant

from caravan.data.readers.labelled import Beir
from caravan.data.runs import Run, read_run

QUERIES = [str(100 + at) for at in range(5)]
PASSAGES = [str(at) for at in range(10)]


def _lines(rows: Iterable[tuple[object, ...]], between: str = "\t") -> str:
    return "".join(between.join(map(str, row)) + "\n" for row in rows)


_RANKED = [(q, str(p), at) for q in QUERIES for at, p in enumerate(range(3, 9), 1)]
RUNS = {
    "trec": (
        ("qid", "Q0", "pid", "rank", "score", "tag"),
        _lines(((q, "Q0", p, at, 9 - at / 4, "bm25") for q, p, at in _RANKED), " "),
    ),
    "ranks": (("qid", "pid", "rank"), _lines(_RANKED)),
    "ranks under a header": (("qid", "pid", "rank"), "qid\tpid\trank\n" + _lines(_RANKED)),
}


def _tried_run(name: str, folder: Path, number: int) -> None:
    names, text = RUNS[name]
    files = {
        f"{part}.jsonl": "".join(f'{{"_id": "{i}", "text": "camel {i}"}}\n' for i in ids)
        for part, ids in (("corpus", PASSAGES), ("queries", QUERIES))
    }
    collection = Beir(str(put(folder / "data", files))).collection(folder / "cache")
    of_texts = collection.queries, collection.corpus
    ids = set(QUERIES), set(PASSAGES)

    def ranked(run: Run) -> naive.Ranked:
        queries = collection.queries.ids(run.query_rows)
        found = {}
        for query, row in zip(queries, run.query_rows, strict=True):
            passages, scores = run.of(int(row))
            listed = zip(collection.corpus.ids(passages), scores.tolist(), strict=True)
            found[query] = list(listed)
        return found

    for end in ("", ".gz"):
        path = folder / f"run.txt{end}"
        data = gzip.compress(text.encode(), mtime=0) if end else text.encode()
        path.write_bytes(data)

        def compared(case: str, path: Path = path) -> bool:
            whole = naive.agrees(
                *(case, lambda: naive.run(path, names, *ids)),
                lambda: ranked(read_run(path, *of_texts)),
            )
            naive.agrees(
                f"{case}, to depth 3",
                lambda: {query: of[:3] for query, of in naive.run(path, names, *ids).items()},
                lambda: ranked(read_run(path, *of_texts, depth=3)),
            )
            return whole

        assert compared("the undamaged run")
        for mutant in sampled(text_mutants(path.name, data, seed=0), number, seed=1):
            if not end and b"\n" not in (mutant.data or b""):
                continue  # a part of one line may be a line of another layout
            put_mutant(path, mutant)
            read = compared(f"{name}{end}: {mutant.name}")
            assert read or mutant.name not in naive.HARMLESS or end, f"{name}: {mutant.name}"


@amounts(2, 80)  # of about 80 of each file
@pytest.mark.parametrize("name", RUNS)
def test_damaged_runs_are_refused_or_read_whole(name: str, number: int, tmp_path: Path) -> None:
    _tried_run(name, tmp_path, number)
