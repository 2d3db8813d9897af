"""The sections of evaluations on a page: results, stages, differences, example queries.

Tables come from metrics.json alone; scores of single queries are computed again from the run files.
If these or their collection are missing, the page reports it and shows the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from caravan.errors import InputError
from caravan.report.compare import (
    Comparison,
    compare,
    examples,
    mean_interval,
    refuse_changed,
)
from caravan.report.plots import Plot, intervals
from caravan.report.records import Evaluation, measures_of
from caravan.report.summary import results_table, stages_table, systems_of
from caravan.report.systems import System, read_judged
from caravan.report.tables import MINUS, NONE, Section, Table, p_value, signed, slug
from caravan.report.verdict import LEVEL, findings
from caravan.retrieval.metrics import parse_measure

SHOWN = 3  # most improved and most degraded queries shown of each pair
MOST_SYSTEMS = 12
"""Systems scored query by query; more would make a page slow to write and long to read."""
ALL_PAIRS = 6
"""Up to this many systems, all pairs are tested; beyond, each against the best.

Systems that differ in the bytes of a vector are tested against the one with most.
"""
DEEP = 100
"""Measures with a deeper cutoff are only in the tables: they need every run read whole."""


def evaluation_sections(
    folder: Path, evaluations: Mapping[Path, Evaluation], names: Mapping[Path, str]
) -> tuple[list[Section], list[tuple[str, Comparison | str]]]:
    """All sections of evaluations, and for each collection the comparison or why there is none.

    Args:
        evaluations: by run directory, below `folder`.
        names: of evaluations, by run directory, if they are not those of the table.
    """
    groups = by_collection(evaluations)
    sections: list[Section] = []
    found: list[tuple[str, Comparison | str]] = []
    for number, group in enumerate(groups, 1):
        where = next(iter(group.values())).where
        systems = systems_of(group, folder, names)
        comparison = _comparison(systems)
        made = [_results(systems, comparison), *_stages(group, folder)]
        if isinstance(comparison, Comparison) and (last := len(comparison.systems) - 1):
            made += comparison_sections(comparison, [(last - 1, last)], SHOWN)
        sections += [_numbered(of, number, where) for of in made] if len(groups) > 1 else made
        found.append((where, comparison))
    return sections, found


def by_collection(evaluations: Mapping[Path, Evaluation]) -> list[dict[Path, Evaluation]]:
    """The evaluations of each collection and split, by run directory."""
    groups: dict[tuple[str, str], dict[Path, Evaluation]] = {}
    for home, one in evaluations.items():
        groups.setdefault((one.collection.digest, one.split), {})[home] = one
    return list(groups.values())


def _numbered(section: Section, number: int, where: str) -> Section:
    """A section on a page of several collections."""
    blocks = [
        replace(block, name=f"{number}-{block.name}") if isinstance(block, Table | Plot) else block
        for block in section.blocks
    ]
    return Section(f"{section.title}: {where}", f"{number}-{section.anchor}", blocks)


def _results(systems: Sequence[System], comparison: Comparison | str) -> Section:
    blocks: list[Any] = [results_table(systems)]
    if isinstance(comparison, str):
        blocks.append(f"Scores of single queries and texts are left out. {comparison}")
    else:
        cut = len(systems) - len(comparison.systems)
        blocks += [f"The {cut} weakest systems are not compared query by query."] if cut else []
        blocks += means(comparison)
    return Section("Results", "results", blocks)


def _stages(evaluations: Mapping[Path, Evaluation], folder: Path) -> list[Section]:
    """The stages of each evaluation that has several."""
    several = {home: one for home, one in evaluations.items() if len(one.stages) > 1}
    alone = len(evaluations) < 2
    tables = [
        stages_table(one, "" if alone else str(home.relative_to(folder)))
        for home, one in several.items()
    ]
    return [Section("Stage by stage", "stages", tables)] if tables else []


def _comparison(systems: Sequence[System]) -> Comparison | str:
    """The systems query by query, or why there is no test."""
    measures = measures_of(one.scored for one in reversed(systems))
    if not measures:
        return "No test: no run is deep enough for its measures."
    shallow = [name for name in measures if parse_measure(name)["cutoff"] <= DEEP] or measures[:1]
    sizes = [one.evaluation.facts.bytes_per_vector or 0 for one in systems if one.evaluation]
    by_size = all(sizes) and len(set(sizes)) > 1
    if by_size:
        largest = systems[sizes.index(max(sizes))]
        systems = [*(one for one in systems if one is not largest), largest]
    chosen = list(systems[-MOST_SYSTEMS:])
    last = len(chosen) - 1
    with_last = [(i, last) for i in range(last)]
    try:
        couples = with_last if by_size or len(chosen) > ALL_PAIRS else None
        found = compare(chosen, read_judged(chosen), shallow, couples)
        refuse_changed(found)
    except InputError as error:
        return f"No test: {error}."
    return found


def comparison_sections(
    comparison: Comparison, couples: Sequence[tuple[int, int]], count: int
) -> list[Section]:
    """Tests of all systems; queries that gained and lost of some couples."""
    tests = comparison_tables(comparison)[1:]
    sections = [Section("Differences", "differences", tests)] if tests else []
    if blocks := [block for a, b in couples for block in examples(comparison, a, b, count)]:
        sections.append(Section("Queries that gained and lost", "queries", blocks))
    return sections


def means(comparison: Comparison) -> list[Plot]:
    """The systems with the confidence intervals of their means; empty if none is scored."""
    measure, values = comparison.measure, comparison.values[comparison.measure]
    scored = [i for i in range(len(values)) if comparison.mean(i, measure) is not None][::-1]
    if not scored:
        return []
    names = [comparison.names[i] for i in scored]
    mean, half = zip(*(mean_interval(values[i]) for i in scored), strict=True)
    caption = (
        f"{comparison.judged.title}: mean {measure} over {comparison.queries:,} queries, with its"
        " 95 % confidence interval (t)."
    )
    draw = intervals(names, mean, half, measure)
    return [Plot(f"means-{slug(measure)}", caption, draw)]


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Scores, and tests unless no pair can be tested."""
    title, names = comparison.judged.title, comparison.names
    missing = zip(names, comparison.missing, strict=True)
    lacking = ", ".join(f"{name} lacks {count:,}" for name, count in missing if count)
    caption = f"{title}: mean over {comparison.queries:,} queries, best in bold."
    caption += f" Queries that a run lacks count 0: {lacking}." if lacking else ""
    means = {measure: values.mean(axis=1) for measure, values in comparison.values.items()}
    frame = pd.DataFrame({"system": names, **means})
    shallow = frame.isna().any(axis=None)
    caption += f" {NONE}: the measure looks deeper than the run." if shallow else ""
    results = Table.of("scores", caption, frame)
    tested = [(measure, pair) for measure, pairs in comparison.pairs.items() for pair in pairs]
    heads = ["measure", "A → B", f"B {MINUS} A", "p", "p (Holm)", "95 % interval (t)"]
    significance = Table(
        "significance",
        f"{title}: paired t-test, two-sided, p corrected after Holm over the pairs of a measure;"
        " below .05 in bold. Queries that gain, keep and lose from A to B.",
        [*heads, "gain", "keep", "lose"],
        [
            [
                measure,
                f"{names[pair.a]} → {names[pair.b]}",
                signed(pair.difference),
                p_value(pair.p),
                p_value(pair.corrected),
                f"{signed(pair.low)} to {signed(pair.high)}",
                *(f"{count:,}" for count in (pair.gained, pair.equal, pair.lost)),
            ]
            for measure, pair in tested
        ],
        labels=2,
        strong=frozenset((i, 4) for i, (_, pair) in enumerate(tested) if pair.corrected < LEVEL),
    )
    return [results, significance] if tested else [results]


def step_tests(systems: Sequence[System]) -> tuple[list[str], str]:
    """Each system against the one in the row before, by the first measure.

    Returns:
        The p of each system ("–" if it is not tested), none if no system is tested; and the verdict
        or why there is none. A system is not tested if its run, or that before, is not deep enough.
    """
    measures = measures_of(one.scored for one in systems)[:1]
    if len(systems) < 2 or not measures:
        return [], ""
    try:
        couples = list(pairwise(range(len(systems))))
        comparison = compare(systems, read_judged(systems), measures, couples)
        refuse_changed(comparison)
    except InputError as error:
        return [], f"not tested: {error}"
    pairs = comparison.pairs[measures[0]]
    if not pairs:
        return [], ""
    tested = {pair.b: p_value(pair.p) for pair in pairs}
    p_values = [tested.get(row, NONE) for row in range(len(systems))]
    return p_values, f"{measures[0]}: {findings(comparison.names, pairs)}"
