"""Runs of the command: what they write, log and refuse; kills; adopted and finished models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.commands import ROOT, SHORT, curves, from_folder, train, train_arguments
from tests.refusals import refused
from tests.tiny import write_beir

from caravan.cli.compose import compose
from caravan.cli.train import train as train_config
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.models import folder
from caravan.training import fit, memory

WEIGHTS = "model/model.safetensors"


@pytest.fixture(scope="module")
def finished(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float | None]:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    return run_dir, train(beir, run_dir)


def test_a_run_writes_model_metrics_curves_and_checkpoints(
    finished: tuple[Path, float | None],
) -> None:
    run_dir, best = finished
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.yaml", "metrics.json", "model", "checkpoints", "tensorboard", "runs"}
    metrics = json.loads((run_dir / "metrics.json").read_text())
    assert metrics["best"] == best is not None
    assert metrics["updates"] == 8
    assert metrics["trained_parameters"] == metrics["parameters"] > 0
    encoding, facts = read_encoding(run_dir / "model")
    assert (encoding.query_length, encoding.passage_length) == (16, 24)
    assert facts["base_model"] == "tiny_llama"
    assert facts["recipe"]["temperature"] == 0.05
    folder.load(run_dir / "model")
    found = curves(run_dir)
    assert found.keys() >= {"train/loss", "train/gradient_norm", "lr-AdamW/pg1", "val/R@100"}
    assert list(found["val/MRR@10"]) == [4, 8]


def test_a_finished_run_is_not_repeated_whatever_has_no_effect_on_it(
    finished: tuple[Path, float | None], beir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, best = finished
    monkeypatch.setattr(fit, "_fit", lambda *_: pytest.fail("trained again"))
    changed = ["batching.num_workers=1", "trainer.enable_progress_bar=true", "~logger.tensorboard"]
    for overrides in ([], ["resume=true", *changed]):
        assert train(beir, run_dir, *overrides) == best


def test_the_log_has_summary_progress_validations_and_warnings(
    beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "caravan")
    best = train(
        beir,
        tmp_path / "run",
        "trainer.max_epochs=2",
        "trainer.accumulate_grad_batches=2",  # 16 queries: batches of 6, 6, 4
        "trainer.val_check_interval=3",
        "callbacks.progress_log.seconds=0",
        "optimizer.warmup_steps=4",
    )
    assert best is not None
    for line in (
        "4 updates, 3 batches an epoch",
        "trainer.max_epochs ends the run after 4 updates",
        "optimizer.warmup_steps=4 does not end within the 4 updates",
    ):
        assert line in caplog.text
    updates = re.findall(r"update (\d) of 4, loss \d+\.\d{4}, about 0:00:\d\d left", caplog.text)
    assert sorted(set(updates)) == ["1", "2", "3", "4"]
    found = re.findall(r"validation after update (\d): MRR@10 (\d\.\d{4}), nDCG", caplog.text)
    assert [step for step, _ in found] == ["2", "4"]
    assert max(float(value) for _, value in found) == pytest.approx(best, abs=1e-4)


def test_the_folder_has_the_instruction_of_its_collection_and_the_next_training_too(
    beir: Path, instructed: Path, tmp_path: Path
) -> None:
    encoding, _ = read_encoding(instructed)
    assert encoding.instruction == "camel"
    assert encoding.instructions == {"one": "salt road", "tiny": "camel"}
    more = ("trainer.max_steps=0", "encoding.query_length=24", *from_folder(instructed))
    train(beir, tmp_path / "next", *more)
    assert read_encoding(tmp_path / "next" / "model")[0] == encoding


@pytest.mark.parametrize("end", ["trainer.max_steps=2", "trainer.max_epochs=1"])
def test_a_run_shorter_than_its_validation_interval_validates_at_its_end(
    beir: Path, tmp_path: Path, end: str
) -> None:
    assert train(beir, tmp_path / "run", "trainer.val_check_interval=500", end) is not None
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()


def test_an_architecture_without_an_estimate_of_memory_is_trained(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ambiguous(*_: Any) -> Any:
        raise RuntimeError("its layers differ")

    monkeypatch.setattr(memory, "need", ambiguous)
    assert train(beir, tmp_path / "run", *SHORT) is not None


@pytest.mark.slow
def test_cached_gradients_fit_on_a_device_that_is_too_small_without(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 4 * 30_208 * 4  # weights, gradients, moments
    sizes = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": weights + 500_000}
    monkeypatch.setattr("os.sysconf", sizes.__getitem__)
    with refused("out-of-memory", "gradcache.chunk"):
        train(beir, tmp_path / "whole")
    train(beir, tmp_path / "cached", "gradcache.chunk=1", "trainer.max_steps=1")


def test_norms_in_bf16_are_recorded_with_the_inputs_of_the_run(
    beir: Path, saved: str, tmp_path: Path
) -> None:
    run = ("backbone=hf", f"backbone.name={saved}", "peft=lora", "trainer.max_steps=1")
    asked = (*run, "peft.bf16_norms=true")
    recorded = []
    for name, given in (("default", run), ("asked", asked)):
        train(beir, tmp_path / name, *given, "precision=bf16")
        weights = load_file(tmp_path / name / "model" / "adapter_model.safetensors")
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
        manifest = json.loads((tmp_path / name / "model.manifest.json").read_text())
        recorded.append(manifest["inputs"]["peft"].get("bf16_norms"))
    assert recorded == [None, True]  # an older run has the inputs of the default


def test_a_model_that_is_not_trained_is_a_folder_too_and_can_be_adopted_without_data(
    beir: Path, tmp_path: Path
) -> None:
    untrained = tmp_path / "untrained"
    assert train(beir, untrained, "trainer.max_steps=0") is None
    assert not (untrained / "checkpoints").exists()
    assert read_encoding(untrained / "model")[1]["updates"] == 0
    overrides = [
        *("backbone=hf", f"backbone.name={untrained / 'model'}", "trainer.max_steps=0"),
        *("data=beir", f"data.path={tmp_path}", f"run_dir={tmp_path / 'adopted'}"),
    ]
    train_config(compose(ROOT / "conf", "train", overrides))
    adopted = (tmp_path / "adopted" / WEIGHTS).read_bytes()
    assert adopted == (untrained / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("overrides", "place"),
    [
        (["sampler.runs=[none.trec]"], "none.trec"),
        (["data.dev_split=other"], "'other'"),
        (["backbone.attention=flash_attention_2", "trainer.accelerator=auto"], "flash"),
    ],
)
def test_a_mistake_is_found_before_a_model_is_made_or_anything_is_written(
    overrides: list[str], place: str, beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(fit, "_module", lambda *_: pytest.fail("a model is made"))
    with pytest.raises(InputError, match=place):
        train(beir, tmp_path / "run", *overrides)
    assert not (tmp_path / "run").exists()


def test_a_reading_without_room_for_the_prompt_is_refused_before_training(
    beir: Path, tmp_path: Path
) -> None:
    prompt = "encoding.passage_template='{text} camel caravan desert dune'"
    with refused("no-room-for-text", "validation.readings: "):
        train(beir, tmp_path / "r", prompt, "validation.readings=[{passage_length:5}]")
    assert not (tmp_path / "r" / "checkpoints").exists()


@pytest.mark.slow
def test_other_processes_than_the_trainer_has_are_refused(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with refused("wrong-world-size", "trainer.devices"):
        train(beir, tmp_path / "r")


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(tmp_path: Path) -> None:
    beir = write_beir(tmp_path / "data", passages=200, queries=60)
    steps = ["trainer.max_steps=60", "trainer.val_check_interval=7"]
    steps += ["callbacks.resume_point.every_n_steps=2", "resume=true"]

    def start(name: str) -> subprocess.Popen[bytes]:
        given = train_arguments(beir, tmp_path / name, *steps)
        return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *given])

    started = time.monotonic()
    assert start("whole").wait() == 0
    whole, kills = time.monotonic() - started, 0
    for tenth in (4, 6, 7, 8, 9):
        process = start("killed")
        try:
            process.wait(timeout=whole * tenth / 10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert start("killed").wait() == 0
    assert kills >= 2
    one, other = (tmp_path / name / WEIGHTS for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()
