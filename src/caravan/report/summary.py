"""The tables of evaluations: all below a folder, the stages of one, and suites of collections.

    python -m caravan.report collections runs/beir/bm25 runs/beir/retriever

A suite is an evaluation of several collections (`evaluate.py collections=[...]`). One system of one
stage shows all of its measures; several systems or stages show the first measure of each. A mean is
over the collections for which all systems have the measure, so that means are comparable; a note
gives their number if that is not all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from caravan.errors import InputError, printable
from caravan.files import replacing
from caravan.report.records import (
    Evaluation,
    Scored,
    Suite,
    distinct,
    path_names,
    read_metrics,
    refuse_mixed,
    refuse_repeated,
)
from caravan.report.systems import System
from caravan.report.tables import NONE, Table, best, depth_note, show, signed, slug

MEAN = "mean"


def collect(folder: Path) -> list[System]:
    """Every system below `folder`, the worst first by its first measure; suites by their mean.

    Raises:
        InputError: If there is no evaluation, one has no scores, or evaluations are of different
            collections or splits.
    """
    found: dict[Path, Evaluation] = {}
    suites: list[Path] = []
    for path in sorted(folder.rglob("metrics.json"), key=lambda path: path.parent.parts):
        home = path.parent
        record = read_metrics(home)
        if not isinstance(record, Evaluation) or any(suite in home.parents for suite in suites):
            continue
        if not record.overall and not record.too_deep:
            message = f"{path} has no scores; run evaluate.py again, or remove the file"
            raise InputError("no-scores", message)
        suites += [home] if isinstance(record, Suite) else []
        found[home] = record
    if not found:
        message = f"{folder} holds no evaluation (metrics.json); make one with evaluate.py"
        raise InputError("no-evaluation", message)
    remedy = f"give a folder of one, or see all by python -m caravan.report page {folder}"
    refuse_mixed({str(home.relative_to(folder)): one for home, one in found.items()}, remedy)
    return systems_of(found, folder)


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


def measures_of(scored: Iterable[Scored]) -> list[str]:
    """The measures of several systems or stages, each once, in the order met."""
    return list(dict.fromkeys(measure for one in scored for measure in one.overall))


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
    caption += depth_note({of.name: of.scored.depth for of in systems if of.scored.too_deep})
    return Table.of("results", caption, frame, {"seconds": "{:,.1f}"})


def stages_table(one: Evaluation, place: str = "") -> Table | None:
    """The stages of one evaluation: scores, gain over the best stage before, queries a second.

    None if no run is deep enough for any of the measures. If there are several tables, `place`
    is the name of the evaluation.
    """
    frame = pd.DataFrame([stage.overall for stage in one.stages])
    if frame.empty:
        return None
    lead = f"{place}: " if place else ""
    caption = (
        f"{lead}{one.where}: {one.queries:,} queries; best in bold. Gain: in {frame.columns[0]},"
        " over the best stage before; queries/s: without what is done once for a collection."
    )
    frame.insert(0, "stage", [stage.stage for stage in one.stages])
    frame["gain"] = [NONE if of.gain is None else signed(of.gain) for of in one.stages]
    frame["queries/s"] = [stage.queries_per_second for stage in one.stages]
    caption += depth_note({of.stage: of.depth for of in one.stages if of.too_deep})
    return Table.of(slug(f"stages {place}"), caption, frame, {"queries/s": "{:,.1f}"})


def read_suites(folders: Sequence[Path]) -> dict[str, Suite]:
    """Suites by the ends of the folders' paths.

    Raises:
        InputError: If a folder is given twice, or holds no suite with a finished collection.
    """
    refuse_repeated(folders)
    found = []
    for folder in folders:
        record = read_metrics(folder)
        if not isinstance(record, Suite) or not record.collections:
            failed = record.failed if isinstance(record, Suite) else {}
            why = "".join(f" ({name}: {reason})" for name, reason in failed.items())
            raise InputError(
                "no-evaluation",
                f"{folder} has no evaluation of several collections that is finished{why}; run"
                " evaluate.py data.path=<folder> 'collections=[...]'",
            )
        found.append(record)
    names = distinct([path_names(folder.resolve()) for folder in folders])
    return dict(zip(names, found, strict=True))


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
    short: dict[str, int | None] = {}
    notes, several = [], len(suites) > 1
    for given, suite in suites.items():
        name = given if several else suite.system
        for collection, own in suite.collections.items():
            collection = printable(collection)  # pandas refuses half of a surrogate pair
            groups[collection] = printable(own.group)
            if contents.setdefault(collection, (own.digest, own.split)) != (own.digest, own.split):
                message = (
                    f"{name} has a different content or split of {collection} than those before"
                )
                raise InputError("mixed-collections", f"{message}; evaluate it again")
            for stage, scored in own.scored().items():
                label = name if len(own.stages) == 1 else f"{name} {stage}"
                label = printable(label if several else stage)
                if scored.too_deep:
                    short[label] = scored.depth
                for measure, value in scored.overall.items():
                    scores.setdefault((label, measure), {})[collection] = value
        if suite.failed:
            notes.append(f"{name}: not in the mean, as they failed: {', '.join(suite.failed)}")
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


def show_suites(suites: Mapping[str, Suite], folder: Path | None = None) -> None:
    """Print the collections of suites with their means; of one, write collections.csv."""
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
