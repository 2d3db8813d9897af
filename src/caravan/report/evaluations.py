"""The sections of evaluations on a page: results, stages, differences, example queries.

Tables come from metrics.json alone; scores of single queries are computed again from the run files.
If these or their collection are missing, the page reports it and shows the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from caravan.errors import InputError
from caravan.manifests import write_json
from caravan.report.compare import (
    OVERLAPS,
    Comparison,
    Pair,
    compare,
    examples,
    mean_interval,
)
from caravan.report.plots import Plot, intervals
from caravan.report.records import (
    Records,
    bytes_per_vector,
    has_scores,
    judged_on,
    refuse_partial,
)
from caravan.report.summary import (
    collect,
    measures_of,
    results_table,
    rows,
    stages_table,
    where,
)
from caravan.report.systems import System, read_judged, read_system
from caravan.report.tables import (
    MINUS,
    NONE,
    Section,
    Table,
    best,
    p_value,
    score,
    show,
    signed,
    slug,
)
from caravan.report.verdict import LEVEL, verdict
from caravan.retrieval.metrics import parse_measure

SHOWN = 3
"""Most improved and most degraded queries shown of each pair."""
MOST_SYSTEMS = 12
"""Systems scored query by query; more would make a page slow to write and long to read."""
ALL_PAIRS = 6
"""Up to this many systems, all pairs are tested; beyond, each against the best.

Systems that differ in the bytes of a vector are tested against the one with most.
"""
DEEP = 100
"""Measures with a deeper cutoff are only in the tables: they need every run read whole."""


def evaluation_sections(
    folder: Path, records: Mapping[Path, dict[str, Any]], names: Mapping[str, str]
) -> tuple[list[Section], list[tuple[str, Comparison | str]]]:
    """All sections of evaluations, and the comparison of each collection and split.

    Args:
        records: of runs below `folder`; those without scores are left out.
        names: names of systems by folder below `folder`, if they are not those of the table.

    Returns:
        The sections; and for each collection its name, and the comparison or why there is none.
    """
    groups: dict[tuple[str, str], Records] = {}
    for home, record in records.items():
        if has_scores(record) and record["run"]:
            refuse_partial(home, record)
            _, digest, split = judged_on(record)
            groups.setdefault((digest, split), {})[str(home.relative_to(folder))] = record
    sections: list[Section] = []
    found: list[tuple[str, Comparison | str]] = []
    for number, group in enumerate(groups.values(), 1):
        prefix, systems = f"{number}-" if len(groups) > 1 else "", rows(group, names)
        comparison: Comparison | str = "No test: no run is deep enough for its measures."
        try:
            comparison = _comparison(folder, systems) or comparison
        except InputError as error:
            comparison = f"No test: {error}."
        sections += _sections(group, systems, comparison, prefix)
        found.append((where(next(iter(group.values()))), comparison))
    return sections, found


def _sections(
    records: Records, systems: Records, comparison: Comparison | str, prefix: str
) -> Iterator[Section]:
    """The sections of one collection and split; a prefix of names if a page has several."""
    title = f": {where(next(iter(records.values())))}" if prefix else ""
    results: list[Any] = [results_table(systems, f"{prefix}results")]
    if isinstance(comparison, str):
        results.append(f"Scores of single queries and texts are left out. {comparison}")
    else:
        cut = len(systems) - len(comparison.systems)
        results += [f"The {cut} weakest systems are not compared query by query."] if cut else []
        results += means(comparison, prefix)
    yield Section(f"Results{title}", f"{prefix}results", results)
    stages = []
    for name, record in records.items():
        if len(record.get("stages", ())) > 1 and measures_of(record["stages"]):
            stem, lead = (f"-{slug(name)}", f"{name}: ") if len(records) > 1 else ("", "")
            stages.append(stages_table(record, f"{prefix}stages{stem}", lead))
    if stages:
        yield Section(f"Stage by stage{title}", f"{prefix}stages", stages)
    if not isinstance(comparison, str) and (last := len(comparison.systems) - 1):
        yield from comparison_sections(comparison, [(last - 1, last)], prefix)


def _comparison(folder: Path, systems: Records) -> Comparison | None:
    """The systems query by query; None if no run is deep enough for one of the measures."""
    measures = measures_of(reversed(systems.values()))
    if not measures:
        return None
    shallow = [name for name in measures if parse_measure(name)["cutoff"] <= DEEP] or measures[:1]
    sizes = {name: bytes_per_vector(row) or 0 for name, row in systems.items()}
    by_size = all(sizes.values()) and len(set(sizes.values())) > 1
    order = list(systems)
    if by_size:
        order.append(order.pop(order.index(max(order, key=lambda name: sizes[name]))))
    rows_of = {name: systems[name] for name in order[-MOST_SYSTEMS:]}
    chosen = []
    for name, row in rows_of.items():
        home = folder / row["folder"]
        chosen.append(System(name, home / row["run"], home, judged_on(row), (), row.get("depth")))
    all_pairs = len(chosen) <= ALL_PAIRS and not by_size
    against = None if all_pairs else len(chosen) - 1
    found = compare(chosen, read_judged(chosen), shallow, against=against)
    refuse_changed(found, list(rows_of.values()))
    return found


def refuse_changed(comparison: Comparison, records: Sequence[Mapping[str, Any]]) -> None:
    """Raise an InputError if a run file no longer has the scores in its metrics.json."""
    for i, record in enumerate(records):
        for measure in comparison.values:
            was, now = record["overall"].get(measure), comparison.mean(i, measure)
            if was is not None and now is not None and abs(was - now) > 1e-6:
                raise InputError(
                    "changed-run",
                    f"{comparison.systems[i].run} has changed since it was scored ({measure} was"
                    f" {was:.4f} and is {now:.4f}); evaluate again",
                )


def comparison_sections(
    comparison: Comparison, couples: Sequence[tuple[int, int]], prefix: str = "", count: int = SHOWN
) -> list[Section]:
    """Tests and overlaps of all systems; queries that gained and lost of some couples."""
    title = f": {comparison.judged.title}" if prefix else ""
    _, *made = comparison_tables(comparison)
    tables = [replace(table, name=f"{prefix}{table.name}") for table in made]
    sections = [Section(f"Differences{title}", f"{prefix}differences", tables)]
    blocks = [block for a, b in couples for block in examples(comparison, a, b, count)]
    if blocks:
        heading = f"Queries that gained and lost{title}"
        sections.append(Section(heading, f"{prefix}queries", blocks))
    return sections


def means(comparison: Comparison, prefix: str = "") -> list[Plot]:
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
    return [Plot(f"{prefix}means-{slug(measure)}", caption, draw)]


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
    tests = [_significance(comparison)] if any(comparison.pairs.values()) else []
    return [results, *tests, overlap]


def _significance(comparison: Comparison) -> Table:
    """The tests: a row for each measure and pair."""
    names = comparison.names
    found = [(measure, pair) for measure, pairs in comparison.pairs.items() for pair in pairs]
    cells = [
        [
            measure,
            f"{names[pair.a]} → {names[pair.b]}",
            signed(pair.difference),
            p_value(pair.p),
            p_value(pair.corrected),
            f"{signed(pair.low)} to {signed(pair.high)}",
            *(f"{count:,}" for count in (pair.gained, pair.equal, pair.lost)),
        ]
        for measure, pair in found
    ]
    heads = ["measure", "A → B", f"B {MINUS} A", "p", "p (Holm)", "95 % interval (t)"]
    return Table(
        "significance",
        f"{comparison.judged.title}: paired t-test, two-sided, p corrected after Holm over the"
        " pairs of a measure; below .05 in bold. Queries that gain, keep and lose from A to B."
        + comparison.depth_note,
        [*heads, "gain", "keep", "lose"],
        cells,
        labels=2,
        strong=frozenset((i, 4) for i, (_, pair) in enumerate(found) if pair.corrected < LEVEL),
    )


def steps(folder: Path, systems: Records) -> dict[str, Pair]:
    """Test each system against the one in the row before, by the first measure.

    A system whose run, or that before, is not deep enough for the measure is left out.

    Raises:
        InputError: If a run or the collection is no longer there.
    """
    if len(systems) < 2 or any("run" not in of for of in systems.values()):
        return {}
    names, measures = list(systems), measures_of(systems.values())
    found = [read_system(folder / of["folder"] / of["run"]) for of in systems.values()]
    comparison = compare(found, read_judged(found), measures[:1])
    refuse_changed(comparison, list(systems.values()))
    (pairs,) = comparison.pairs.values()
    return {names[pair.b]: pair for pair in pairs if pair.b == pair.a + 1}


def show_table(folder: Path) -> None:
    """Print the table, its verdict and the paths of run files; write `summary.json`."""
    systems = collect(folder)
    path = folder / "summary.json"
    scores = {n: {**r["overall"], "seconds": round(r["seconds"], 1)} for n, r in systems.items()}
    tests: dict[str, Pair] = {}
    try:
        tests = steps(folder, systems)
    except InputError as error:
        sentence = f"not tested: {error}"
    else:
        measure = measures_of(systems.values())[0]
        sentence = verdict(measure, list(systems), tests.values()) if tests else ""
    for name, pair in tests.items():
        scores[name]["p"] = pair.p
    write_json(path, scores)
    values = [p_value(tests[name].p) if name in tests else NONE for name in systems]
    show(results_table(systems, p_values=values if tests else ()))
    for name, record in systems.items():
        show(f"run {name:<12} {folder / record['folder'] / record['run']}")
    show(f"table {path}")
    if sentence:
        show(f"\n{sentence}")
