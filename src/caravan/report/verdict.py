"""The verdict of a page: one or two sentences on what differs significantly, and what does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from caravan.report.compare import Comparison, Pair, mean_interval, paired_tests
from caravan.report.records import Training
from caravan.report.sweep import SEED, Sweep, label
from caravan.report.tables import p_value

LEVEL = 0.05  # below this p, a difference is significant
NAMED = 4  # pairs named in a verdict; the others are counted
TIE = 1e-9  # a smaller difference of means is rounding
SEEDS = 3  # with fewer seeds, settings are not tested

NOTHING = "Nothing to compare: no training or evaluation has ended with a score."
NO_SEEDS = "no setting was repeated with other seeds"


def findings(names: Sequence[str], pairs: Iterable[Pair], verb: str = "beats") -> str:
    """One sentence on the differences between pairs of systems, significant by their `p` or not.

    >>> pair = Pair(0, 1, 0.02, 0.01, 0.03, 0.004, 0.008, 9, 3, 2)
    >>> findings(["bm25", "fused"], [pair])
    'fused beats bm25 by 0.0200 (p = .004).'
    """
    found: dict[str, list[str]] = {}
    rest: list[bool] = []
    for number, pair in enumerate(pairs):
        a, b = (pair.b, pair.a) if pair.difference < 0 else (pair.a, pair.b)
        p = p_value(pair.p).replace("<", "< ")
        p = p if p.startswith("<") else f"= {p}"
        if number >= NAMED:
            rest.append(pair.p < LEVEL)
        elif pair.p < LEVEL:
            text = f"{names[a]} by {abs(pair.difference):.4f} (p {p})"
            found.setdefault(f"{names[b]} {verb}", []).append(text)
        else:
            start = f"{names[b]} does not differ significantly from"
            found.setdefault(start, []).append(f"{names[a]} (p {p})")
    parts = [f"{start} {listed(of)}" for start, of in found.items()]
    if rest:
        parts.append(f"of {count(len(rest), 'more pair')}, {sum(rest)} differ significantly")
    return f"{'; '.join(parts)}."


def listed(texts: Sequence[str]) -> str:
    """Texts as a list in a sentence, such as "a, b and c"."""
    *first, last = texts
    return f"{', '.join(first)} and {last}" if first else last


def count(number: int, noun: str) -> str:
    """Such as "1 training" and "2 trainings"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def _have(names: Sequence[str]) -> str:
    return f"{listed(names)} {'has' if len(names) < 2 else 'have'}"


def _highest(names: Sequence[str], means: Any) -> list[str]:
    """The names with the highest of the means [n]; those without one (NaN) are left out."""
    means = np.asarray(means, dtype=float)
    return [name for name, at in zip(names, means >= np.nanmax(means) - TIE, strict=True) if at]


def _against_last(pairs: Iterable[Pair], last: int) -> list[Pair]:
    """The pairs with the last system, the closest first, with their corrected p."""
    found = [replace(pair, p=pair.corrected) for pair in pairs if last in (pair.a, pair.b)]
    return sorted(found, key=lambda pair: abs(pair.difference))


def of_comparison(comparison: Comparison) -> str:
    """The best system, and the last (the best on a page) tested against each of the others."""
    measure, names = comparison.measure, comparison.names
    values, ranked = comparison.values[measure], _ranked(comparison)
    if not ranked:
        return f"No test: no run is deep enough for {measure}."
    mean, half = mean_interval(values[ranked[-1]])
    several = comparison.queries > 1
    over = f"over {comparison.queries:,} queries" if several else "for one query"
    if len(names) < 2:
        interval = f" ± {half:.4f} (95 % confidence interval)" if several else ""
        return f"{names[0]} has {measure} {mean:.4f}{interval} {over}; no test of one system."
    best = _highest(names, values.mean(axis=1))
    first = f"{_have(best)} the highest {measure}, {mean:.4f} {over}"
    if len(ranked) < len(names):
        first += f", of the {count(len(ranked), 'run')} deep enough for it"
    pairs = _against_last(comparison.pairs[measure], len(names) - 1)
    if not pairs:
        return f"{first}; no test: a run is not deep enough for {measure}."
    if not several:
        return f"{first}; no test of one query."
    return f"{first}. {findings(names, pairs)}"


def _ranked(comparison: Comparison) -> list[int]:
    """The systems whose runs are deep enough, the best last."""
    means = comparison.values[comparison.measure].mean(axis=1)
    return [i for i in np.argsort(means, kind="stable").tolist() if not np.isnan(means[i])]


def of_evaluations(found: Sequence[tuple[str, Comparison | str]]) -> str:
    """The verdict on collections, each with its comparison or why there is none."""
    if len(found) <= 2:
        texts = [one if isinstance(one, str) else of_comparison(one) for _, one in found]
        if len(found) > 1:
            texts = [f"On {name}, {text}" for (name, _), text in zip(found, texts, strict=True)]
        return " ".join(texts)
    ahead: Counter[str] = Counter()
    collections, better = 0, []
    for _, one in found:
        if not isinstance(one, str) and len(ranked := _ranked(one)) > 1:
            ahead.update(_highest(one.names, one.values[one.measure].mean(axis=1)))
            collections += 1
            pairs = one.pairs[one.measure]
            better += [p.corrected < LEVEL for p in pairs if {p.a, p.b} == {*ranked[-2:]}]
    if not better:
        return f"No test: none of {len(found)} collections has two systems that can be tested."
    most = [f"{name} on {number}" for name, number in ahead.most_common(NAMED)]
    return (
        f"Best system: {', '.join(most)} of {collections} collections. The best is significantly"
        f" better than the next on {sum(better)} of {len(better)} collections."
    )


def of_sweep(sweep: Sweep) -> str:
    """The best setting, by the first measure, and the test against the others over seeds."""
    if not sweep.scores:
        return NOTHING
    measure, settings = sweep.scores[0], sweep.rows[sweep.others].to_dict("records")
    labels = [label(of, sweep.others) or sweep.name for of in settings]
    if SEED not in sweep.varied:
        scored = int(sweep.rows[measure].count())
        text = f"{_have(_highest(labels, sweep.rows[measure]))} the highest {measure},"
        text += f" {sweep.rows[measure].max():.4f}, of {count(scored, 'setting')}"
        return f"{text}; no test: {NO_SEEDS}."
    table = sweep.rows.assign(label=labels).pivot_table(measure, "label", SEED).dropna(axis=1)
    seeds = table.shape[1]
    if seeds < 2:
        return f"No test: fewer than 2 seeds have {measure} for every setting."
    table = table.loc[table.mean(axis=1).sort_values().index]
    last, names = len(table) - 1, list(table.index)
    best, score = _highest(names, table.mean(axis=1)), f"{table.iloc[-1].mean():.4f}"
    text = f"{_have(best)} {f'the highest {measure},' if last else measure} {score}"
    if len(best) < 2:
        text += f" ± {table.iloc[-1].std():.4f} (mean and standard deviation over {seeds} seeds)"
    else:
        text += f" (mean over {seeds} seeds)"
    if not last or seeds < SEEDS:
        return f"{text}; no test: {f'fewer than {SEEDS} seeds' if last else 'one setting'}."
    pairs = paired_tests(table.to_numpy(), [(i, last) for i in range(last)])
    return f"{text}. {findings(names, _against_last(pairs, last))}"


def of_trainings(trainings: Mapping[str, Training]) -> str:
    """The best monitored value of each training, unranked: of a loss, the lowest is the best."""
    texts = [
        f"{name} reached {one.monitored} {one.best:.4f} in {count(one.updates, 'update')}"
        for name, one in trainings.items()
        if one.monitored and one.best is not None
    ]
    if not texts:
        return NOTHING
    if len(texts) < 2:
        return f"{texts[0]}; no test of one training."
    more = [f"{len(texts) - NAMED} more are below"] if len(texts) > NAMED else []
    why = f"validation does not record scores of single queries, and {NO_SEEDS}"
    return f"{'; '.join([*texts[:NAMED], *more])}. No test: {why}."
