"""LastCheckpoint: a run killed at any moment resumes to the same weights, losses and metrics."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping
from tests.fitting import Fit, Fitted, KillAt, same_weights
from tests.refusals import refused

from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.training.callbacks import is_log_step


@pytest.fixture(scope="module")
def whole(module_fit: Fit) -> Fitted:
    return module_fit(every_n_steps=100)


def resumes(fit: Fit, *kills: KillAt, whole: Fitted | None = None, **settings: Any) -> Fitted:
    """Kill a fit and resume it, and compare with an uninterrupted one."""
    whole = whole or fit.into("whole")(**{**settings, "every_n_steps": 100})
    for i, kill in enumerate(kills):
        fit(kill=kill, resume=i > 0, **settings)
    resumed = fit(resume=True, **settings)
    assert same_weights(resumed.weights, whole.weights)
    assert resumed.losses == {b: x for b, x in whole.losses.items() if b in resumed.losses}
    assert max(resumed.losses) == max(whole.losses)
    for name in (name for name in resumed.metrics if name.startswith("val/")):
        assert resumed.metrics[name] == whole.metrics[name]
    best, again = (one.trainer.checkpoint_callback for one in (whole, resumed))
    assert best.best_model_score == again.best_model_score
    return resumed


# An epoch is 3 batches, the last one short; a validation follows batches 4 and 8.
@pytest.mark.parametrize(
    "kills",
    [
        [KillAt(2)],
        [KillAt(4)],
        [KillAt(4, "validation")],
        [KillAt(3), KillAt(6)],
    ],
    ids=["2", "4", "4 in validation", "3 and 6, epochs' ends"],
)
def test_a_killed_run_resumes_exactly(whole: Fitted, fit: Fit, kills: list[KillAt]) -> None:
    resumes(fit, *kills, whole=whole)


@pytest.mark.slow
def test_dropout_and_accumulation_repeat_after_a_resume(fit: Fit) -> None:
    peft = LoRA(rank=2, alpha=4, dropout=0.5)
    resumes(fit, KillAt(3), peft=peft, accumulate=2)
    names = fit.state()["state_dict"]
    assert all("lora_" in name for name in names)
    assert len(names) == 28  # A and B of 7 linear layers in 2 blocks
    with refused("other-model", "choose another run_dir"):
        fit(steps=12, resume=True)


@pytest.mark.slow
def test_a_run_on_four_bits_resumes_exactly(fit: Fit, saved: str) -> None:
    def backbone() -> Pretrained:
        made = Pretrained(saved)
        made.quantization = peft.quantization()
        return made

    peft = LoRA(rank=2, alpha=4, quant_type="nf4")
    whole = fit.into("whole")(peft=peft, backbone=backbone(), steps=6)
    fit(peft=peft, backbone=backbone(), steps=6, kill=KillAt(5))
    resumed = fit(peft=peft, backbone=backbone(), steps=6, resume=True)
    assert same_weights(resumed.weights, whole.weights)


# Validations after batches 3, 5 and 9 fall between the two batches of an update, or on an epoch's
# last batch, which is an update of its own.
@pytest.mark.parametrize(
    ("interval", "step"),
    [(3, 3), *(pytest.param(*of, marks=pytest.mark.slow) for of in ((5, 5), (9, 4)))],
)
def test_a_validation_between_the_batches_of_an_update_loses_no_gradient(
    fit: Fit, interval: int, step: int
) -> None:
    settings: dict[str, Any] = {"accumulate": 2, "val_check_interval": interval, "steps": 8}
    settings |= {"queries_per_batch": 3, "every_n_steps": 100}  # 6 batches an epoch
    resumes(fit, KillAt(step), **settings)


@pytest.mark.parametrize(("limit", "step"), [(2, 2), (0.7, 3)])
def test_a_limited_epoch_resumes_exactly(fit: Fit, limit: float, step: int) -> None:
    resumes(fit, KillAt(step), limit_train_batches=limit, steps=6)


def test_a_run_that_stopped_early_does_not_continue(fit: Fit) -> None:
    def stopping() -> pl.Callback:  # any metric suffices: it stops at the first validation
        return EarlyStopping("val/MRR@10", mode="max", stopping_threshold=-1.0)

    whole = fit.into("whole")(early_stopping=stopping())
    fit(early_stopping=stopping(), kill=KillAt(4, "epoch end"))
    resumed = fit(early_stopping=stopping(), resume=True)
    assert resumed.losses == {}
    assert resumed.trainer.global_step == whole.trainer.global_step == 4
    assert same_weights(resumed.weights, whole.weights)


def test_throughput_and_padding_are_logged(whole: Fitted) -> None:
    assert whole.metrics["train/tokens_per_second"] > 0
    assert 0 < whole.metrics["train/padding"] < 0.5


def test_an_update_of_several_batches_has_one_log_step_at_its_end(fit: Fit) -> None:
    class LogSteps(pl.Callback):
        seen: ClassVar[list[int]] = []

        def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
            if is_log_step(trainer):
                self.seen.append(trainer.fit_loop.total_batch_idx + 1)

    fit(steps=4, accumulate=2, early_stopping=LogSteps())
    # Every second update is logged; an epoch has three batches, of which the last is an update.
    assert LogSteps.seen == [3, 6]
