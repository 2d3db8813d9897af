"""Damaged files of runs in every report."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
from tests.fuzz.mutations import json_mutants, put, restored, sampled, text_mutants
from tests.refusals import refused
from tests.report.conftest import Report, write_record

from caravan.errors import CONTROLS
from caravan.report import jobs
from caravan.report.records import Evaluation, Job, read_jobs, read_metrics

COMMANDS = {
    "of evaluations": ["table", "mine"],
    "of a sweep": ["table", "sweep"],
    "of a suite": ["table", "suite"],
    "of all": ["page", "."],
    "of systems": ["compare", "mine/bm25", "mine/pipeline", "theirs.trec.gz"],
    "of run files": [
        *("compare", "mine/bm25/runs/bm25.train.trec", "theirs.trec.gz"),
        *("--qrels", "qrels.txt"),
    ],
}


def _report_of_damaged(
    number: int, home: Path, monkeypatch: pytest.MonkeyPatch, report: Report
) -> int:
    """A report of runs of which one file is damaged; returns its exit code."""
    rng = random.Random(number)
    name = rng.choice(list(COMMANDS))
    below = [home / one for one in COMMANDS[name][1:] if (home / one).exists()]
    files = [path for one in below for path in (one, *sorted(one.rglob("*"))) if path.is_file()]
    victim = rng.choice(files)
    with restored(victim) as data:
        mutants = text_mutants(victim.name, data, number)
        if victim.suffix == ".json" and rng.random() < 0.8:
            mutants = json_mutants(data, number, depth=5)
        (mutant,) = sampled(mutants, 1, number)
        put(victim, mutant)
        monkeypatch.chdir(home)
        code, printed, error = report(*COMMANDS[name])
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
    assert read_jobs(tmp_path) == {tmp_path: job}
    (tmp_path / "job.json").write_text(text)
    with refused("damaged-file", "job.json"):
        read_jobs(tmp_path)


@pytest.mark.parametrize("command", ["table", "page"])
def test_a_folder_that_does_not_exist_is_named(
    command: str, tmp_path: Path, report: Report
) -> None:
    code, _, error = report(command, tmp_path / "nowhere")
    assert code == 2
    assert str(tmp_path / "nowhere") in error


def test_measures_deeper_than_a_run_are_left_out_of_older_files(tmp_path: Path) -> None:
    scores = {"MRR@10": 0.3, "R@100": 0.5}
    stage = {"run": "runs/x.trec", "run_xxh3": "d", "seconds": 1.0, "overall": scores}
    stages = [{**stage, "stage": "bm25", "depth": 60}, {**stage, "stage": "reranked", "depth": 10}]
    record = read_metrics(write_record(tmp_path, stages=stages))
    assert isinstance(record, Evaluation)
    assert [list(one.overall) for one in record.stages] == [["MRR@10", "R@100"], ["MRR@10"]]
    assert list(record.overall) == ["MRR@10"]
