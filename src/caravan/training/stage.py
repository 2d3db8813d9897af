"""The base class of all stages: a LightningModule that loads its network late.

Subclasses build the network and compute the training step. `Stage` handles precision and sharding,
dropout that is the same after a resume, gradient caching, clipping, logging, and checkpoints of
only the trainable weights.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_, get_total_norm
from transformers import AutoModel, AutoModelForCausalLM

from caravan.data.batch import EncodeBatch, Packed
from caravan.data.batching import Groups
from caravan.data.collection import Collection
from caravan.data.negatives import Sampler
from caravan.data.pairs import PairTemplates
from caravan.data.tokenization import Templates
from caravan.data.unlabelled import Unlabelled
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import varlen
from caravan.models.adapters import LoRA
from caravan.models.backbone import Backbone
from caravan.models.bidirectional import has_adapter
from caravan.models.hardware import settle_precisions
from caravan.models.loading import add_slots, fit_vocabulary
from caravan.models.remote_code import is_remote_code
from caravan.training import fsdp, losses, parallel
from caravan.training.callbacks import is_log_step
from caravan.training.gradcache import GradCache, undisturbed
from caravan.training.losses import Loss, Sum
from caravan.training.optim import AdamW, updates

log = logging.getLogger(__name__)


class Stage(pl.LightningModule, ABC):
    """A network with its loss and optimizer.

    Args:
        backbone: loads the transformer (`caravan.models.backbone`).
        peft: adapters to train, or None for full fine-tuning.
        tokenizer: the tokenizer of the backbone.
        encoding: how texts are encoded; saved in the model folder.
        loss: from `caravan.training.losses`; None if the stage defines its own loss.
        optimizer: from `caravan.training.optim`.
        seed: seed of new weights and dropout.
        gradcache: computes the gradient chunk by chunk; None keeps all activations of a batch.
    """

    forward_methods: Sequence[str] = ()
    """Methods of the network other than `forward` for which FSDP must gather weights."""

    def __init__(
        self,
        backbone: Backbone,
        peft: Any,
        tokenizer: Any,
        encoding: Encoding,
        loss: Loss | Sum | None,
        optimizer: AdamW,
        seed: int,
        gradcache: GradCache | None = None,
    ) -> None:
        super().__init__()
        backbone.use_adapters(peft)
        self.backbone, self.peft = backbone, peft
        self.tokenizer, self.encoding = tokenizer, encoding
        self.loss, self.optimizer, self.gradcache = loss, optimizer, gradcache
        self.seed = seed
        self.bf16 = False  # whether training computes in bf16; set with the trainer's precision
        self.network: Any = None  # built by `configure_model`
        # With FSDP, rank 0's copy without weights; a list, so that it is not a submodule.
        self._empty: list[nn.Module] = []
        # Frozen weights are not in a checkpoint; `_refuse_other_model` checks strictly.
        self.strict_loading = False

    def reading(
        self, collection: str = "", lengths: Mapping[str, int] | None = None
    ) -> Templates | PairTemplates:
        """The templates of the encoding, with the instruction of a collection, given by its name.

        Args:
            lengths: those of one of `validation.readings`.
        """
        kind = PairTemplates if self.encoding.kind == "reranker" else Templates
        encoding = self.encoding.instructed(collection)
        if not lengths:
            return kind(self.tokenizer, encoding)
        try:
            return kind(self.tokenizer, replace(encoding, **lengths))  # type: ignore[arg-type]
        except InputError as error:
            raise InputError(error.code, f"validation.readings: {error}") from None

    def training_set(
        self, collection: Collection, split: str, sampler: Sampler, token_budget: int
    ) -> Groups | Unlabelled:
        """The training data: the queries of a split with their groups of passages."""
        qrels = collection.qrels(split)
        templates = self.reading(collection.name)
        groups = Groups(collection, qrels, sampler, templates, token_budget, self.seed, self.pads)
        if not len(groups):
            raise InputError(
                "no-relevant-passages",
                f"{collection.name}: split {split!r} has no query with a relevant passage; choose"
                " another split with data.train_split",
            )
        return groups

    @property
    def pads(self) -> bool:
        """Whether the network computes padding; a released encoder's head does in any case."""
        released_head = self.encoding.kind == "reranker" and self.encoding.pooling == "cls"
        return self.backbone.attention != varlen.NAME or released_head

    @property
    def bf16_norms(self) -> bool:
        """Whether frozen norms and embeddings are bf16 too (`LoRA`)."""
        return isinstance(self.peft, LoRA) and self.peft.bf16_norms

    @property
    def uses_output_layer(self) -> bool:
        """Whether the network is a language model with its output layer."""
        return self.encoding.scoring != "head"

    def outline(self) -> Any:
        """The transformer with adapters on the meta device; None if that is not possible."""
        auto = AutoModelForCausalLM if self.uses_output_layer else AutoModel
        try:
            with torch.device("meta"):
                config = self.backbone.config(self.tokenizer)
                if is_remote_code(config):
                    return None  # its classes are unknown before loading
                model = auto.from_config(config, trust_remote_code=False)
                return model if self.peft is None else self.peft.apply(model)
        except (ValueError, RuntimeError) as error:
            log.debug("no outline of %s: %s", self.backbone.name, error)
            return None  # loading reports the error

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the network and load its weights."""

    def adapted(self, transformer: nn.Module) -> nn.Module:
        """The transformer with the adapters of `peft`, if any."""
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
        if self._loads_as_stored(mesh is not None):
            self.backbone.dtype = "auto"
        if mesh is None:
            self.network = self.build()
            settle_precisions(self.network, self.bf16, self.bf16_norms)
            return
        device = self.trainer.strategy.root_device
        self.network, empty = fsdp.sharded(
            self.build, mesh, device, self.bf16, self.forward_methods
        )
        self._empty = [] if empty is None else [empty]

    def _loads_as_stored(self, sharded: bool) -> bool:
        """Whether weights are loaded in the precision of their files and converted afterwards.

        FSDP's rank 0 can then map the files, and a frozen base takes less than four bytes a weight.
        Loading must not compute with the weights, as for new embeddings or the output layer.
        """
        if self.encoding.slots or self.uses_output_layer:
            return False
        frozen = isinstance(self.peft, LoRA)
        if sharded:
            return frozen or self.peft is None
        return frozen and self.bf16 and self.backbone.quantization is None

    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Load the `state_dict` of a checkpoint."""
        self._refuse_other_model(weights)
        if self.device_mesh is None:
            self.load_state_dict(weights, strict=False)
        else:
            fsdp.load_weights(self, weights)

    def whole(self) -> Any:
        """The full network for saving. With FSDP, only rank 0 gets it; other ranks get None."""
        if self.device_mesh is None:
            return self.network
        transformer = self.network.transformer
        # An adapter is saved without its base unless the base has random weights.
        adapter = has_adapter(transformer)
        alone = adapter and bool(transformer.active_peft_config.base_model_name_or_path)
        weights = fsdp.full_weights(self.network, trainable_only=alone)
        return fsdp.fill(self._empty[0], weights) if self._empty else None

    def on_fit_start(self) -> None:
        if not self._trainable():
            raise InputError(
                "nothing-to-train",
                "all weights are frozen, so there is nothing to train; set peft=none or peft=lora",
            )
        # Only now is the model on its device.
        with self.trainer.precision_plugin.forward_context():
            varlen.try_out(self.network, self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Dropout is a function of (seed, batch, rank), so a resumed run reproduces it exactly.
        batch_seed = self.seed * 1_000_003 + self.trainer.fit_loop.total_batch_idx
        torch.manual_seed(batch_seed * 4099 + self.global_rank)

    def validation_step(self, batch: EncodeBatch, batch_idx: int, dataloader_idx: int = 0) -> Any:
        """Return rows [N] and vectors [N, d], which `RetrievalEvaluation` collects and searches."""
        return {"rows": batch.rows, "vectors": self.rows_of(batch.texts)}

    def loss_of(self, loss: Callable[[Tensor], Tensor], batch_idx: int, texts: Packed) -> Tensor:
        """Compute the loss from the network's outputs [N, ...] for the texts, in their order."""
        if self.gradcache is None:
            return loss(self.rows_of(texts))
        accumulated = self.trainer.accumulate_grad_batches
        if batch_idx % accumulated == 0:
            self.optimizers().zero_grad()  # type: ignore[union-attr]
        chunks = self.in_step(texts.split(self.gradcache.chunk))
        return self.gradcache(self.network.of, chunks, loss, share=1 / accumulated)

    def measured(
        self, scores: Sequence[Tensor], targets: Tensor, teacher: Tensor | None, counts: list[int]
    ) -> dict[str, Tensor]:
        """The loss and other values for the log, weighted by this rank's share of the queries.

        Args:
            scores: [Q, N] float32 each; the loss is summed over them, and the others are those of
                the last.
            targets: [Q] int64. teacher: [Q, N] float32. counts: queries of each rank.
        """
        assert self.loss is not None
        # In bf16, logits at temperature 0.01 would be rounded to steps of 0.4.
        with torch.autocast(self.device.type, enabled=False):
            each = [losses.compute(self.loss, one, targets, teacher) for one in scores]
            loss = torch.stack(each).sum()
        # With this weight, the average over ranks is the mean over the union batch.
        weight = parallel.weight(counts)
        values, last = {"loss": loss * weight}, scores[-1]
        if last.shape[1] > 1:
            hits = (last.argmax(dim=1) == targets).float().mean()
            negatives = last.isfinite().sum(dim=1).float() - 1  # [Q]
            masked = losses.false_negatives(self.loss, last, targets)
            if masked is not None:
                number = masked.sum(dim=1).float()
                share = (number / negatives.clamp(min=1)).mean()
                values["masked"] = share * weight
                negatives = negatives - number
            values |= {"accuracy": hits * weight, "negatives": negatives.mean() * weight}
        return values

    def log_over_ranks(self, values: dict[str, Tensor], texts: int) -> None:
        """Log `train/<name>`: the means over ranks of single values, in one reduction.

        Several ranks reduce only on the steps whose values reach the loggers.

        Args:
            texts: in this rank's batch.
        """
        if parallel.world() > 1 and not is_log_step(self.trainer):
            return
        means = parallel.mean(torch.stack([value.detach().float() for value in values.values()]))
        for name, value in zip(values, means, strict=True):
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=texts)

    def rows_of(self, texts: Packed) -> Tensor:
        """The network's output [N, ...] for texts, in their order."""
        texts = self.in_step(texts)
        own = len(texts.chunks) - texts.extra
        rows = [self.network.of(chunk) for chunk in texts.chunks[:own]]
        if texts.extra:
            with undisturbed(self.device):
                rows += [self.network.of(chunk) for chunk in texts.chunks[own:]]
        return texts.restore(torch.cat(rows))

    def in_step(self, texts: Packed) -> Packed:
        """With FSDP, pad to the largest number of chunks of a rank: forward is a collective."""
        if self.device_mesh is None:
            return texts
        return texts.lengthened(max(parallel.sizes(len(texts.chunks), self.device)))

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        """Skipped with gradient caching: `loss_of` zeroes gradients before it backpropagates."""
        if self.gradcache is None:
            super().optimizer_zero_grad(epoch, batch_idx, optimizer)

    def configure_optimizers(self) -> Any:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        last = updates(self.trainer, data.batches_per_epoch(self.trainer))
        return self.optimizer.build(self, last)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Log the gradient norm, then clip by norm or value; None or 0 disables clipping."""
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = fsdp.full(get_total_norm(gradients))
        self.log("train/gradient_norm", norm)
        if gradient_clip_val and gradient_clip_algorithm == "value":
            clip_grad_value_(self.parameters(), gradient_clip_val, foreach=True)
        elif gradient_clip_val:
            clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm, foreach=True)

    def _trainable(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainable, weights = self._trainable(), checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: weights[name] for name in weights if name in trainable}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._refuse_other_model(checkpoint["state_dict"])

    def _refuse_other_model(self, weights: Mapping[str, Tensor]) -> None:
        """Compare the weights of a checkpoint with the trainable ones, by name."""
        stored, wanted = set(weights), self._trainable()
        if stored != wanted:
            raise InputError(
                "other-model",
                f"it is a checkpoint of another model: {len(wanted - stored)} trainable weights are"
                f" missing and {len(stored - wanted)} are not used; choose another run_dir",
            )
