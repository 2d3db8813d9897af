"""The table of suites: evaluations of several collections (`evaluate.py collections=[...]`).

    python -m caravan.report collections runs/beir/bm25 runs/beir/retriever

One system of one stage shows all of its measures; several systems or stages show the first measure
of each. A mean is over the collections for which all systems have the measure, so that means are
comparable; a note gives their number if that is not all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from caravan.errors import InputError, printable
from caravan.files import replacing
from caravan.report.records import Records, distinct, path_names, read_metrics, to_depth
from caravan.report.tables import NONE, Table, best, depth_note, score, show

MEAN = "mean"


def read_suites(folders: Sequence[Path]) -> Records:
    """The records of suites, by the ends of the folders' paths; "" for one alone.

    Raises:
        InputError: If a folder is given twice, or holds no suite with a finished collection.
    """
    records = []
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if paths.count(path) > 1:
            raise InputError("given-twice", f"{folder} is given twice; name folders that differ")
        record = read_metrics(folder) or {}
        if not record.get("collections"):
            failed = "; ".join(f"{n}: {reason}" for n, reason in record.get("failed", {}).items())
            why = f" ({failed}); correct what failed, and start" if failed else "; run"
            raise InputError(
                "no-evaluation",
                f"{folder} has no evaluation of several collections that is finished{why}"
                " evaluate.py data.path=<folder> 'collections=[...]'",
            )
        records.append(record)
    names = distinct([path_names(path) for path in paths]) if len(paths) > 1 else [""]
    return dict(zip(names, records, strict=True))


def collect_suites(suites: Mapping[str, dict[str, Any]]) -> tuple[pd.DataFrame, list[str]]:
    """Put the collections of suites into one table.

    Args:
        suites: of `records.to_depth`, by the name of the system; "" for one alone.

    Returns:
        The scores: a row for each collection, one for the mean of each group of several, and one
        for the mean of all; a column for each (system or stage, measure). And notes on what is
        missing.

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
    columns = pd.MultiIndex.from_product([systems, measures])
    frame = pd.DataFrame(scores, list(groups)).reindex(columns=columns)
    means, partial = _means(frame, pd.Series(groups))
    return pd.concat([frame, means]), notes + partial


def _means(scores: pd.DataFrame, groups: pd.Series) -> tuple[pd.DataFrame, list[str]]:
    """Rows with the means of groups and of all, and a note for each mean of a part.

    Args:
        scores: [collections, (system, measure)], NaN if missing.
        groups: of each collection, the group that counts once.
    """
    several = [group for group, size in groups.value_counts(sort=False).items() if size > 1]
    means, notes = [], []
    for measure in scores.columns.unique(1):
        # Empty columns do not count: TREC DL's passages have MRR(rel=2)@10 in place of MRR@10.
        part = scores.loc[:, (slice(None), [measure])].dropna(axis=1, how="all")
        common = part.dropna()
        of_groups = common.groupby(groups, sort=False).mean()
        rows = of_groups.reindex(several).rename(index="{} (mean)".format)
        rows.loc[MEAN] = of_groups.mean()
        means.append(rows)
        if len(common) < len(scores):
            number = f"{len(common)} of {len(scores)}"
            notes.append(f"mean {measure}: over {number} collections, those that all systems have")
    return pd.concat(means, axis=1), notes


def suites_table(scores: pd.DataFrame) -> Table:
    """All measures of one system, or the first measure of several."""
    systems, measures = (scores.columns.unique(level) for level in (0, 1))
    several = len(systems) > 1
    title = measures[0] if several else systems[0]
    shown = scores.xs(title, axis=1, level=1 if several else 0)
    cells = [[row, *map(score, values)] for row, *values in shown.itertuples(name=None)]
    caption = f"{title} of each collection, which all weigh the same in a mean"
    caption += "; best of each row in bold." if several else "."
    highest = best(shown.T.to_numpy(), 0) if several else ()
    strong = frozenset((row, column + 1) for column, row in highest)
    return Table("overview", caption, ["collection", *shown.columns], cells, strong=strong)


def means_sentence(scores: pd.DataFrame) -> str:
    """The mean of each system by the first measure, the best first; empty if none has one."""
    measure = scores.columns.unique(1)[0]
    means = scores.loc[MEAN].xs(measure, level=1).dropna().sort_values(ascending=False)
    found = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
    shared = " that all systems have" if len(means) > 1 else ""
    return f"Mean {measure} of the collections{shared}: {found}." if found else ""


def show_suites(suites: Records, folder: Path | None = None) -> None:
    """Print the collections of suites with their means.

    Args:
        suites: of `read_suites`.
        folder: of one suite, where collections.csv is written.
    """
    scores, notes = collect_suites(suites)
    show(suites_table(scores))
    for note in notes:
        show(note)
    if folder is not None:
        path = folder / "collections.csv"
        columns = [" ".join(column) for column in scores.columns]
        with replacing(path) as scratch:
            scores.set_axis(columns, axis=1).to_csv(scratch, index_label="collection")
        show(f"table {path}")


def show_suite(metrics: dict[str, Any], folder: Path) -> None:
    """Print the collections of one suite, and write collections.csv into its folder.

    Args:
        metrics: the contents of its `metrics.json`.
        folder: its run directory.
    """
    show_suites({"": to_depth(metrics)}, folder)
