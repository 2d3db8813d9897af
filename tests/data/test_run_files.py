"""Files of runs: the two layouts that are read, and mistakes with their lines."""

import gzip
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

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


@pytest.mark.parametrize("depth", [None, 1])
@pytest.mark.parametrize(
    "text",
    [
        "qid\tpid\trank\nq2\tp5\t1\nq2\tp6\t2\n",
        "qid\tQ0\tdocno\trank\tscore\ttag\nq2\tQ0\tp6\t1\t1\tx\nq2\tQ0\tp5\t2\t2\tx\n",
    ],
)
def test_a_header_is_skipped(read: Read, names: Collection, text: str, depth: int | None) -> None:
    run = read(text, depth=depth)
    assert run.query_rows.tolist() == [2]
    assert names.corpus.ids(run.of(2)[0])[0] == "p5"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("q2\tp5\t1\t30\nq2\tp6\t2\t20\n", "malformed-line"),  # ColBERT's ranking.tsv
        ("qid docid rank score\nq2 p5 1 30\nq2 p6 2 20\n", "malformed-line"),
        ("q2\tp5\t9.5\nq2\tp6\t3\n", "invalid-rank"),
        ("qid pid score\nq2 p5 30\nq2 p6 20\n", "invalid-rank"),
    ],
)
def test_a_score_in_another_column_is_refused_with_the_command_that_moves_it(
    read: Read, names: Collection, tmp_path: Path, text: str, code: str
) -> None:
    with refused(code, "x.trec:1") as caught:
        read(text)
    command = re.search("awk '.*' .*trec.trec", str(caught.value))
    assert command is not None
    subprocess.run(command[0], shell=True, check=True)
    made = (tmp_path / "x.trec.trec").read_text()
    run = read("".join(line for line in made.splitlines(True) if " score " not in line))
    assert names.corpus.ids(run.of(2)[0]) == ["p5", "p6"]


def test_ms_marcos_candidates_with_their_texts_are_refused(read: Read) -> None:
    with refused("malformed-line", "x.trec:1", "0 for $4"):
        read("q2\tp5\ta query\tits passage, of words\n")


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
        ("qid\tpid\tlabel\nq1\tp1\t1\n", "invalid-rank", ":1"),
        ("q1 0 11 1\nq2 0 12 1\n", "malformed-line", ":1"),  # qrels
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
