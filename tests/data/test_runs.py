"""Runs in memory, their order, and what is read from and written to files."""

import gzip
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.refusals import refused

from caravan import manifests
from caravan.data import runs
from caravan.data.collection import Collection, write_collection
from caravan.data.readers import lines
from caravan.data.runs import Run, canonical, read_run, write_run

PASSAGES, QUERIES = 60, 8
IDS = [f"p{i}" if i % 4 else f"é€{i}" for i in np.random.default_rng(5).permutation(PASSAGES)]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return write_collection(
        tmp_path_factory.mktemp("names") / "names",
        "names",
        [(name, "", "text") for name in IDS],
        [(f"q{i}", "", "text") for i in range(QUERIES)],
        {},
    )


def random_run(seed: int, distinct: int | None = None) -> Run:
    rng = np.random.default_rng(seed)
    scores = rng.standard_normal((QUERIES, 30)) * 10.0 ** rng.integers(-9, 9, (QUERIES, 30))
    if distinct:
        scores = rng.integers(0, distinct, scores.shape) / 3
    rows = np.array([rng.permutation(PASSAGES)[:30] for _ in range(QUERIES)])
    rows[2, 5:] = -1  # fewer results
    rows[4] = -1  # none at all
    return Run.from_topk(rng.permutation(QUERIES), scores.astype(np.float32), rows)


def text_of(tmp_path: Path, content: str | bytes, name: str = "x.trec") -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def same(a: Run, b: Run) -> bool:
    """Equal as files are: queries without passages do not show there."""
    rows = [(run.query_rows[run.counts > 0], run.counts[run.counts > 0]) for run in (a, b)]
    return (
        np.array_equal(rows[0], rows[1])
        and np.array_equal(a.passage_rows, b.passage_rows)
        and np.array_equal(a.scores, b.scores)
    )


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
    assert run.scores.dtype == np.float32
    assert run.passage_rows.dtype == np.int64


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
        rows, scores = run.of(query)
        # Python's order of strings is trec_eval's strcmp on UTF-8
        expected = sorted(zip(scores.tolist(), names.corpus.ids(rows), strict=True), reverse=True)
        got_rows, got_scores = ordered.of(query)
        got = list(zip(got_scores.tolist(), names.corpus.ids(got_rows), strict=True))
        assert got == expected


@pytest.mark.parametrize("name", ["run.trec", "run.trec.gz"])
@pytest.mark.parametrize("distinct", [None, 3])
def test_a_run_survives_its_file_to_the_last_bit(
    tmp_path: Path, names: Collection, name: str, distinct: int | None
) -> None:
    run = random_run(2, distinct)
    write_run(tmp_path / "new" / name, run, names.queries, names.corpus)
    back = read_run(tmp_path / "new" / name, names.queries, names.corpus)
    assert same(back, canonical(run, names.corpus))
    assert back.tag == "caravan"
    assert [path.name for path in (tmp_path / "new").iterdir()] == [name]


def test_the_file_is_what_trec_eval_reads(tmp_path: Path, names: Collection) -> None:
    low, high = names.corpus.rows(["p1", "p2"])
    run = Run.from_flat(np.array([1, 1]), np.array([low, high]), np.array([1 / 3, 1 / 3]), "two%s")
    write_run(tmp_path / "x.trec", run, names.queries, names.corpus)
    assert (tmp_path / "x.trec").read_text() == (
        "q1 Q0 p2 1 0.333333343 two%s\nq1 Q0 p1 2 0.333333343 two%s\n"
    )


def test_equal_runs_give_equal_bytes(tmp_path: Path, names: Collection) -> None:
    for name in ("a.gz", "b.gz"):
        write_run(tmp_path / name, random_run(3), names.queries, names.corpus)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, names: Collection
) -> None:
    path = text_of(tmp_path, "old")
    broken = Run.from_flat(np.array([0]), np.array([PASSAGES + 1]), np.ones(1))
    with pytest.raises(IndexError):
        write_run(path, broken, names.queries, names.corpus)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_tag_with_white_space_is_refused(tmp_path: Path, names: Collection) -> None:
    run = Run.from_flat(np.array([0]), np.array([0]), np.ones(1), "two words")
    with refused("invalid-tag", "two words"):
        write_run(tmp_path / "x.trec", run, names.queries, names.corpus)


def test_columns_may_be_divided_by_any_white_space(tmp_path: Path, names: Collection) -> None:
    path = text_of(
        tmp_path,
        "\ufeffq1\tQ0  p1 \t1 2.5 t\r\n\n  q1 Q0 p2 9 +3e0 t \n \t \nq0 Q0 p1 1 -.5 t",
    )
    run = read_run(path, names.queries, names.corpus)
    assert names.corpus.ids(run.of(1)[0]) == ["p2", "p1"]
    assert run.of(1)[1].tolist() == [3.0, 2.5]
    assert run.of(0)[1].tolist() == [-0.5]


def test_ms_marco_files_have_ranks_for_scores(tmp_path: Path, names: Collection) -> None:
    path = text_of(tmp_path, "q2\tp6\t1\nq1\tp6\t1\nq2\tp7\t2\nq2\tp5\t3\n")
    run = read_run(path, names.queries, names.corpus)
    assert names.corpus.ids(run.of(2)[0]) == ["p6", "p7", "p5"]
    assert run.of(2)[1].tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert run.tag == "msmarco"


@pytest.mark.parametrize("block", [40, 1000])
def test_ms_marco_candidates_come_with_their_texts_and_without_an_order(
    tmp_path: Path, names: Collection, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    rows = ["q2\tp5\ta query\tits passage, of words", "q1\tp6\tone\tx y z", "q2\tp7\ta query\t"]
    run = read_run(text_of(tmp_path, "\n\n".join(rows)), names.queries, names.corpus)
    assert names.corpus.ids(run.of(2)[0]) == ["p7", "p5"]  # as trec_eval orders what is equal
    assert names.corpus.ids(run.of(1)[0]) == ["p6"]
    assert run.scores.tolist() == [0, 0, 0]
    for wrong, code in (
        ("q1\tp1\ta\tb\tc", "malformed-line"),
        ("q1\tp1\ta", "malformed-line"),
        ("q1\tp 1\ta\tb", "invalid-id"),
        ("q1\t\ta\tb", "invalid-id"),
        ("q1\tp99999\ta\tb", "unknown-id"),
    ):
        path = text_of(tmp_path, "\n".join([*rows, wrong, rows[0].replace("p5", "p8")]))
        with refused(code, "x.trec:4"):
            read_run(path, names.queries, names.corpus)


@pytest.mark.parametrize("block", [40, 97, 1000])
def test_files_longer_than_a_block_are_read_whole(
    tmp_path: Path, names: Collection, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    run = random_run(4)
    write_run(tmp_path / "x.trec", run, names.queries, names.corpus)
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    assert same(read_run(tmp_path / "x.trec", names.queries, names.corpus), run)
    with (tmp_path / "x.trec").open("a") as file:
        file.write("q0 Q0\n")
    with refused("malformed-line", "x.trec:186"):
        read_run(tmp_path / "x.trec", names.queries, names.corpus)


@pytest.mark.parametrize("distinct", [None, 3])
@pytest.mark.parametrize("depth", [1, 5, 1000])
@pytest.mark.parametrize("order", ["ranked", "shuffled"])
def test_reading_to_a_depth_gives_the_top_of_the_whole_run(
    tmp_path: Path,
    names: Collection,
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
    whole = read_run(path, names.queries, names.corpus)
    cut = read_run(path, names.queries, names.corpus, depth=depth)
    assert same(cut, whole.top(depth))
    assert cut.tag == whole.tag


GOOD = "q1 Q0 p1 1 2.5 t\n"


@pytest.mark.parametrize(
    ("content", "code", "place"),
    [
        ("", "empty-file", "x.trec"),
        ("\n \n", "empty-file", "x.trec"),
        ("q1 p1\n", "malformed-line", "x.trec:1"),
        (f"\n{GOOD}q1 Q0 p2 2 2.5\n", "malformed-line", "x.trec:3"),
        # one column too many makes up for one too few, but not on the same line
        (f"{GOOD}q1 Q0 p2 2 2.5\nq1 Q0 p3 3 2.5 t u\n", "malformed-line", "x.trec:2"),
        (f"{GOOD}q1 Q0 p2 2 high t\n", "invalid-score", "x.trec:2"),
        (f"{GOOD}\nq1 Q0 p2 2 NaN t\n", "invalid-score", "x.trec:3"),
        (f"{GOOD}q1 Q0 p2 2 -inf t\n", "invalid-score", "x.trec:2"),
        (f"{GOOD}q1 Q0 p2 2 1e99 t\n", "invalid-score", "x.trec:2"),
        ("q1 p1 0\n", "invalid-rank", "x.trec:1"),
        ("q1 p1 1\nq1 p2 1.5\n", "invalid-rank", "x.trec:2"),
        ("q1 p1 1\nq1 p2 2\nq1 p3 4\n", "invalid-rank", "x.trec:3"),
        ("q\x851 Q0 p1 1 2 t\n", "invalid-id", "x.trec:1"),
        ("q1 Q0 p1\u2028 1 2 t\n", "invalid-id", "x.trec:1"),
        ("q1 p1 first\n", "invalid-rank", "x.trec:1"),
        (f"{GOOD}q9 Q0 p1 1 2 t\n", "unknown-id", "x.trec:2"),
        (f"{GOOD}q1 Q0 zz 1 2 t\n", "unknown-id", "x.trec:2"),
        (f"{GOOD}{GOOD}", "duplicate-line", "x.trec:2"),
        (GOOD.encode() + b"q1 Q0 p\xe9 1 2 t\n", "not-utf8", "x.trec:2"),
        (GOOD.encode("utf-16"), "not-utf8", "x.trec:1"),
    ],
)
def test_a_mistake_in_a_file_is_reported_with_its_line(
    tmp_path: Path, names: Collection, content: str | bytes, code: str, place: str
) -> None:
    with refused(code, place) as caught:
        read_run(text_of(tmp_path, content), names.queries, names.corpus)
    assert "\n" not in str(caught.value)
    with refused(code, place):
        read_run(text_of(tmp_path, content), names.queries, names.corpus, depth=1)


def test_missing_and_broken_gzip_files_are_named(tmp_path: Path, names: Collection) -> None:
    with refused("file-not-found", "none.trec"):
        read_run(tmp_path / "none.trec", names.queries, names.corpus)
    whole = gzip.compress(GOOD.encode() * 50)
    for content in (whole[:-12], whole[:30] + b"\0\0\0" + whole[33:]):
        with refused("damaged-file", "x"):
            read_run(text_of(tmp_path, content, "x.gz"), names.queries, names.corpus)


@pytest.mark.parametrize("damage", [None, "cut", "file", "manifest", "changed run"])
def test_a_long_run_is_parsed_once_and_again_if_anything_has_changed(
    names: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str | None
) -> None:
    monkeypatch.setattr(runs, "KEPT_FROM", 1)
    collection, path, parsed = names, tmp_path / "x.trec", []
    monkeypatch.setattr(runs, "read_run", lambda *given: parsed.append(given) or read_run(*given))
    kept = collection.folder / "parsed"
    shutil.rmtree(kept, ignore_errors=True)
    write_run(path, random_run(1), collection.queries, collection.corpus)
    collection.read_run(path, 7)
    (arrays,) = [one for one in kept.iterdir() if one.is_dir()]
    file = arrays / "scores.npy"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-8])
    elif damage == "file":
        file.unlink()
    elif damage == "manifest":
        manifests.path_of(arrays).write_text("{}")
    elif damage == "changed run":
        write_run(path, random_run(2), collection.queries, collection.corpus)
    found = collection.read_run(path, 7)
    assert len(parsed) == (1 if damage is None else 2)
    expected = read_run(path, collection.queries, collection.corpus, 7)
    assert same(found, expected)
    assert found.tag == expected.tag
    Collection.open(collection.folder)  # the kept arrays are no damage


def test_a_long_run_is_read_where_nothing_can_be_kept(
    names: Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "KEPT_FROM", 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    path = tmp_path / "x.trec"
    write_run(path, random_run(1), names.queries, names.corpus)
    shutil.rmtree(names.folder / "parsed", ignore_errors=True)
    assert same(names.read_run(path), read_run(path, names.queries, names.corpus))
    assert not (names.folder / "parsed").exists()
