"""The table of suites: evaluations of several collections (`evaluate.py collections=[...]`).

    python -m caravan.report collections runs/beir/bm25 runs/beir/retriever

One system of one stage shows all of its measures; several systems or stages show the first measure
of each. A mean is over the collections that all columns of its measure have, so that means are
comparable, or over those of each column if there are none; its row says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from caravan.errors import InputError, printable
from caravan.files import replacing
from caravan.report.records import Records, distinct, read_metrics, to_depth
from caravan.report.tables import NONE, Screen, Table, depth_note, score

MEAN, OWN = "mean", "separate mean"
"""Rows of means; the second if systems have no collection in common."""


@dataclass(frozen=True)
class Suites:
    """The scores of one or more suites, side by side.

    Args:
        scores: a row for each collection, after a group its mean, and last the means over all; a
            column for each (system or stage, measure).
        notes: what is missing, a sentence for each system.
    """

    scores: pd.DataFrame
    notes: list[str]

    def table(self) -> Table:
        """All measures of one system, or the first measure of several."""
        systems, measures = (self.scores.columns.unique(level) for level in (0, 1))
        several = len(systems) > 1
        title = measures[0] if several else systems[0]
        shown = self.scores.xs(title, axis=1, level=1 if several else 0)
        shown = shown.astype(object).where(shown.notna(), None)
        cells = [[row, *map(score, values)] for row, *values in shown.itertuples(name=None)]
        caption = f"{title}: all collections weigh the same in a mean."
        return Table("overview", caption, ["collection", *shown.columns], cells)


def collect_suites(suites: Mapping[str, dict[str, Any]]) -> Suites:
    """Put the collections of suites into one table.

    Args:
        suites: of `records.to_depth`, by the name of the system; "" for one alone.

    Raises:
        InputError: If nothing has scores, or a collection differs between suites.
    """
    groups: dict[str, str] = {}
    contents: dict[str, tuple[Any, Any]] = {}
    scores: dict[tuple[str, str], dict[str, float]] = {}
    short: Records = {}  # stages whose runs some measures look deeper than
    notes = []
    for system, record in suites.items():
        name = system or record.get("system", "the suite")
        for collection, own in record["collections"].items():
            collection = printable(collection)  # pandas refuses half of a surrogate pair
            groups[collection] = printable(own["group"])
            content = (own.get("digest"), own.get("split"))
            if contents.setdefault(collection, content) != content:
                message = f"{name} has another content or split of {collection} than those before"
                raise InputError("mixed-collections", f"{message}; evaluate it again")
            for stage, overall in own["stages"].items():
                alone = system and len(own["stages"]) == 1
                label = printable(system if alone else f"{system} {stage}".strip())
                if stage in own["too_deep"]:
                    short[label] = {"depth": own["depths"][stage], "too_deep": own["too_deep"]}
                for measure, value in overall.items():
                    scores.setdefault((label, measure), {})[collection] = value
        if record["failed"]:
            notes.append(f"{name}: not in the mean, as they failed: {', '.join(record['failed'])}")
    if note := depth_note(short):
        notes.append(note.strip().replace(NONE, "-"))
    if not scores:
        why = " ".join(notes) or "their stages are empty; evaluate them again"
        raise InputError("no-scores", f"{', '.join(suites)}: no collection has scores: {why}")
    measures = dict.fromkeys(measure for _, measure in scores)
    systems = dict.fromkeys(system for system, _ in scores)
    columns = [(system, measure) for measure in measures for system in systems]
    frame = pd.DataFrame(scores, list(groups)).reindex(columns=pd.MultiIndex.from_tuples(columns))
    return Suites(_with_means(frame, pd.Series(groups)), notes)


def _with_means(scores: pd.DataFrame, groups: pd.Series) -> pd.DataFrame:
    """The scores with rows for the means of groups and of all.

    Args:
        scores: [collections, (system, measure)], NaN if missing.
        groups: of each collection, the group that counts once.
    """
    means: dict[str, dict[tuple[str, str], float]] = {}
    sizes = groups.value_counts(sort=False)
    for measure in scores.columns.unique(1):
        # Empty columns do not count: TREC DL's passages have MRR(rel=2)@10 in place of MRR@10.
        part = scores.loc[:, (slice(None), [measure])].dropna(axis=1, how="all")
        common = part.dropna()
        own = common.empty
        whose = "" if part.shape[1] == 1 else " that all have"
        by_group = (part if own else common).groupby(groups, sort=False)
        of_group = by_group.mean()
        for group, number in by_group.size().items():
            if sizes[group] > 1:
                which = whose if number < sizes[group] else ""
                row = f"{group} ({OWN if own else f'{MEAN} of {number}{which}'})"
                means.setdefault(row, {}).update(of_group.loc[group])
        # If all have a part of a group, the row of the group names it.
        whole = len(of_group) == len(sizes) and (whose or len(common) == len(scores))
        row = OWN if own else MEAN if whole else f"{MEAN} of {len(of_group)}{whose}"
        means.setdefault(row, {}).update(of_group.mean())
    order = []
    last = groups.drop_duplicates(keep="last").index
    for name in scores.index:
        after = f"{groups[name]} (" if name in last else "\n"
        order += [name, *(row for row in means if row.startswith(after))]
    order += [row for row in means if row not in order]
    return pd.concat([scores, pd.DataFrame(means).T]).reindex(order)


def read_suites(folders: Sequence[Path]) -> Records:
    """The records of suites, by the ends of the folders' paths; "" for one alone.

    Raises:
        InputError: If a folder is given twice, or holds no suite with a finished collection.
    """
    records = []
    parts = [folder.resolve().parts for folder in folders]
    for folder, own in zip(folders, parts, strict=True):
        if parts.count(own) > 1:
            raise InputError("given-twice", f"{folder} is given twice; name folders that differ")
        record = read_metrics(folder) or {}
        if not record.get("collections"):
            command = "evaluate.py data.path=<folder> 'collections=[...]'"
            failed = "; ".join(f"{n}: {reason}" for n, reason in record.get("failed", {}).items())
            why = f" ({failed}); correct what failed, and start" if failed else "; run"
            message = f"{folder} has no evaluation of several collections that is finished{why}"
            raise InputError("no-evaluation", f"{message} {command}")
        records.append(record)
    names = distinct([["/".join(own[-n:]) for n in range(1, len(own) + 1)] for own in parts])
    return dict(zip(names if len(names) > 1 else [""], records, strict=True))


def show_suites(suites: Records, folder: Path | None = None) -> None:
    """Print the collections of suites with their means.

    Args:
        suites: of `read_suites`.
        folder: of one suite, where collections.csv is written.
    """
    found = collect_suites(suites)
    screen = Screen()
    screen.table(found.table())
    for note in found.notes:
        screen.line(note)
    if folder is not None:
        path = folder / "collections.csv"
        columns = [" ".join(column) for column in found.scores.columns]
        with replacing(path) as scratch:
            found.scores.set_axis(columns, axis=1).to_csv(scratch, index_label="collection")
        screen.line(f"table {path}")


def show_suite(metrics: dict[str, Any], folder: Path) -> None:
    """Print the collections of one suite, and write collections.csv into its folder.

    Args:
        metrics: the contents of its `metrics.json`.
        folder: its run directory.
    """
    show_suites({"": to_depth(metrics)}, folder)
