"""What stages share: clipping, validation metrics, weights in the precision of their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from tests.fitting import MEASURES, Fit, Sgd, same_weights
from tests.refusals import refused
from tests.tiny import tiny_backbone

from caravan.data.runs import read_run
from caravan.encoding import Encoding
from caravan.models import varlen
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.models.hardware import settle_precisions
from caravan.retrieval.metrics import score_run
from caravan.training.losses import InfoNCE
from caravan.training.optim import AdamW
from caravan.training.retriever import Retriever


def test_gradients_are_limited_by_norm_by_value_or_not_at_all(fit: Fit) -> None:
    settings: dict[str, Any] = {"steps": 1, "optimizer": Sgd(), "every_n_steps": 100}
    start = fit(**settings, limit_train_batches=0).weights
    clipped = fit(**settings)
    assert clipped.metrics["train/gradient_norm"] > 1
    free = [fit(**settings, gradient_clip_val=limit).weights for limit in (None, 0, 1e9)]
    assert same_weights(free[0], free[2])
    assert same_weights(free[1], free[2])
    moved = torch.cat([(clipped.weights[name] - start[name]).flatten() for name in start])
    assert moved.norm() == pytest.approx(0.5, rel=1e-3)  # the learning rate
    by_value = fit(**settings, gradient_clip_val=1e-3, gradient_clip_algorithm="value").weights
    most = max(float((by_value[name] - start[name]).abs().max()) for name in start)
    assert most == pytest.approx(0.5e-3, rel=1e-3)


def test_attention_without_padding_is_tried_once_the_model_is_on_its_device(
    fit: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device has a kernel that fails, and bf16 alone uses it."""

    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel image")

    def move(_: Any) -> None:
        monkeypatch.setattr(varlen, "has_kernel", lambda states: True)

    monkeypatch.setattr(SingleDeviceStrategy, "model_to_device", move)
    monkeypatch.setattr(varlen, "kernel", lambda: fails)
    backbone = tiny_backbone()
    backbone.attention = "unpadded"
    fit(backbone=backbone, steps=1)
    with refused("attention-not-supported", "on cpu", "no kernel image", "attention=auto"):
        fit(backbone=backbone, steps=1, precision="bf16-mixed")


def test_training_lowers_the_loss_and_the_metrics_are_those_of_the_run(fit: Fit) -> None:
    fitted = fit(steps=40, workers=1, every_n_steps=100)
    losses = list(fitted.losses.values())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    texts = fit.collection.queries, fit.collection.corpus
    run = read_run(fit.folder / "run.trec", *texts)
    scored = score_run(run, fit.collection.qrels("dev"), *texts, MEASURES)
    for name, value in scored["overall"].items():
        assert fitted.metrics[f"val/{name}"] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_a_frozen_base_is_loaded_as_stored_and_trains_the_same(
    stored: torch.dtype, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    tiny_backbone().model(tokenizer).to(stored).save_pretrained(tmp_path)
    built = []
    for bf16 in (True, False):
        backbone, adapters = Pretrained(str(tmp_path)), LoRA(rank=2, alpha=4)
        module = Retriever(backbone, adapters, tokenizer, encoding, InfoNCE(), AdamW(), seed=0)
        module.bf16 = bf16
        module.configure_model()
        assert backbone.dtype == ("auto" if bf16 else torch.float32)
        built.append(module.network)
    module = Retriever(
        Pretrained(str(tmp_path)),
        LoRA(rank=2, alpha=4, bf16_norms=True),
        tokenizer,
        encoding,
        InfoNCE(),
        AdamW(),
        seed=0,
    )
    module.bf16 = True
    module.configure_model()
    frozen = {p.dtype for p in module.network.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16}
    settle_precisions(built[1], bf16=True)
    weights, expected = (dict(model.named_parameters()) for model in built)
    assert {p.dtype for p in weights.values()} == {torch.bfloat16, torch.float32}
    for name, weight in weights.items():
        assert weight.dtype == expected[name].dtype
        assert torch.equal(weight, expected[name]), name
