"""Backbone, adapters, strategy, precision, cached gradients: each set runs, or is refused."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tests.commands import ROOT, train_arguments
from tests.two_ranks import TwoRanks

from caravan.cli.compose import compose
from caravan.cli.train import train
from caravan.errors import InputError

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"intermediate_size": 48, "vocab_size": 400, "max_position_embeddings": 64}
BACKBONES = {
    "tiny_llama": None,
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, num_key_value_heads=1, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SHAPE, num_key_value_heads=1, head_dim=16, sliding_window=8
    ),
    "bert": lambda: transformers.BertConfig(**SHAPE),
}
CHOICES = (
    tuple(BACKBONES),
    ("none", "lora", "qlora"),
    ("float32", "bf16"),
    (None, 2),
)
Choice = tuple[Any, ...]


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    for name, config in BACKBONES.items():
        if config is not None:
            torch.manual_seed(0)
            transformers.AutoModel.from_config(config()).save_pretrained(tmp_path / name)
            tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


def _told(folder: Path, beir: Path, strategy: str, choice: Choice) -> str:
    """ "runs", or what was told instead."""
    backbone, peft, precision, chunk = choice
    run_dir = folder / "-".join(map(str, (strategy, *choice)))
    arguments = train_arguments(
        *(beir, run_dir, f"strategy={strategy}", f"peft={peft}", f"precision={precision}"),
        *(f"gradcache.chunk={'null' if chunk is None else chunk}", "trainer.max_steps=1"),
        *("validation.queries=2", "validation.passages=8"),
        *([] if peft == "none" else ["peft.rank=2"]),
        *([] if strategy == "auto" else ["trainer.devices=2"]),
    )
    if backbone != "tiny_llama":
        arguments = [text for text in arguments if not text.startswith("backbone.")]
        arguments += ["backbone=hf", f"backbone.name={folder / backbone}"]
        arguments += ["encoding.pooling=mean"] if backbone == "bert" else []
    try:
        train(compose(ROOT / "conf", "train", arguments))
    except InputError as error:
        return str(error)
    except Exception as error:  # noqa: BLE001 - any is a failure of the test
        return f"failed: {type(error).__name__}: {error}"
    return "runs"


def _all(folder: Path, beir: Path, strategy: str) -> list[str]:
    return [_told(folder, beir, strategy, choice) for choice in itertools.product(*CHOICES)]


def _holds(strategy: str, choices: Iterable[Choice], told: Iterable[str]) -> None:
    """Four bits need saved weights, and no other rank to share them; all else runs."""
    for choice, text in zip(choices, told, strict=True):
        backbone, peft, *_ = choice
        expected = None
        if peft == "qlora" and strategy == "fsdp":
            expected = "shared out over ranks"
        elif peft == "qlora" and backbone == "tiny_llama":
            expected = "random ones"
        held = text == "runs" if expected is None else expected in text
        assert held, (strategy, *choice, text)


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_combination_runs_or_is_refused_on_one_process(
    folder: Path, beir: Path, whole: bool
) -> None:
    choices = [
        choice
        for choice in itertools.product(*CHOICES)
        if whole or (choice[0] in ("tiny_llama", "bert") and choice[2] == "float32")
    ]
    assert len(choices) == (60 if whole else 12)
    _holds("auto", choices, [_told(folder, beir, "auto", choice) for choice in choices])


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_combination_runs_or_is_refused_on_two(
    folder: Path, beir: Path, two_ranks: TwoRanks, strategy: str
) -> None:
    for told in two_ranks(_all, folder, beir, strategy):
        _holds(strategy, itertools.product(*CHOICES), told)
