"""Whole fits through Lightning: resumed, on two ranks, with the evaluation callback."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tests.tiny import tiny_backbone
from torch import Tensor

from caravan.contract import Contract
from caravan.data.collection import Collection
from caravan.data.datamodule import DataModule
from caravan.data.negatives import Negatives
from caravan.data.runs import read_run
from caravan.data.templates import Templates
from caravan.models.backbone import LoRA
from caravan.retrieval.index import Faiss
from caravan.retrieval.metrics import score_run
from caravan.training.callbacks import (
    AtomicCheckpoints,
    ResumePoint,
    RetrievalEvaluation,
    Throughput,
)
from caravan.training.losses import InfoNCE
from caravan.training.optim import AdamW
from caravan.training.retriever import Retriever

MEASURES = ["MRR@10", "nDCG@10", "R@100"]


class KilledError(Exception):
    pass


class KillAt(pl.Callback):
    """Stops the run dead at a moment: in a training step, or in a validation."""

    def __init__(self, step: int, moment: str) -> None:
        self.step, self.moment = step, moment

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.moment == "step" and trainer.global_step == self.step:
            raise KilledError

    def on_validation_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.moment == "validation" and trainer.global_step == self.step:
            raise KilledError


class Losses(pl.Callback):
    def __init__(self) -> None:
        self.seen: dict[int, float] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, out: Any, *_: Any) -> None:
        self.seen[trainer.fit_loop.total_batch_idx] = float(out["loss"])


@dataclass
class Fitted:
    weights: dict[str, Tensor]
    losses: dict[int, float]
    metrics: dict[str, float]
    trainer: pl.Trainer


class Fit:
    """A small training run over the tiny collection, with all that `train.py` puts around one."""

    def __init__(
        self, collection: Collection, tokenizer: Any, contract: Contract, folder: Path
    ) -> None:
        self.collection, self.tokenizer = collection, tokenizer
        self.contract, self.folder = contract, folder

    def __call__(
        self,
        steps: int = 10,
        peft: Any = None,
        resume: bool = False,
        kill: KillAt | None = None,
        accumulate: int = 1,
        workers: int = 0,
        optimizer: Any = None,
        **trainer_settings: Any,
    ) -> Fitted:
        data = DataModule(
            self.collection,
            Templates(self.tokenizer, self.contract),
            Negatives(number=2),
            "train",
            "dev",
            seed=0,
            queries_per_batch=6,
            token_budget=128,
            num_workers=workers,
        )
        module = Retriever(
            tiny_backbone(),
            peft,
            self.tokenizer,
            self.contract,
            InfoNCE(),
            optimizer or AdamW(lr=1e-2, warmup_steps=2),
            seed=0,
        )
        losses = Losses()
        best = ModelCheckpoint(
            self.folder / "checkpoints",
            "best",
            monitor="val/MRR@10",
            mode="max",
            enable_version_counter=False,
        )
        callbacks: list[pl.Callback] = [
            RetrievalEvaluation(Faiss(k=100), MEASURES, str(self.folder / "run.trec")),
            best,
            ResumePoint(str(self.folder / "checkpoints"), every_n_steps=1),
            Throughput(),
            losses,
        ]
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=100,
            val_check_interval=4,
            check_val_every_n_epoch=None,
            accumulate_grad_batches=accumulate,
            callbacks=callbacks + ([kill] if kill else []),
            plugins=[AtomicCheckpoints()],
            logger=False,
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=2,
            **{"devices": 1, **trainer_settings},
        )
        module.configure_model()
        last = self.folder / "checkpoints" / "last.ckpt"
        try:
            trainer.fit(
                module, datamodule=data, ckpt_path=last if resume else None, weights_only=False
            )
        except KilledError:
            pass
        else:
            assert kill is None, "the run was to be killed and was not"
        weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return Fitted(weights, losses.seen, metrics, trainer)


@pytest.fixture
def fit(collection: Collection, tokenizer: Any, contract: Contract, tmp_path: Path) -> Fit:
    return Fit(collection, tokenizer, contract, tmp_path)


@pytest.fixture(scope="module")
def whole(
    collection: Collection,
    tokenizer: Any,
    contract: Contract,
    tmp_path_factory: pytest.TempPathFactory,
) -> Fitted:
    return Fit(collection, tokenizer, contract, tmp_path_factory.mktemp("whole"))()


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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
    assert _same(resumed.weights, whole.weights)
    assert resumed.losses == {b: x for b, x in whole.losses.items() if b in resumed.losses}
    assert max(resumed.losses) == max(whole.losses)
    for name, value in resumed.metrics.items():
        if name.startswith("val/"):
            assert whole.metrics[name] == value
    best, again = (x.trainer.checkpoint_callback for x in (whole, resumed))
    assert best.best_model_score == again.best_model_score


def test_dropout_and_accumulation_repeat_after_a_resume(fit: Fit, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"peft": LoRA(rank=2, alpha=4, dropout=0.5), "accumulate": 2}
    whole = fit(**settings)
    fit.folder = tmp_path / "killed"
    fit(kill=KillAt(3, "step"), **settings)
    resumed = fit(resume=True, **settings)
    assert _same(resumed.weights, whole.weights)


def test_a_checkpoint_of_adapters_holds_only_what_is_trained(fit: Fit) -> None:
    fitted = fit(steps=2, peft=LoRA(rank=2, alpha=4))
    state = torch.load(fit.folder / "checkpoints" / "last.ckpt", weights_only=False)
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


class Sgd:
    """Plain gradient descent: a weight's change is its gradient, where Adam would rescale it."""

    def build(self, model: torch.nn.Module, total_steps: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)


def test_two_ranks_equal_one(fit: Fit, tmp_path: Path) -> None:
    one = fit(steps=6, optimizer=Sgd())
    fit.folder = tmp_path / "two"
    two = fit(steps=6, optimizer=Sgd(), devices=2, strategy="ddp_spawn")
    state = torch.load(fit.folder / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    first = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=False)["state_dict"]
    for name, weight in first.items():
        torch.testing.assert_close(state[name], weight, atol=2e-5, rtol=1e-4, msg=name)
    for name in MEASURES:
        assert two.metrics[f"val/{name}"] == pytest.approx(one.metrics[f"val/{name}"], abs=1e-6)
    assert (fit.folder / "run.trec").read_text().split("\n")[0].split()[:3] == (
        tmp_path / "run.trec"
    ).read_text().split("\n")[0].split()[:3]
