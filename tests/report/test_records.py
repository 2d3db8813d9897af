"""Damaged files of runs, and scores beyond the depth of a run, in every report."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.fuzz.mutations import json_mutants, put, restored, sampled, text_mutants
from tests.refusals import refused
from tests.report.conftest import Report, write_record

from caravan.errors import CONTROLS
from caravan.report import jobs, page
from caravan.report.records import Evaluation, Job, read_jobs, read_metrics

COMMANDS = {
    "table": ["mine"],
    "compare": ["mine/bm25", "mine/pipeline", "theirs.trec.gz"],
    "compare --qrels qrels.txt": ["mine/bm25/runs/bm25.train.trec", "theirs.trec.gz"],
    "sweep": ["sweep"],
    "collections": ["suite"],
    "page": ["."],
}


def _report_of_damaged(
    number: int, home: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> int:
    """A report of runs of which one file is damaged; returns its exit code."""
    rng = random.Random(number)
    name = rng.choice(list(COMMANDS))
    below = [home / one for one in COMMANDS[name]]
    below += [home / "qrels.txt"] if "--qrels" in name else []
    files = [path for one in below for path in (one, *sorted(one.rglob("*"))) if path.is_file()]
    victim = rng.choice(files)
    with restored(victim) as data:
        mutants = text_mutants(victim.name, data, number)
        if victim.suffix == ".json" and rng.random() < 0.8:
            mutants = json_mutants(data, number, depth=5)
        (mutant,) = sampled(mutants, 1, number)
        put(victim, mutant)
        monkeypatch.chdir(home)
        command, *options = name.split()
        code, printed, error = report(command, *COMMANDS[name], *options)
    what = f"{number}: {name} after {mutant.name} of {victim.relative_to(home)}: {error}"
    assert code in (0, 2), what
    if code == 2:
        assert 1 <= len(error.strip().splitlines()) <= 2, what
        assert error.strip()[-1] != ":", what
    assert not CONTROLS.search(printed + error), what
    return code


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    "numbers",
    [
        range(10),
        *(pytest.param(range(i, i + 60), marks=pytest.mark.slow) for i in range(60, 600, 60)),
    ],
    ids=str,
)
def test_a_damaged_file_is_no_traceback(
    numbers: range, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> None:
    shutil.copytree(whole, home := tmp_path / "whole")
    codes = {_report_of_damaged(i, home, monkeypatch, report) for i in numbers}
    assert codes == {0, 2}


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ('{"overall":', "metrics.json"),
        ("[]", "metrics.json"),
        ('{"overall": {"MRR@10": NaN}}', "overall.MRR@10"),
        ('{"overall": {}, "seconds": 1, "stages": [{}]}', "stages.0.overall"),
        ('{"train_seconds": true}', "train_seconds"),
    ],
)
def test_a_damaged_value_is_named(text: str, place: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(text)
    with refused("damaged-file", str(tmp_path / "metrics.json"), place):
        read_metrics(tmp_path)


def test_an_unknown_measure_of_a_suite_is_named(tmp_path: Path) -> None:
    own = {"group": "g", "digest": "d", "split": "test", "stages": {"s": {"F1": 0.1}}}
    write_record(tmp_path, collections={"a": own}, failed={})
    with refused("damaged-file", "collections.a.stages.s.F1"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "[" * 100_000, '{"state": 1}', '{"state": "finished"}'),
        '{"state": "finished", "overrides": {"k1": []}, "error": null}',
        '{"state": "failed", "overrides": {}, "error": {"x": 1}}',
    ],
)
def test_a_damaged_record_of_a_job_is_named(text: str, tmp_path: Path) -> None:
    jobs.write(tmp_path, ["bm25.k1=1", "+name='a b'"], jobs.FINISHED)
    job = Job(overrides={"bm25.k1": "1", "name": "a b"}, state="finished")
    assert read_jobs(tmp_path) == ({tmp_path: job}, [])
    (tmp_path / "job.json").write_text(text)
    with refused("damaged-file", "job.json"):
        read_jobs(tmp_path)


@pytest.mark.parametrize("command", ["table", "sweep", "collections", "page"])
def test_a_folder_that_does_not_exist_is_named(
    command: str, tmp_path: Path, report: Report
) -> None:
    code, _, error = report(command, tmp_path / "nowhere")
    assert code == 2
    assert str(tmp_path / "nowhere") in error


def _settings(depth: int) -> dict[str, Any]:
    """A reranker's top 100 of a retriever's 1,000."""
    reranked = {"MRR@10": 0.3, "R@1000": 0.6 if depth < 1000 else 0.8}
    both: list[tuple[str, int, dict[str, float], float | None]] = [
        ("retriever", 1000, {"MRR@10": 0.2, "R@1000": 0.9}, None),
        ("reranked", depth, reranked, 0.1),
    ]
    stages = [
        {
            "stage": name, "run": f"runs/{name}.test.trec", "run_xxh3": f"{name}{depth}",
            "overall": overall, "seconds": 1.0, "gain": gain, "depth": deep,
        }
        for name, deep, overall, gain in both
    ]  # fmt: skip
    run = {"system": "reranked", "run": "runs/reranked.test.trec"}
    return {**run, "passages": 5000, "overall": reranked, "stages": stages}


def test_a_record_keeps_the_measures_that_each_stage_is_deep_enough_for(tmp_path: Path) -> None:
    def read(depth: int, **settings: Any) -> Evaluation:
        found = read_metrics(write_record(tmp_path, **{**_settings(depth), **settings}))
        assert isinstance(found, Evaluation)
        return found

    found = read(100)
    measures = [list(stage.overall) for stage in found.stages]
    assert measures == [["MRR@10", "R@1000"], ["MRR@10"]]
    assert (found.overall, found.depth) == ({"MRR@10": 0.3}, 100)
    assert found.too_deep == ["R@1000"]
    without = read(5)  # the gain is in the first measure
    assert (without.overall, without.stages[1].gain) == ({}, None)
    assert read(1000).overall == _settings(1000)["overall"]
    assert read(100, passages=100).overall == _settings(100)["overall"]


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("command", ["table", "collections", "sweep", "page"])
def test_every_report_leaves_out_a_score_beyond_the_depth_and_says_why(
    command: str, tmp_path: Path, report: Report
) -> None:
    home = tmp_path / "runs"
    for depth in (100, 1000):
        settings = _settings(depth)
        if command == "collections":
            own = {"group": "c", "digest": "d", "split": "test", "passages": 5000}
            own["depths"] = {stage["stage"]: stage["depth"] for stage in settings["stages"]}
            own["stages"] = {stage["stage"]: stage["overall"] for stage in settings["stages"]}
            settings |= {"collections": {"c": own}, "failed": {}, "run": ""}
        folder = write_record(home / f"depth-{depth}", **settings)
        if command == "sweep":
            jobs.write(folder, [f"rerank.depth={depth}"], jobs.FINISHED)
    code, shown, _ = report(command, home / "depth-100" if command == "collections" else home)
    assert code == 0
    if command == "page":
        shown = (home / page.FILE).read_text()
    assert "100 deep" in shown
    written = [path.read_text() for path in home.rglob("*.[cm][sd]*")]  # .csv and .md
    assert not any("0.6" in text for text in [shown, *written])
    assert "0.8000" in shown or command == "collections"
