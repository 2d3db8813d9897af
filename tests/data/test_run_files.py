"""Files of runs: the layouts that are recognized, and mistakes with their lines."""

import gzip
from collections.abc import Callable

import pytest
from tests.refusals import refused

from caravan.data.collection import Collection
from caravan.data.readers import lines
from caravan.data.runs import Run

Read = Callable[..., Run]
GOOD = "q1 Q0 p1 1 2.5 t\n"


def test_columns_may_be_divided_by_any_white_space(read: Read, names: Collection) -> None:
    run = read("\ufeffq1\tQ0  p1 \t1 2.5 t\r\n\n  q1 Q0 p2 9 +3e0 t \n \t \nq0 Q0 p1 1 -.5 t")
    assert names.corpus.ids(run.of(1)[0]) == ["p2", "p1"]
    assert run.of(1)[1].tolist() == [3.0, 2.5]
    assert run.of(0)[1].tolist() == [-0.5]


def test_ms_marco_files_have_ranks_for_scores(read: Read, names: Collection) -> None:
    run = read("q2\tp6\t1\nq1\tp6\t1\nq2\tp7\t2\nq2\tp5\t3\n")
    assert names.corpus.ids(run.of(2)[0]) == ["p6", "p7", "p5"]
    assert run.of(2)[1].tolist() == pytest.approx([1, 1 / 2, 1 / 3])
    assert run.tag == "msmarco"


@pytest.mark.parametrize("block", [40, 1000])
def test_ms_marco_candidates_come_with_their_texts_and_without_an_order(
    read: Read, names: Collection, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    rows = ["q2\tp5\ta query\tits passage, of words", "q1\tp6\tone\tx y z", "q2\tp7\ta query\t"]
    run = read("\n\n".join(rows))
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
        with refused(code, "x.trec:4"):
            read("\n".join([*rows, wrong, rows[0].replace("p5", "p9")]))


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize(
    ("text", "best"),
    [
        ("q2\tp5\t1\t9.5\nq2\tp6\t2\t3\n", "p5"),  # ColBERT's ranking.tsv
        ("q2 p5 1 30\nq2 p6 2 30\nq2 p7 3 -4e1\n", "p6"),  # ties: descending ids
        ("q2\tp6\t3\nq2\tp5\t9.25\nq2\tp7\t1.5\nq2\tp9\t.25\n", "p5"),  # most are not whole
        ("qid\tpid\trank\nq2\tp5\t1\nq2\tp6\t2\n", "p5"),
        ("query-id\tcorpus-id\tscore\nq2\tp6\t1\nq2\tp5\t2\n", "p5"),
        ("qid docid rank score\nq2 p5 1 2\nq2 p6 2 1\n", "p5"),
        ("qid\tQ0\tdocno\trank\tscore\ttag\nq2\tQ0\tp6\t1\t1\tx\nq2\tQ0\tp5\t2\t2\tx\n", "p5"),
    ],
)
def test_other_layouts_are_recognized(
    read: Read, names: Collection, text: str, best: str, depth: int | None
) -> None:
    run = read(text, depth=depth)
    assert run.query_rows.tolist() == [2]
    assert names.corpus.ids(run.of(2)[0])[0] == best


@pytest.mark.parametrize(
    ("content", "code", "line"),
    [
        ("", "empty-file", ""),
        ("\n \n", "empty-file", ""),
        ("qid\tpid\trank\n", "empty-file", ""),
        ("q1 p1\n", "malformed-line", ":1"),
        ("q1 p1 1 x\n", "malformed-line", ":1"),
        ("q1 p1 1 2.5 x\n", "malformed-line", ":1"),
        (f"\n{GOOD}q1 Q0 p2 2 2.5\n", "malformed-line", ":3"),
        # one column too many makes up for one too few, but not on the same line
        (f"{GOOD}q1 Q0 p2 2 2.5\nq1 Q0 p3 3 2.5 t u\n", "malformed-line", ":2"),
        (f"{GOOD}q1 Q0 p2 2 high t\n", "invalid-score", ":2"),
        (f"{GOOD}\nq1 Q0 p2 2 NaN t\n", "invalid-score", ":3"),
        (f"{GOOD}q1 Q0 p2 2 -inf t\n", "invalid-score", ":2"),
        (f"{GOOD}q1 Q0 p2 2 1e99 t\n", "invalid-score", ":2"),
        ("q1\tp1\t1\t5\nq1\tp2\t2\t3\nq1\tp3\t3\tbad\n", "invalid-score", ":3"),
        ("q\x851 Q0 p1 1 2 t\n", "invalid-id", ":1"),
        ("q1 Q0 p1\u2028 1 2 t\n", "invalid-id", ":1"),
        (f"{GOOD}q9 Q0 p1 1 2 t\n", "unknown-id", ":2"),
        (f"{GOOD}q1 Q0 zz 1 2 t\n", "unknown-id", ":2"),
        (f"{GOOD}{GOOD}", "duplicate-line", ":2"),
        (GOOD.encode() + b"q1 Q0 p\xe9 1 2 t\n", "not-utf8", ":2"),
        (GOOD.encode("utf-16"), "not-utf8", ":1"),
        ("q1 p1 first\n", "invalid-rank", ":1"),
        ("q1 p1 1\nq1 p2 1.5\n", "invalid-rank", ":2"),
        ("q1 p1 1\nq1 p2 2\nq1 p3 4\n", "invalid-rank", ":3"),
        ("q1 p1 1\nq2 p1 1\nq1 p2 2\nq1 p3 2\n", "invalid-rank", ":4"),
        ("q1 p1 0\nq1 p2 1\nq1 p3 2\n", "invalid-rank", ":1"),
        # whole numbers that may be ranks or scores
        ("q1 p1 9\nq1 p2 5\nq1 p3 2\n", "invalid-rank", ":1"),
        ("q1 p1 3\nq1 p2 2\nq1 p3 1\n", "invalid-rank", ":1"),
        ("q1 p1 1\nq1 p2 2\nq1 p3 2.5\nq1 p4 4\n", "invalid-rank", ":3"),
        ("q1\tp1\t2.5\t1\nq1\tp2\t1.5\t2\n", "invalid-rank", ":1"),
        ("q1\tp1\t7\t1\nq1\tp2\t9\t2\n", "invalid-rank", ":1"),
        ("q1 p1 1 1\nq2 p1 30 1\nq2 p2 20 2\n", "invalid-rank", ":2"),
        ("qid\tpid\tlabel\nq1\tp1\t1\n", "invalid-rank", ":1"),
        ("q1 0 11 1\nq2 0 12 1\n", "invalid-rank", ":1"),  # qrels
    ],
)
def test_a_mistake_is_reported_with_its_line(
    read: Read, content: str | bytes, code: str, line: str
) -> None:
    for depth in (None, 1):
        with refused(code, f"x.trec{line}") as caught:
            read(content, depth=depth)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("block", [20, 47, 1000])
def test_ranks_are_checked_over_blocks_of_a_file(
    read: Read, names: Collection, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", block)
    known = [f"p{i}" for i in (1, 2, 3, 5, 6, 7, 9, 10, 11)]
    rows = [f"q{q} {name} {rank}\n" for rank, name in enumerate(known, 1) for q in (3, 1)]
    assert names.corpus.ids(read("".join(rows)).of(3)[0]) == known
    rows[12] = rows[12].replace(" 7", " 8")
    with refused("invalid-rank", "x.trec:13"):
        read("".join(rows), depth=2)


def test_missing_and_broken_files_are_named(read: Read) -> None:
    with refused("file-not-found", "x.trec"):
        read()
    whole = gzip.compress(GOOD.encode() * 50)
    for content in (whole[:-12], whole[:30] + b"\0\0\0" + whole[33:]):
        with refused("damaged-file", "x.trec"):
            read(content)
