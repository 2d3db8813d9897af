"""The two commands on the tiny collection, inside the test's process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from caravan.cli.compose import compose
from caravan.cli.evaluate import evaluate as evaluate_config
from caravan.cli.train import train as train_config

ROOT = Path(__file__).parents[1]
TINY = (
    *("backbone.vocab_size=400", "backbone.hidden_size=32", "backbone.heads=2"),
    *("backbone.intermediate_size=48", "backbone.max_length=64"),
    *("encoding.query_length=16", "encoding.passage_length=24"),
    *("sampler.number=2", "batching.queries_per_batch=6", "batching.num_workers=0"),
    *("optimizer.lr=1e-2", "optimizer.warmup_steps=2", "precision=float32"),
    *("trainer.max_steps=8", "trainer.max_epochs=100", "trainer.val_check_interval=4"),
    "trainer.log_every_n_steps=2",
    *("trainer.accelerator=cpu", "callbacks.progress=null", "trainer.enable_progress_bar=false"),
)
SHORT = (
    *("trainer.max_steps=2", "trainer.val_check_interval=1"),
    "callbacks.resume_point.every_n_steps=1",
)
"""Two updates, with a validation and a checkpoint after each."""


def train_arguments(beir: Path, run_dir: Path, *overrides: str) -> list[str]:
    data = ["data=beir", f"data.path={beir}", f"cache_dir={run_dir.parent / 'cache'}"]
    of_retriever = not any(text.startswith("stage=") for text in overrides)
    loss = ["loss.temperature=0.05"] if of_retriever else []
    tiny = TINY
    if any(text.startswith("backbone=") for text in overrides):  # it has its own shape
        tiny = tuple(text for text in TINY if not text.startswith("backbone."))
    return [*data, f"run_dir={run_dir}", *tiny, *loss, *overrides]


def from_folder(folder: Any) -> tuple[str, str]:
    """The overrides that initialize the transformer from a model folder."""
    return "backbone=from_folder", f"backbone.folder={folder}"


def train(beir: Path, run_dir: Path, *overrides: str) -> float | None:
    return train_config(compose(ROOT / "conf", "train", train_arguments(beir, run_dir, *overrides)))


def adopt(released: Path, run_dir: Path, *overrides: str) -> Path:
    """The model folder of a released model, by the command that adopts it."""
    given = ["backbone=hf", f"backbone.name={released}", "trainer.max_steps=0"]
    given += [f"run_dir={run_dir}", f"cache_dir={run_dir.parent / 'cache'}", "precision=float32"]
    train_config(compose(ROOT / "conf", "train", [*given, *overrides]))
    return run_dir / "model"


def evaluate_arguments(beir: Path, run_dir: Path, retriever: Any, *overrides: str) -> list[str]:
    return [
        *("data=beir", f"data.path={beir}", f"cache_dir={run_dir.parent / 'cache'}"),
        *(f"run_dir={run_dir}", f"retriever={retriever}", "num_workers=0"),
        *overrides,
    ]


def evaluate(beir: Path, run_dir: Path, retriever: Any, *overrides: str) -> dict[str, Any]:
    given = evaluate_arguments(beir, run_dir, retriever, *overrides)
    return evaluate_config(compose(ROOT / "conf", "evaluate", given))


def curves(run_dir: Path) -> dict[str, dict[int, float]]:
    """The values of each curve by step."""
    events = EventAccumulator(str(run_dir / "tensorboard")).Reload()
    names = events.Tags()["scalars"]
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}


def products(folder: Path) -> dict[str, bytes]:
    """The shards and runs of an evaluation, by their path."""
    paths = (path for end in ("npy", "trec") for path in sorted(folder.rglob(f"*.{end}")))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
