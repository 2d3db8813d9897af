"""The first sentences of a page against the tests of scipy."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel
from tests.report.conftest import Evaluations, sweep_of, write_job, write_page

from caravan.manifests import write_json
from caravan.report.compare import Comparison, holm, paired_tests
from caravan.report.systems import System
from caravan.report.tables import p_value
from caravan.report.verdict import NAMED, NOTHING, findings, of_comparison, of_evaluations, of_sweep


def _first_sentence(html: Path) -> str:
    return html.read_text().partition('<p class="verdict">')[2].partition("</p>")[0]


def test_better_worse_and_equal_systems_are_named_in_the_right_order() -> None:
    values = np.random.default_rng(0).random((3, 200))
    values[1] = values[0] + 0.1 + 0.01 * values[2]
    pairs = paired_tests(values, [(0, 1), (1, 0), (0, 2)])
    text = findings(["a", "b", "c"], pairs)
    assert text.startswith("b beats a by 0.1")
    assert text.count("a by 0.1") == 2
    assert "c does not differ significantly from a" in text or (
        "a does not differ significantly from c" in text
    )


def _comparison(rows: list[list[float]], names: str) -> Comparison:
    values, systems = np.array(rows), [System(name, Path()) for name in names]
    tests = paired_tests(values, list(itertools.combinations(range(len(names)), 2)))
    scores, pairs = {"MRR@10": values}, {"MRR@10": tests}
    judged: Any = None
    return Comparison(judged, systems, [], values, scores, [], pairs)


@pytest.mark.parametrize(
    ("rows", "start"),
    [
        (
            [[0.5, 0.25, 1], [0.25, 0.5, 1], [0, 0.1, 0]],
            "a and b have the highest MRR@10, 0.5833 over 3 queries. ",
        ),
        (  # another is tested against all
            [[0.3, 0.2, 0.4], [0.9, 0.8, 0.7], [0.3, 0.2, 0.3]],
            "b has the highest MRR@10, 0.8000 over 3 queries. ",
        ),
        ([[0.5]], "a has MRR@10 0.5000 for one query; no test of one system."),
        (
            [[0.5, 0.5], [np.nan, np.nan], [0.6, 0.8]],
            "c has the highest MRR@10, 0.7000 over 2 queries, of the 2 runs deep enough for it",
        ),
    ],
)
def test_the_best_of_the_ranked_systems_is_named(rows: list[list[float]], start: str) -> None:
    assert of_comparison(_comparison(rows, "abc"[: len(rows)])).startswith(start)


def test_the_best_systems_of_many_collections_are_counted() -> None:
    tied = _comparison([[0.5, 0.25, 1], [0.25, 0.5, 1], [0, 0.1, 0]], "abc")
    values = np.random.default_rng(0).random(50)
    ahead = _comparison([values.tolist(), (values + 0.1 + 0.01 * values[::-1]).tolist()], "ab")
    text = of_evaluations([("x", tied), ("y", ahead), ("z", ahead), ("none", "No test: x.")])
    assert text.startswith("Best system: b on 3, a on 1 of 3 collections. ")
    assert text.endswith("better than the next on 2 of 3 collections.")
    assert of_evaluations([("a", "No test: x.")] * 3).startswith("No test: none of 3 collections")


def test_pairs_beyond_the_first_are_counted() -> None:
    values = np.random.default_rng(0).random((NAMED + 4, 50))
    values[-1] += 1
    last = len(values) - 1
    names = [f"s{i}" for i in range(len(values))]
    text = findings(names, paired_tests(values, [(i, last) for i in range(last)]))
    assert text.count(" by ") == NAMED
    assert text.endswith("; of 3 more pairs, 3 differ significantly.")


def test_the_best_system_is_compared_with_each_other_by_the_corrected_p() -> None:
    values = np.random.default_rng(0).random((3, 40))
    values[2] += [0.05] * 20 + [0.2] * 20
    found = _comparison(values.tolist(), "abc")
    p = holm([ttest_rel(values[b], values[a]).pvalue for a, b in ((0, 1), (0, 2), (1, 2))])
    text = of_comparison(found)
    assert p[1] < 0.05
    for name, corrected in (("a", p[1]), ("b", p[2])):
        verb = "beats" if corrected < 0.05 else "does not differ significantly from"
        assert re.search(
            rf"c {verb} ([^;]* and |[^;]*, )?{name} [^;]*p .*{p_value(corrected)[-4:]}", text
        )


@pytest.mark.usefixtures("undrawn")
def test_a_page_of_one_system_says_that_nothing_is_tested(
    evaluations: Evaluations,
) -> None:
    one = _first_sentence(write_page(evaluations.folder / "bm25"))
    scores = evaluations.per_query(evaluations.folder / "bm25/runs/bm25.train.trec", "MRR@10")
    assert f"MRR@10 {sum(scores.values()) / 40:.4f} ±" in one
    assert "no test of one system" in one


@pytest.mark.usefixtures("undrawn")
def test_a_page_of_trainings_has_what_they_reached(tmp_path: Path) -> None:
    for name, best in (("a", 0.25), ("b", 0.5)):
        record = {"monitored": "val/MRR@10", "best": best, "updates": 12}
        write_json(tmp_path / name / "metrics.json", record)
    text = _first_sentence(write_page(tmp_path))
    assert text.startswith("a reached val/MRR@10 0.2500 in 12 updates; b reached val/MRR@10 0.5000")
    one = _first_sentence(write_page(tmp_path / "b"))
    assert one == "b reached val/MRR@10 0.5000 in 12 updates; no test of one training."


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_settings_are_tested_over_three_seeds_or_more(seeds: int, tmp_path: Path) -> None:
    scores = {"1e-4": [0.1, 0.12, 0.13, 0.1, 0.11], "1e-3": [0.3, 0.31, 0.35, 0.29, 0.31]}
    for rate, values in scores.items():
        for seed, value in enumerate(values[: seeds + 1]):
            lost = seed == seeds and rate == "1e-3"  # by a failed job
            metrics = None if lost else {"validation": {"MRR@10": value}, "train_seconds": 1.0}
            write_job(tmp_path, [f"optimizer.lr={rate}", f"seed={seed}"], metrics)
    text = of_sweep(sweep_of(tmp_path))
    if seeds == 1:
        assert text.startswith("No test")
        return
    best, other = scores["1e-3"][:seeds], scores["1e-4"][:seeds]
    spread = f"{np.mean(best):.4f} ± {np.std(best, ddof=1):.4f}"
    assert f"optimizer.lr=0.001 has the highest MRR@10, {spread}" in text
    if seeds < 3:
        assert "no test: fewer than 3 seeds" in text
        return
    assert ttest_rel(best, other).pvalue < 0.05
    difference = np.mean(best) - np.mean(other)
    assert f" optimizer.lr=0.001 beats optimizer.lr=0.0001 by {difference:.4f} (p " in text


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_without_seeds_has_its_best_setting_and_no_test(tmp_path: Path) -> None:
    for rate in "12":
        metrics = {"validation": {"MRR@10": int(rate) / 10}}
        write_job(tmp_path, [f"optimizer.lr={rate}"], metrics)
    text = _first_sentence(write_page(tmp_path))
    assert text.startswith("optimizer.lr=2 has the highest MRR@10, 0.2000, of 2 settings; no test")
    write_job(tmp_path, ["optimizer.lr=3"], {"validation": {"MRR@10": 0.2}})
    write_job(tmp_path, ["optimizer.lr=4"], {})
    text = of_sweep(sweep_of(tmp_path))
    assert text.startswith(
        "optimizer.lr=2 and optimizer.lr=3 have the highest MRR@10, 0.2000, of 3"
    )


def test_the_highest_loss_of_a_sweep_is_not_its_best(tmp_path: Path) -> None:
    for rate in "12":
        metrics = {"monitored": "train/loss", "best": int(rate) / 10}
        write_job(tmp_path, [f"optimizer.lr={rate}"], metrics)
    sweep = sweep_of(tmp_path)
    assert "train/loss" in sweep.measures
    assert sweep.scores == []
    assert of_sweep(sweep) == NOTHING
