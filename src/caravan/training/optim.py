"""AdamW with warm-up and decay, and how many updates and batches a run has.

The defaults are RepLLaMA's settings (arXiv 2310.08319, section 3).
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AllowInfNan, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from caravan.errors import InputError

Beta = Annotated[float, Field(ge=0, lt=1)]

log = logging.getLogger(__name__)


def updates(trainer: Any, batches: int) -> int:
    """Updates in the whole run, where the schedule ends; `batches` of one epoch.

    Lightning's own count (`estimated_stepping_batches`) makes the training loader before the
    checkpoint is read and loses the loader's position: a resumed run would see other batches.
    """
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    if not ends:
        raise InputError(
            "endless-training",
            "a schedule needs an end: set trainer.max_steps or trainer.max_epochs",
        )
    return min(ends)


def batches_in_run(trainer: Any, batches: int) -> int:
    """Batches in the whole run; `batches` of one epoch, `limit_train_batches` included."""
    # An epoch's last batch makes an update, however few were accumulated.
    accumulated = trainer.accumulate_grad_batches
    of_epoch = max(math.ceil(batches / accumulated), 1)
    epochs, left = divmod(updates(trainer, batches), of_epoch)
    return epochs * batches + min(left * accumulated, batches)


@dataclass
class AdamW:
    """The optimizer's settings; `build` makes torch's AdamW and its schedule for a model.

    Args:
        lr: the peak learning rate, reached after `warmup_steps` updates.
        weight_decay: of matrices; biases and norms are not decayed.
        schedule: how the rate falls to `final` * lr at the last update: linear, cosine, constant.
        fused: use torch's fused kernel.
    """

    lr: Annotated[PositiveFloat, AllowInfNan(False)] = 1e-4
    weight_decay: NonNegativeFloat = 0.0
    warmup_steps: NonNegativeInt = 100
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    final: float = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    fused: bool = True

    def build(self, model: nn.Module, total_steps: int) -> dict[str, Any]:
        """Optimizer and schedule as Lightning's `configure_optimizers` returns them.

        Args:
            total_steps: updates in the whole run, where the decay ends.
        """
        trainable = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trainable if p.ndim >= 2]
        decayed = {"params": matrices, "weight_decay": self.weight_decay}
        plain = {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0}
        betas = self.betas[0], self.betas[1]  # a list in the config
        optimizer = torch.optim.AdamW(
            [decayed, plain], lr=self.lr, betas=betas, eps=self.eps, fused=self.fused
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.factor(step, total_steps)
        )
        scheduler = {"scheduler": schedule, "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def factor(self, step: int, total_steps: int) -> float:
        """The learning rate at update `step`, as a share of the peak.

        >>> adamw = AdamW(warmup_steps=10)
        >>> adamw.factor(0, 110), adamw.factor(10, 110), adamw.factor(60, 110)
        (0.1, 1.0, 0.5)
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = min((step - self.warmup_steps) / max(total_steps - self.warmup_steps, 1), 1.0)
        left = 1.0 - done if self.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.final + (1 - self.final) * left

    def warn_if_warmup_outlasts(self, total_steps: int) -> None:
        """Warn if the run ends before the warm-up does, as with a small collection's epochs."""
        if self.warmup_steps >= total_steps > 0:
            log.warning(
                f"optimizer.warmup_steps={self.warmup_steps} does not end within the {total_steps}"
                f" updates of the run, so the learning rate stays below"
                f" optimizer.lr={self.lr:g}; set it to {total_steps // 10}"
            )
