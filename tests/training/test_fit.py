"""Whole fits through Lightning: resumed, on two ranks, with the evaluation callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping
from tests.fitting import MEASURES, Fit, Fitted, KillAt, Sgd, random_candidates, same_weights, told
from tests.two_ranks import TwoRanks

from caravan.data.collection import Collection
from caravan.data.runs import read_run
from caravan.encoding import Encoding
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.retrieval.metrics import score_run


@pytest.fixture(scope="module")
def whole(
    collection: Collection,
    tokenizer: Any,
    encoding: Encoding,
    tmp_path_factory: pytest.TempPathFactory,
) -> Fitted:
    return Fit(collection, tokenizer, encoding, tmp_path_factory.mktemp("whole"))()


# An epoch is 3 batches, the last one short; a validation follows batches 4 and 8.
@pytest.mark.parametrize(
    ("step", "moment"),
    [*((step, "step") for step in (2, 3, 4, 5, 6, 9)), (4, "validation"), (8, "validation")],
)
def test_a_killed_run_resumes_to_the_same_weights_and_figures(
    whole: Fitted, fit: Fit, step: int, moment: str
) -> None:
    fit(kill=KillAt(step, moment))
    resumed = fit(resume=True)
    assert same_weights(resumed.weights, whole.weights)
    assert resumed.losses == {b: x for b, x in whole.losses.items() if b in resumed.losses}
    assert max(resumed.losses) == max(whole.losses)
    for name, value in resumed.metrics.items():
        if name.startswith("val/"):
            assert whole.metrics[name] == value
    best, again = (x.trainer.checkpoint_callback for x in (whole, resumed))
    assert best.best_model_score == again.best_model_score


def test_kills_at_the_ends_of_two_epochs_in_a_row_resume_to_the_same_weights(
    whole: Fitted, fit: Fit
) -> None:
    fit(kill=KillAt(3, "step"))
    fit(kill=KillAt(6, "step"), resume=True)
    resumed = fit(resume=True)
    assert same_weights(resumed.weights, whole.weights)
    assert resumed.losses == {b: x for b, x in whole.losses.items() if b in resumed.losses}


def test_dropout_and_accumulation_repeat_after_a_resume(fit: Fit, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"peft": LoRA(rank=2, alpha=4, dropout=0.5), "accumulate": 2}
    whole = fit(**settings)
    fit.folder = tmp_path / "killed"
    fit(kill=KillAt(3, "step"), **settings)
    resumed = fit(resume=True, **settings)
    assert same_weights(resumed.weights, whole.weights)


def test_a_run_on_four_bits_resumes_to_the_same_weights(
    fit: Fit, tmp_path: Path, saved: str
) -> None:
    def settings() -> dict[str, Any]:
        peft, backbone = LoRA(rank=2, alpha=4, quant_type="nf4"), Pretrained(saved)
        backbone.quantization = peft.quantization()
        return {"peft": peft, "backbone": backbone, "steps": 6}

    whole = fit(**settings())
    fit.folder = tmp_path / "killed"
    fit(kill=KillAt(5, "step"), **settings())  # after the validation of the fourth update
    resumed = fit(resume=True, **settings())
    assert same_weights(resumed.weights, whole.weights)
    state = torch.load(fit.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert all("lora_" in name for name in state["state_dict"])


# Validations after batches 3, 5 and 9 fall between the two batches of an update, or on an epoch's
# last batch, which is an update of its own.
@pytest.mark.parametrize(("interval", "step"), [(3, 3), (5, 3), (5, 5), (9, 4)])
def test_a_validation_between_the_batches_of_an_update_loses_no_gradient(
    fit: Fit, tmp_path: Path, interval: int, step: int
) -> None:
    settings: dict[str, Any] = {
        "accumulate": 2,
        "val_check_interval": interval,
        "steps": 8,
        "queries_per_batch": 3,  # 6 batches an epoch
        "every_n_steps": 100,
    }
    whole = fit(**settings)
    fit.folder = tmp_path / "killed"
    fit(kill=KillAt(step, "step"), **settings)
    resumed = fit(resume=(fit.folder / "checkpoints" / "last.ckpt").exists(), **settings)
    assert same_weights(resumed.weights, whole.weights)


@pytest.mark.parametrize("limit", [2, 0.7])
@pytest.mark.parametrize("step", [1, 2, 3, 4, 5])
def test_a_limited_epoch_resumes_to_the_same_weights(
    fit: Fit, tmp_path: Path, limit: float, step: int
) -> None:
    settings: dict[str, Any] = {"limit_train_batches": limit, "steps": 6}
    whole = fit(**settings)
    fit.folder = tmp_path / "killed"
    fit(kill=KillAt(step, "step"), **settings)
    resumed = fit(resume=True, **settings)
    assert same_weights(resumed.weights, whole.weights)
    assert resumed.losses == {b: x for b, x in whole.losses.items() if b in resumed.losses}


def test_a_run_that_was_stopped_early_trains_no_further_when_resumed(
    fit: Fit, tmp_path: Path
) -> None:
    def stopping() -> pl.Callback:  # any figure is good enough: it stops at the first validation
        return EarlyStopping("val/MRR@10", mode="max", stopping_threshold=-1.0)

    whole = fit(early_stopping=stopping())
    assert whole.trainer.global_step == 4
    fit.folder = tmp_path / "killed"
    fit(early_stopping=stopping(), kill=KillAt(4, "epoch end"))
    resumed = fit(early_stopping=stopping(), resume=True)
    assert resumed.losses == {}
    assert resumed.trainer.global_step == 4
    assert same_weights(resumed.weights, whole.weights)


def test_a_point_to_resume_from_is_written_in_an_epochs_last_batch(fit: Fit) -> None:
    fit(kill=KillAt(3, "step"), every_n_steps=3)
    state = torch.load(fit.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 3


@pytest.mark.parametrize("none", [None, 0])
def test_no_limit_leaves_the_gradient_as_it_is(fit: Fit, none: int | None) -> None:
    free = fit(steps=2, optimizer=Sgd(), gradient_clip_val=none)
    wide = fit(steps=2, optimizer=Sgd(), gradient_clip_val=1e9)
    assert same_weights(free.weights, wide.weights)
    assert not same_weights(free.weights, fit(steps=2, optimizer=Sgd()).weights)
    assert free.metrics["train/gradient_norm"] > 1


def test_gradients_are_limited_by_value_when_asked(fit: Fit) -> None:
    before = fit(steps=1, optimizer=Sgd(), gradient_clip_val=1e9, limit_train_batches=0).weights
    after = fit(
        steps=1, optimizer=Sgd(), gradient_clip_val=1e-3, gradient_clip_algorithm="value"
    ).weights
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert moved == pytest.approx(0.5e-3, rel=1e-3)


def test_a_checkpoint_of_adapters_holds_only_what_is_trained(fit: Fit) -> None:
    fitted = fit(steps=2, peft=LoRA(rank=2, alpha=4))
    state = torch.load(fit.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["state_dict"].keys() == {n for n in fitted.weights if "lora_" in n}
    assert len(state["state_dict"]) == 28  # A and B of 7 linear layers in 2 blocks


def test_training_lowers_the_loss_and_the_figures_are_those_of_the_run(fit: Fit) -> None:
    fitted = fit(steps=40, workers=1)
    losses = list(fitted.losses.values())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    collection = fit.collection
    run = read_run(fit.folder / "run.trec", collection.queries, collection.corpus)
    scored = score_run(
        run, collection.qrels("dev"), collection.queries, collection.corpus, MEASURES
    )
    for name, value in scored["overall"].items():
        assert fitted.metrics[f"val/{name}"] == pytest.approx(value, abs=1e-6)


def test_throughput_and_padding_are_logged(fit: Fit) -> None:
    metrics = fit(steps=4).metrics
    assert metrics["train/tokens_per_second"] > 0
    assert 0 < metrics["train/padding"] < 0.5
    assert metrics["train/gradient_norm"] > 0


def test_a_checkpoint_of_another_model_is_refused(fit: Fit) -> None:
    from caravan.errors import InputError

    fit(steps=2)
    with pytest.raises(InputError, match="another model"):
        fit(steps=4, peft=LoRA(rank=2, alpha=4), resume=True)


@pytest.mark.parametrize("stage", ["retriever", "reranker", "adaptation"])
def test_two_ranks_equal_one(fit: Fit, two_ranks: TwoRanks, tmp_path: Path, stage: str) -> None:
    # Batches of 7, 7 and 2 queries: one rank has 4 of 7, and its mean must weigh more.
    settings: dict[str, Any] = {"steps": 5, "optimizer": Sgd(), "queries_per_batch": 7}
    settings["adapts"] = stage == "adaptation"
    if stage == "reranker":
        settings["candidates"] = random_candidates(fit.collection, tmp_path / "candidates.trec")
    one = fit(**settings)
    fit.folder = tmp_path / "two"
    two, _ = two_ranks(told, fit, "ddp", **settings)
    logged = ["train/loss", *(name for name in one.metrics if name.endswith(("accuracy", "hits")))]
    assert len(logged) == (3 if stage == "adaptation" else 2)
    for name in logged:
        assert two["metrics"][name] == pytest.approx(one.metrics[name], abs=1e-5)
    state = torch.load(fit.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    first = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, weight in first.items():
        torch.testing.assert_close(state[name], weight, atol=2e-5, rtol=1e-4, msg=name)
    shown = [name for name in one.metrics if name.startswith("val/")]
    assert len(shown) >= len(MEASURES)
    for name in shown:
        assert two["metrics"][name] == pytest.approx(one.metrics[name], abs=1e-6)
    assert (fit.folder / "run.trec").read_text().split("\n")[0].split()[:3] == (
        tmp_path / "run.trec"
    ).read_text().split("\n")[0].split()[:3]
