from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from caravan.errors import InputError
from caravan.report import jobs
from caravan.report.sweep import averaged, collect, labelled, show


def _job(folder: Path, overrides: list[str], figures: dict[str, Any] | None) -> None:
    run_dir = folder / ",".join(overrides)
    jobs.write(run_dir, overrides, jobs.FINISHED if figures else jobs.FAILED, "it is broken")
    if figures:
        (run_dir / "metrics.json").write_text(json.dumps(figures))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for rate, mrr in (("1e-4", 0.1), ("1e-3", 0.3)):
        for seed in (1, 2):
            figures = {"validation": {"MRR@10": mrr + seed / 100}, "train_seconds": 2.04}
            _job(tmp_path, ["name=rates", f"optimizer.lr={rate}", f"seed={seed}"], figures)
    return tmp_path


def test_settings_that_vary_are_the_columns_and_each_job_a_row(sweep: Path) -> None:
    varied, measures, rows, failed = collect(sweep)
    assert (varied, measures, failed) == (["optimizer.lr", "seed"], ["MRR@10", "seconds"], [])
    assert {"optimizer.lr": 1e-3, "seed": 2, "MRR@10": 0.32, "seconds": 2.0} in rows
    assert len(rows) == 4


def test_seeds_give_a_mean_and_a_standard_deviation(sweep: Path) -> None:
    varied, measures, rows, _ = collect(sweep)
    high = next(r for r in averaged(varied, measures, rows) if r["optimizer.lr"] == 1e-3)
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
        rows = list(csv.DictReader(file))
    figures = [float(row["MRR@10"]) for row in rows]
    assert figures == pytest.approx([0.11, 0.12, 0.31, 0.32])
    text = (sweep / "sweep.txt").read_text()
    assert "0.3150 ± 0.0071" in text
    assert (sweep / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "failed: name=rates,optimizer.lr=1,seed=1: it is broken" in capsys.readouterr().out


def test_a_model_that_is_read_at_several_lengths_has_a_row_for_each(tmp_path: Path) -> None:
    for trained in (64, 128):
        read = {str(length): {"MRR@10": trained / length / 10} for length in (64, 128)}
        _job(tmp_path, [f"encoding.passage_length={trained}"], {"read": read})
    varied, _, rows, _ = collect(tmp_path)
    assert varied == ["encoding.passage_length", "read at"]
    assert {"encoding.passage_length": 128, "read at": 64, "MRR@10": 0.2} in rows
    assert show(tmp_path) == []
    assert (tmp_path / "sweep.png").exists()


def test_jobs_of_unlike_size_show_their_weights_memory_and_figures_of_training(
    tmp_path: Path,
) -> None:
    for peft, trained in (("none", 1000), ("lora", 100)):
        record = {"validation": {"MRR@10": 0.5}, "train": {"MRR@10": 0.75}, "memory_gib": 1.5}
        _job(tmp_path, [f"peft={peft}"], {**record, "trained_parameters": trained})
    _, measures, rows, _ = collect(tmp_path)
    assert measures == ["MRR@10", "train MRR@10", "trained", "GiB"]
    assert [row["trained"] for row in rows] == [100, 1000]
    assert show(tmp_path) == []
    assert "1,000" in (tmp_path / "sweep.txt").read_text()


def test_jobs_of_one_size_do_not_show_it(tmp_path: Path) -> None:
    for rate in ("1", "2"):
        record = {"validation": {"MRR@10": 0.5}, "trained_parameters": 100, "memory_gib": 1.5}
        _job(tmp_path, [f"optimizer.lr={rate}"], record)
    assert collect(tmp_path)[1] == ["MRR@10"]


def test_lists_and_paths_are_shown_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for i, runs in enumerate(("[/data/a.trec]", "[b.trec]")):
        jobs.write(tmp_path / str(i), [f"sampler.runs={runs}"], jobs.FINISHED, None)
        (tmp_path / str(i) / "metrics.json").write_text('{"validation": {"MRR@10": 0.5}}')
    show(tmp_path)
    for text in (capsys.readouterr().out, (tmp_path / "sweep.txt").read_text()):
        assert "[/data/a.trec]" in text
        assert "[b.trec]" in text


def test_folders_are_shown_without_what_their_paths_share(tmp_path: Path) -> None:
    for folder in ("null", "runs/x/both/${seed}/model", "runs/x/one-task/${seed}/model"):
        _job(tmp_path / folder[-20:-6], [f"init_from={folder}"], {"validation": {"MRR@10": 0.1}})
    assert {row["init_from"] for row in collect(tmp_path)[2]} == {"null", "both", "one-task"}


def test_a_folder_is_not_shortened_to_the_name_of_another_value(tmp_path: Path) -> None:
    for folder in ("bm25", "runs/bm25/model", "runs/dense/model"):
        _job(tmp_path / folder, [f"retriever={folder}"], {"overall": {"MRR@10": 0.1}})
    names = {row["retriever"] for row in collect(tmp_path)[2]}
    assert names == {"bm25", "runs/bm25/model", "runs/dense/model"}


def test_jobs_that_no_setting_tells_apart_are_called_by_their_folders(tmp_path: Path) -> None:
    for rate in ("1e-3", "0.001", "1e-4"):
        _job(tmp_path, [f"optimizer.lr={rate}"], {"overall": {"MRR@10": 0.1}})
    names = sorted(labelled(tmp_path).values())
    assert names == ["optimizer.lr=0.0001", "optimizer.lr=0.001", "optimizer.lr=1e-3"]


@pytest.mark.parametrize("mark", ["multirun.yaml", "sweep.txt"])
def test_two_sweeps_are_not_one_table(mark: str, tmp_path: Path) -> None:
    for name, key in (("rates", "optimizer.lr"), ("seeds", "seed")):
        for value in "12":
            _job(tmp_path / name / "deeper", [f"{key}={value}"], {"overall": {"MRR@10": 0.1}})
        (tmp_path / name / mark).touch()
    with pytest.raises(InputError, match=r"several sweeps \(rates, seeds\).*; give the folder of"):
        collect(tmp_path)
    assert collect(tmp_path / "rates")[0] == ["optimizer.lr"]
    for value in "34":  # a sweep of its own, in whose folder two others lie
        _job(tmp_path, [f"sampler.number={value}"], {"overall": {"MRR@10": 0.1}})
    (tmp_path / mark).touch()
    assert collect(tmp_path)[0] == ["sampler.number"]


@pytest.mark.parametrize(
    "folders",
    [("runs/x/model", "runs/x/model/model"), ("/data/squad", "/data/squad/small")],
)
def test_folders_within_one_another_stay_apart(folders: tuple[str, str], tmp_path: Path) -> None:
    for number, folder in enumerate(folders):
        _job(tmp_path / str(number), [f"init_from={folder}"], {"validation": {"MRR@10": 0.1}})
    varied, measures, rows, _ = collect(tmp_path)
    names = {row["init_from"] for row in rows}
    assert len(names) == len(averaged(varied, measures, rows)) == 2
    assert all(names)


def test_a_job_that_failed_is_named_by_its_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _job(tmp_path / name, ["seed=1"], None)
    assert [name for name, _ in collect(tmp_path)[3]] == ["a/seed=1", "b/seed=1"]


def test_settings_that_are_names_are_drawn_as_bars(tmp_path: Path) -> None:
    for loss in ("kl", "bce"):
        _job(tmp_path, [f"loss={loss}"], {"overall": {"MRR@10": 0.2}, "seconds": 1})
    assert show(tmp_path) == []
    assert (tmp_path / "sweep.png").exists()


def test_a_folder_without_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no job of a sweep"):
        collect(tmp_path)
