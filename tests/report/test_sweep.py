from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from tests.refusals import refused

from caravan.report import jobs
from caravan.report.sweep import averaged, collect, plots, show


def _job(folder: Path, overrides: list[str], metrics: dict[str, Any] | None) -> None:
    run_dir = folder / ",".join(overrides)
    jobs.write(run_dir, overrides, jobs.FINISHED if metrics else jobs.FAILED, "it is broken")
    if metrics:
        (run_dir / "metrics.json").write_text(json.dumps(metrics))


SCORED = {"overall": {"MRR@10": 0.1}}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for rate, mrr in (("1e-4", 0.1), ("1e-3", 0.3)):
        for seed in (1, 2):
            metrics = {"validation": {"MRR@10": mrr + seed / 100}, "train_seconds": 2.04}
            _job(tmp_path, ["name=rates", f"optimizer.lr={rate}", f"seed={seed}"], metrics)
    return tmp_path


def test_settings_that_vary_are_the_columns_and_each_job_a_row(sweep: Path) -> None:
    found = collect(sweep)
    assert (found.varied, found.measures) == (["optimizer.lr", "seed"], ["MRR@10", "seconds"])
    assert {"optimizer.lr": 1e-3, "seed": 2, "MRR@10": 0.32, "seconds": 2.0} in found.rows
    assert (len(found.rows), found.failed) == (4, [])


def test_seeds_give_a_mean_and_a_standard_deviation(sweep: Path) -> None:
    (high,) = (row for row in averaged(collect(sweep)) if row["optimizer.lr"] == 1e-3)
    mean, spread, seeds = high["MRR@10"]
    assert mean == pytest.approx(0.315)
    assert spread == pytest.approx(0.00707, abs=1e-5)
    assert seeds == 2


def test_a_sweep_ends_in_text_csv_and_a_plot(
    sweep: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _job(sweep, ["name=rates", "optimizer.lr=1", "seed=1"], None)
    assert show(sweep) == [("name=rates,optimizer.lr=1,seed=1", "it is broken")]
    with (sweep / "sweep.csv").open() as file:
        scores = [float(row["MRR@10"]) for row in csv.DictReader(file)]
    assert scores == pytest.approx([0.11, 0.12, 0.31, 0.32])
    assert "0.3150 ± 0.0071" in (sweep / "sweep.txt").read_text()
    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "failed: name=rates,optimizer.lr=1,seed=1: it is broken" in capsys.readouterr().out
    assert "Mean and standard deviation over 2 seeds." in plots(collect(sweep))[0].caption


def test_a_model_that_is_evaluated_at_several_lengths_has_a_row_for_each(tmp_path: Path) -> None:
    for trained in (64, 128):
        read = {str(length): {"MRR@10": trained / length / 10} for length in (64, 128)}
        _job(tmp_path, [f"encoding.passage_length={trained}"], {"read": read})
    found = collect(tmp_path)
    assert found.varied == ["encoding.passage_length", "read at"]
    assert {"encoding.passage_length": 128, "read at": 64, "MRR@10": 0.2} in found.rows


@pytest.mark.parametrize(("sizes", "shown"), [((1000, 100), ["trained", "GiB"]), ((9, 9), [])])
def test_jobs_show_their_sizes_if_these_differ(
    sizes: tuple[int, int], shown: list[str], tmp_path: Path
) -> None:
    for peft, trained in zip(("none", "lora"), sizes, strict=True):
        record = {"validation": {"MRR@10": 0.5}, "train": {"MRR@10": 0.75}, "memory_gib": 1.5}
        _job(tmp_path, [f"peft={peft}"], {**record, "trained_parameters": trained})
    assert collect(tmp_path).measures == ["MRR@10", "train MRR@10", *shown]
    assert show(tmp_path) == []  # a setting of names has bars
    assert (tmp_path / "sweep.png").exists()
    assert ("1,000" in (tmp_path / "sweep.txt").read_text()) == bool(shown)


@pytest.mark.parametrize(
    ("values", "names"),
    [
        (["[/data/a.trec]", "[b.trec]"], {"[/data/a.trec]", "[b.trec]"}),
        (["null", "runs/x/both/model", "runs/x/one/model"], {"null", "both/model", "one/model"}),
        # Not if one would be the name of another, or if nothing would be left.
        (["a/m", "runs/a/m", "runs/b/m"], {"a/m", "runs/a/m", "runs/b/m"}),
        (["runs/x/model", "runs/x/model/model"], {"model", "model/model"}),
        (["/data/squad", "/data/squad/small"], {"squad", "squad/small"}),
        (["/data/squad", "data/squad"], {"/data/squad", "data/squad"}),
        (["1_1", "11", "1e-3"], {"1_1", 11, 0.001}),
    ],
)
def test_values_are_shown_as_numbers_and_paths_from_where_they_differ(
    values: list[str], names: set[Any], tmp_path: Path
) -> None:
    for number, value in enumerate(values):
        jobs.write(tmp_path / str(number), [f"backbone.folder={value}"], jobs.FINISHED)
        (tmp_path / str(number) / "metrics.json").write_text(json.dumps(SCORED))
    found = collect(tmp_path)
    assert {row["backbone.folder"] for row in found.rows} == names
    assert len(averaged(found)) == len(values)


def test_jobs_with_equal_settings_are_labelled_by_their_folders(tmp_path: Path) -> None:
    for rate in ("1e-3", "0.001", "1e-4"):
        _job(tmp_path, [f"optimizer.lr={rate}"], SCORED)
    names = sorted(collect(tmp_path).labels.values())
    assert names == ["optimizer.lr=0.0001", "optimizer.lr=0.001", "optimizer.lr=1e-3"]


@pytest.mark.parametrize("mark", ["multirun.yaml", "sweep.txt"])
def test_two_sweeps_are_not_one_table(mark: str, tmp_path: Path) -> None:
    with refused("no-jobs", str(tmp_path)):
        collect(tmp_path)
    for name, key in (("rates", "optimizer.lr"), ("seeds", "seed")):
        for value in "12":
            _job(tmp_path / name / "deeper", [f"{key}={value}"], SCORED)
        (tmp_path / name / mark).touch()
    with refused("several-sweeps", "(rates, seeds)"):
        collect(tmp_path)
    assert collect(tmp_path / "rates").varied == ["optimizer.lr"]
    for value in "34":  # a sweep of its own, with two others in its folder
        _job(tmp_path, [f"sampler.number={value}"], SCORED)
    (tmp_path / mark).touch()
    assert collect(tmp_path).varied == ["sampler.number"]


def test_a_failed_job_is_named_by_its_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _job(tmp_path / name, ["seed=1"], None)
    assert [name for name, _ in collect(tmp_path).failed] == ["a/seed=1", "b/seed=1"]
