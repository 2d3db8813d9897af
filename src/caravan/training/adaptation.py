"""LLaRA: adapt a language model with two pretext tasks on unlabelled text (arXiv 2312.15503).

    python train.py stage=adaptation backbone=hf backbone.name=<model> data=texts data.path=<files>

EBAE: the embedding of a text predicts the tokens of the same text; EBAR: those of the next text.
One forward pass computes both tasks, and optionally the causal language modelling loss. The model
folder can be used for retrieval, or to initialize a retriever (`backbone=from_folder`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import AllowInfNan, PositiveFloat, PositiveInt
from torch import Tensor

from caravan.data.batch import AdaptationBatch
from caravan.data.collection import Collection
from caravan.data.unlabelled import TASKS, JointTemplates, Unlabelled
from caravan.encoding import Encoding, template_parts
from caravan.errors import InputError
from caravan.models.llara import Layout, SlotEncoder, set_losses, token_losses
from caravan.models.loading import fit_vocabulary
from caravan.training import parallel
from caravan.training.optim import AdamW
from caravan.training.stage import Stage

Weight = Annotated[PositiveFloat, AllowInfNan(False)]


class Adaptation(Stage):
    """A language model with LLaRA's tasks and an optimizer.

    Args:
        self_prompt, next_prompt: prompts after the text for EBAE and for EBAR.
        tasks: joined by +: ebae, ebar, and lm, the causal language modelling loss.
        ebae, ebar, lm: loss weights of the tasks.
        targets: tokens to predict (`caravan.data.unlabelled`).
        words: words per segment of text.
        Others: see `Stage`; `loss` and `gradcache` do not apply.
    """

    forward_methods = ("read",)

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
        ebae: Weight = 1.0,
        ebar: Weight = 1.0,
        lm: Weight = 1.0,
        targets: Literal["all", "content"] = "all",
        words: PositiveInt = 500,
        loss: None = None,
    ) -> None:
        super().__init__(backbone, peft, tokenizer, encoding, loss, optimizer, seed)
        chosen, weights = tasks.split("+"), {"ebae": ebae, "ebar": ebar, "lm": lm}
        if not set(chosen) <= set(weights):
            raise InputError(
                "unknown-task",
                f"stage.tasks is {tasks!r}; it must be one or more of ebae, ebar and lm, joined"
                " by +",
            )
        self.weights = {task: weights[task] for task in TASKS if task in chosen}
        self.lm = lm if "lm" in chosen else 0.0
        self.targets, self.words = targets, words
        prompts = [{"ebae": self_prompt, "ebar": next_prompt}[task] for task in self.weights]
        slotted = {bool(template_parts(f"{{text}}{prompt}")[2]) for prompt in prompts}
        if len(slotted) > 1:
            raise InputError(
                "mixed-slots",
                "stage.self_prompt and stage.next_prompt must either both end with slots ({self}"
                " and {next}) or both have no slots",
            )
        _check_encoding(encoding, (self_prompt, next_prompt), slots=True in slotted)
        self.templates = JointTemplates(tokenizer, encoding, prompts)
        per_prompt = encoding.slots if True in slotted else 1
        self.layout = Layout(self.templates.skipped, self.templates.prompts, per_prompt)

    @property
    def uses_output_layer(self) -> bool:
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
        """The segments of the collection's passages; split and sampler do not apply."""
        read = collection.corpus, self.templates, self.targets, self.words, list(self.weights)
        return Unlabelled(*read, token_budget, self.seed)

    def training_step(self, batch: AdaptationBatch, batch_idx: int) -> Tensor:
        read = self.network.read(self.in_step(batch.texts), tokens=self.lm > 0)
        values: dict[str, Tensor] = {}
        total = read.slots.new_zeros(())
        language_model = self.network.language_model
        if self.weights:
            slots, sizes = read.slots.flatten(0, 1), batch.counts.flatten()
            losses, hits = set_losses(language_model, slots, batch.targets, sizes, True)
            losses, hits = losses.view_as(batch.counts), hits.view_as(batch.counts)
            for i, (task, weight) in enumerate(self.weights.items()):
                counts = batch.counts[:, i]
                least = counts.clamp(min=1).log()
                loss, share, floor = _means(counts > 0, losses[:, i], hits[:, i], least)
                total = total + weight * loss
                values |= {task: loss, f"{task}_above_floor": loss - floor, f"{task}_hits": share}
                (values[f"{task}_empty"],) = _means(None, (counts == 0).float())
        if self.lm:
            (values["lm"],) = _means(None, token_losses(language_model, read))
            total = total + self.lm * values["lm"]
        self.log_over_ranks({**values, "loss": total}, len(batch.counts))
        return total


def _check_encoding(encoding: Encoding, prompts: tuple[str, str], slots: bool) -> None:
    """Check that the saved encoding ends with one of these prompts and pools at its slots."""
    for name in ("query_template", "passage_template"):
        if not getattr(encoding, name).endswith(prompts):
            raise InputError(
                "other-prompt",
                f"encoding.{name} is {getattr(encoding, name)!r}; it must end with"
                " stage.self_prompt or stage.next_prompt",
            )
    allowed = ("slots", "last") if slots else ("last",)
    if encoding.pooling not in allowed:
        raise InputError(
            "incompatible-settings",
            f"encoding.pooling is {encoding.pooling!r}, but adaptation trains the states at the"
            f" slots: set it to {' or '.join(allowed)}",
        )


def _means(where: Tensor | None, *values: Tensor) -> list[Tensor]:
    """Means of `values` [N] where `where` [N] holds, weighted for the average over ranks."""
    device = values[0].device
    kept = torch.ones_like(values[0], dtype=torch.bool) if where is None else where
    number = int(kept.sum())
    counts = parallel.sizes(number, device)
    weight = parallel.weight(counts) if sum(counts) else 0.0
    return [value[kept].sum() / max(number, 1) * weight for value in values]
