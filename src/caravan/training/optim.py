"""AdamW with warm-up and decay; RepLLaMA's settings are the defaults (arXiv 2310.08319, section 3).

Biases and norms are not decayed, as is usual; with RepLLaMA's weight decay of 0 it plays no part.
"""

from __future__ import annotations

import math
from typing import Annotated, Any

import torch
from pydantic import AllowInfNan, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat
from torch import nn

from caravan.errors import InputError

Beta = Annotated[float, Field(ge=0, lt=1)]
SCHEDULES = ("linear", "cosine", "constant")


def updates(trainer: Any, batches: int) -> int:
    """Updates in the whole run, where the schedule ends.

    Lightning's own count (`estimated_stepping_batches`) makes the training loader before the
    checkpoint is read, and the loader's place in the epoch is then lost: a resumed run would see
    the batches of another epoch.

    Args:
        batches: of one epoch, `limit_train_batches` counted in.
    """
    ends = [trainer.max_steps] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        ends.append(trainer.max_epochs * math.ceil(batches / trainer.accumulate_grad_batches))
    if not ends:
        raise InputError("a schedule needs an end: set trainer.max_steps or trainer.max_epochs")
    return min(ends)


class AdamW:
    """Describes the optimiser; `build` makes it for a model.

    Args:
        lr: the peak learning rate, reached after `warmup_steps` updates.
        schedule: how it falls to `final` * lr at the last update: linear, cosine, or constant.
        fused: one kernel for all of an update.
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
                f"optimizer.schedule is {schedule!r}; it must be one of {', '.join(SCHEDULES)}"
            )
        self.settings = {"lr": lr, "betas": tuple(betas), "eps": eps, "fused": fused}
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.schedule = schedule
        self.final = final

    def build(self, model: nn.Module, total_steps: int) -> dict[str, Any]:
        """Optimiser and schedule in Lightning's form.

        Args:
            total_steps: updates in the whole run, where the decay ends.
        """
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter in model.parameters():
            if parameter.requires_grad:
                (decayed if parameter.ndim >= 2 else plain).append(parameter)
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
        """What the peak learning rate is multiplied by at update `step`.

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
