from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from caravan.report.tables import Table

TABLE = Table(
    "results",
    "Scores of a_b, 50 % of it; best in bold.",
    ["sys|tem", "MRR@10", "p"],
    [["a_b & c", "0.5000", "<.001"], ["x|y", "0.4000", "\u22120.1 ± 2"]],
    strong=frozenset({(0, 1)}),
)


def test_latex_and_markdown_are_escaped(tmp_path: Path) -> None:
    TABLE.write(tmp_path)
    text = (tmp_path / "results.tex").read_text()
    assert r"a\_b \& c & \textbf{0.5000} & $<$.001 \\" in text
    assert r"x$|$y & 0.4000 & $-$0.1 $\pm$ 2 \\" in text
    assert r"\caption{Scores of a\_b, 50 \% of it; best in bold.}" in text
    assert r"\begin{tabular}{lrr}" in text
    assert r"\toprule" in text
    assert text.count(r"\begin{") == text.count(r"\end{") == 2
    assert (tmp_path / "results.md").read_text().splitlines()[2:] == [
        r"| sys\|tem | MRR@10 | p |",
        "| --- | ---: | ---: |",
        r"| a\_b & c | **0.5000** | \<.001 |",
        "| x\\|y | 0.4000 | \u22120.1 ± 2 |",
    ]


def test_the_best_score_of_a_column_is_strong_unless_all_are_equal() -> None:
    frame = pd.DataFrame({"system": list("abc"), "MRR@10": [0.1, 0.3, 0.3], "R@5": [0.5] * 3})
    frame["p"], frame["nDCG@10"], frame["seconds"] = ["-", ".1", ".2"], [None, 0.25, 0.2], [1, 2, 3]
    table = Table.of("t", "", frame, {"seconds": "{:.1f}"})
    assert table.columns == list(frame)
    assert table.rows[0] == ["a", "0.1000", "0.5000", "-", "\u2013", "1.0"]
    assert table.strong == {(1, 1), (2, 1), (1, 4)}


@pytest.mark.parametrize("width", [10, 40, 100, None])
def test_names_and_numbers_are_whole_on_a_terminal_of_any_width(width: int | None) -> None:
    interval = "\u22120.0014 to +0.0451"
    row = ["z" * 40, "A [red] B", interval, ".018"]
    table = Table("t", "Below .05 in bold.", ["system", "A → B", "interval", "p"], [row], labels=2)
    text = table.text(width)
    assert all(cell in text for cell in row)
    strong = Table("t", table.caption, table.columns, [row], 2, frozenset({(0, 3)})).text()
    assert strong.startswith("Below .05 marked *.\n")
    assert ".018*" in strong


def test_a_cell_does_not_control_the_terminal() -> None:
    hurt = "\x1b[2Jsalt\u202e"
    text = Table("t", hurt, ["system", hurt], [[hurt, "0.1"]]).text(80)
    assert text.count("salt") == 3
    assert not set(text) & {*"\x1b\u202e"}
