"""The sections of evaluations on a page: results, stages, differences, example queries.

Tables come from metrics.json alone; scores of single queries are computed again from the run files.
If those or their collection are gone, the page says so and has the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.report.compare import OVERLAPS, RESAMPLES, Comparison, compare, examples, mean_interval
from caravan.report.plots import Line, Plot, bars, changes, lines
from caravan.report.records import Records, has_scores, judged_on, refuse_partial
from caravan.report.summary import measures_of, results_table, rows, stages_table, where
from caravan.report.systems import System, read_judged
from caravan.report.tables import MINUS, Section, Table, best, score, signed, slug
from caravan.retrieval.metrics import parse_measure

SHOWN = 5
"""Most improved and most degraded queries shown of each pair."""
FEW = 2
"""The same on a page with several collections."""
MOST_SYSTEMS = 12
"""Systems scored query by query; more would make a page slow to write and long to read."""
ALL_PAIRS = 6
"""Up to this many systems, all pairs are tested; beyond, each against the best."""
DEEP = 100
"""Measures with a deeper cutoff are only in the tables: they need every run read whole."""


def evaluation_sections(
    folder: Path,
    records: Mapping[Path, dict[str, Any]],
    names: Mapping[str, str],
    against: int = -2,
) -> list[Section]:
    """All sections of evaluations, by collection and split.

    Args:
        records: of runs below `folder`; those without scores are left out.
        names: names of systems by folder below `folder`, if they are not those of the table.
        against: the system that the best is shown against query by query: -2 is the next best.
    """
    groups: dict[tuple[str, str], Records] = {}
    for home, record in records.items():
        if has_scores(record) and record["run"]:
            refuse_partial(home, record)
            _, digest, split = judged_on(record)
            groups.setdefault((digest, split), {})[str(home.relative_to(folder))] = record
    several = len(groups) > 1
    prefixes = [f"{number}-" if several else "" for number in range(1, len(groups) + 1)]
    return [
        section
        for prefix, group in zip(prefixes, groups.values(), strict=True)
        for section in _sections(folder, group, names, against, prefix)
    ]


def _sections(
    folder: Path, records: Records, names: Mapping[str, str], against: int, prefix: str
) -> Iterator[Section]:
    """The sections of one collection and split; a prefix of names if a page has several."""
    systems = rows(records, names)
    title = f": {where(next(iter(records.values())))}" if prefix else ""
    results: list[Any] = [results_table(systems, f"{prefix}results")]
    try:
        comparison = _comparison(folder, systems)
    except InputError as error:
        comparison = None
        results.append(f"Scores of single queries and texts are left out: {error}.")
    if comparison is not None:
        cut = len(systems) - len(comparison.systems)
        results += [f"The {cut} weakest systems are not compared query by query."] if cut else []
        results += [*means(comparison, prefix), _recomputed(comparison, systems)]
    yield Section(f"Results{title}", f"{prefix}results", results)
    several = len(records) > 1
    stages = [
        block
        for name, record in records.items()
        if len(record.get("stages", ())) > 1
        for block in _stages(record, name if several else "", prefix)
    ]
    if stages:
        yield Section(f"Stage by stage{title}", f"{prefix}stages", stages)
    if comparison is not None and len(comparison.systems) > 1:
        places = range(len(comparison.systems))
        couples = [(places[against], places[-1])]
        count = FEW if prefix else SHOWN
        yield from comparison_sections(comparison, couples, prefix, count)


def comparison_sections(
    comparison: Comparison, couples: Sequence[tuple[int, int]], prefix: str = "", count: int = SHOWN
) -> list[Section]:
    """Tests and overlaps of all systems; queries that gained and lost of some couples."""
    title = f": {comparison.judged.title}" if prefix else ""
    tables = [
        replace(table, name=f"{prefix}{table.name}", folded=table.name == "overlap")
        for table in comparison_tables(comparison)[1:]
    ]
    blocks: list[Any] = []
    if not comparison.judged.has_texts:
        blocks.append("The judgements came from a file without texts: only ids are shown.")
    for a, b in couples:
        if all(comparison.scored(i, comparison.measure) for i in (a, b)):
            blocks += [_changes(comparison, a, b, prefix), *examples(comparison, a, b, count)]
    queries = Section(f"Queries that gained and lost{title}", f"{prefix}queries", blocks)
    differences = Section(f"Differences{title}", f"{prefix}differences", tables)
    return [differences, queries] if blocks else [differences]


def _comparison(folder: Path, systems: Records) -> Comparison | None:
    """The systems query by query; None if no run is deep enough for one of the measures."""
    measures = measures_of(reversed(systems.values()))
    if not measures:
        return None
    shallow = [name for name in measures if parse_measure(name).cutoff <= DEEP] or measures[:1]
    chosen = []
    for name, row in list(systems.items())[-MOST_SYSTEMS:]:
        home = folder / row["folder"]
        chosen.append(System(name, home / row["run"], home, judged_on(row), (), row.get("depth")))
    against = None if len(chosen) <= ALL_PAIRS else len(chosen) - 1
    return compare(chosen, read_judged(chosen), shallow, against=against)


def _recomputed(comparison: Comparison, systems: Records) -> str:
    """Whether the run files still have the scores of metrics.json."""
    other = [
        f"{name} {measure} {mean:.4f} and not {recorded:.4f}"
        for measure in comparison.values
        for i, name in enumerate(comparison.names)
        if (recorded := systems[name]["overall"].get(measure)) is not None
        and (mean := comparison.mean(i, measure)) is not None
        and abs(mean - recorded) > 1e-6
    ]
    scored = f"{', '.join(comparison.values)}, scored again from the run files by ir_measures:"
    if not other:
        return f"{scored} equal to metrics.json in every digit shown."
    return f"{scored} not equal to metrics.json, so a run file has changed: {'; '.join(other)}."


def means(comparison: Comparison, prefix: str = "") -> list[Plot]:
    """The systems with the confidence intervals of their means; empty if none is scored."""
    measure = comparison.measure
    scored = [i for i in range(len(comparison.systems)) if comparison.scored(i, measure)][::-1]
    if not scored:
        return []
    names = [comparison.names[i] for i in scored]
    mean, half = zip(*(mean_interval(comparison.values[measure][i]) for i in scored), strict=True)
    caption = (
        f"{comparison.judged.title}: mean {measure} over {comparison.queries:,} queries, with its"
        " 95 % confidence interval (t)."
    )
    draw, height = bars(names, mean, half, measure), 0.8 + 0.3 * len(names)
    return [Plot(f"{prefix}means-{slug(measure)}", caption, draw, height)]


def _changes(comparison: Comparison, a: int, b: int, prefix: str) -> Plot:
    measure = comparison.measure
    (pair,) = (pair for pair in comparison.pairs[measure] if (pair.a, pair.b) == (a, b))
    before, after = comparison.names[a], comparison.names[b]
    caption = (
        f"{comparison.judged.title}: what each query gains or loses in {measure} from {before} to"
        f" {after}: {pair.gained:,} gain, {pair.lost:,} lose, {pair.equal:,} stay; the mean is"
        f" {signed(pair.difference)}."
    )
    differences = comparison.values[measure][b] - comparison.values[measure][a]
    draw = changes(differences.tolist(), f"change of {measure}")
    return Plot(f"{prefix}changes-{slug(before)}-{slug(after)}", caption, draw, height=2.2)


def _stages(record: dict[str, Any], name: str, prefix: str) -> list[Any]:
    """The stages of one evaluation: a table, and a plot of up to four measures."""
    stem, title = f"{prefix}stages{name and f'-{slug(name)}'}", name and f"{name}: "
    table = stages_table(record, stem, title)
    if table is None:
        return []
    stages = record["stages"]
    drawn = []
    for measure in measures_of(stages)[:4]:
        at = [i for i, stage in enumerate(stages) if measure in stage["overall"]]
        drawn.append(Line(measure, at, [stages[i]["overall"][measure] for i in at]))
    draw = lines(drawn, "stage", "", [stage["stage"] for stage in stages])
    return [table, Plot(f"{stem}-gain", f"{title}each stage on {where(record)}.", draw)]


# --- tables of a comparison -----------------------------------------------------------------------


def comparison_tables(comparison: Comparison) -> list[Table]:
    """Scores, tests (unless no pair can be tested), overlap."""
    title, names = comparison.judged.title, comparison.names
    scores = [[comparison.mean(i, m) for m in comparison.values] for i in range(len(names))]
    missing = zip(names, comparison.missing, strict=True)
    lacking = ", ".join(f"{name} lacks {count:,}" for name, count in missing if count)
    results = Table(
        "scores",
        f"{title}: mean over {comparison.queries:,} queries, best in bold."
        + (f" Queries that a run lacks count 0: {lacking}." if lacking else "")
        + comparison.depth_note,
        ["system", *comparison.values],
        [[name, *map(score, row)] for name, row in zip(names, scores, strict=True)],
        strong=best(scores),
    )
    overlap = Table(
        "overlap",
        f"{title}: what two rankings have in common, mean over the queries. Jaccard@k: passages in"
        " the first k of both over those in the first k of either.",
        ["A", "B", "same first", *(f"Jaccard@{k}" for k in OVERLAPS[1:])],
        [
            [names[a], names[b], *(f"{share:.3f}" for share in shares.values())]
            for (a, b), shares in comparison.jaccard.items()
        ],
        labels=2,
    )
    tests = [significance_table(comparison)] if any(comparison.pairs.values()) else []
    return [results, *tests, overlap]


def significance_table(comparison: Comparison) -> Table:
    """The tests: a row for each measure and pair; with several pairs, p is corrected too."""
    title, names = comparison.judged.title, comparison.names
    found = [(measure, pair) for measure, pairs in comparison.pairs.items() for pair in pairs]
    several = len(comparison.jaccard) > 1
    cells = []
    for measure, pair in found:
        ps = [p_value(pair.p), p_value(pair.corrected)] if several else [p_value(pair.p)]
        couple = [f"{names[pair.a]} → {names[pair.b]}"] if several else []
        interval = f"{signed(pair.low)} to {signed(pair.high)}"
        counts = [f"{count:,}" for count in (pair.gained, pair.equal, pair.lost)]
        cells.append([measure, *couple, signed(pair.difference), *ps, interval, *counts])
    by = "paired t-test" if comparison.test == "t" else f"randomisation test, {RESAMPLES:,} samples"
    labels, heads = ["measure", "A → B"], ["p", "p (Holm)"]
    after = ", p corrected after Holm over the pairs of a measure"
    if not several:
        ((a, b),) = comparison.jaccard
        title += f", {names[b]} (B) against {names[a]} (A)"
        labels, heads, after = labels[:1], heads[:1], ""
    decides = len(labels) + len(heads)
    return Table(
        "significance",
        f"{title}: {by}, two-sided{after}; below .05 in bold. Queries that gain, keep and lose from"
        f" A to B.{comparison.depth_note}",
        [*labels, f"B {MINUS} A", *heads, "95 % interval (t)", "gain", "keep", "lose"],
        cells,
        labels=len(labels),
        strong=frozenset((i, decides) for i, (_, p) in enumerate(found) if p.corrected < 0.05),
    )


def p_value(p: float) -> str:
    """A p-value as papers print it.

    >>> p_value(0.0184), p_value(0.00001), p_value(1.0)
    ('.018', '<.001', '1.000')
    """
    return "<.001" if p < 0.001 else f"{p:.3f}".removeprefix("0")
