"""The collections of a suite in one table with the mean; several systems side by side.

    python -m caravan.report collections runs/beir/bm25 runs/beir/retriever

A folder is that of an `evaluate.py` with `collections=[...]`. One system of one stage shows all of
its measures; several systems or stages show the first measure of each. With one folder, all
measures are written there as collections.csv.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import fmean
from typing import Any

from caravan.atomic import replacing
from caravan.errors import InputError
from caravan.report.records import read_metrics

MEAN = "mean"
Column = tuple[str, str]
"""A system's (or stage's) name, and a measure."""
Figures = dict[Column, dict[str, float]]
"""Of each column, the figure of each collection, and of the mean."""


def collect(folders: list[Path]) -> tuple[list[str], Figures, list[str]]:
    """The figures of one or more suites.

    A system is called by its folder, and by the folders above it where those are alike.

    Returns:
        Collections in order, those of a group followed by the group's own row, and last the mean
        over what all systems have; figures; and what is missing, a sentence for each system.

    Raises:
        InputError: a folder holds no suite, or none of its collections is finished; two folders
            have measured different things under one name.
    """
    rows: dict[str, str] = {}  # collection: its group
    measured: dict[str, tuple[Path, Any, Any]] = {}
    columns: Figures = {}
    told = []
    for folder, system in zip(folders, _told_apart(folders), strict=True):
        record = _read(folder)
        for name, own in record["collections"].items():
            rows[name] = own["group"]
            there, *before = measured.setdefault(
                name, (folder, own.get("digest"), own.get("split"))
            )
            if before != [own.get("digest"), own.get("split")]:
                raise InputError(
                    f"{folder} has measured {name} with another content or split than {there}; "
                    "evaluate one of them anew, or leave it out"
                )
            for stage, overall in own["stages"].items():
                one = len(own["stages"]) == 1
                label = system if system and one else " ".join(filter(None, (system, stage)))
                for measure, figure in overall.items():
                    columns.setdefault((label, measure), {})[name] = figure
        if record["failed"]:
            missing = ", ".join(record["failed"])
            told.append(f"{system or record['system']}: not in the mean, as they failed: {missing}")
    measures = list(dict.fromkeys(measure for _, measure in columns))
    labels = list(dict.fromkeys(label for label, _ in columns))
    columns = {(label, m): columns.get((label, m), {}) for m in measures for label in labels}
    of_all = {
        name
        for name in rows
        if all(any(name in columns[label, m] for m in measures) for label in labels)
    }
    order, counted = _with_groups(rows, columns, of_all)
    common = [row for row, members in counted.items() if of_all.issuperset(members)]
    mean = MEAN if len(common) == len(counted) else f"{MEAN} of {len(common)} that all have"
    for figures in columns.values():
        _add_mean(figures, mean, common)
    return [*order, mean], columns, told


def _told_apart(folders: list[Path]) -> list[str]:
    """The ends of the folders' paths, as long as they must be to differ; none for one alone."""
    if len(folders) == 1:
        return [""]
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-depth:]) for one in parts]
        if len(set(names)) == len(names):
            return names
    again = next(folder for folder, one in zip(folders, parts, strict=True) if parts.count(one) > 1)
    raise InputError(f"{again} is given twice; give folders that differ")


def _read(folder: Path) -> dict[str, Any]:
    record = read_metrics(folder) or {}
    if "collections" not in record:
        raise InputError(
            f"{folder} holds no evaluation of several collections; make one with evaluate.py"
            " data.path=<folder> 'collections=[...]'"
        )
    if not record["collections"]:
        name, reason = next(iter(record["failed"].items()))
        raise InputError(
            f"no collection of {folder} is finished: {name}: {reason}; mend what failed, and start"
            " its evaluate.py again"
        )
    return record


def _with_groups(
    rows: dict[str, str], columns: Figures, of_all: set[str]
) -> tuple[list[str], dict[str, list[str]]]:
    """Rows in order, a group of several collections with a row of its own after them; and the rows
    that count in the mean, with the collections behind each.

    A group's figure is the mean over what all systems have of it.
    """
    order, counted = list(rows), {}
    for group in dict.fromkeys(rows.values()):
        members = [name for name, of in rows.items() if of == group]
        if len(members) == 1:
            counted[members[0]] = members
            continue
        shared = [name for name in members if name in of_all]
        row = f"{group} ({MEAN} of {len(shared or members)})"
        if 0 < len(shared) < len(members):
            row = f"{group} ({MEAN} of {len(shared)} that all have)"
        order.insert(order.index(members[-1]) + 1, row)
        counted[row] = shared or members
        for figures in columns.values():
            _add_mean(figures, row, counted[row])
    return order, counted


def _add_mean(figures: dict[str, float], row: str, of: list[str]) -> None:
    if of and all(name in figures for name in of):
        figures[row] = fmean(figures[name] for name in of)


def show(folders: list[Path]) -> None:
    """Print the table; of one folder, write collections.csv."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows, columns, told = collect(folders)
    labels = list(dict.fromkeys(label for label, _ in columns))
    measures = list(dict.fromkeys(measure for _, measure in columns))
    several = len(labels) > 1
    shown = [one for one in columns if not several or one[1] == measures[0]]
    table = Table(
        title=Text(measures[0] if several else labels[0]),
        caption=None if several else "all collections weigh the same in the mean",
    )
    table.add_column("collection")
    for label, measure in shown:
        table.add_column(Text(label if several else measure), justify="right")
    for row in rows:
        if row == rows[-1]:
            table.add_section()
        table.add_row(Text(row), *(_cell(columns[one].get(row)) for one in shown))
    console = Console(soft_wrap=True, markup=False)
    console.print(table)
    for line in told:
        console.print(line, highlight=False)
    if len(folders) == 1:
        path = folders[0] / "collections.csv"
        with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["collection", *(" ".join(one) for one in columns)])
            for row in rows:
                writer.writerow([row, *(columns[one].get(row, "") for one in columns)])
        console.print(f"table {path}", highlight=False)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
