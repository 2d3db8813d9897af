"""Render the ledger into the tables of docs/papers.md.

python reproduce/tables.py
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "papers.md"
PAPERS = ("repllama", "rankllama", "llara")


def ledger() -> dict[str, dict[str, Any]]:
    """The files of the ledger, by paper."""
    return {name: yaml.safe_load((HERE / f"{name}.yaml").read_text()) for name in PAPERS}


def table(head: list[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---" for _ in head], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def published(results: list[dict[str, Any]], name: str) -> str:
    """The published values of one table; * marks those that are not confirmed."""
    values: dict[str, dict[str, str]] = {}
    for result in (one for one in results if one["table"] == name):
        mark = "" if result.get("confirmed", True) else "*"
        row = values.setdefault(result["row"], {})
        row.update({key: f"{value}{mark}" for key, value in result["published"].items()})
    metrics = list(dict.fromkeys(key for row in values.values() for key in row))
    if len(metrics) > len(values):  # BEIR: a row for each collection
        cells = [[key, *(row.get(key, "") for row in values.values())] for key in metrics]
        return table([name, *values], cells)
    cells = [[key, *(row.get(metric, "") for metric in metrics)] for key, row in values.items()]
    return table([name, *metrics], cells)


def commands(results: list[dict[str, Any]]) -> str:
    """The command and the last measured values of every result."""
    rows = []
    for one in results:
        values, measured = one["published"], one["measured"] or {}
        metric = ", ".join(values) if len(values) < 4 else "all"
        found = ", ".join(str(value) for value in measured.values()) or "not measured"
        what = f"{one['row']}, {one['table']}: {metric}"
        rows.append([what, f"± {one['tolerance']}", found, f"`{one['command']}`"])
    return table(["result", "tolerance", "measured", "command"], rows)


def steps(paper: dict[str, Any]) -> str:
    """Every step of a paper with its expected time and memory."""
    rows = []
    for one in paper["steps"]:
        hours = ["", ""] if "hours" not in one else [str(hour) for hour in one["hours"]]
        rows.append([one["step"], *hours, str(one.get("memory", "")), f"`{one['command']}`"])
    return table(["step", "hours, 1 A800", "16", "GiB per GPU", "command"], rows)


def render(page: str) -> str:
    """The page with its tables, between `<!-- ledger: name -->` and `<!-- end -->`, renewed."""
    papers = ledger()
    results = [result for paper in papers.values() for result in paper["results"]]
    tables = {name: published(results, name) for name in {one["table"] for one in results}}
    tables |= {f"steps {name}": steps(paper) for name, paper in papers.items()}
    tables["commands"] = commands(results)
    for name, text in tables.items():
        before, start, rest = page.partition(f"<!-- ledger: {name} -->\n")
        page = before + start + "\n" + text + "\n\n" + rest[rest.index("<!-- end -->") :]
    return page


if __name__ == "__main__":
    PAGE.write_text(render(PAGE.read_text()))
