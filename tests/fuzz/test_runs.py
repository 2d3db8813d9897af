"""Damaged runs of both layouts: each is refused in a sentence, or read as plain Python reads it."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from tests.files import put
from tests.fuzz import naive
from tests.fuzz.mutations import amounts, sampled, text_mutants
from tests.fuzz.mutations import put as put_mutant
from tests.layouts import PASSAGES, QUERIES, files_of, lines

from caravan.data.readers.labelled import Beir
from caravan.data.runs import Run, read_run

_RANKED = [(q, str(p), at) for q, _ in QUERIES for at, p in enumerate(range(3, 9), 1)]
RUNS = {
    "trec": (
        ("qid", "Q0", "pid", "rank", "score", "tag"),
        lines(((q, "Q0", p, at, 9 - at / 4, "bm25") for q, p, at in _RANKED), " "),
    ),
    "ranks": (("qid", "pid", "rank"), lines(_RANKED)),
    "ranks under a header": (("qid", "pid", "rank"), "qid\tpid\trank\n" + lines(_RANKED)),
}


@amounts(2, 80)  # of about 80 of each file
@pytest.mark.parametrize("name", RUNS)
def test_damaged_runs_are_refused_or_read_whole(name: str, number: int, tmp_path: Path) -> None:
    names, text = RUNS[name]
    there = put(tmp_path / "data", files_of("beir"))
    collection = Beir(str(there)).collection(tmp_path / "cache")
    of_texts = collection.queries, collection.corpus
    ids = [{one[0] for one in part} for part in (QUERIES, PASSAGES)]

    def ranked(run: Run) -> naive.Ranked:
        queries = collection.queries.ids(run.query_rows)
        found = {}
        for query, row in zip(queries, run.query_rows, strict=True):
            passages, scores = run.of(int(row))
            listed = zip(collection.corpus.ids(passages), scores.tolist(), strict=True)
            found[query] = list(listed)
        return found

    for end in ("", ".gz"):
        path = tmp_path / f"run.txt{end}"
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
