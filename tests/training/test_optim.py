"""The schedule, and updates and batches counted as Lightning makes them."""

from __future__ import annotations

from typing import Any

import pytest
import pytorch_lightning as pl
import pytorch_lightning.demos.boring_classes
import torch

from caravan.data.loaders import limited
from caravan.training.optim import AdamW, batches_in_run, updates


@pytest.mark.parametrize(
    ("schedule", "middle", "end"), [("linear", 0.5, 0.0), ("cosine", 0.5, 0.0), ("constant", 1, 1)]
)
def test_the_rate_warms_up_and_falls_to_its_end(schedule: str, middle: float, end: float) -> None:
    adamw = AdamW(warmup_steps=10, schedule=schedule)
    factors = [adamw.factor(step, 110) for step in range(111)]
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert factors[60] == pytest.approx(middle)
    assert factors[110] == pytest.approx(end)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    final = AdamW(warmup_steps=0, schedule=schedule, final=0.1).factor(100, 100)
    assert final == pytest.approx(max(end, 0.1))


def test_biases_and_norms_are_not_decayed() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    model[0].weight.requires_grad_(False)
    model.append(torch.nn.Linear(2, 2))
    groups = AdamW(weight_decay=0.3).build(model, 10)["optimizer"].param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert [len(group["params"]) for group in groups] == [1, 4]


@pytest.mark.parametrize(
    ("settings", "batches", "steps"),
    [
        ({"max_steps": 7}, 7, 7),
        ({"max_epochs": 3}, 15, 15),
        ({"max_steps": 4, "max_epochs": 3}, 4, 4),
        ({"max_epochs": 3, "accumulate_grad_batches": 2}, 15, 9),
        ({"max_steps": 7, "accumulate_grad_batches": 2}, 12, 7),  # 2 + 2 + 1, the same again, 2
        ({"max_steps": 6, "accumulate_grad_batches": 2}, 10, 6),
        ({"max_steps": 1, "accumulate_grad_batches": 9}, 5, 1),
        ({"max_epochs": 3, "limit_train_batches": 2}, 6, 6),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 6, 6),
    ],
)
def test_updates_and_batches_are_counted_as_lightning_makes_them(
    settings: dict[str, Any], batches: int, steps: int
) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = pl.Trainer(accelerator="cpu", enable_progress_bar=False, **quiet, **settings)
    epoch = limited(5, trainer.limit_train_batches)
    assert (batches_in_run(trainer, epoch), updates(trainer, epoch)) == (batches, steps)
    model = pl.demos.boring_classes.BoringModel()
    model.val_dataloader = None
    trainer.fit(model, torch.utils.data.DataLoader(torch.randn(5, 32)))
    assert trainer.fit_loop.total_batch_idx + 1 == batches
    assert trainer.global_step == steps
