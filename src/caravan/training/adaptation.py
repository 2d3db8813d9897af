"""LLaRA: adapt a language model by two pretext tasks on unlabelled text (arXiv 2312.15503).

    python train.py stage=adaptation backbone=hf backbone.name=<model> data=texts data.path=<files>

EBAE: a text's embedding is to tell the tokens of the text. EBAR: it is to tell those of the text
that follows. One pass serves both, and the causal language model's own loss where it is asked for.
What comes out is a model folder that retrieves as it is and that a retriever begins from
(`init_from`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from caravan.data.batch import AdaptationBatch, EncodeBatch
from caravan.data.collection import Collection
from caravan.data.unlabelled import TASKS, JointTemplates, Unlabelled
from caravan.encoding import Encoding, template_parts
from caravan.errors import InputError
from caravan.models.llara import Layout, SlotEncoder, set_losses, token_losses
from caravan.models.loading import fit_vocabulary
from caravan.training import parallel
from caravan.training.optim import AdamW
from caravan.training.stage import Stage


class Adaptation(Stage):
    """A language model with LLaRA's tasks and an optimiser.

    Args:
        self_prompt, next_prompt: what follows the text for EBAE and for EBAR.
        tasks: which are trained, joined by +: ebae, ebar, and lm, the causal language model's own.
        ebae, ebar, lm: weights of their losses, where they are trained.
        targets: what of a text is to be told, "all" or "content" (`caravan.data.unlabelled`).
        words: of a chunk.
        The others: see `Stage`; there is no loss to choose.
    """

    def __init__(
        self,
        backbone: Any,
        peft: Any,
        tokenizer: Any,
        encoding: Encoding,
        optimizer: AdamW,
        seed: int,
        self_prompt: str,
        next_prompt: str,
        tasks: str = "ebae+ebar",
        ebae: float = 1.0,
        ebar: float = 1.0,
        lm: float = 1.0,
        targets: str = "all",
        words: int = 500,
        loss: None = None,
    ) -> None:
        super().__init__(backbone, peft, tokenizer, encoding, loss, optimizer, seed)
        asked = tasks.split("+")
        weights = {"ebae": ebae, "ebar": ebar, "lm": lm}
        if not set(asked) <= set(weights):
            raise InputError(
                f"stage.tasks is {tasks!r}; it must be some of ebae, ebar and lm, joined by +"
            )
        for task in asked:
            if not 0 < weights[task] < math.inf:
                raise InputError(f"stage.{task} is {weights[task]}; it must be above 0 and finite")
        self.weights = {task: weights[task] for task in TASKS if task in asked}
        self.lm = lm if "lm" in asked else 0.0
        self.targets = targets
        self.words = words
        prompts = [{"ebae": self_prompt, "ebar": next_prompt}[task] for task in self.weights]
        slots = {bool(template_parts(f"{{text}}{prompt}")[2]) for prompt in prompts}
        if len(slots) > 1:
            raise InputError(
                "stage.self_prompt and stage.next_prompt must both end with slots, {self} and"
                " {next}, or neither"
            )
        _refuse_other_prompts(encoding, [self_prompt, next_prompt], True in slots)
        self.templates = JointTemplates(tokenizer, encoding, prompts)
        of_a_prompt = encoding.slots if True in slots else 1
        self.layout = Layout(self.templates.skipped, self.templates.prompts, of_a_prompt)

    @property
    def tells_tokens(self) -> bool:
        return True

    def build(self) -> SlotEncoder:
        language_model = self.backbone.language_model(self.tokenizer)
        if self.encoding.slots:
            fit_vocabulary(language_model, self.tokenizer)
        trunk = language_model.base_model
        if self.peft is not None:
            trunk = self.adapted(trunk)
            language_model.get_output_embeddings().requires_grad_(False)
        return SlotEncoder(language_model, trunk, self.encoding, self.layout)

    def training_set(
        self, collection: Collection, split: str, sampler: Any, token_budget: int
    ) -> Unlabelled:
        """What is trained on: the collection's passages as chunks; a split plays no part."""
        return Unlabelled(
            collection.corpus,
            self.templates,
            self.targets,
            self.words,
            list(self.weights),
            token_budget,
            self.seed,
        )

    def training_step(self, batch: AdaptationBatch, batch_idx: int) -> Tensor:
        read = self.model.read(self.evened(batch.texts), tokens=self.lm > 0)
        texts = len(batch.counts)
        told: dict[str, Any] = {"batch_size": texts, "sync_dist": True}
        total = read.slots.new_zeros(())
        language_model = self.model.language_model
        if self.weights:
            losses, hits = set_losses(
                language_model,
                read.slots.flatten(0, 1),
                batch.targets,
                batch.counts.flatten(),
                True,
            )
            losses, hits = losses.view_as(batch.counts), hits.view_as(batch.counts)
            for i, (task, weight) in enumerate(self.weights.items()):
                counts = batch.counts[:, i]
                loss, share, floor = _means(
                    counts > 0, losses[:, i], hits[:, i], counts.clamp(min=1).log()
                )
                total = total + weight * loss
                self.log(f"train/{task}", loss, **told)
                self.log(f"train/{task}_above_floor", loss - floor, **told)
                self.log(f"train/{task}_hits", share, **told)
                (empty,) = _means(None, (counts == 0).float())
                self.log(f"train/{task}_empty", empty, **told)
        if self.lm:
            (loss,) = _means(None, token_losses(language_model, read))
            total = total + self.lm * loss
            self.log("train/lm", loss, **told)
        self.log("train/loss", total, prog_bar=True, **told)
        return total

    def validation_step(
        self, batch: EncodeBatch, batch_idx: int, dataloader_idx: int = 0
    ) -> dict[str, Tensor]:
        """Rows [N] and vectors [N, d]; `RetrievalEvaluation` collects and searches them."""
        return {"rows": batch.rows, "vectors": self.rows_of(batch.texts)}


def _refuse_other_prompts(encoding: Encoding, prompts: list[str], slots: bool) -> None:
    """The folder must promise what was adapted: these prompts, read at their slots."""
    for name in ("query_template", "passage_template"):
        if not getattr(encoding, name).endswith(tuple(prompts)):
            raise InputError(
                f"encoding.{name} is {getattr(encoding, name)!r}, which ends with neither"
                " stage.self_prompt nor stage.next_prompt; end it with one of them"
            )
    wanted = ("slots", "last") if slots else ("last",)
    if encoding.pooling not in wanted:
        raise InputError(
            f"encoding.pooling is {encoding.pooling!r}; what is adapted is read at its slots: set"
            f" it to {' or '.join(wanted)}"
        )


def _means(where: Tensor | None, *values: Tensor) -> list[Tensor]:
    """The mean of each of `values` [N], of those rows that count, so that ranks average to it.

    Args:
        where: [N] bool, the rows that count; None for all.
    """
    device = values[0].device
    kept = torch.ones_like(values[0], dtype=torch.bool) if where is None else where
    number = int(kept.sum())
    counts = parallel.sizes(number, device)
    weight = parallel.weight(counts) if sum(counts) else 0.0
    return [value[kept].sum() / max(number, 1) * weight for value in values]
