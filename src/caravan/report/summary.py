"""The tables of evaluations: all below a folder, and the stages of one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.report import tables
from caravan.report.records import (
    Records,
    distinct,
    judged_on,
    read_metrics,
    refuse_mixed,
    refuse_partial,
    to_depth,
)
from caravan.report.tables import NONE, Table, best, depth_note, score, signed


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
        tables.show(table)
