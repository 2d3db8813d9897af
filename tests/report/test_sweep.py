from __future__ import annotations

import csv
import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from tests.report.conftest import Report, sweep_of, write_job, write_page, write_record

from caravan.report.sweep import collect, plots

SCORED = {"validation": {"MRR@10": 0.1}}


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for rate, mrr in (("1e-4", 0.1), ("1e-3", 0.3)):
        for seed in (1, 2):
            metrics = {"validation": {"MRR@10": mrr + seed / 100}, "train_seconds": 2.04}
            write_job(tmp_path, ["name=rates", f"optimizer.lr={rate}", f"seed={seed}"], metrics)
    return tmp_path


def test_settings_that_vary_are_columns_each_job_a_row_and_seeds_are_averaged(sweep: Path) -> None:
    found = sweep_of(sweep)
    assert (found.varied, found.measures) == (["optimizer.lr", "seed"], ["MRR@10", "seconds"])
    rows = found.rows.to_dict("records")
    assert {"optimizer.lr": 1e-3, "seed": 2, "MRR@10": 0.32, "seconds": 2.0} in rows
    assert (len(rows), found.failed) == (4, [])
    high = found.averaged().loc[1e-3]["MRR@10"]
    assert (high["mean"], high["std"], high["count"]) == pytest.approx((0.315, 0.007071068, 2))


def test_a_sweep_has_printed_tables_a_csv_and_a_plot(sweep: Path, report: Report) -> None:
    write_job(sweep, ["name=rates", "optimizer.lr=1", "seed=1"], None)
    code, printed, _ = report("table", sweep)
    assert code == 0
    assert "0.3150 ± 0.0071*" in printed
    assert "Not finished: name=rates,optimizer.lr=1,seed=1: it is broken" in printed
    write_page(sweep)
    with (sweep / "sweep.csv").open() as file:
        scores = [float(row["MRR@10"]) for row in csv.DictReader(file)]
    assert scores == pytest.approx([0.11, 0.12, 0.31, 0.32])
    assert (sweep / "report/sweep-MRR-10.png").read_bytes().startswith(b"\x89PNG")
    assert "2 seeds" in plots(sweep_of(sweep))[0].caption


@pytest.mark.parametrize(("sizes", "shown"), [((1000, 100), ["trained", "GiB"]), ((9, 9), [])])
def test_jobs_show_their_sizes_if_these_differ(
    sizes: tuple[int, int], shown: list[str], tmp_path: Path, report: Report
) -> None:
    for peft, trained in zip(("none", "lora"), sizes, strict=True):
        record = {"validation": {"MRR@10": 0.5}, "train": {"MRR@10": 0.75}, "memory_gib": 1.5}
        write_job(tmp_path, [f"peft={peft}"], {**record, "trained_parameters": trained})
    assert sweep_of(tmp_path).measures == ["MRR@10", "train MRR@10", *shown]
    assert plots(sweep_of(tmp_path))  # a setting of names is plotted too
    assert ("1,000" in report("table", tmp_path)[1]) == bool(shown)


def test_values_stay_apart_and_equal_ones_are_labelled_by_their_folders(tmp_path: Path) -> None:
    values = ["1_1", "11", "a/m", "b/m", "nan", "0.001", "1e-3"]
    for value in values:
        write_job(tmp_path, [f"x={value}", "y=1"], SCORED)
    write_job(tmp_path, ["z=1"], SCORED)
    found = sweep_of(tmp_path)
    assert set(found.rows["x"]) == {"1_1", 11, "a/m", "b/m", "nan", 0.001, "\u2013"}
    assert len(set(found.labels.values())) == len(values) + 1
    assert {"x=0.001,y=1", "x=1e-3,y=1"} <= set(found.labels.values())


def test_long_paths_are_named_by_their_ends_and_whole_in_the_csv(
    tmp_path: Path, report: Report
) -> None:
    folders = ("runs/negatives/a_long_name_of_a_collection/runs", "runs/negatives/mined/runs")
    lists = [
        f"[{folders[0]}/bm25.train.trec]",
        "[" + ",".join(f"{f}/bm25.train.trec" for f in folders) + "]",
    ]
    for i, text in enumerate(lists):
        for margin, score in (("null", 0.1), ("0.05", 0.2)):
            overrides = [f"sampler.runs={text}", f"sampler.relative_margin={margin}"]
            write_job(tmp_path, overrides, {"validation": {"MRR@10": score}}, f"{i}{margin}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of matplotlib, if labels leave no room for the axes
        write_page(tmp_path)
    one = "a_long_name_of_a_collection/runs/bm25.train.trec"
    short = {f"[{one}]", f"[{one},mined/runs/bm25.train.trec]"}
    assert set(sweep_of(tmp_path).rows["sampler.runs"]) == short
    assert folders[0] not in report("table", tmp_path)[1]
    with (tmp_path / "sweep.csv").open() as file:
        assert {row["sampler.runs"] for row in csv.DictReader(file)} == set(lists)


@pytest.mark.parametrize("mark", ["multirun.yaml", "sweep.csv"])
def test_two_sweeps_are_not_one_table(mark: str, tmp_path: Path) -> None:
    assert collect(tmp_path) is None
    for name, key in (("rates", "optimizer.lr"), ("seeds", "seed")):
        for value in "12":
            write_job(tmp_path / name / "deeper", [f"{key}={value}"], SCORED)
        (tmp_path / name / mark).touch()
    assert collect(tmp_path) is None
    assert sweep_of(tmp_path / "rates").varied == ["optimizer.lr"]
    for value in "34":  # a sweep of its own, with two others in its folder
        write_job(tmp_path, [f"sampler.number={value}"], SCORED)
    assert sweep_of(tmp_path).varied == ["sampler.number"]
    write_job(tmp_path / "failed", ["seed=1"], None)
    assert [name for name, _ in sweep_of(tmp_path).failed] == ["failed/seed=1"]


def test_jobs_that_differ_in_bytes_are_plotted_over_them_on_a_logarithmic_axis(
    tmp_path: Path,
) -> None:
    for index, size in (("exact", 2), ("int8", 1)):
        for dim in ("8", "16", "null"):
            run_dir = write_job(tmp_path, [f"dim={dim}", f"index={index}"], {})
            facts = {"bytes_per_vector": size * (32 if dim == "null" else int(dim))}
            write_record(run_dir, overall={"MRR@10": 0.1}, facts=facts)
    found = sweep_of(tmp_path)
    assert (found.measures, found.scores) == (["MRR@10", "seconds", "bytes/vector"], ["MRR@10"])
    (plot,) = plots(found)
    assert "over bytes/vector, a line for each index" in plot.caption
    axes = Figure().add_subplot()
    plot.draw(axes)
    assert axes.get_xscale() == "log"
    drawn = [bars[0].get_xdata() for bars in axes.containers]
    assert [list(x) for x in drawn] == [[16, 32, 64], [8, 16, 32]]
    for run_dir in found.records:  # the same bytes in all jobs
        write_record(run_dir, overall={"MRR@10": 0.1}, facts={"bytes_per_vector": 8})
    assert sweep_of(tmp_path).measures == ["MRR@10", "seconds"]
