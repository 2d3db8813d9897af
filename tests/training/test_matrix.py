"""Each combination of backbone, adapters, strategy, precision and gradcache runs or is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from tests.commands import ROOT, train_arguments
from tests.models.small import model_of, saved_base
from tests.two_ranks import TwoRanks

from caravan.cli.compose import compose
from caravan.cli.train import train
from caravan.errors import InputError

BACKBONES = ("tiny_llama", "llama", "qwen3", "gemma3_text", "bert")
Choice = tuple[str, str, str, int | None]
CHOICES: list[Choice] = list(
    itertools.product(BACKBONES, ("none", "lora", "qlora"), ("float32", "bf16"), (None, 2))
)
FEW: list[Choice] = [
    ("bert", "none", "bf16", None),
    ("bert", "lora", "float32", 2),
    ("bert", "qlora", "float32", None),
]


@pytest.fixture
def folder(tokenizer: Any, tmp_path: Path) -> Path:
    for name in BACKBONES[1:]:
        model = model_of(name, vocab_size=400, max_position_embeddings=64)
        saved_base(tokenizer, tmp_path / name, model)
    return tmp_path


def _wrong(folder: Path, beir: Path, strategy: str, choices: list[Choice]) -> list[Any]:
    """Four bits need saved weights, and cannot be sharded; everything else runs."""
    wrong = []
    for choice in choices:
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
        refused = peft == "qlora" and (strategy == "fsdp" or backbone == "tiny_llama")
        outcome = "runs"
        try:
            train(compose(ROOT / "conf", "train", arguments))
        except InputError as error:
            outcome = str(error)
        if ("peft" not in outcome) if refused else (outcome != "runs"):
            wrong.append((strategy, *choice, outcome))
    return wrong


@pytest.mark.parametrize("choices", [FEW, pytest.param(CHOICES, marks=pytest.mark.slow)])
def test_every_combination_runs_or_is_refused_on_one_process(
    folder: Path, beir: Path, choices: list[Choice]
) -> None:
    assert _wrong(folder, beir, "auto", choices) == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_every_combination_runs_or_is_refused_on_two(
    folder: Path, beir: Path, two_ranks: TwoRanks, strategy: str
) -> None:
    assert two_ranks(_wrong, folder, beir, strategy, CHOICES) == [[], []]
