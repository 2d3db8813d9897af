"""A small fit through Lightning, with all that `train.py` puts around one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tests.tiny import tiny_backbone
from torch import Tensor

from caravan.data.collection import Collection
from caravan.data.datamodule import DataModule
from caravan.data.negatives import Negatives
from caravan.data.runs import Run, write_run
from caravan.encoding import Encoding
from caravan.retrieval.index import Faiss
from caravan.training.adaptation import Adaptation
from caravan.training.callbacks import LastCheckpoint, Throughput
from caravan.training.checkpoints import AtomicCheckpoints
from caravan.training.evaluation import RerankingEvaluation, RetrievalEvaluation
from caravan.training.fsdp import FullySharded
from caravan.training.gradcache import GradCache
from caravan.training.losses import InfoNCE
from caravan.training.optim import AdamW
from caravan.training.reranker import Reranker
from caravan.training.retriever import Retriever

MEASURES = ["MRR@10", "nDCG@10", "R@100"]
TASKS = "ebae+ebar+lm"


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

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.moment == "epoch end" and trainer.global_step == self.step:
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
        self, collection: Collection, tokenizer: Any, encoding: Encoding, folder: Path
    ) -> None:
        self.collection, self.tokenizer = collection, tokenizer
        self.encoding, self.folder = encoding, folder

    def __call__(
        self,
        steps: int = 10,
        peft: Any = None,
        resume: bool = False,
        kill: KillAt | None = None,
        accumulate: int = 1,
        workers: int = 0,
        optimizer: Any = None,
        early_stopping: pl.Callback | None = None,
        every_n_steps: int = 1,
        queries_per_batch: int = 6,
        candidates: Path | None = None,
        adapts: bool = False,
        gradcache: GradCache | None = None,
        token_budget: int = 128,
        backbone: Any = None,
        shards_in_bf16: bool = False,
        **trainer_settings: Any,
    ) -> Fitted:
        """Train the retriever, or adapt, or with candidates to put in order train a reranker."""
        reranks = candidates is not None
        optimizer = optimizer or AdamW(lr=1e-2, warmup_steps=2)
        module: Any
        if adapts:
            prompts = {"self_prompt": " camel:", "next_prompt": " caravan:", "tasks": TASKS}
            encoding = replace(
                self.encoding,
                query_template="{text} caravan:",
                passage_template="{title} {text} camel:",
            )
            settings = (encoding, optimizer, 0)
            module = Adaptation(
                tiny_backbone(), peft, self.tokenizer, *settings, **prompts, words=6
            )
        else:
            encoding = replace(self.encoding, kind="reranker") if reranks else self.encoding
            module = (Reranker if reranks else Retriever)(
                backbone or tiny_backbone(),
                peft,
                self.tokenizer,
                encoding,
                InfoNCE(1.0 if reranks else 0.05),
                optimizer,
                seed=0,
                gradcache=gradcache,
            )
        module.bf16 = shards_in_bf16
        data = DataModule(
            self.collection,
            module.reading(),
            module.training_set(self.collection, "train", Negatives(number=2), token_budget),
            "dev",
            queries_per_batch=queries_per_batch,
            token_budget=token_budget,
            num_workers=workers,
            run=str(candidates) if candidates else None,
        )
        losses = Losses()
        best = ModelCheckpoint(
            self.folder / "checkpoints",
            "best",
            monitor="val/MRR@10",
            mode="max",
            enable_version_counter=False,
        )
        run_file = str(self.folder / "run.trec")
        callbacks: list[pl.Callback] = [
            RerankingEvaluation(MEASURES, run_file)
            if reranks
            else RetrievalEvaluation(Faiss(k=100), MEASURES, run_file),
            best,
            LastCheckpoint(str(self.folder / "checkpoints"), every_n_steps=every_n_steps),
            Throughput(),
            losses,
            *([early_stopping] if early_stopping else []),
        ]
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=100,
            check_val_every_n_epoch=None,
            accumulate_grad_batches=accumulate,
            callbacks=callbacks + ([kill] if kill else []),
            plugins=[AtomicCheckpoints()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=2,
            **{
                "devices": 1,
                "val_check_interval": 4,
                "gradient_clip_val": 1.0,
                **trainer_settings,
            },
        )
        last = self.folder / "checkpoints" / "last.ckpt"
        try:
            trainer.fit(
                module, datamodule=data, ckpt_path=last if resume else None, weights_only=True
            )
        except KilledError:
            pass
        else:
            assert kill is None, "the run was to be killed and was not"
        weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return Fitted(weights, losses.seen, metrics, trainer)


class Sgd:
    """Plain gradient descent: a weight's change is its gradient, where Adam would rescale it."""

    def build(self, model: torch.nn.Module, total_steps: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)


def random_candidates(collection: Collection, path: Path) -> Path:
    """A run that ranks the whole corpus at random for every dev query."""
    queries = np.unique(collection.qrels("dev").query_rows)
    rng = np.random.default_rng(0)
    found = np.stack([rng.permutation(len(collection.corpus)) for _ in queries])
    run = Run.from_topk(queries, -np.sort(rng.random(found.shape)), found)
    write_run(path, run, collection.queries, collection.corpus)
    return path


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def told(fit: Fit, strategy: str, **settings: Any) -> dict[str, Any]:
    """Metrics and losses of a fit on several ranks ("ddp" or "fsdp"), which can be sent."""
    of_ranks = FullySharded() if strategy == "fsdp" else "ddp"
    bf16 = settings.get("bf16", False) and strategy == "fsdp"  # the shards, and no autocast
    if settings.pop("bf16", False) and not bf16:
        settings["precision"] = "bf16-mixed"
    fitted = fit(**settings, devices=2, strategy=of_ranks, shards_in_bf16=bf16)
    return {"metrics": fitted.metrics, "losses": fitted.losses}
