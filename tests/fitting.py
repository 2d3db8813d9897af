"""A small fit through Lightning, with the callbacks of `train.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from tests.tiny import tiny_backbone
from torch import Tensor
from torch.distributed.tensor import DTensor

from caravan.data.collection import Collection
from caravan.data.mixture import Entry, Part, open_parts
from caravan.data.negatives import Negatives
from caravan.encoding import Encoding
from caravan.retrieval.index import Faiss
from caravan.training import fsdp
from caravan.training.adaptation import Adaptation
from caravan.training.callbacks import LastCheckpoint, Throughput
from caravan.training.checkpoints import AtomicCheckpoints
from caravan.training.datamodule import DataModule
from caravan.training.distillation import Distillation
from caravan.training.evaluation import RerankingEvaluation, RetrievalEvaluation
from caravan.training.losses import InfoNCE
from caravan.training.optim import AdamW
from caravan.training.reranker import Reranker
from caravan.training.retriever import Retriever

MEASURES = ["MRR@10", "nDCG@10", "R@100"]
PROMPTS = {"self_prompt": " camel:", "next_prompt": " caravan:", "tasks": "ebae+ebar+lm"}

TOKEN: dict[str, Any] = {"scoring": "token", "append_eos": False, "suffix": "\nso:"}
TOKEN |= {"positive": " salt", "negative": " silk"}


class KilledError(Exception):
    pass


class KillAt(pl.Callback):
    """Kills the run after an update: in the next step, in the validation, or at the epoch's end."""

    def __init__(self, step: int, moment: str = "step") -> None:
        self.step, self.moment = step, moment

    def _at(self, moment: str, trainer: pl.Trainer) -> None:
        if self.moment == moment and trainer.global_step == self.step:
            raise KilledError

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at("step", trainer)

    def on_validation_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at("validation", trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self._at("epoch end", trainer)


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
    trainer: Any

    @property
    def results(self) -> dict[str, float]:
        """The metrics that are the same on any number of ranks."""
        differing = ("train/tokens_per_second", "train/padding")
        return {name: value for name, value in self.metrics.items() if name not in differing}


@dataclass
class Fit:
    """A small training run over the tiny collection."""

    collection: Collection
    tokenizer: Any
    encoding: Encoding
    candidates: Path
    folder: Path
    source: Any = None  # a mixture, instead of the collection

    def into(self, name: str) -> Fit:
        """The same, in another folder below this one."""
        (self.folder / name).mkdir(exist_ok=True)
        return replace(self, folder=self.folder / name)

    def state(self, file: str = "last.ckpt") -> dict[str, Any]:
        """A checkpoint."""
        path = self.folder / "checkpoints" / file
        state: dict[str, Any] = torch.load(path, weights_only=True)
        return state

    def __call__(
        self,
        stage: str = "retriever",
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
        gradcache: Any = None,
        token_budget: int = 128,
        backbone: Any = None,
        shards_in_bf16: bool = False,
        loss: Any = None,
        in_batch: bool = True,
        distillation: Distillation | None = None,
        **trainer_settings: Any,
    ) -> Fitted:
        parts = (backbone or tiny_backbone(), peft, self.tokenizer)
        optimizer = optimizer or AdamW(lr=1e-2, warmup_steps=2)
        module: Any
        reranks = stage in ("reranker", "token")
        if stage == "adaptation":
            encoding = replace(
                self.encoding,
                query_template="{text} caravan:",
                passage_template="{title} {text} camel:",
            )
            module = Adaptation(*parts, encoding, optimizer, 0, **PROMPTS, words=6)
        elif reranks:
            scoring = TOKEN if stage == "token" else {}
            encoding = replace(self.encoding, kind="reranker", **scoring)
            module = Reranker(*parts, encoding, InfoNCE(1.0), optimizer, 0, gradcache)
        else:
            loss = loss or InfoNCE(0.05)
            given = (self.encoding, loss, optimizer, 0, gradcache, in_batch)
            module = Retriever(*parts, *given, distillation=distillation)
        module.bf16 = shards_in_bf16
        run = str(self.candidates) if reranks else None
        sampler = Negatives(number=2)
        splits: Any = SimpleNamespace(train_split="train", dev_split="dev")
        parts = [Part("", self.collection, Entry(splits), sampler)]
        if self.source is not None:
            parts = open_parts(self.source, self.folder / "cache", sampler)
        batching = (queries_per_batch, token_budget, workers)
        data = DataModule(self.source, parts, module, {"run": run}, *batching)
        losses, run_file = Losses(), str(self.folder / "run.trec")
        evaluation: pl.Callback = RetrievalEvaluation(Faiss(k=100), MEASURES, run_file)
        if reranks:
            evaluation = RerankingEvaluation(MEASURES, run_file)
        best = ModelCheckpoint(
            self.folder / "checkpoints",
            "best",
            monitor="val/MRR@10",
            mode="max",
            enable_version_counter=False,
        )
        last = LastCheckpoint(str(self.folder / "checkpoints"), every_n_steps=every_n_steps)
        callbacks = [evaluation, best, last, Throughput(), losses, early_stopping, kill]
        settings = {"devices": 1, "val_check_interval": 4, "gradient_clip_val": 1.0}
        trainer = pl.Trainer(
            accelerator="cpu",
            max_steps=steps,
            max_epochs=100,
            check_val_every_n_epoch=None,
            accumulate_grad_batches=accumulate,
            callbacks=[callback for callback in callbacks if callback is not None],
            plugins=[AtomicCheckpoints()],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=2,
            **(settings | trainer_settings),
        )
        path = last.path if resume and last.path.exists() else None
        try:
            trainer.fit(module, datamodule=data, ckpt_path=path, weights_only=True)
        except KilledError:
            pass
        else:
            assert kill is None, "the run was not killed"
        weights = {name: p.detach().clone() for name, p in module.named_parameters()}
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        return Fitted(weights, losses.seen, metrics, trainer)


class Sgd:
    """Plain gradient descent: a weight's change is its gradient, where Adam would rescale it."""

    def build(self, model: torch.nn.Module, total_steps: int) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.5)


def same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], atol: float = 2e-5) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        torch.testing.assert_close(other[name], weight, atol=atol, rtol=1e-4, msg=name)


def assert_loss_and_gradient(
    module: Any, found: Tensor, expected: Tensor, atol: float = 2e-5, rtol: float = 1e-3
) -> None:
    """A loss and its gradient by the trainable weights equal those of a reference."""
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    weights = [p for p in module.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(of, weights) for of in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=rtol)


def on_ranks(
    fit: Fit, strategy: str, bf16: bool = False, replicas: int = 1, **settings: Any
) -> dict[str, Any]:
    """Results and losses of a fit on all ranks ("ddp" or "fsdp"), which can be sent."""
    sharded = strategy == "fsdp"
    if bf16 and not sharded:
        settings["precision"] = "bf16-mixed"
    fitted = fit(
        **settings,
        devices=torch.distributed.get_world_size(),
        strategy=fsdp.FullySharded(replicas) if sharded else "ddp",
        shards_in_bf16=bf16 and sharded,  # without autocast
    )
    weights = fitted.weights.values()
    held = sum((w.to_local() if isinstance(w, DTensor) else w).numel() for w in weights)
    return {"metrics": fitted.results, "losses": fitted.losses, "held": held}
