from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.commands import ROOT, train, train_arguments
from tests.tiny import write_beir

from caravan.contract import folder_digest, read_contract
from caravan.errors import InputError
from caravan.models import folder


@pytest.fixture(scope="module")
def finished(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float | None]:
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    return run_dir, train(beir, run_dir)


def test_a_run_leaves_model_figures_curves_and_checkpoints(
    finished: tuple[Path, float | None],
) -> None:
    run_dir, best = finished
    names = {path.name for path in run_dir.iterdir()}
    assert names >= {"config.yaml", "metrics.json", "model", "checkpoints", "tensorboard", "runs"}
    figures = json.loads((run_dir / "metrics.json").read_text())
    assert figures["best"] == best is not None
    assert figures["updates"] == 8
    assert list((run_dir / "tensorboard").glob("events*"))
    contract, facts = read_contract(run_dir / "model")
    assert (contract.query_length, contract.temperature) == (16, 0.05)
    assert facts["base_model"] == "tiny_llama"
    folder.load(run_dir / "model")


def test_tensorboard_holds_the_curves(finished: tuple[Path, float | None]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    wanted = {
        *("train/loss", "train/gradient_norm", "lr-AdamW/pg1"),
        *("val/MRR@10", "val/nDCG@10", "val/R@100"),
    }
    assert wanted <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("val/MRR@10")] == [3, 7]


def test_a_finished_run_is_not_done_again(
    finished: tuple[Path, float | None], beir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, best = finished
    monkeypatch.setattr("caravan.training.run._fit", lambda *_: pytest.fail("trained again"))
    assert train(beir, run_dir) == best
    assert train(beir, run_dir, "resume=true") == best


def test_another_run_in_the_same_place_is_refused(
    finished: tuple[Path, float | None], beir: Path
) -> None:
    before = folder_digest(finished[0] / "model")
    with pytest.raises(InputError, match=r"optimizer\.lr: 0\.01 -> 0\.5.*choose another name="):
        train(beir, finished[0], "optimizer.lr=0.5")
    assert folder_digest(finished[0] / "model") == before


def test_a_run_is_the_same_wherever_it_is_written(
    finished: tuple[Path, float | None], beir: Path, tmp_path: Path
) -> None:
    train(beir, tmp_path / "elsewhere")
    weights = "model/model.safetensors"
    assert (tmp_path / "elsewhere" / weights).read_bytes() == (finished[0] / weights).read_bytes()


def test_an_untrained_model_is_a_folder_too(beir: Path, tmp_path: Path) -> None:
    assert train(beir, tmp_path / "untrained", "trainer.max_steps=0") is None
    assert not (tmp_path / "untrained" / "checkpoints").exists()
    assert read_contract(tmp_path / "untrained" / "model")[1]["updates"] == 0


def test_a_released_model_is_adopted_without_a_collection(
    finished: tuple[Path, float | None], tmp_path: Path
) -> None:
    overrides = [
        *("backbone=hf", f"backbone.name={finished[0] / 'model'}", "trainer.max_steps=0"),
        *("data=beir", f"data.path={tmp_path}", f"run_dir={tmp_path / 'adopted'}"),
    ]
    from caravan.compose import compose
    from caravan.training.run import train as train_config

    train_config(compose(ROOT / "conf", "train", overrides))
    adopted, released = (
        path / "model/model.safetensors" for path in (tmp_path / "adopted", finished[0])
    )
    assert adopted.read_bytes() == released.read_bytes()


def test_a_run_of_negatives_that_is_not_there_is_told_with_the_remedy(
    beir: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"no such run; write it with evaluate\.py"):
        train(beir, tmp_path / "run", f"sampler.runs=[{tmp_path}/none.trec]")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(tmp_path: Path) -> None:
    beir = write_beir(tmp_path / "data", passages=200, queries=60)
    steps = ["trainer.max_steps=60", "trainer.val_check_interval=7"]
    steps.append("callbacks.resume_point.every_n_steps=2")

    def command(name: str) -> list[str]:
        given = train_arguments(beir, tmp_path / name, *steps, "resume=true")
        return [sys.executable, str(ROOT / "train.py"), *given]

    started = time.monotonic()
    subprocess.run(command("whole"), check=True, capture_output=True)
    whole = time.monotonic() - started
    kills = 0
    for tenth in (4, 6, 7, 8, 9):
        process = subprocess.Popen(command("killed"), stderr=subprocess.PIPE)
        try:
            process.wait(timeout=whole * tenth / 10)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    subprocess.run(command("killed"), check=True, capture_output=True)
    assert kills >= 2
    one, other = (tmp_path / name / "model/model.safetensors" for name in ("whole", "killed"))
    assert one.read_bytes() == other.read_bytes()
