"""Tables of evaluations: those below a folder, the stages of one, the collections of suites.

    python -m caravan.report table runs/quickstart
    python -m caravan.report collections runs/beir/bm25 runs/beir/retriever

A suite is the folder of an `evaluate.py` with `collections=[...]`. One system of one stage shows
all of its measures; several systems or stages show the first measure of each. A mean is over the
collections that all columns of its measure have, so that means are comparable, or over those of
each column if there are none; its row names which, and how many they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd

from caravan.errors import InputError
from caravan.files import replacing
from caravan.manifests import write_json
from caravan.report.records import (
    distinct,
    judged_on,
    read_metrics,
    refuse_mixed,
    refuse_partial,
    to_depth,
)
from caravan.report.tables import NONE, Screen, Table, best, depth_note, score, signed

Records = dict[str, dict[str, Any]]
"""`metrics.json` of evaluations, or of the systems in them, by name."""
MEAN = "mean"
COMMON, OWN = " that all have", " of its own"
"""The collections of a mean, if they are not all of them."""
Columns = dict[tuple[str, str], dict[str, float]]
"""{collection or mean: score} of each system (or stage) and measure."""


def collect(folder: Path) -> Records:
    """A record of every system below `folder`, the worst first by its first measure.

    A suite is shown by its mean.

    Raises:
        InputError: If there is no evaluation, one has no scores, or evaluations are of different
            collections or splits.
    """
    records = {}
    for path in sorted(folder.rglob("metrics.json")):
        record = read_metrics(path.parent) or {}
        if "overall" in record:
            if not record["overall"] and not record["too_deep"]:
                why, remedy = "the measures were an empty list", " with measures=[MRR@10]"
                if record.get("failed"):
                    why, remedy = "each of its collections failed", ""
                message = f"{path} has no scores, because {why}; run evaluate.py again{remedy}"
                raise InputError("no-scores", f"{message}, or remove the file")
            records[str(path.parent.relative_to(folder))] = record
    for suite in [name for name, record in records.items() if "collections" in record]:
        inside = [name for name in records if folder / suite in (folder / name).parents]
        records = {name: record for name, record in records.items() if name not in inside}
    for name, record in records.items():
        refuse_partial(folder / name, record)
    if not records:
        message = f"{folder} holds no evaluation (metrics.json); make one with evaluate.py"
        raise InputError("no-evaluation", message)
    remedy = f"give a folder of one, or see all by python -m caravan.report page {folder}"
    refuse_mixed({name: judged_on(record) for name, record in records.items()}, remedy)
    return rows(records)


def rows(records: Records, names: Mapping[str, str] | None = None) -> Records:
    """A record {overall, seconds, run, folder, ...} for each row of a table, the worst first.

    An evaluation of several stages gives a row for each, named after the stage if no other row is;
    a run that an evaluation has alone is shown once, as that evaluation.

    Args:
        records: evaluations, by folder.
        names: names of evaluations by folder, if they differ from the folder.
    """
    names = names or {}
    alone = {name: r for name, r in records.items() if len(r.get("stages", ())) <= 1}
    shown = {stage["run_xxh3"] for record in alone.values() for stage in record.get("stages", ())}
    candidates, found = [], []
    for folder, record in alone.items():
        own = [folder]
        if folder == ".":  # a run directory by itself is named after its system
            system = record.get("system", folder)
            own = [system, f"./{system}"]
        candidates.append([names[folder], *own] if folder in names else own)
        found.append({**record, "folder": folder})
    for folder, record in records.items():
        for stage in () if folder in alone else record["stages"]:
            if stage["run_xxh3"] not in shown:
                name = stage["stage"]
                longer = (f"{names.get(folder, folder)}/{name}", f"{name} of {folder}")
                candidates.append([name, *longer])
                found.append({**record, **stage, "folder": folder})
    (first, *_) = measures_of(found) or [""]
    of_name = zip(distinct(candidates), found, strict=True)
    return dict(sorted(of_name, key=lambda item: item[1]["overall"].get(first, 0.0)))


def measures_of(scored: Iterable[dict[str, Any]]) -> list[str]:
    """The measures of several systems or stages, each once, in the order met."""
    return list(dict.fromkeys(measure for one in scored for measure in one["overall"]))


def where(record: Mapping[str, Any]) -> str:
    """Name and split of the collection of an evaluation."""
    return f"{record['collection']['name']} {record['split']}"


def results_table(systems: Records, name: str = "results") -> Table:
    """The scores and seconds of systems on one collection."""
    measures = measures_of(systems.values())
    scores = [[of["overall"].get(measure) for measure in measures] for of in systems.values()]
    first = next(iter(systems.values()))
    caption = (
        f"{where(first)}: {first['queries']:,} queries, {first['passages']:,} passages; best in"
        " bold. Seconds: embed or index the corpus, and search; or rerank."
    )
    cells = [
        [name, *map(score, row), f"{of['seconds']:,.1f}"]
        for (name, of), row in zip(systems.items(), scores, strict=True)
    ]
    heads = ["system", *measures, "seconds"]
    return Table(name, caption + depth_note(systems), heads, cells, strong=best(scores))


def show(folder: Path) -> None:
    """Print the table and the places of all files; write `summary.json`."""
    systems = collect(folder)
    path = folder / "summary.json"
    scores = {n: {**r["overall"], "seconds": round(r["seconds"], 1)} for n, r in systems.items()}
    write_json(path, scores)
    screen = Screen()
    screen.table(results_table(systems))
    for name, record in systems.items():
        screen.line(f"run   {name:<12} {folder / record['folder'] / record['run']}")
    for model in sorted(folder.rglob("model/caravan.json")):
        screen.line(f"model {model.parent.parent.name:<12} {model.parent}")
    screen.line(f"table              {path}")
    if any(folder.rglob("events.out.tfevents.*")):
        screen.line(f"curves             tensorboard --logdir {folder}")


def stages_table(metrics: dict[str, Any], name: str = "stages", title: str = "") -> Table | None:
    """The stages of one evaluation: scores, gain over the best stage before, queries a second.

    None if no run is deep enough for any of the measures.
    """
    stages = metrics["stages"]
    measures = measures_of(stages)
    if not measures:
        return None
    scores = [[stage["overall"].get(measure) for measure in measures] for stage in stages]
    cells = []
    for stage, row in zip(stages, scores, strict=True):
        gain, speed = stage.get("gain"), stage.get("queries_per_second")
        more = [NONE if gain is None else signed(gain), NONE if speed is None else f"{speed:,.1f}"]
        cells.append([stage["stage"], *map(score, row), *more])
    caption = (
        f"{title}{where(metrics)}: {metrics['queries']:,} queries; best in bold. Gain: in"
        f" {measures[0]}, over the best stage before; queries/s: without what is done once for a"
        f" collection.{depth_note({stage['stage']: stage for stage in stages})}"
    )
    heads = ["stage", *measures, "gain", "queries/s"]
    return Table(name, caption, heads, cells, strong=best(scores))


def show_stages(metrics: dict[str, Any]) -> None:
    """Print the stages of one evaluation, from the contents of its `metrics.json`."""
    if table := stages_table(to_depth(metrics)):
        Screen().table(table)


# --- suites ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Suites:
    """The scores of one or more suites, side by side.

    Args:
        rows: the collections in order, those of a group followed by the group's mean, and last the
            means over all.
        columns: by system (or stage) and measure.
        notes: what is missing, a sentence for each system.
    """

    rows: list[str]
    columns: Columns
    notes: list[str]

    def table(self) -> Table:
        """All measures of one system, or the first measure of several."""
        labels = list(dict.fromkeys(label for label, _ in self.columns))
        first = next(measure for _, measure in self.columns)
        several = len(labels) > 1
        shown = {
            (n if several else m): of
            for (n, m), of in self.columns.items()
            if not several or m == first
        }
        cells = [[row, *(score(of.get(row)) for of in shown.values())] for row in self.rows]
        title = first if several else labels[0]
        caption = f"{title}: all collections weigh the same in a mean."
        return Table("overview", caption, ["collection", *shown], cells)


def collect_suites(suites: Mapping[str, dict[str, Any]]) -> Suites:
    """Put the collections of suites into one table.

    Args:
        suites: of `records.to_depth`, by the name of the system; "" for one alone.

    Raises:
        InputError: If nothing has scores, or a collection differs between suites.
    """
    groups: dict[str, str] = {}
    measured: dict[str, tuple[str, Any, Any]] = {}
    scores: Columns = {}
    short: Records = {}  # stages whose runs some measures look deeper than
    notes = []
    for system, record in suites.items():
        name = system or record.get("system", "the suite")
        for collection, own in record["collections"].items():
            groups[collection] = own["group"]
            content = (own.get("digest"), own.get("split"))
            there, *before = measured.setdefault(collection, (name, *content))
            if tuple(before) != content:
                message = (
                    f"{collection}: its content or split in {name} is not that in {there};"
                    " evaluate one of them again, or leave it out"
                )
                raise InputError("mixed-collections", message)
            for stage, overall in own["stages"].items():
                alone = system and len(own["stages"]) == 1
                label = system if alone else f"{system} {stage}".strip()
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
    labels = dict.fromkeys(label for label, _ in scores)
    columns = {(label, m): scores.get((label, m), {}) for m in measures for label in labels}
    return Suites(_with_means(groups, columns), columns, notes)


def _with_means(groups: dict[str, str], columns: Columns) -> list[str]:
    """Add the means of groups and of all to the columns; returns all rows in order.

    Args:
        groups: of each collection, the group that counts once.
    """
    members: dict[str, list[str]] = {}
    for name, group in groups.items():
        members.setdefault(group, []).append(name)
    after: dict[str, dict[str, None]] = {name: {} for name in groups}  # rows after a collection's
    last: dict[str, None] = {}
    having = {column: set(values) for column, values in columns.items()}
    for column, values in columns.items():
        if not values:
            continue
        # Empty columns do not count: TREC DL's passages have MRR(rel=2)@10 in place of MRR@10.
        beside = [of for other, of in having.items() if other[1] == column[1] and of]
        common = set.intersection(*beside)
        over = common or having[column]
        whose = "" if len(beside) < 2 else COMMON if common else OWN
        counted = []
        for group, every in members.items():
            shared = [name for name in every if name in over]
            there = shared or [name for name in every if name in having[column]]
            if shared:
                counted.append(fmean(values[name] for name in shared))
            if there and len(every) > 1:
                which = (whose if shared else OWN) if len(there) < len(every) else ""
                row = f"{group} ({MEAN} of {len(there)}{which})"
                values[row] = fmean(values[name] for name in there)
                after[every[-1]][row] = None
        # If all have a part of a group, the row of the group names it.
        whole = len(counted) == len(members) and (whose == COMMON or over >= groups.keys())
        row = MEAN if whole else f"{MEAN} of {len(counted)}{whose}"
        values[row] = fmean(counted)
        last[row] = None
    return [*(row for name in groups for row in (name, *after[name])), *last]


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
        columns = {" ".join(column): values for column, values in found.columns.items()}
        with replacing(path) as scratch:
            pd.DataFrame(columns, found.rows).to_csv(scratch, index_label="collection")
        screen.line(f"table {path}")


def show_suite(metrics: dict[str, Any], folder: Path) -> None:
    """Print the collections of one suite, and write collections.csv into its folder.

    Args:
        metrics: the contents of its `metrics.json`.
        folder: its run directory.
    """
    show_suites({"": to_depth(metrics)}, folder)
