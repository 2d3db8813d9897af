"""The collections of a suite in one table with the mean; several systems side by side.

    python -m caravan.report collections runs/beir/bm25 runs/beir/retriever

A folder is that of an `evaluate.py` with `collections=[...]`. One system of one stage shows all of
its measures; several systems or stages show the first measure of each. With one folder, all
measures are written there as collections.csv.

A mean is over the collections that all columns of its measure have, so that means compare; where
there is none of those, over what each column has. Its row says which, and how many they are.
"""

from __future__ import annotations

import csv
from pathlib import Path
from statistics import fmean
from typing import Any

from caravan.errors import InputError
from caravan.files import replacing
from caravan.report.records import read_metrics
from caravan.report.tables import NONE, Screen, Table, depth_note

MEAN = "mean"
COMMON, OWN = " that all have", " of its own"
"""Whose collections a mean is over, where it is not over all of them."""
Column = tuple[str, str]
"""A system's (or stage's) name, and a measure."""
Figures = dict[Column, dict[str, float]]
"""Of each column, the figure of each collection, and of the mean."""


def collect(folders: list[Path]) -> tuple[list[str], Figures, list[str]]:
    """The figures of one or more suites.

    A system is called by its folder, and by the folders above it where those are alike.

    Returns:
        Collections in order, those of a group followed by the group's own mean, and last the means;
        figures; and what is missing, a sentence for each system.

    Raises:
        InputError: a folder holds no suite, or none of its collections is finished; two folders
            have measured different things under one name.
    """
    rows: dict[str, str] = {}  # collection: its group
    measured: dict[str, tuple[Path, Any, Any]] = {}
    columns: Figures = {}
    short: dict[str, dict[str, Any]] = {}  # stages whose runs some measures look deeper than
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
                if stage in own["too_deep"]:
                    short[label] = {"depth": own["depths"][stage], "too_deep": own["too_deep"]}
                for measure, figure in overall.items():
                    columns.setdefault((label, measure), {})[name] = figure
        if record["failed"]:
            missing = ", ".join(record["failed"])
            name = system or record.get("system", folder)
            told.append(f"{name}: not in the mean, as they failed: {missing}")
    if note := depth_note({name or "the run": of for name, of in short.items()}):
        told.append(note.strip().replace(NONE, "-"))
    if not columns:
        why = " ".join(told) or "their stages are empty; evaluate them again"
        raise InputError(f"no collection of {', '.join(map(str, folders))} has scores: {why}")
    measures = list(dict.fromkeys(measure for _, measure in columns))
    labels = list(dict.fromkeys(label for label, _ in columns))
    columns = {(label, m): columns.get((label, m), {}) for m in measures for label in labels}
    return _with_means(rows, columns), columns, told


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
        name, reason = next(iter(record["failed"].items()), ("", "none was evaluated"))
        raise InputError(
            f"no collection of {folder} is finished: {name}: {reason}; mend what failed, and start"
            " its evaluate.py again"
        )
    return record


def _with_means(groups: dict[str, str], columns: Figures) -> list[str]:
    """Add the means of groups and of all to the figures; returns all rows in order.

    Args:
        groups: of each collection, the group that counts once.
    """
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    below: dict[str, dict[str, None]] = {name: {} for name in groups}  # rows after a collection's
    last: dict[str, None] = {}
    over = {column: _averaged(column, columns) for column in columns}
    for column, figures in columns.items():
        whose, names = over[column]
        own = set(figures)
        counted = []
        for group, every in members.items():
            common = [name for name in every if name in names]
            there = common or [name for name in every if name in own]
            if common:
                counted.append(fmean(figures[name] for name in common))
            if there and len(every) > 1:
                row = f"{group} ({_mean_of(there, every, whose if common else OWN)})"
                figures[row] = fmean(figures[name] for name in there)
                below[every[-1]][row] = None
        if counted:
            # Of a group that all have a part of, the row of the group says which.
            whole = len(counted) == len(members) and (whose == COMMON or names >= groups.keys())
            row = MEAN if whole else f"{MEAN} of {len(counted)}{whose}"
            figures[row] = fmean(counted)
            last[row] = None
    return [*(row for name in groups for row in (name, *below[name])), *last]


def _averaged(column: Column, columns: Figures) -> tuple[str, set[str]]:
    """Whose collections a column's mean is over, in words, and which they are.

    A column of another measure is not asked, nor one that is empty: TREC DL's passages have
    MRR(rel=2)@10 where others have MRR@10.
    """
    beside = [set(of) for (_, measure), of in columns.items() if measure == column[1] and of]
    if len(beside) < 2:
        return "", set(columns[column])
    common = set.intersection(*beside)
    return (COMMON, common) if common else (OWN, set(columns[column]))


def _mean_of(there: list[str], every: list[str], whose: str) -> str:
    return f"{MEAN} of {len(there)}{whose if len(there) < len(every) else ''}"


def show(folders: list[Path]) -> None:
    """Print the table; of one folder, write collections.csv."""
    rows, columns, told = collect(folders)
    labels = list(dict.fromkeys(label for label, _ in columns))
    measures = list(dict.fromkeys(measure for _, measure in columns))
    several = len(labels) > 1
    shown = [one for one in columns if not several or one[1] == measures[0]]
    table = Table(
        "collections",
        f"{measures[0] if several else labels[0]}: all collections weigh the same in a mean.",
        ["collection", *(label if several else measure for label, measure in shown)],
        [[row, *(_cell(columns[one].get(row)) for one in shown)] for row in rows],
    )
    screen = Screen()
    screen.table(table)
    for line in told:
        screen.line(line)
    if len(folders) == 1:
        path = folders[0] / "collections.csv"
        with replacing(path) as scratch, scratch.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["collection", *(" ".join(one) for one in columns)])
            for row in rows:
                writer.writerow([row, *(columns[one].get(row, "") for one in columns)])
        screen.line(f"table {path}")


def _cell(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"
