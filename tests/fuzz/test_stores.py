"""Damaged products of an evaluation: the next start gives the same results, or a sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.commands import ROOT, evaluate_arguments
from tests.fuzz.mutations import (
    Snapshot,
    amounts,
    exchanged,
    file_mutants,
    noted,
    outcome,
    put,
    sampled,
)

from caravan.cli.compose import compose
from caravan.cli.evaluate import evaluate
from caravan.data.readers import lines
from caravan.errors import InputError

TIMED = ("seconds", "queries_per_second", "index_s", "search_query_s", "encode_s")
RUNS = ("bm25", "retriever", "fused", "reranked")
MADE_FROM = {"bm25": RUNS[0], "passages": RUNS[1], "queries": RUNS[1], "scores": RUNS[3]}
"""The run that a product of the store is searched for; it is removed, so that it is made anew."""


class Done(NamedTuple):
    """A finished evaluation in run/ with its cache/ beside it."""

    cfg: Any
    home: Path
    written: Snapshot
    results: dict[str, Any]


def _results(home: Path) -> dict[str, Any]:
    """The bytes of the runs, and the metrics without what depends on time."""
    runs = {path.name: path.read_bytes() for path in (home / "run/runs").glob("*.trec")}
    return {**runs, "metrics": _untimed(json.loads((home / "run/metrics.json").read_text()))}


def _untimed(tree: Any) -> Any:
    if isinstance(tree, dict):
        timed = (*TIMED, "facts")
        return {key: _untimed(value) for key, value in tree.items() if key not in timed}
    return [_untimed(value) for value in tree] if isinstance(tree, list) else tree


@pytest.fixture(scope="module")
def done(beir: Path, folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Done:
    home = tmp_path_factory.mktemp("store")
    given = evaluate_arguments(
        *(beir, home / "run", f"[bm25,{folders['retriever']}]"),
        *(f"reranker={folders['reranker']}", "rerank.depth=3", "measures=[MRR@10,nDCG@10]"),
    )
    cfg = compose(ROOT / "conf", "evaluate", given)
    evaluate(cfg)
    return Done(cfg, home, Snapshot(home), _results(home))


def _is_made_anew(done: Done, path: Path) -> None:
    """Remove the results that were made from a product of the store."""
    parts = path.relative_to(done.home / "run").parts
    if parts[0] == "store":
        run = MADE_FROM[parts[1].lstrip(".").partition(".")[0]]  # of a lock too
        (done.home / f"run/runs/{run}.test.trec.manifest.json").unlink()
    if parts[0] != "metrics.json":
        (done.home / "run/metrics.json.manifest.json").unlink(missing_ok=True)


@amounts(1, 40)  # of 33 and more of each file
@pytest.mark.parametrize(
    "part", ["run/store", "run/runs", "run/metrics.json", "run/config.yaml", "cache/collections"]
)
def test_an_evaluation_over_damaged_products_ends_with_the_same_results(
    done: Done, part: str, number: int
) -> None:
    for path, data in sorted(done.written.files.items()):
        if not path.relative_to(done.home).as_posix().startswith(part):
            continue
        mutants = [*file_mutants(path, data), *exchanged(path)]
        for mutant in sampled(mutants, number, seed=1):
            done.written.restore()
            put(path, mutant)
            if (done.home / "run") in path.parents:
                _is_made_anew(done, path)
            with noted(f"{path.relative_to(done.home)}: {mutant.name}"):
                found = outcome(lambda: evaluate(done.cfg))
                if isinstance(found, InputError):
                    named = (path.name, path.parent.name, "run_dir")
                    assert any(name in str(found) for name in named), found
                else:
                    assert _results(done.home) == done.results


def test_damaged_digests_of_the_cache_are_computed_again(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "KEPT_FROM_BYTES", 0)
    expected = lines.digest(beir / "corpus.jsonl", tmp_path)
    (path,) = (tmp_path / "digests").iterdir()
    for mutant in sampled(file_mutants(path, path.read_bytes()), 40, seed=1):
        put(path, mutant)
        with noted(mutant.name):
            assert outcome(lambda: lines.digest(beir / "corpus.jsonl", tmp_path)) == expected
