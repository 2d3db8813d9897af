from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import pytorch_lightning.demos.boring_classes
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.commands import ROOT, evaluate, train, train_arguments
from tests.tiny import write_beir

from caravan import manifests
from caravan.cli.compose import compose
from caravan.cli.train import train as train_config
from caravan.data.batching import limited
from caravan.encoding import folder_digest, read_encoding
from caravan.errors import InputError, OccupiedError
from caravan.models import folder, hardware
from caravan.training import fit
from caravan.training.optim import batches_in_run
from caravan.training.provenance import file_digests, inputs_of


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
    encoding, facts = read_encoding(run_dir / "model")
    assert (encoding.query_length, encoding.passage_length) == (16, 24)
    assert facts["base_model"] == "tiny_llama"
    folder.load(run_dir / "model")


def test_rows_of_other_toolkits_train_with_their_own_negatives_and_teacher(
    beir: Path, tmp_path: Path
) -> None:
    corpus = [json.loads(line) for line in (beir / "corpus.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in corpus]
    rows = [
        {
            "query": " ".join(texts[i].split()[:3]),
            "pos": [texts[i]],
            "neg": [texts[(i + at) % 60] for at in (1, 2, 3)],
            "pos_scores": [3.0],
            "neg_scores": [1.0, -1.0, 0.5],
        }
        for i in range(40)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [
        *("data=flagembedding", f"data.path={tmp_path / 'rows.jsonl'}", "data.held_out=0.2"),
        *("loss=infonce_kl", "sampler.runs=[data:negatives]", "sampler.teacher=data:teacher"),
        "trainer.max_steps=4",
    ]
    best = train(beir, tmp_path / "run", *own)
    assert best is not None
    record = manifests.read(tmp_path / "run" / "model")
    assert record is not None
    assert list(record["inputs"]["runs"]) == ["data:negatives", "data:teacher"]
    with pytest.raises(InputError, match="has no run data:bm25: there are data:negatives"):
        train(beir, tmp_path / "other", *own, "sampler.runs=[data:bm25]")


def test_tensorboard_holds_the_curves(finished: tuple[Path, float | None]) -> None:

    events = EventAccumulator(str(finished[0] / "tensorboard"))
    events.Reload()
    wanted = {
        *("train/loss", "train/gradient_norm", "lr-AdamW/pg1"),
        *("val/MRR@10", "val/nDCG@10", "val/R@100"),
    }
    assert wanted <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("val/MRR@10")] == [4, 8]


def test_a_finished_run_is_not_done_again(
    finished: tuple[Path, float | None], beir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir, best = finished
    monkeypatch.setattr("caravan.training.fit._fit", lambda *_: pytest.fail("trained again"))
    assert train(beir, run_dir) == best
    assert train(beir, run_dir, "resume=true") == best


def test_another_run_in_the_same_place_is_refused(
    finished: tuple[Path, float | None], beir: Path
) -> None:
    before = folder_digest(finished[0] / "model")
    with pytest.raises(InputError, match=r"optimizer\.lr: 0\.01 -> 0\.5.*choose another name="):
        train(beir, finished[0], "optimizer.lr=0.5")
    assert folder_digest(finished[0] / "model") == before


@pytest.mark.parametrize(
    "lost", [(), ("metrics.json",), ("config.yaml.manifest.json",)], ids=["whole", "early", "old"]
)
def test_a_training_does_not_replace_an_evaluation(
    lost: tuple[str, ...], beir: Path, tmp_path: Path
) -> None:
    evaluate(beir, tmp_path / "run", "bm25")
    for name in lost:
        (tmp_path / "run" / name).unlink()
    before = file_digests(tmp_path / "run")
    with pytest.raises(OccupiedError, match="holds an evaluation; choose another name="):
        train(beir, tmp_path / "run")
    assert file_digests(tmp_path / "run") == before


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lr=0.5", r"optimizer\.lr: 0\.01 -> 0\.5"),
        ("seed=3", r"seed: 0 -> 3"),
        ("batching.queries_per_batch=4", r"batching\.queries_per_batch: 6 -> 4"),
        ("loss.temperature=0.1", r"loss\.temperature: 0\.05 -> 0\.1"),
        ("sampler.number=1", r"sampler\.number: 2 -> 1"),
    ],
)
def test_a_run_is_not_resumed_as_another_one(
    finished: tuple[Path, float | None], beir: Path, override: str, told: str
) -> None:
    run_dir = finished[0]
    before = (run_dir / "config.yaml").read_text()
    with pytest.raises(InputError, match=told + ".*choose another name="):
        train(beir, run_dir, "resume=true", override)
    assert (run_dir / "config.yaml").read_text() == before
    assert (run_dir / "model.manifest.json").exists()


def test_a_run_is_not_resumed_over_another_collection(
    finished: tuple[Path, float | None], tmp_path: Path
) -> None:
    other = write_beir(tmp_path / "tiny", seed=1)
    with pytest.raises(InputError, match=r"cannot be resumed.*collection: "):
        train(other, finished[0], "resume=true")


def test_a_longer_run_goes_on_from_the_shorter_one(
    beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(beir, tmp_path / "run", "trainer.max_steps=4")
    train(beir, tmp_path / "run", "trainer.max_steps=8", "resume=true")
    assert "resumed with another setting: trainer.max_steps: 4 -> 8" in caplog.text
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["updates"] == 8


def test_how_a_run_is_done_and_watched_is_no_input(
    finished: tuple[Path, float | None], beir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caravan.training.fit._fit", lambda *_: pytest.fail("trained again"))
    overrides = [
        "batching.num_workers=1",
        "trainer.enable_progress_bar=true",
        "~logger.tensorboard",
    ]
    assert train(beir, finished[0], *overrides) == finished[1]


def test_a_kill_before_the_manifest_leaves_no_model_that_looks_finished(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    train(beir, run_dir, "trainer.max_steps=0")
    write = manifests.write

    def killed(product: Path, *rest: Any) -> None:
        if product.name == "model":
            raise KeyboardInterrupt
        write(product, *rest)

    monkeypatch.setattr(manifests, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        train(beir, run_dir, "trainer.max_steps=2", "resume=true")
    assert (run_dir / "model").exists()
    assert not (run_dir / "model.manifest.json").exists()


def test_other_weights_in_the_backbones_folder_are_another_run(
    finished: tuple[Path, float | None], beir: Path, tmp_path: Path
) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(finished[0] / "model", backbone)
    given = [
        *("backbone=hf", f"backbone.name={backbone}", "trainer.max_steps=0"),
        *("data=beir", f"data.path={beir}", f"run_dir={tmp_path / 'adopted'}"),
    ]
    train_config(compose(ROOT / "conf", "train", given))
    weights = backbone / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match="backbone_digest: "):
        train_config(compose(ROOT / "conf", "train", [*given, "resume=true"]))


def test_the_precision_that_a_machine_chooses_is_recorded(
    finished: tuple[Path, float | None],
) -> None:
    settings = yaml.safe_load((finished[0] / "config.yaml").read_text())
    settings["precision"] = "auto"
    assert inputs_of(settings, None)["precision"] == hardware.resolve("auto")


def test_a_run_is_the_same_wherever_it_is_written(
    finished: tuple[Path, float | None], beir: Path, tmp_path: Path
) -> None:
    train(beir, tmp_path / "elsewhere")
    weights = "model/model.safetensors"
    assert (tmp_path / "elsewhere" / weights).read_bytes() == (finished[0] / weights).read_bytes()


def test_the_best_weights_are_asked_training_queries_too(beir: Path, tmp_path: Path) -> None:
    best = train(beir, tmp_path / "r", "validation.train_queries=10", "trainer.max_steps=40")
    figures = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert set(figures["train"]) == {"MRR@10", "nDCG@10", "R@100"}
    assert best == figures["best"]
    assert figures["train"]["MRR@10"] > figures["best"]  # of what it has seen
    assert figures["trained_parameters"] == figures["parameters"] > 0
    validated = (tmp_path / "r" / "runs" / "validation.trec").read_text()
    short = ("validation.read_lengths=[8]", "validation.train_queries=10", "trainer.max_steps=40")
    train(beir, tmp_path / "s", *short)
    again = json.loads((tmp_path / "s" / "metrics.json").read_text())
    assert again["train"] == figures["train"]
    assert again["read"]["8"] != figures["train"]
    # The run and the curves are those of the validation.
    assert (tmp_path / "s" / "runs" / "validation.trec").read_text() == validated
    assert (tmp_path / "s" / "runs" / "read_8.trec").exists()
    events = EventAccumulator(str(next((tmp_path / "s" / "tensorboard").rglob("events*"))))
    steps = [event.step for event in events.Reload().Scalars("val/MRR@10")]
    assert len(steps) == len(set(steps)) == 10


def test_a_reading_length_without_room_is_refused_before_training(
    beir: Path, tmp_path: Path
) -> None:
    prompt = "encoding.passage_template='{text} camel caravan desert dune'"
    with pytest.raises(InputError, match=r"validation\.read_lengths=5: .* no room"):
        train(beir, tmp_path / "r", "validation.read_lengths=[5]", prompt)
    assert not (tmp_path / "r" / "checkpoints").exists()


def test_processes_that_the_trainer_does_not_know_of_are_told(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"2 processes were started .* the trainer has 1; set"):
        train(beir, tmp_path / "r")


def test_cached_gradients_make_room_on_a_device_that_is_too_small(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = 4 * 30_208 * 4  # weights, gradients, moments
    monkeypatch.setattr("caravan.training.stage.device_memory", lambda device: weights + 500_000)
    with pytest.raises(InputError, match=r"training needs about .* and the cpu has 0\.0 GiB"):
        train(beir, tmp_path / "whole")
    assert train(beir, tmp_path / "cached", "gradcache.chunk=1") is not None


def test_flash_attention_without_a_gpu_is_told_before_anything_loads(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = ["backbone.attention=flash_attention_2", "trainer.accelerator=auto"]
    with pytest.raises(InputError, match=r"flash_attention_2 runs on GPUs alone, .* choose auto"):
        train(beir, tmp_path / "run", *given)
    assert list(tmp_path.iterdir()) == []


def test_an_untrained_model_is_a_folder_too(beir: Path, tmp_path: Path) -> None:
    assert train(beir, tmp_path / "untrained", "trainer.max_steps=0") is None
    assert not (tmp_path / "untrained" / "checkpoints").exists()
    assert read_encoding(tmp_path / "untrained" / "model")[1]["updates"] == 0


def test_a_released_model_is_adopted_without_a_collection(
    finished: tuple[Path, float | None], tmp_path: Path
) -> None:
    overrides = [
        *("backbone=hf", f"backbone.name={finished[0] / 'model'}", "trainer.max_steps=0"),
        *("data=beir", f"data.path={tmp_path}", f"run_dir={tmp_path / 'adopted'}"),
    ]
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


def test_a_split_to_validate_on_is_missed_before_a_model_is_made(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit, "_module", lambda *_: pytest.fail("a model is made"))
    with pytest.raises(InputError, match=r"has no split 'other': .* name one of them"):
        train(beir, tmp_path / "run", "data.dev_split=other")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("warmup", "told"), [(100, True), (2, True), (1, False)])
def test_a_warm_up_that_outlasts_the_run_is_told(
    beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, warmup: int, told: bool
) -> None:
    given = ["trainer.max_steps=2", f"optimizer.warmup_steps={warmup}"]
    train(beir, tmp_path / "run", *given)
    assert (f"optimizer.warmup_steps={warmup} does not end" in caplog.text) == told


def test_the_log_tells_how_far_a_run_is_and_what_validations_gave(
    beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "caravan")
    given = [
        "trainer.max_steps=4",
        "trainer.val_check_interval=2",
        "callbacks.progress_log.seconds=0",
    ]
    best = train(beir, tmp_path / "run", *given)
    assert best is not None
    updates = re.findall(r"update (\d) of 4, loss \d+\.\d{4}, about 0:00:\d\d left", caplog.text)
    assert updates == ["1", "2", "3", "4"]
    found = re.findall(r"validation after update (\d): MRR@10 (\d\.\d{4}), nDCG", caplog.text)
    assert [step for step, _ in found] == ["2", "4"]
    assert max(float(figure) for _, figure in found) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("interval", [["trainer.max_steps=2"], ["trainer.max_epochs=1"]])
def test_a_run_shorter_than_its_validation_interval_validates_at_its_end(
    beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, interval: list[str]
) -> None:
    best = train(beir, tmp_path / "run", "trainer.val_check_interval=500", *interval)
    assert best is not None
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").is_file()
    assert "trainer.val_check_interval=500 is beyond the" in caplog.text


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": 4, "max_epochs": 3}, 4),
        ({"max_epochs": 3}, 15),
        ({"max_steps": 7, "accumulate_grad_batches": 2}, 12),  # 2 + 2 + 1, the same again, 2
        ({"max_steps": 6, "accumulate_grad_batches": 2}, 10),
        ({"max_steps": 1, "accumulate_grad_batches": 9}, 5),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6),
    ],
)
def test_the_batches_of_a_run_are_counted_as_lightning_makes_them(
    settings: dict[str, Any], expected: int
) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", enable_progress_bar=False, **quiet, **settings)
    assert batches_in_run(trainer, limited(5, trainer.limit_train_batches)) == expected
    model = pl.demos.boring_classes.BoringModel()
    model.val_dataloader = None
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(5, 32)))
    assert trainer.fit_loop.total_batch_idx + 1 == expected


def test_the_first_lines_count_updates_and_tell_what_ends_the_run(
    beir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    short = ["trainer.max_epochs=2", "trainer.accumulate_grad_batches=2"]
    train(beir, tmp_path / "run", *short)  # 16 queries: batches of 6, 6, 4
    assert "4 updates, 3 batches an epoch" in caplog.text
    assert "max_epochs ends the run after 4 updates" in caplog.text
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["updates"] == 4


def test_a_mistake_found_in_a_worker_is_told_as_one_sentence(
    beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise InputError("the passage p1 is not to be had; write the collection again")

    monkeypatch.setattr("caravan.data.batching.Groups.__getitem__", refuse)
    with pytest.raises(InputError) as raised:
        train(beir, tmp_path / "run", "batching.num_workers=1")
    assert str(raised.value) == "the passage p1 is not to be had; write the collection again"


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes_to_the_same_weights(tmp_path: Path) -> None:
    beir = write_beir(tmp_path / "data", passages=200, queries=60)
    steps = ["trainer.max_steps=60", "trainer.val_check_interval=7"]
    steps.append("callbacks.last.every_n_steps=2")

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
