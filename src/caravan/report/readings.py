"""Trainings whose models were evaluated with several text lengths, and the cost of each.

`read` in the metrics.json of a training is a list, one entry for each of `validation.readings`
(`caravan.training.evaluation.evaluate_reading`). A sweep of such trainings has, for each side whose
length varies, a table of training x reading with the cost below, and a plot of the score over the
tokens that are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from caravan.report.plots import Line, Plot, lines
from caravan.report.records import Reading
from caravan.report.tables import NONE, Table, slug

QUERY, PASSAGE, SEGMENT = "query read at", "passage read at", "segments"
COLUMNS = (QUERY, PASSAGE, SEGMENT)
FORMATS = {
    "tokens/query": "{:,.1f}",
    "tokens/passage": "{:,.1f}",
    "read seconds": "{:,.2f}",
    "read GiB": "{:.2f}",
}
"""The columns of the cost, and their formats."""
TOKENS = list(FORMATS)[:2]


def row(of: Reading) -> dict[str, Any]:
    """What differs from training, the scores, and the cost."""
    segment = None if of.segment is None else f"{of.segment} of {of.segment_words} words"
    values = (of.query_length, of.passage_length, segment)
    cells = {
        name: NONE if value is None else value for name, value in zip(COLUMNS, values, strict=True)
    }
    costs = (of.tokens_per_query, of.tokens_per_passage, of.seconds, of.memory_gib)
    known = {name: x for name, x in zip(FORMATS, costs, strict=True) if x is not None}
    return {**cells, **of.scores, **known}


def _sides(means: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The rows that differ from training in the passage, in the query, and in both.

    Args:
        means: one row for each training and reading.
    """
    means = means.assign(**{name: NONE for name in COLUMNS if name not in means})
    means = means.sort_values(SEGMENT, key=lambda of: of != NONE, kind="stable")  # whole ones first
    query = means[QUERY] != NONE
    passage = (means[PASSAGE] != NONE) | (means[SEGMENT] != NONE)
    for name, chosen in (
        ("passage", passage & ~query),
        ("query", query & ~passage),
        ("query and passage", query & passage),
    ):
        found = means[chosen]
        labels = [
            ", ".join(str(value) for value in of if value != NONE)
            for of in found[list(COLUMNS)].to_numpy()
        ]
        if len(set(labels)) > 1:
            yield name, found.assign(reading=labels)


def grids(sweep: str, means: pd.DataFrame, trained: Sequence[str], measure: str) -> list[Table]:
    """For each side, a table of training (rows) x reading (columns), with the cost below.

    Args:
        means: one row for each training and reading; columns `trained`, `COLUMNS`, measures.
    """
    made = []
    for side, found in _sides(means):
        order = list(dict.fromkeys(found["reading"]))
        scores = found.set_index([*trained, "reading"])[measure].unstack(sort=False)
        table = Table.of(
            f"sweep-{slug(side)}",
            f"{sweep}: {measure} by training (rows) and {side} length at inference (columns),"
            " the best training of each column in bold; below, the mean cost of each column.",
            scores[order].reset_index(),
            labels=len(trained),
        )
        costs = []
        for column, form in FORMATS.items():
            if column in found and found[column].notna().any():
                cost = found.groupby("reading")[column].mean()[order]
                cells = [NONE if pd.isna(mean) else form.format(mean) for mean in cost]
                costs.append([column, *[""] * (len(trained) - 1), *cells])
        made.append(replace(table, rows=[*table.rows, *costs]))
    return made


def plots(
    sweep: str, means: pd.DataFrame, trained: Sequence[str], measures: Sequence[str]
) -> list[Plot]:
    """For each side and measure, the score over the tokens that are read.

    Args:
        means: as in `grids`.
    """
    made = []
    for side, found in _sides(means):
        known = [name for name in TOKENS if name in found and found[name].notna().all()]
        known = [name for name in known if name.removeprefix("tokens/") in side] or known
        if not known:
            continue
        x = known[-1]
        for measure in measures:
            caption = f"{sweep}: {measure} over {x} at inference, a line for each training."
            if (found[SEGMENT] != NONE).any():
                caption += " Hollow marks are those of segments."
            draw = lines(_lines(found, trained, x, measure), x, measure)
            made.append(Plot(f"sweep-{slug(side)}-{slug(measure)}", caption, draw))
    return made


def _lines(found: pd.DataFrame, trained: Sequence[str], x: str, measure: str) -> list[Line]:
    """A line for each training; those of its segments have its colour and mark."""
    drawn: list[Line] = []
    first: dict[Any, int] = {}  # the line of each training
    named = set()
    for (*key, segment), of in found.groupby([*trained, SEGMENT], sort=False):
        of = of.sort_values(x)
        points = [float(f"{value:.3g}") for value in of[x]], of[measure].tolist()
        names = [name.rpartition(".")[2] for name in trained]
        label = ", ".join(f"{name}={value}" for name, value in zip(names, key, strict=True))
        like = first.setdefault(tuple(key), len(drawn))
        if like == len(drawn):
            drawn.append(Line(label if segment == NONE else f"{label}, {segment}", *points))
        else:
            drawn.append(Line("" if segment in named else segment, *points, like=like))
            named.add(segment)
    return drawn
