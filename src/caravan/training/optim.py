"""AdamW with warm-up and decay, and how many updates and batches a run has.

The defaults are RepLLaMA's settings (arXiv 2310.08319, section 3).
"""

from __future__ import annotations

import logging
import math
from typing import Annotated, Any

import torch
from pydantic import AllowInfNan, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from caravan.distributed import is_main_process
from caravan.errors import InputError

Beta = Annotated[float, Field(ge=0, lt=1)]
SCHEDULES = ("linear", "cosine", "constant")

log = logging.getLogger(__name__)


def updates(trainer: Any, batches: int) -> int:
    """Updates in the whole run, where the schedule ends.

    Lightning's own count (`estimated_stepping_batches`) makes the training loader before the
    checkpoint is read and loses the loader's position: a resumed run would see other batches.

    Args:
        batches: of one epoch, `limit_train_batches` included.
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


def batches_in_run(trainer: Any, batches: int) -> int | None:
    """Batches in the whole run; None if only time ends it.

    Args:
        batches: of one epoch, `limit_train_batches` included.
    """
    ends = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs * batches)
    if trainer.max_steps >= 0:
        # An epoch's last batch makes an update, however few were accumulated.
        accumulated = trainer.accumulate_grad_batches
        epochs, updates_left = divmod(trainer.max_steps, max(math.ceil(batches / accumulated), 1))
        ends.append(epochs * batches + min(updates_left * accumulated, batches))
    return min(ends) if ends else None


class AdamW:
    """The optimizer's settings; `build` makes torch's AdamW and its schedule for a model.

    Args:
        lr: the peak learning rate, reached after `warmup_steps` updates.
        weight_decay: of matrices; biases and norms are not decayed.
        schedule: how the rate falls to `final` * lr at the last update: linear, cosine, constant.
        fused: use torch's fused kernel.
    """

    def __init__(
        self,
        lr: Annotated[PositiveFloat, AllowInfNan(False)] = 1e-4,
        weight_decay: NonNegativeFloat = 0.0,
        warmup_steps: NonNegativeInt = 100,
        schedule: str = "linear",
        final: float = 0.0,
        betas: tuple[Beta, Beta] = (0.9, 0.999),
        eps: NonNegativeFloat = 1e-8,
        fused: bool = True,
    ) -> None:
        if schedule not in SCHEDULES:
            raise InputError(
                "unknown-schedule",
                f"optimizer.schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}",
            )
        self.settings = {"lr": lr, "betas": tuple(betas), "eps": eps, "fused": fused}
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.final = final

    def build(self, model: nn.Module, total_steps: int) -> dict[str, Any]:
        """Optimizer and schedule as Lightning's `configure_optimizers` returns them.

        Args:
            total_steps: updates in the whole run, where the decay ends.
        """
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        decayed = [parameter for parameter in trainable if parameter.ndim >= 2]
        plain = [parameter for parameter in trainable if parameter.ndim < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": self.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            **self.settings,  # type: ignore[arg-type]
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: self.factor(step, total_steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

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
        if self.warmup_steps >= total_steps > 0 and is_main_process():
            log.warning(
                f"optimizer.warmup_steps={self.warmup_steps} does not end within the {total_steps}"
                f" updates of the run, so the learning rate stays below"
                f" optimizer.lr={self.settings['lr']:g}; set it to {total_steps // 10}"
            )
