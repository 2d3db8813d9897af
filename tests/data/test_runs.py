"""Runs in memory, their order, and what is written and read back."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.refusals import refused

from caravan import manifests
from caravan.data import collection as module
from caravan.data import runs
from caravan.data.collection import Collection
from caravan.data.readers import lines
from caravan.data.runs import Run, canonical, read_run, write_run

PASSAGES, QUERIES = 60, 8  # of the fixture `names`


def random_run(seed: int, distinct: int | None = None) -> Run:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((QUERIES, 30)) * 10.0 ** rng.integers(-9, 9, (QUERIES, 30))
    if distinct:
        scores = rng.integers(0, distinct, scores.shape) / 3
    rows = np.array([rng.permutation(PASSAGES)[:30] for _ in range(QUERIES)])
    rows[2, 5:] = -1  # fewer results
    rows[4] = -1  # none at all
    return Run.from_topk(rng.permutation(QUERIES), scores.astype(np.float32), rows)


def same(a: Run, b: Run) -> bool:
    """Equal as files are: queries without passages do not show there."""
    rows = [(run.query_rows[run.counts > 0], run.counts[run.counts > 0]) for run in (a, b)]
    columns = ((a.passage_rows, b.passage_rows), (a.scores, b.scores))
    return all(np.array_equal(*pair) for pair in (rows, *columns)) and a.tag == b.tag


def test_from_topk_sorts_queries_and_scores_and_drops_nothing_rows() -> None:
    run = Run.from_topk(
        np.array([7, 3]),
        np.array([[0.5, 0.9, 0.1], [0.2, -np.inf, -np.inf]], dtype=np.float32),
        np.array([[10, 11, 12], [13, -1, -1]]),
    )
    assert run.query_rows.tolist() == [3, 7]
    assert run.offsets.tolist() == [0, 1, 4]
    assert run.of(7)[0].tolist() == [11, 10, 12]
    assert run.of(3)[1].tolist() == pytest.approx([0.2])
    assert [len(part) for part in run.of(5)] == [0, 0]
    assert (run.scores.dtype, run.passage_rows.dtype) == (np.float32, np.int64)


def test_top_keeps_the_best_of_each_query() -> None:
    run = random_run(0)
    cut = run.top(3)
    assert cut.query_rows.tolist() == list(range(QUERIES))
    for query in range(QUERIES):
        assert cut.of(query)[0].tolist() == run.of(query)[0][:3].tolist()
    assert same(run.top(1000), run)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_scores_that_float32_cannot_rank_are_refused(value: float) -> None:
    with refused("invalid-score", "caravan"):
        Run.from_flat(np.array([3, 4]), np.array([1, 1]), np.array([0.5, value]))


@pytest.mark.parametrize("seed", range(5))
def test_canonical_orders_ties_by_id_descending_as_trec_eval(seed: int, names: Collection) -> None:
    run = random_run(seed, distinct=4)
    ordered = canonical(run, names.corpus)
    for query in range(QUERIES):
        pairs, got = (
            list(zip(scores.tolist(), names.corpus.ids(rows), strict=True))
            for rows, scores in (run.of(query), ordered.of(query))
        )
        # Python's order of strings is trec_eval's strcmp on UTF-8
        assert got == sorted(pairs, reverse=True)


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
@pytest.mark.parametrize("distinct", [None, 3])
@pytest.mark.parametrize("block", [40, 97, 1000])
def test_a_run_survives_its_file_to_the_last_bit(
    tmp_path: Path,
    names: Collection,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    distinct: int | None,
    block: int,
) -> None:
    run, paths = random_run(2, distinct), [tmp_path / folder / name for folder in ("new", "again")]
    for path in paths:
        write_run(path, run, names.queries, names.corpus)
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert list(paths[0].parent.iterdir()) == [paths[0]]
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    back = read_run(paths[0], names.queries, names.corpus)
    assert same(back, canonical(run, names.corpus))


def test_the_file_is_what_trec_eval_reads(tmp_path: Path, names: Collection) -> None:
    low, high = names.corpus.rows(["p1", "p2"])
    run = Run.from_flat(np.array([1, 1]), np.array([low, high]), np.array([1 / 3, 1 / 3]), "two%s")
    write_run(tmp_path / "x.trec", run, names.queries, names.corpus)
    assert (tmp_path / "x.trec").read_text() == (
        "q1 Q0 p2 1 0.333333343 two%s\nq1 Q0 p1 2 0.333333343 two%s\n"
    )


def test_a_tag_of_two_words_is_refused(tmp_path: Path, names: Collection) -> None:
    one = np.zeros(1, dtype=np.int64)
    with refused("invalid-tag", "two words"):
        tagged = Run.from_flat(one, one, np.ones(1), "two words")
        write_run(tmp_path / "x.trec", tagged, names.queries, names.corpus)


@pytest.mark.parametrize("distinct", [None, 3])
@pytest.mark.parametrize("depth", [1, 5, 1000])
@pytest.mark.parametrize("order", ["ranked", "shuffled"])
def test_reading_to_a_depth_gives_the_top_of_the_whole_run(
    tmp_path: Path,
    names: Collection,
    read: Callable[..., Run],
    monkeypatch: pytest.MonkeyPatch,
    distinct: int | None,
    depth: int,
    order: str,
) -> None:
    path = tmp_path / "x.trec"
    write_run(path, random_run(5, distinct), names.queries, names.corpus)
    if order == "shuffled":
        whole_lines = path.read_text().splitlines(keepends=True)
        path.write_text("".join(np.random.default_rng(0).permutation(whole_lines)))
    monkeypatch.setattr(lines, "BLOCK_BYTES", 200)
    monkeypatch.setattr(runs, "LINES", 20)
    assert same(read(depth=depth), read().top(depth))


@pytest.mark.parametrize("damage", [None, "cut", "file", "manifest", "changed run", "read-only"])
def test_a_long_run_is_parsed_once_and_again_if_anything_has_changed(
    names: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None
) -> None:
    path, kept, parsed = tmp_path / "x.trec", names.folder / "parsed", []
    monkeypatch.setattr(module, "CACHED_RUN", 1)
    monkeypatch.setattr(module, "read_run", lambda *given: parsed.append(given) or read_run(*given))
    shutil.rmtree(kept, ignore_errors=True)
    write_run(path, random_run(1), names.queries, names.corpus)
    if damage == "read-only":
        monkeypatch.setattr(os, "access", lambda *_: False)
    names.read_run(path, 7)
    arrays = next((one for one in kept.glob("*") if one.is_dir()), kept)
    assert (arrays == kept) == (damage == "read-only")
    if damage == "cut":
        file = arrays / "scores.npy"
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "file":
        (arrays / "scores.npy").unlink()
    elif damage == "manifest":
        manifests.path_of(arrays).write_text("{}")
    elif damage == "changed run":
        write_run(path, random_run(2), names.queries, names.corpus)
    found = names.read_run(path, 7)
    assert len(parsed) == (1 if damage is None else 2)
    assert same(found, read_run(path, names.queries, names.corpus, 7))
