"""Layouts of run files: which are recognized, and which are refused because they are in doubt."""

from pathlib import Path

import pytest
from tests.files import put
from tests.refusals import refused

from caravan.data.collection import Collection, write_collection
from caravan.data.readers import lines
from caravan.data.runs import read_run


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    passages = [(f"p{i}", "", "text") for i in range(10)]
    queries = [(f"q{i}", "", "text") for i in range(4)]
    return write_collection(
        tmp_path_factory.mktemp("names") / "names", "names", passages, queries, {}
    )


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize(
    "text",
    [
        "q2\tp5\t1\t9.5\nq2\tp6\t2\t3\n",  # ColBERT's ranking.tsv
        "q2 p5 1 30\nq2 p6 2 30\nq2 p7 3 -4e1\n",
        "q2\tp6\t3\nq2\tp5\t9.25\nq2\tp7\t1.5\nq2\tp9\t.25\n",  # most scores are not whole
        "qid\tpid\trank\nq2\tp5\t1\nq2\tp6\t2\n",
        "query-id\tcorpus-id\tscore\nq2\tp6\t1\nq2\tp5\t2\n",
        "qid docid rank score\nq2 p5 1 2\nq2 p6 2 1\n",
        "qid\tQ0\tdocno\trank\tscore\ttag\nq2\tQ0\tp6\t1\t1\tx\nq2\tQ0\tp5\t2\t2\tx\n",
    ],
)
def test_other_layouts_are_recognized(
    tmp_path: Path, names: Collection, text: str, depth: int | None
) -> None:
    run = read_run(
        put(tmp_path, {"x.trec": text}) / "x.trec", names.queries, names.corpus, depth=depth
    )
    assert run.query_rows.tolist() == names.queries.rows(["q2"]).tolist()
    best = ["p6", "p5"] if text.startswith("q2 p5") else ["p5"]  # ties: descending ids
    assert names.corpus.ids(run.of(2)[0])[:1] == best[:1]


@pytest.mark.parametrize(
    ("text", "code", "place"),
    [
        ("q1 p1 9\nq1 p2 5\nq1 p3 2\n", "invalid-rank", "x.trec:1"),  # whole scores
        ("q1 p1 3\nq1 p2 2\nq1 p3 1\n", "invalid-rank", "x.trec:1"),
        ("q1 p1 1\nq2 p1 1\nq1 p2 2\nq1 p3 2\n", "invalid-rank", "x.trec:4"),
        ("q1 p1 0\nq1 p2 1\nq1 p3 2\n", "invalid-rank", "x.trec:1"),
        ("q1 p1 1\nq1 p2 2\nq1 p3 2.5\nq1 p4 4\n", "invalid-rank", "x.trec:3"),
        ("q1\tp1\t2.5\t1\nq1\tp2\t1.5\t2\n", "invalid-rank", "x.trec:1"),
        ("q1\tp1\t7\t1\nq1\tp2\t9\t2\n", "invalid-rank", "x.trec:1"),
        ("q1\tp1\t1\t5\nq1\tp2\t2\t3\nq1\tp3\t3\tbad\n", "invalid-score", "x.trec:3"),
        ("q1 0 11 1\nq2 0 12 1\n", "invalid-rank", "x.trec:1"),
        ("q1 p1 1 x\n", "malformed-line", "x.trec:1"),
        ("q1 p1 1 2.5 x\n", "malformed-line", "x.trec:1"),
        ("q1 p1 1 1\nq2 p1 30 1\nq2 p2 20 2\n", "invalid-rank", "x.trec:2"),
        ("q1\tp1\t42\t7\nq1\tp2\t42\t9\n", "invalid-rank", "x.trec:1"),
        ("qid\tpid\tlabel\nq1\tp1\t1\n", "invalid-rank", "x.trec:1"),
        ("qid\tpid\trank\n", "empty-file", "x.trec"),
    ],
)
def test_columns_that_may_be_either_ranks_or_scores_are_refused(
    tmp_path: Path, names: Collection, text: str, code: str, place: str
) -> None:
    with refused(code, place):
        read_run(put(tmp_path, {"x.trec": text}) / "x.trec", names.queries, names.corpus)


@pytest.mark.parametrize("block", [20, 47, 1000])
def test_ranks_are_checked_over_blocks_of_a_file(
    tmp_path: Path, names: Collection, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    known = [f"p{i}" for i in range(1, 10)]
    rows = [f"q{q} {name} {rank}\n" for rank, name in enumerate(known, 1) for q in (3, 1)]
    path = put(tmp_path, {"x.trec": "".join(rows)}) / "x.trec"
    run = read_run(path, names.queries, names.corpus)
    assert names.corpus.ids(run.of(3)[0]) == known
    rows[12] = rows[12].replace(" 7", " 8")
    put(tmp_path, {"x.trec": "".join(rows)})
    with refused("invalid-rank", "x.trec:13"):
        read_run(path, names.queries, names.corpus, depth=2)
