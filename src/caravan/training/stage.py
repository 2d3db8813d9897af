"""What the stages share: a model that is built late, dropout that resumes, clipping, checkpoints.

A stage (`Retriever`, `Reranker`, `Adaptation`) adds how its network is built and what a step
computes.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from caravan.data.batch import Packed
from caravan.data.batching import Groups
from caravan.data.collection import Collection
from caravan.data.negatives import Negatives
from caravan.data.pairs import PairTemplates
from caravan.data.tokenization import Templates
from caravan.data.unlabelled import Unlabelled
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models.backbone import Backbone
from caravan.models.hardware import settle_precisions
from caravan.models.loading import add_slots, fit_vocabulary
from caravan.models.remote_code import is_remote_code
from caravan.training import fsdp, parallel
from caravan.training.gradcache import GradCache, undisturbed
from caravan.training.optim import AdamW, updates

log = logging.getLogger(__name__)


class Stage(pl.LightningModule, ABC):
    """A network with its loss and optimiser.

    Args:
        backbone: describes the transformer (`caravan.models.backbone`).
        peft: adapters to put on it, or None for full fine-tuning.
        tokenizer: the backbone's tokenizer.
        encoding: what the model folder will promise.
        loss: of `caravan.training.losses`.
        seed: makes weights and dropout reproducible, from every step on.
        gradcache: computes the gradient piece by piece; None keeps the activations of a batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        peft: Any,
        tokenizer: Any,
        encoding: Encoding,
        loss: Any,
        optimizer: AdamW,
        seed: int,
        gradcache: GradCache | None = None,
    ) -> None:
        super().__init__()
        backbone.use_adapters(peft)
        self.backbone = backbone
        self.peft = peft
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.loss = loss
        self.optimizer = optimizer
        self.seed = seed
        self.gradcache = gradcache
        self.bf16 = False  # the arithmetic of training, which the trainer knows
        self.network: nn.Module | None = None
        # Where ranks share weights: the network without any. In a list, to be no part of this one.
        self._empty: list[nn.Module] = []
        # Frozen weights are not in a checkpoint; `on_load_checkpoint` does the strict check.
        self.strict_loading = False

    def reading(self) -> Templates | PairTemplates:
        """How the network reads texts: one at a time, or a query and a passage together."""
        templates = PairTemplates if self.encoding.kind == "reranker" else Templates
        return templates(self.tokenizer, self.encoding)

    def training_set(
        self, collection: Collection, split: str, sampler: Negatives, token_budget: int
    ) -> Groups | Unlabelled:
        """What is trained on: the queries of a split, each with its group of passages."""
        qrels = collection.qrels(split)
        groups = Groups(collection, qrels, sampler, self.reading(), token_budget, self.seed)
        if not len(groups):
            raise InputError(
                f"{collection.name}: split {split!r} has no query with a relevant passage; choose"
                " another with data.train_split"
            )
        return groups

    @property
    def tells_tokens(self) -> bool:
        """Whether the output layer is in use: its logits need memory too."""
        return self.encoding.scoring == "likelihood"

    def outline(self) -> Any:
        """The transformer without its weights, adapters included; None if it cannot be had so."""
        from transformers import AutoModel, AutoModelForCausalLM

        auto = AutoModelForCausalLM if self.tells_tokens else AutoModel
        try:
            with torch.device("meta"):
                config = self.backbone.config(self.tokenizer)
                if is_remote_code(config):
                    return None  # its classes are known when it is loaded, at its own revision
                model = auto.from_config(config, trust_remote_code=False)
                return model if self.peft is None else self.peft.apply(model)
        except (ValueError, RuntimeError) as error:
            log.debug("no outline of %s: %s", self.backbone.name, error)
            return None  # what is wrong with it is told when it is loaded

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, its weights loaded."""

    def adapted(self, transformer: nn.Module) -> nn.Module:
        """The transformer with the adapters that were asked for."""
        if self.encoding.slots:
            fit_vocabulary(transformer, self.tokenizer)
        if self.peft is None:
            return transformer
        rows = add_slots(self.tokenizer, self.encoding)
        return self.backbone.adapted(self.peft, transformer, rows)

    def configure_model(self) -> None:
        if self.network is not None:
            return
        torch.manual_seed(self.seed)
        mesh = self.device_mesh
        if self._as_stored(mesh is not None):
            self.backbone.dtype = "auto"
        if mesh is None:
            self.network = self.build()
            settle_precisions(self.network, self.bf16)
            return
        device = self.trainer.strategy.root_device
        self.network, empty = fsdp.sharded(self.build, mesh, device, self.bf16)
        self._empty = [] if empty is None else [empty]

    def _as_stored(self, shared: bool) -> bool:
        """Whether weights are loaded in their files' precision, then brought to that of training.

        Where ranks share them, rank 0 maps them and reads none; where the base is frozen, a device
        needs no room for four bytes of each weight. Not where something is computed with them
        before: new rows, trials of masks, DoRA's norms.
        """
        if self.encoding.slots or self.encoding.bidirectional or self.tells_tokens:
            return False
        if self.peft is None:
            return shared
        frozen = self.bf16 and self.backbone.quantization is None
        known = getattr(self.peft, "settings", None)  # adapters of one's own may do anything
        return known is not None and (shared or frozen) and not known.get("use_dora")

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Go back to the weights of a checkpoint's `state_dict`."""
        if self.device_mesh is None:
            self.load_state_dict(weights, strict=False)
        else:
            fsdp.load_weights(self, weights)

    def whole(self) -> Any:
        """The network as it is saved; where ranks share its weights on rank 0 alone, else None."""
        if self.device_mesh is None:
            return self.model
        transformer = self.model.transformer
        # An adapter is saved alone, unless its base is in no folder.
        adapter = hasattr(transformer, "peft_config")
        alone = adapter and bool(transformer.active_peft_config.base_model_name_or_path)
        weights = fsdp.whole_weights(self.model, trained_only=alone)
        return fsdp.fill(self._empty[0], weights) if self._empty else None

    @property
    def model(self) -> Any:
        if self.network is None:
            raise RuntimeError("the model is built by configure_model()")
        return self.network

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout becomes a function of (seed, batch, rank): a resumed run repeats it exactly.
        torch.manual_seed(
            (self.seed * 1_000_003 + self.trainer.fit_loop.total_batch_idx) * 4099
            + self.global_rank
        )

    def loss_of(self, loss: Callable[..., Tensor], batch_idx: int, *texts: Packed) -> Tensor:
        """The loss from what the network makes of `texts`, the rows of each in their order."""
        if self.gradcache is None:
            return loss(*map(self.rows_of, texts))
        accumulated = self.trainer.accumulate_grad_batches
        if batch_idx % accumulated == 0:
            self.optimizers().zero_grad()  # type: ignore[union-attr]
        pieces = [self.evened(packed.split(self.gradcache.chunk)) for packed in texts]
        return self.gradcache(self.model.of, pieces, loss, share=1 / accumulated)

    def rows_of(self, texts: Packed) -> Tensor:
        """What the network makes of texts [N, ...], in their order."""
        texts = self.evened(texts)
        own = len(texts.chunks) - texts.extra
        rows = [self.model.of(chunk) for chunk in texts.chunks[:own]]
        if texts.extra:
            with undisturbed(self.device):
                rows += [self.model.of(chunk) for chunk in texts.chunks[own:]]
        return texts.restore(torch.cat(rows))

    def evened(self, texts: Packed) -> Packed:
        """Ranks that share weights compute in step: each as many chunks as the one with most."""
        if self.device_mesh is None:
            return texts
        return texts.lengthened(max(parallel.sizes(len(texts.chunks), self.device)))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Lightning's turn comes after the step; by then gradients have been cached."""
        if self.gradcache is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def log_step(self, loss: Tensor, scores: Tensor, targets: Tensor, weight: float) -> None:
        """Log the loss, and how often the positive scores highest, and the number
        of negatives of a query, as means over all ranks.
        """
        queries = len(scores)
        self.log("train/loss", loss, prog_bar=True, batch_size=queries, sync_dist=True)
        if scores.shape[1] < 2:
            return
        with torch.no_grad():
            hit = (scores.argmax(dim=1) == targets).float().mean() * weight
            negatives = scores.isfinite().sum(dim=1).float().mean() - 1
        self.log("train/accuracy", hit, batch_size=queries, sync_dist=True)
        self.log("train/negatives", negatives * weight, batch_size=queries, sync_dist=True)

    def configure_optimizers(self) -> Any:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        batches = data.batches_per_epoch(self.trainer)
        return self.optimizer.build(self, updates(self.trainer, batches))

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the norm of the gradient and limit it, or its values; no limit is None or 0."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = fsdp.full(torch.nn.utils.get_total_norm(gradients))
        self.log("train/gradient_norm", norm)
        if not gradient_clip_val:
            return
        own = [fsdp.local(gradient) for gradient in gradients]
        if gradient_clip_algorithm == "value":
            torch._foreach_clamp_min_(own, -gradient_clip_val)
            torch._foreach_clamp_max_(own, gradient_clip_val)
        else:
            torch._foreach_mul_(own, (gradient_clip_val / (norm + 1e-6)).clamp(max=1.0))

    def _trainable(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = self._trainable()
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        stored, wanted = set(checkpoint["state_dict"]), self._trainable()
        if stored != wanted:
            raise InputError(
                f"the checkpoint is of another model: {len(wanted - stored)} trainable weights are"
                f" missing in it and {len(stored - wanted)} are not used; choose another run_dir"
            )
