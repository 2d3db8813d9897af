"""Render the ledger into the tables of docs/papers.md and docs/results.md.

python -m reproduce.tables
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from reproduce import run

HERE = Path(__file__).parent
PAGES = [HERE.parent / "docs" / name for name in ("papers.md", "results.md")]
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
    """The command and the status of every published result."""
    rows = []
    for one in results:
        metric = ", ".join(one["published"]) if len(one["published"]) < 4 else "all"
        what = f"{one['row']}, {one['table']}: {metric}"
        rows.append([what, f"± {one['tolerance']}", "not run", f"`{one['command']}`"])
    return table(["result", "tolerance", "status", "command"], rows)


def steps(paper: dict[str, Any]) -> str:
    """Every step of a paper with its expected time and memory."""
    rows = []
    for one in paper["steps"]:
        hours = ["", ""] if "hours" not in one else [str(hour) for hour in one["hours"]]
        rows.append([one["step"], *hours, str(one.get("memory", "")), f"`{one['command']}`"])
    return table(["step", "hours, 1 A800", "16", "GiB per GPU", "command"], rows)


def expected(row: dict[str, Any]) -> str:
    """The expectation of a measured row."""
    expect = row["expect"]
    if "values" in expect:
        values = ", ".join(f"{name} {value}" for name, value in expect["values"].items())
        return f"{values}, ± {row['tolerance']}"
    return "ahead with every seed, p < .05" if "better" in expect else f"equals {row['peer']}"


def found(row: dict[str, Any], record: dict[str, Any]) -> str:
    """The measured values of a row."""
    values = record["values"]
    if "better" not in row["expect"]:
        return ", ".join(f"{name} {value}" for name, value in values.items())
    ahead, behind = (" / ".join(f"{x:.3f}" for x in values[key]) for key in ("better", "than"))
    p = "< 1e-4" if values["p"] < 1e-4 else f"= {values['p']}"
    if "p_seeds" in values:
        p += f" over queries, p = {values['p_seeds']} over seeds"
    return (
        f"{values['measure']} {ahead} against {behind}: {values['difference']:+.3f}, p {p},"
        f" {values['queries']:,} queries"
    )


def measured(group: str | None) -> str:
    """The measured rows of a group with their status; None: the tests."""
    records, rows = run.read(run.MEASURED), []
    for name, row in run.rows().items():
        if row.get("group") != group:
            continue
        record = records.get(name, {})
        cells = ["", "not run", ""]
        if record.get("row") == run.row_digest(row):  # else of other commands
            status = "measured: " + ("as expected" if record["passed"] else "not as expected")
            cells = [found(row, record), status, f"{record['date']}, {record['seconds']} s"]
        about = [f"`{name}`", row["claim"]]
        about += [] if group is None else [f"{row['collection']} ({row['source']})"]
        rows.append([*about, expected(row), *cells])
    head = ["row", "claim", *([] if group is None else ["collection (source)"])]
    return table([*head, "expected", "measured", "status", "date, time"], rows)


def machines() -> str:
    """Where the measured rows were measured."""
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, record in run.read(run.MEASURED).items():
        versions = ", ".join(f"{key} {value}" for key, value in record["versions"].items())
        rows.setdefault((record["machine"], versions), []).append(f"`{name}`")
    return table(
        ["machine", "versions", "rows"], [[*where, ", ".join(of)] for where, of in rows.items()]
    )


def tables() -> dict[str, str]:
    """Every table by its name in `<!-- ledger: name -->`."""
    papers = ledger()
    results = [result for paper in papers.values() for result in paper["results"]]
    found = {name: published(results, name) for name in {one["table"] for one in results}}
    found |= {f"steps {name}": steps(paper) for name, paper in papers.items()}
    groups = {row.get("group") for row in run.rows().values()}
    found |= {f"measured {group or 'tests'}": measured(group) for group in groups}
    return {**found, "commands": commands(results), "machines": machines()}


def render(page: str) -> str:
    """The page with its tables, between `<!-- ledger: name -->` and `<!-- end -->`, renewed."""
    for name, text in tables().items():
        mark = f"<!-- ledger: {name} -->\n"
        if mark in page:
            before, _, rest = page.partition(mark)
            page = before + mark + "\n" + text + "\n\n" + rest[rest.index("<!-- end -->") :]
    return page


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(render(path.read_text()))
