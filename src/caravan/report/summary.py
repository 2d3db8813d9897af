"""The tables of evaluations: all below a folder, the stages of one, and suites of collections.

    python -m caravan.report collections runs/beir/bm25 runs/beir/retriever

A suite is an evaluation of several collections (`evaluate.py collections=[...]`). One system of one
stage shows all of its measures; several systems or stages show the first measure of each. A mean is
over the collections for which all systems have the measure, so that means are comparable; a note
gives their number if that is not all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from caravan.errors import InputError, printable
from caravan.files import replacing
from caravan.report.records import (
    Records,
    distinct,
    judged_on,
    path_names,
    read_metrics,
    refuse_mixed,
    refuse_partial,
    to_depth,
)
from caravan.report.tables import NONE, Table, best, depth_note, score, show, signed

MEAN = "mean"


def collect(folder: Path) -> Records:
    """A record of every system below `folder`, the worst first by its first measure.

    A suite is shown by its mean.

    Raises:
        InputError: If there is no evaluation, one has no scores, or evaluations are of different
            collections or splits.
    """
    records: Records = {}
    suites: list[Path] = []
    for path in sorted(folder.rglob("metrics.json"), key=lambda path: path.parent.parts):
        home = path.parent
        record = read_metrics(home) or {}
        if "overall" not in record or any(suite in home.parents for suite in suites):
            continue
        if not record["overall"] and not record["too_deep"]:
            message = f"{path} has no scores; run evaluate.py again, or remove the file"
            raise InputError("no-scores", message)
        refuse_partial(home, record)
        suites += [home] if "collections" in record else []
        records[str(home.relative_to(folder))] = record
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


def results_table(systems: Records, name: str = "results", p_values: Sequence[str] = ()) -> Table:
    """The scores and seconds of systems on one collection.

    Args:
        p_values: of each system against the one in the row before.
    """
    measures = measures_of(systems.values())
    scores = [[of["overall"].get(measure) for measure in measures] for of in systems.values()]
    first = next(iter(systems.values()))
    caption = (
        f"{where(first)}: {first['queries']:,} queries, {first['passages']:,} passages; best in"
        " bold. Seconds: to embed or index the corpus and to search, or to rerank, without what was"
        " on disk already."
    )
    cells = [
        [name, *map(score, row), f"{of['seconds']:,.1f}"]
        for (name, of), row in zip(systems.items(), scores, strict=True)
    ]
    heads = ["system", *measures, "seconds"]
    if p_values:
        caption += f" p: paired t-test in {measures[0]} against the row before."
        heads.insert(-1, "p")
        for row, p in zip(cells, p_values, strict=True):
            row.insert(-1, p)
    return Table(name, caption + depth_note(systems), heads, cells, strong=best(scores))


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
        show(table)


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
        suites: of `read_suites`, or of `records.to_depth` by name.
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
