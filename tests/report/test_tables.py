from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from caravan.report.tables import Table, best, write

TABLE = Table(
    "results",
    "Scores of a_b, 50 % of it; best in bold.",
    ["sys|tem", "MRR@10", "p"],
    [["a_b & c", "0.5000", "<.001"], ["x|y", "0.4000", "\u22120.1 ± 2"]],
    strong=frozenset({(0, 1)}),
)


def _printed(table: Table, width: int) -> str:
    file = io.StringIO()
    Console(file=file, width=width, soft_wrap=True).print(table.rich(width))
    return file.getvalue()


def test_latex_is_escaped() -> None:
    text = TABLE.latex()
    assert r"a\_b \& c & \textbf{0.5000} & $<$.001 \\" in text
    assert r"x$|$y & 0.4000 & $-$0.1 $\pm$ 2 \\" in text
    assert r"\caption{Scores of a\_b, 50 \% of it; best in bold.}" in text
    assert r"\begin{tabular}{lrr}" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert r"\toprule" in text


def test_markdown_keeps_a_cell_in_its_column() -> None:
    assert TABLE.markdown().splitlines()[2:] == [
        r"| sys\|tem | MRR@10 | p |",
        "| --- | ---: | ---: |",
        r"| a\_b & c | **0.5000** | \<.001 |",
        "| x\\|y | 0.4000 | \u22120.1 ± 2 |",
    ]


def test_the_best_of_a_column_is_strong_unless_all_are_equal() -> None:
    assert best([[0.1, 0.5, None], [0.3, 0.5, 0.2], [0.3, 0.5, None]]) == {(1, 1), (2, 1)}
    assert best([[0.1]]) == frozenset()


def test_each_table_is_written_in_both_forms(tmp_path: Path) -> None:
    write(tmp_path, [TABLE])
    assert {path.name for path in tmp_path.iterdir()} == {"results.md", "results.tex"}


@pytest.mark.parametrize("width", [10, 40, 100])
def test_names_and_numbers_are_whole_on_a_terminal_of_any_width(width: int) -> None:
    interval = "\u22120.0014 to +0.0451"
    table = Table("t", "Caption.", ["system", "interval", "p"], [["z" * 40, interval, ".018"]])
    printed = _printed(table, width)
    assert interval in printed
    assert ".018" in printed
    assert printed.count("z") == 40


def test_a_wide_row_has_two_lines_and_strong_cells_are_marked() -> None:
    names = ["runs/bm25/six/cranfield", "runs/mine/six/cranfield"]
    heads = ["A", "B", "B \u2212 A", "p", "p (Holm)", "95 % interval (t)", "gain"]
    row = [*names, "+0.1000", ".011", ".033", "\u22120.0014 to +0.0451", "53"]
    table = Table("t", "Below .05 in bold.", heads, [row], labels=2, strong=frozenset({(0, 4)}))
    lines = _printed(table, 80).splitlines()
    assert lines[0] == "Below .05 marked *."
    assert any(all(name in line for name in names) for line in lines)
    assert any(".033*" in line for line in lines)
    assert all(len(line) <= 80 for line in lines)


def test_a_cell_does_not_control_the_terminal() -> None:
    hurt = "\x1b[2Jsalt\u202e"
    printed = _printed(Table("t", hurt, ["system", hurt], [[hurt, "0.1"]]), 80)
    assert printed.count("salt") == 3
    assert not set(printed) & {*"\x1b\u202e"}
