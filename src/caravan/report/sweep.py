"""The jobs of a sweep in one table, and plots.

A row is a job: the settings that differ from job to job, then the metrics of its `metrics.json`.
A sweep over seeds also has a table of means and standard deviations. `evaluate.py -m` and
`train.py -m` end with the tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from caravan.errors import printable
from caravan.files import replacing
from caravan.report import jobs, readings
from caravan.report.plots import Line, Plot, intervals, lines
from caravan.report.records import (
    Evaluation,
    Training,
    distinct,
    path_names,
    read_jobs,
    read_metrics,
)
from caravan.report.tables import NONE, SCORE, Section, Table, slug

SEED, SECONDS, TRAINED, MEMORY, BYTES = "seed", "seconds", "trained", "GiB", "bytes/vector"
DIM = "dim"  # the setting that determines the bytes, together with the index
FORMATS = {
    **readings.FORMATS,
    SECONDS: "{:.1f}",
    TRAINED: "{:,.0f}",
    MEMORY: "{:.1f}",
    BYTES: "{:,.0f}",
}
"""Formats of the columns that are not scores; these columns come last."""
ONLY_IF_THEY_DIFFER = {TRAINED: [TRAINED, MEMORY], BYTES: [BYTES]}
"""Columns that are left out if all jobs have the same value of the key."""
LONG = ("sweep", "sweep-seeds")
"""Names of the tables with one row per job, and one row per setting."""
MOST_MEASURES = 6  # plots in a section
NOTES = {
    SECONDS: "training, or indexing and search",
    TRAINED: "weights that are updated",
    MEMORY: "peak memory",
    BYTES: "what a search reads of each passage",
}
"""What the captions explain."""
WORD = re.compile(r"[^\s\[\]{},='\"]+")  # a path, or another part of a value


@dataclass(frozen=True)
class Sweep:
    """The jobs of a sweep.

    `rows` are those of the finished jobs, in order: the varied settings (objects), then the
    measures (NaN if missing).
    """

    name: str  # of its folder
    varied: list[str]  # the settings that differ from job to job
    rows: pd.DataFrame
    records: dict[Path, Training | Evaluation]  # of the finished jobs, by run_dir
    labels: dict[Path, str]  # what sets each apart, such as `rerank.depth=5`
    failed: list[tuple[str, str]]  # (job, reason) of the others
    whole: dict[str, dict[str, str]]  # values whose paths are shortened, by setting

    @property
    def others(self) -> list[str]:
        """The settings that differ, without the seed."""
        return [name for name in self.varied if name != SEED]

    @property
    def trained(self) -> list[str]:
        """The settings that differ between trainings, without the seed and the readings."""
        return [name for name in self.others if name not in readings.COLUMNS]

    @property
    def measures(self) -> list[str]:
        return [name for name in self.rows if name not in self.varied]

    @property
    def scores(self) -> list[str]:
        """The measures for which higher is better."""
        return [name for name in self.measures if name not in FORMATS and "loss" not in name]

    @property
    def reads(self) -> bool:
        """Whether models were evaluated with several readings."""
        return bool(set(readings.COLUMNS) & set(self.varied))

    def averaged(self) -> pd.DataFrame:
        """A row for each setting but the seed; columns (measure, "mean" | "std" | "count")."""
        groups = self.rows.groupby(self.others or (lambda _: self.name), sort=False)
        return groups[self.measures].agg(["mean", "std", "count"])

    def means(self) -> pd.DataFrame:
        """The means of `averaged`, with the settings as columns."""
        return self.averaged().xs("mean", axis=1, level=1).reset_index(names=self.others or None)


def collect(folder: Path) -> Sweep | None:
    """The jobs of the sweep in a folder; None if it is not the folder of a sweep."""
    found = read_jobs(folder)
    if not found or folder in found:
        return None
    overrides = {
        run: {printable(key): _value(text) for key, text in job.overrides.items()}
        for run, job in found.items()
    }
    names = dict.fromkeys(key for of in overrides.values() for key in of)
    settings = {run: {key: of.get(key, NONE) for key in names} for run, of in overrides.items()}
    varied = [name for name in names if len({of[name] for of in settings.values()}) > 1]
    varied.sort(key=lambda name: name == SEED)
    short = {name: shortened(of[name] for of in settings.values()) for name in varied}
    for of in settings.values():
        of |= {name: short[name].get(of[name], of[name]) for name in varied}
    places = {run: str(run.relative_to(folder)) for run in found}
    done = [run for run, job in found.items() if job.state == jobs.FINISHED]
    done.sort(key=lambda run: [_order(settings[run][name]) for name in varied])
    candidates = [[label(settings[run], varied) or places[run], places[run]] for run in done]
    labels = dict(zip(done, distinct(candidates), strict=True))
    reasons = {run: job.error or "not finished" for run, job in found.items()}
    failed = [(places[run], reason) for run, reason in reasons.items() if run not in done]
    records = {run: record for run in done if (record := read_metrics(run)) is not None}
    rows = [
        {**{name: settings[run][name] for name in varied}, **metrics}
        for run in done
        for metrics in (_metrics(records[run]) if run in records else [{}])
    ]
    constant = [n for n in readings.COLUMNS if len({row.get(n, NONE) for row in rows}) < 2]
    if read := [name for name in readings.COLUMNS if name not in constant]:
        varied = [*varied, *read]
        rows = [{**dict.fromkeys(read, NONE), **row} for row in rows]
        rows.sort(key=lambda row: [_order(row[name]) for name in varied])
    table = pd.DataFrame(rows, dtype=object).drop(columns=constant, errors="ignore")
    whole = {name: {new: old for old, new in of.items()} for name, of in short.items() if of}
    return Sweep(folder.name, varied, _ordered(table, varied), records, labels, failed, whole)


def _ordered(table: pd.DataFrame, varied: list[str]) -> pd.DataFrame:
    """The settings, the scores, and what else differs between jobs."""
    for name, columns in ONLY_IF_THEY_DIFFER.items():
        if name not in table or table[name].nunique() < 2:
            table = table.drop(columns=columns, errors="ignore")
    measures = [name for name in table if name not in varied]
    measures.sort(key=lambda name: list(FORMATS).index(name) if name in FORMATS else -1)
    table = table.reindex(columns=[*varied, *measures])
    table[measures] = table[measures].apply(pd.to_numeric)
    return table


def label(settings: Mapping[Any, Any], names: Sequence[str]) -> str:
    """Settings as they are typed, without those that a job lacks.

    >>> label({"lr": 0.1, "segments": "best of 60 words", "dim": NONE}, ["lr", "segments", "dim"])
    'lr=0.1 segments=best_of_60_words'
    """
    given = [f"{name}={settings[name]}" for name in names if settings[name] != NONE]
    return " ".join(text.replace(" ", "_") for text in given)


def shortened(values: Iterable[Any]) -> dict[str, str]:
    """Map texts with paths to shorter texts, in which a path has only its distinct end.

    >>> list(shortened(["[runs/a/bm25.trec,runs/b/dense.trec]", "runs/c/bm25.trec", 3]).values())
    ['[a/bm25.trec,dense.trec]', 'c/bm25.trec']
    """
    texts = [value for value in dict.fromkeys(values) if isinstance(value, str)]
    words = list(dict.fromkeys(word for text in texts for word in WORD.findall(text)))
    ends = [path_names(Path(word)) if "/" in word.strip("/") else [] for word in words]
    # "model" is the end of every model folder.
    ends = [names[1:] if names[:1] == ["model"] else names for names in ends]
    candidates = [[*names, word] for names, word in zip(ends, words, strict=True)]
    names = dict(zip(words, distinct(candidates), strict=True))
    found = {text: WORD.sub(lambda match: names[match[0]], text) for text in texts}
    return {old: new for old, new in found.items() if old != new}


def _metrics(record: Training | Evaluation) -> list[dict[str, Any]]:
    """The metrics of one job; several if its model was evaluated with several readings."""
    if isinstance(record, Evaluation):
        size = record.facts.bytes_per_vector
        own = {} if size is None else {BYTES: size}
        return [{**record.overall, SECONDS: round(record.seconds, 1), **own}]
    seconds = None if record.train_seconds is None else round(record.train_seconds, 1)
    facts = {SECONDS: seconds, TRAINED: record.trained_parameters, MEMORY: record.memory_gib}
    common = {f"train {name}": value for name, value in record.train.items()}
    common |= {name: value for name, value in facts.items() if value is not None}
    scores = record.validation
    if not scores and record.monitored and record.best is not None:
        scores = {record.monitored: record.best}
    return [{**own, **common} for own in [readings.row(of) for of in record.read] or [scores]]


def tables(sweep: Sweep) -> list[Table]:
    """The jobs, and their means over seeds if there are several seeds; none without a score."""
    if not sweep.measures:
        return []
    parts = [f"a row for each job{' and reading' * sweep.reads}", "best in bold"]
    parts += [f"{name}: {text}" for name, text in NOTES.items() if name in sweep.measures]
    caption = f"{sweep.name}: {'; '.join(parts)}."
    others = [name for name in sweep.measures if name not in sweep.scores]
    formats = {name: FORMATS.get(name, SCORE) for name in others}
    made: list[Table] = []
    if sweep.trained and sweep.scores and sweep.reads:
        made += readings.grids(sweep.name, sweep.means(), sweep.trained, sweep.scores[0])
    made.append(Table.of("sweep", caption, sweep.rows, formats, len(sweep.varied)))
    if SEED in sweep.varied:
        caption = f"{sweep.name}: mean ± standard deviation over seeds, best mean in bold."
        settings = len(sweep.others)
        means = sweep.means()[[*sweep.others, *sweep.measures]]
        table = Table.of("sweep-seeds", caption, means, formats, settings)
        rows = [
            [*row[:settings], *(_spread(name, of[name]) for name in sweep.measures)]
            for row, (_, of) in zip(table.rows, sweep.averaged().iterrows(), strict=True)
        ]
        made.append(replace(table, rows=rows))
    return made


def section(sweep: Sweep) -> Section:
    """The shortest tables of a sweep, plots, the other tables, and the jobs that failed."""
    made = tables(sweep)
    first = [table for table in made if table.name not in LONG] or made[-1:]
    rest = [table for table in made if table not in first]
    blocks: list[Any] = [*first, *plots(sweep)[:MOST_MEASURES], *rest]
    blocks += [f"Not finished: {job}: {reason}" for job, reason in sweep.failed]
    return Section("Sweep", "sweep", blocks)


def write(sweep: Sweep, path: Path) -> None:
    """Write the rows as csv, with the paths among the values in full."""
    with replacing(path) as scratch:
        sweep.rows.replace(sweep.whole).to_csv(scratch, index=False)


def plots(sweep: Sweep) -> list[Plot]:
    """A plot for each measure that varies, or of the first measure if none does.

    If models were evaluated with several readings, the x-axis is the tokens that they read.
    """
    known = [name for name in sweep.scores if sweep.rows[name].notna().any()]
    vary = [name for name in known if sweep.rows[name].nunique() > 1]
    vary = vary or known[:1]
    if sweep.trained and sweep.reads:
        return readings.plots(sweep.name, sweep.means(), sweep.trained, vary)
    return [_plot(sweep, name) for name in vary]


def _plot(sweep: Sweep, measure: str) -> Plot:
    """Lines over the numeric setting with the most values, one per combination of the others.

    The x-axis is the bytes per vector if jobs differ in them; dots if no setting is numeric.
    """
    averaged = sweep.averaged()
    of = averaged[measure]
    averaged, of = averaged[of["count"] > 0], of[of["count"] > 0].fillna({"std": 0.0})
    means = of.reset_index(names=sweep.others or ["sweep"])
    numeric = [
        name
        for name in sweep.others
        if all(isinstance(value, int | float) for value in means[name])
    ]
    across = max(numeric, key=lambda name: means[name].nunique(), default=None)
    beside = [name for name in sweep.others if name != across]
    sized = BYTES in sweep.measures
    if sized:
        across, beside = BYTES, [name for name in sweep.others if name != DIM]
        means[BYTES] = averaged[BYTES, "mean"].to_numpy()
    labels = [label(row, beside) for row in means.to_dict("records")]
    seeds = int(means["count"].max())
    spread = f" Mean and standard deviation over {seeds} seeds." if seeds > 1 else ""
    name, title = f"sweep-{slug(measure)}", f"{sweep.name}: {measure}"
    if across is None:
        shown = [text or sweep.name for text in labels]
        draw = intervals(shown, means["mean"].tolist(), means["std"].tolist(), measure)
        return Plot(name, f"{title} of each setting.{spread}", draw)
    drawn = []
    for text, part in means.groupby(pd.Series(labels, means.index), sort=False):
        part = part.sort_values(across, kind="stable")
        values = (part[name].tolist() for name in (across, "mean", "std"))
        drawn.append(Line(text, *values))
    each = f", a line for each {', '.join(beside)}" if beside else ""
    draw = lines(drawn, across, measure, logarithmic=sized)
    return Plot(name, f"{title} over {across}{each}.{spread}", draw)


def _value(text: str) -> Any:
    """A number if the text is one."""
    if re.fullmatch(r"[+-]?\d{1,15}", text, re.ASCII):
        return int(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d{1,2})?", text, re.ASCII | re.IGNORECASE):
        return float(text)
    return printable(text)


def _order(value: Any) -> tuple[bool, float, str]:
    number = isinstance(value, int | float)
    return not number, float(value) if number else 0.0, str(value)


def _spread(measure: str, of: pd.Series) -> str:
    """The mean and the standard deviation of several values."""
    if not of["count"]:
        return NONE
    spread = 0.0 if pd.isna(of["std"]) else of["std"]
    return " ± ".join(FORMATS.get(measure, SCORE).format(x) for x in (of["mean"], spread))
