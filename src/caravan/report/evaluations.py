"""The sections of a page that evaluations fill: results, stages, differences, queries.

Tables come from metrics.json alone; what needs the figures of each query is scored from the run
files. Where those or their collection are gone, the page says so and has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from caravan import manifests
from caravan.errors import InputError
from caravan.report import compare, systems
from caravan.report.blocks import Block, Note, Queries, Section
from caravan.report.compare import Comparison, compared, interval, signed, slug
from caravan.report.examples import examples
from caravan.report.plots import Line, Plot, bars, changes, stage_lines
from caravan.report.summary import measures_of
from caravan.report.summary import rows as rows_of
from caravan.report.systems import System
from caravan.report.tables import NONE, Table, best, depth_note
from caravan.retrieval.metrics import parse_measure

Records = dict[str, dict[str, Any]]
"""metrics.json of evaluations of one collection and split, by folder."""

SHOWN = 5
"""Queries that gained, and as many that lost, of each pair."""
MOST_SYSTEMS = 12
"""Read query by query; more would make a page slow to write and long to read."""
ALL_PAIRS = 6
"""Systems of which all pairs are tested; of more, each against the best."""
OF_COLLECTION = {"collection", "split", "candidates", "runs", "block", "token_budget", "versions"}
"""Inputs of a stage that say nothing of the system: where it was, how much at a time, by what."""
DEEP = 100
"""Measures of a deeper cutoff are left to the tables: they would need every run read whole."""


@dataclass(frozen=True)
class Evaluated:
    """Evaluations that one table may hold, and what the run files say of each query."""

    folder: Path
    records: Records
    rows: Records  # of the table, by system
    order: list[str]  # worst system first
    measures: list[str]
    comparison: Comparison | None
    left_out: str  # what the comparison lacks and why; empty if nothing
    prefix: str  # of titles and names where a page has several collections

    @property
    def where(self) -> str:
        first = next(iter(self.records.values()))
        return f"{first['collection']['name']} {first['split']}"


def gathered(
    folder: Path, records: Records, prefix: str = "", names: dict[str, str] | None = None
) -> Evaluated:
    """Read what evaluations have left.

    Args:
        records: of one collection and split, by folder below `folder`.
        names: what systems are called, by folder; by default as in the table.
    """
    rows = rows_of(records, names)
    measures = measures_of(rows.values())
    (first, *_) = measures or [""]
    order = sorted(rows, key=lambda name: rows[name]["overall"].get(first, 0.0))
    comparison, left_out = _comparison(folder, order, rows, measures)
    return Evaluated(folder, records, rows, order, measures, comparison, left_out, prefix)


def evaluations(of: Evaluated, count: int = SHOWN) -> list[Section]:
    """All sections of evaluations.

    Args:
        count: queries that gained, and lost, of each pair.
    """
    title = _of(of.prefix, of.where)
    results = Section(f"Results{title}", f"{of.prefix}results", [_results(of), *by_query(of)])
    found = [results]
    stages = [
        block
        for name, record in of.records.items()
        if len(record.get("stages", ())) > 1
        for block in _stages(name, record, of.prefix, len(of.records) > 1)
    ]
    if stages:
        found.append(Section(f"Stage by stage{title}", f"{of.prefix}stages", stages))
    if of.comparison is not None and len(of.comparison.systems) > 1:
        found += comparisons(of.comparison, _worth_showing(of), of.prefix, count)
    return found


def made_from(home: Path) -> str | None:
    """What an evaluation was made from whatever its collection: models and settings of its stages.

    None where that is not known: nothing beside metrics.json says it, or a stage is a run file.
    """
    inputs = (manifests.read(home / "metrics.json") or {}).get("inputs")
    stages = inputs.get("stages") if isinstance(inputs, dict) else None
    if not isinstance(stages, list) or not all(isinstance(stage, dict) for stage in stages):
        return None
    if not stages or any("given" in stage for stage in stages):
        return None
    return manifests.digest(
        [{key: stage[key] for key in stage if key not in OF_COLLECTION} for stage in stages]
    )


def by_query(of: Evaluated) -> list[Block]:
    """What figures of queries add to the table: intervals, and whether the files still give it."""
    blocks: list[Block] = [Note(of.left_out)] if of.left_out else []
    if of.comparison is not None:
        blocks += [*means(of.comparison, of.prefix), Note(_recomputed(of.comparison, of.rows))]
    return blocks


def _results(of: Evaluated) -> Table:
    first = next(iter(of.records.values()))
    figures = [[of.rows[name]["overall"].get(m) for m in of.measures] for name in of.order]
    return Table(
        f"{of.prefix}results",
        f"{of.where}: {first['queries']:,} queries, {first['passages']:,} passages"
        f"{'; best in bold' if len(of.order) > 1 else ''}."
        " Seconds: embed or index the corpus, and search; or rerank."
        f"{depth_note({name: of.rows[name] for name in of.order})}",
        ["system", *of.measures, "seconds"],
        [
            [name, *map(_figure, row), f"{of.rows[name]['seconds']:,.1f}"]
            for name, row in zip(of.order, figures, strict=True)
        ],
        strong=best(figures),
    )


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def comparisons(
    comparison: Comparison, couples: Sequence[tuple[int, int]], prefix: str = "", count: int = SHOWN
) -> list[Section]:
    """Tests and overlaps of all systems; queries that gained and lost of some couples."""
    told = compare.tables(comparison)[1:]
    of = _of(prefix, compare.where(comparison))
    found = [
        Section(
            f"Differences{of}",
            f"{prefix}differences",
            [
                replace(table, name=f"{prefix}{table.name}", folded=i > 0 and len(table.rows) > 3)
                for i, table in enumerate(told)
            ],
        )
    ]
    blocks: list[Block] = []
    if not comparison.judged.has_texts:
        blocks.append(Note("The judgements came from a file without texts: ids alone are shown."))
    for a, b in couples:
        if not all(comparison.scored(i, comparison.measure) for i in (a, b)):
            continue
        before, after = comparison.names[a], comparison.names[b]
        blocks.append(_changes(comparison, a, b, prefix))
        gained, lost = examples(comparison, a, b, count)
        for what, some in (("gain", gained), ("lose", lost)):
            title = f"{before} → {after}: queries that {what} most"
            if some:
                blocks.append(Queries(title, before, after, comparison.measure, some))
    if blocks:
        found.append(Section(f"Queries that gained and lost{of}", f"{prefix}queries", blocks))
    return found


def _of(prefix: str, where: str) -> str:
    return f": {where}" if prefix else ""


def _comparison(
    folder: Path, order: list[str], rows: Records, measures: list[str]
) -> tuple[Comparison | None, str]:
    """The systems query by query, or why there is none of it, or what it leaves out."""
    if not measures:
        return None, "No run is deep enough for one of the measures."
    shallow = [name for name in measures if parse_measure(name).cutoff <= DEEP] or measures[:1]
    wanted = order[-MOST_SYSTEMS:]
    chosen = []
    for name in wanted:
        row = rows[name]
        home = folder / row["folder"]
        of = row["collection"]
        chosen.append(
            System(
                name,
                home / row["run"],
                home,
                (of["name"], of["digest"]),
                row["split"],
                depth=row.get("depth"),
            )
        )
    try:
        judged = systems.judged(chosen)
        against = None if len(chosen) <= ALL_PAIRS else len(chosen) - 1
        made = compared(chosen, judged, shallow, against=against)
    except InputError as error:
        return None, f"Figures query by query and texts are left out: {error}."
    cut = len(order) - len(wanted)
    return made, f"The {cut} weakest systems are not compared query by query." if cut else ""


def _recomputed(comparison: Comparison, rows: Records) -> str:
    """Whether the run files still give the figures of metrics.json."""
    other = [
        f"{name} {measure} {np.mean(values[i]):.4f} and not {rows[name]['overall'][measure]:.4f}"
        for measure, values in comparison.values.items()
        for i, name in enumerate(comparison.names)
        if measure in rows[name]["overall"]
        and comparison.scored(i, measure)
        and abs(float(np.mean(values[i])) - rows[name]["overall"][measure]) > 1e-6
    ]
    told = f"{', '.join(comparison.values)}, scored again from the run files by ir_measures:"
    if not other:
        return f"{told} equal to metrics.json in every digit shown."
    return (
        f"{told} they differ from metrics.json, so a run file is not as it was: {'; '.join(other)}."
    )


def _worth_showing(of: Evaluated) -> list[tuple[int, int]]:
    """The best against its own candidates and against its first stage, or against the next best."""
    assert of.comparison is not None
    found = of.comparison.systems
    last = len(found) - 1
    for name, record in of.records.items():
        files = [Path(stage["run"]).name for stage in record.get("stages", ())]
        if of.folder / name == found[last].home and found[last].run.name in files:
            before = [
                i
                for file in files[: files.index(found[last].run.name)]
                for i, one in enumerate(found)
                if (one.home, one.run.name) == (found[last].home, file)
            ]
            if before:
                return [(a, last) for a in dict.fromkeys((before[-1], before[0]))]
    return [(last - 1, last)]


def means(comparison: Comparison, prefix: str = "") -> list[Plot]:
    """The systems with the confidence intervals of their means; nothing where none is scored."""
    measure = comparison.measure
    scored = [i for i in range(len(comparison.systems)) if comparison.scored(i, measure)][::-1]
    found = [interval(comparison.values[measure][i]) for i in scored]
    names = [comparison.names[i] for i in scored]
    if not names:
        return []
    told = "; ".join(
        f"{n}: {mean:.4f} ± {half:.4f}" for n, (mean, half) in zip(names, found, strict=True)
    )
    return [
        Plot(
            f"{prefix}means-{slug(measure)}",
            f"{compare.where(comparison)}: mean {measure} over {comparison.queries:,}"
            " queries, with its 95 % confidence interval (t).",
            f"Mean {measure} of each system. {told}.",
            bars(names, [mean for mean, _ in found], [half for _, half in found], measure),
            height=0.8 + 0.3 * len(names),
        )
    ]


def _changes(comparison: Comparison, a: int, b: int, prefix: str) -> Plot:
    measure = comparison.measure
    differences = comparison.values[measure][b] - comparison.values[measure][a]
    before, after = comparison.names[a], comparison.names[b]
    gained, lost = int((differences > 0).sum()), int((differences < 0).sum())
    return Plot(
        f"{prefix}changes-{slug(before)}-{slug(after)}",
        f"{compare.where(comparison)}: what each query gains or loses in {measure} from {before} to"
        f" {after}: {gained:,} gain, {lost:,} lose, {len(differences) - gained - lost:,} stay.",
        f"Change of {measure} of each query, in order: {gained} gain, {lost} lose, the mean is"
        f" {signed(float(np.mean(differences)))}.",
        changes(differences.tolist(), f"change of {measure}"),
        height=2.2,
    )


def _stages(name: str, record: dict[str, Any], prefix: str, named: bool) -> list[Block]:
    """The stages of one evaluation: figures, speed, and gain over the best stage before."""
    stages = record["stages"]
    measures = measures_of(stages)
    if not measures:
        return []  # no run is deep enough for any of them
    where = f"{record['collection']['name']} {record['split']}"
    stem = f"{prefix}stages{'-' + slug(name) if named else ''}"
    figures = [[stage["overall"].get(m) for m in measures] for stage in stages]
    of = f"{name}: " if named else ""
    made = Table(
        stem,
        f"{of}the stages on {where}. Gain: in {measures[0]}, over the best stage before; queries/s:"
        " without what is done once for a collection."
        f"{depth_note({stage['stage']: stage for stage in stages})}",
        ["stage", *measures, "gain", "queries/s"],
        [
            [
                stage["stage"],
                *map(_figure, row),
                NONE if stage.get("gain") is None else signed(stage["gain"]),
                NONE
                if stage.get("queries_per_second") is None
                else f"{stage['queries_per_second']:,.1f}",
            ]
            for stage, row in zip(stages, figures, strict=True)
        ],
        strong=best(figures),
    )
    drawn = [
        Line(
            m,
            [i for i, stage in enumerate(stages) if m in stage["overall"]],
            [stage["overall"][m] for stage in stages if m in stage["overall"]],
        )
        for m in measures[:4]
    ]
    told = "; ".join(
        f"{stage['stage']}: "
        + ", ".join(f"{m} {stage['overall'][m]:.4f}" for m in measures[:4] if m in stage["overall"])
        for stage in stages
    )
    return [
        made,
        Plot(
            f"{stem}-gain",
            f"{of}figures of each stage on {where}.",
            f"Figures stage by stage. {told}.",
            stage_lines(drawn, [stage["stage"] for stage in stages]),
        ),
    ]
