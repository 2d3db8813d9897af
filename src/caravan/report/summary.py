"""The tables of evaluations: several of one collection, the stages of one, and suites.

A suite is an evaluation of several collections (`evaluate.py collections=[...]`). One system of one
stage shows all of its measures; several systems or stages show the first measure of each. A mean is
over the collections for which all systems have the measure, so that means are comparable; a note
gives their number if that is not all of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from caravan.errors import InputError, printable
from caravan.report.records import Evaluation, Suite, distinct, measures_of, path_names
from caravan.report.systems import System
from caravan.report.tables import NONE, Section, Table, best, signed, slug

MEAN = "mean"


def systems_of(
    evaluations: Mapping[Path, Evaluation], folder: Path, names: Mapping[Path, str] | None = None
) -> list[System]:
    """The rows of a table of evaluations below `folder`, the worst first.

    An evaluation of several stages gives a row for each, named after the stage if no other row is;
    a run that an evaluation has alone is shown once, as that evaluation.

    Args:
        names: of evaluations, by run directory, if they differ from the folders.
    """
    names = names or {}
    alone = {home: one for home, one in evaluations.items() if len(one.stages) <= 1}
    shown = {stage.run_xxh3 for one in alone.values() for stage in one.stages}
    found: list[System] = []
    candidates = []
    for home, one in alone.items():
        # A run directory by itself is named after its system.
        own = [one.system, f"./{one.system}"] if home == folder else [str(home.relative_to(folder))]
        candidates.append([names[home], *own] if home in names else own)
        found.append(System("", home / one.run, home, one, one))
    for home, one in evaluations.items():
        place = str(home.relative_to(folder))
        for stage in () if home in alone else one.stages:
            if stage.run_xxh3 not in shown:
                longer = f"{names.get(home, place)}/{stage.stage}", f"{stage.stage} of {place}"
                candidates.append([stage.stage, *longer])
                found.append(System("", home / stage.run, home, one, stage))
    (first, *_) = measures_of(one.scored for one in found) or [""]
    named = [replace(one, name=n) for one, n in zip(found, distinct(candidates), strict=True)]
    return sorted(named, key=lambda one: one.scored.overall.get(first, 0.0))


def results_table(systems: Sequence[System], p_values: Sequence[str] = ()) -> Table:
    """Scores and seconds of systems on one collection; `p_values`: against the row before."""
    one = systems[0].evaluation
    assert one is not None
    caption = (
        f"{one.where}: {one.queries:,} queries, {one.passages:,} passages; best in bold. Seconds:"
        " to embed or index the corpus and to search, or to rerank, without what was on disk"
        " already."
    )
    frame = pd.DataFrame([system.scored.overall for system in systems])
    frame.insert(0, "system", [system.name for system in systems])
    if p_values:
        caption += f" p: paired t-test in {frame.columns[1]} against the row before."
        frame["p"] = p_values
    frame["seconds"] = [system.scored.seconds for system in systems]
    return Table.of("results", caption, frame, {"seconds": "{:,.1f}"})


def stages_table(one: Evaluation, place: str = "") -> Table:
    """The stages of one evaluation: scores, gain over the best stage before, queries a second.

    If there are several tables, `place` is the name of the evaluation.
    """
    frame = pd.DataFrame([stage.overall for stage in one.stages])
    lead = f"{place}: " if place else ""
    caption = (
        f"{lead}{one.where}: {one.queries:,} queries; best in bold. Gain: in the first measure,"
        " over the best stage before; queries/s: without what is done once for a collection."
    )
    frame.insert(0, "stage", [stage.stage for stage in one.stages])
    frame["gain"] = [NONE if of.gain is None else signed(of.gain) for of in one.stages]
    frame["queries/s"] = [stage.queries_per_second for stage in one.stages]
    return Table.of(slug(f"stages {place}"), caption, frame, {"queries/s": "{:,.1f}"})


def suites_section(suites: Mapping[Path, Suite]) -> tuple[Section, str]:
    """The table of suites by run directory, with notes, and a sentence on their means.

    Raises:
        InputError: As `collect_suites`.
    """
    names = distinct([path_names(home.resolve()) for home in suites])
    scores, notes = collect_suites(dict(zip(names, suites.values(), strict=True)))
    blocks = [suites_table(scores), *notes]
    return Section("All collections", "overview", blocks), means_sentence(scores)


def collect_suites(suites: Mapping[str, Suite]) -> tuple[pd.DataFrame, list[str]]:
    """Put the collections of suites into one table.

    Args:
        suites: by name, which the table has if there are several.

    Returns:
        The scores: a row for each collection, one for the mean of each group of several, and one
        for the mean of all; a column for each (system or stage, measure). And notes on what is
        missing.

    Raises:
        InputError: If nothing has scores, or a collection differs between suites.
    """
    groups: dict[str, str] = {}
    contents: dict[str, tuple[str, str]] = {}
    scores: dict[tuple[str, str], dict[str, float]] = {}
    notes, several = [], len(suites) > 1
    for given, suite in suites.items():
        name = given if several else suite.system or given
        for collection, own in suite.collections.items():
            collection = printable(collection)  # pandas refuses half of a surrogate pair
            groups[collection] = printable(own.group)
            if contents.setdefault(collection, (own.digest, own.split)) != (own.digest, own.split):
                message = (
                    f"{name} has a different content or split of {collection} than those before"
                )
                raise InputError("mixed-collections", f"{message}; evaluate it again")
            for stage, overall in own.stages.items():
                label = name if len(own.stages) == 1 else f"{name} {stage}"
                label = printable(label if several else stage)
                for measure, value in overall.items():
                    scores.setdefault((label, measure), {})[collection] = value
        if suite.failed:
            notes.append(f"{name}: not in the mean, as they failed: {', '.join(suite.failed)}")
    if not scores:
        failed = [of for suite in suites.values() for of in suite.failed.items()]
        why = "; ".join(f"{collection}: {reason}" for collection, reason in failed)
        why = why or "no stage has a score; set measures that look no deeper than the runs"
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
    caption = f"{title} of each collection; in the mean, a group of collections counts once"
    caption += "; best of each row in bold." if several else "."
    highest = best(shown.T) if several else []
    shown = shown.rename_axis("collection").reset_index(allow_duplicates=True)
    table = Table.of("overview", caption, shown)
    return replace(table, strong=frozenset((row, column + 1) for column, row in highest))


def means_sentence(scores: pd.DataFrame) -> str:
    """The mean of each system by the first measure, the best first; empty if none has one."""
    measure = scores.columns.unique(1)[0]
    means = scores.loc[MEAN].xs(measure, level=1).dropna().sort_values(ascending=False)
    found = ", ".join(f"{name} {value:.4f}" for name, value in means.items())
    shared = " that all systems have" if len(means) > 1 else ""
    return f"Mean {measure} of the collections{shared}: {found}." if found else ""
