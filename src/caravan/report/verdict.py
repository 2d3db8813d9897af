"""The verdict of a page: one or two sentences on what differs significantly, and what does not."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from caravan.report.compare import Comparison, Pair, mean_interval, paired_tests
from caravan.report.sweep import SEED, Sweep
from caravan.report.tables import p_value

LEVEL = 0.05
"""Below this p, a difference is significant."""
NAMED = 4
"""Pairs named in a verdict; the others are counted."""
SEEDS = 3
"""Without this many seeds, settings are not tested."""

NOTHING = (
    "No test: there are no scores of single queries, and no setting was repeated with other seeds."
)


def verdict(measure: str, names: Sequence[str], pairs: Iterable[Pair], verb: str = "beats") -> str:
    """One sentence on pairs of systems, by their `p`.

    >>> pair = Pair(0, 1, 0.02, 0.01, 0.03, 0.004, 0.008, 9, 3, 2)
    >>> verdict("MRR@10", ["bm25", "fused"], [pair])
    'MRR@10: fused beats bm25 by 0.0200 (p = .004).'
    """
    parts: list[str] = []
    rest: list[bool] = []
    for pair in pairs:
        a, b = (pair.b, pair.a) if pair.difference < 0 else (pair.a, pair.b)
        p = p_value(pair.p).replace("<", "< ")
        p = p if p.startswith("<") else f"= {p}"
        if len(parts) == NAMED:
            rest.append(pair.p < LEVEL)
        elif pair.p < LEVEL:
            parts.append(f"{names[b]} {verb} {names[a]} by {abs(pair.difference):.4f} (p {p})")
        else:
            parts.append(f"{names[b]} does not differ significantly from {names[a]} (p {p})")
    more = f"; {sum(rest)} of {len(rest)} more pairs differ significantly" if rest else ""
    return f"{measure}: {', '.join(parts)}{more}."


def _against_last(pairs: Iterable[Pair], last: int) -> list[Pair]:
    """The pairs with the last system, the closest first, with their corrected p."""
    found = [replace(pair, p=pair.corrected) for pair in pairs if last in (pair.a, pair.b)]
    return sorted(found, key=lambda pair: abs(pair.difference))


def of_comparison(comparison: Comparison) -> str:
    """The last system, which is the best of a page, against each of the others."""
    measure, names = comparison.measure, comparison.names
    if len(names) < 2:
        if comparison.mean(0, measure) is None:
            return f"No test: the run is not deep enough for {measure}."
        mean, half = mean_interval(comparison.values[measure][0])
        return f"{names[0]} has {measure} {mean:.4f} ± {half:.4f} (95 %); no test of one system."
    pairs = _against_last(comparison.pairs[measure], len(names) - 1)
    if not pairs:
        return f"No test: a run is not deep enough for {measure}."
    if comparison.queries < 2:
        return f"No test: one query says nothing about {measure} of others."
    return verdict(measure, names, pairs)


def of_evaluations(found: Sequence[tuple[str, Comparison | str]]) -> str:
    """The verdict of a page.

    Args:
        found: a collection, and the comparison of its systems or why there is none.
    """
    if len(found) <= 2:
        texts = [one if isinstance(one, str) else of_comparison(one) for _, one in found]
        named = zip(found, texts, strict=True)
        texts = [f"On {name}, {text}" for (name, _), text in named] if len(found) > 1 else texts
        return " ".join(texts) or NOTHING
    best = []
    for _, one in found:
        if not isinstance(one, str) and len(one.names) > 1:
            last = len(one.names) - 1
            best += [
                pair.corrected < LEVEL
                for pair in one.pairs[one.measure]
                if {pair.a, pair.b} == {last - 1, last}
            ]
    if not best:
        return f"No test: none of {len(found)} collections has two systems that can be tested."
    return (
        f"The best system is significantly better than the next on {sum(best)} of {len(best)}"
        f" collections, and not on {len(best) - sum(best)}."
    )


def of_sweep(sweep: Sweep) -> str | None:
    """The best setting against the others over seeds, by the first measure.

    None if the sweep has no seeds, so that only scores of single queries could be tested.
    """
    if SEED not in sweep.varied or not sweep.scores:
        return None
    measure, settings = sweep.scores[0], sweep.rows[sweep.others].to_dict("records")
    labels = [", ".join(f"{k}={v}" for k, v in of.items()) or sweep.name for of in settings]
    table = sweep.rows.assign(label=labels).pivot_table(measure, "label", SEED).dropna(axis=1)
    seeds = table.shape[1]
    if seeds < 2:
        return f"No test: fewer than 2 seeds have {measure} of all settings."
    table = table.loc[table.mean(axis=1).sort_values().index]
    last, best = len(table) - 1, table.iloc[-1]
    text = (
        f"{best.name} has {measure} {best.mean():.4f} ± {best.std():.4f} (mean, standard deviation)"
        f" over {seeds} seeds"
    )
    if not last or seeds < SEEDS:
        return f"{text}; no test: {f'fewer than {SEEDS} seeds' if last else 'one setting'}."
    pairs = paired_tests(table.to_numpy(), [(i, last) for i in range(last)])
    return f"{text}. {verdict(measure, list(table.index), _against_last(pairs, last))}"
