"""docs/extending.md: its examples are written into a folder as they stand, and train."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.commands import ROOT, TINY
from tests.refusals import refused
from tests.tiny import WORDS, write_beir

import caravan
from caravan.cli.compose import compose, preflight
from caravan.cli.train import train
from caravan.data.collection import Collection
from caravan.data.readers.labelled import Beir

PAGE = ROOT / "docs" / "extending.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {
    heading: FENCE.findall(text)
    for heading, text in re.findall(
        r"^## (.+)\n((?:(?!^## ).*\n)*)", PAGE.read_text(), re.MULTILINE
    )
    if FENCE.search(text)
}
MODULES = re.findall(r"^# (\w+)\.py$", PAGE.read_text(), re.MULTILINE)
STEPS = 2
SHORT = (f"trainer.max_steps={STEPS}", "trainer.val_check_interval=1", "logger=none")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The reader's folder: the files of the page, data, and the working directory."""
    for examples in EXAMPLES.values():
        for kind, body in examples:
            if kind:
                path = tmp_path / body.partition("\n")[0].removeprefix("# ")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(body)
    write_beir(tmp_path / "my-data")
    rng = np.random.default_rng(0)
    pairs = [(" ".join(rng.choice(WORDS, 3)), " ".join(rng.choice(WORDS, 9))) for _ in range(20)]
    rows = [json.dumps({"question": question, "answer": answer}) for question, answer in pairs]
    (tmp_path / "my-faq.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CARAVAN_CACHE", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    _forget()  # of an earlier test's folder
    yield tmp_path
    _forget()


def _forget() -> None:
    for name in MODULES:
        sys.modules.pop(name, None)


def run(heading: str) -> Path:
    """Run the command of an example for a few steps of a tiny model; returns its run_dir."""
    (command,) = (body for kind, body in EXAMPLES[heading] if not kind)
    program, *arguments = shlex.split(command)[1:]
    assert program == "train.py"
    preflight(arguments, ROOT / "conf", "train")
    more = None
    if arguments[0] == "--config-dir":
        more, arguments = Path(arguments[1]), arguments[2:]
    own = {text.partition("=")[0] for text in arguments}
    tiny = [text for text in TINY if text.partition(".")[0] not in own]  # their own keys stay
    cfg = compose(ROOT / "conf", "train", [*tiny, *arguments, *SHORT], more)
    train(cfg)
    return Path(cfg.run_dir)


def count_calls(monkeypatch: pytest.MonkeyPatch, name: str, method: str) -> list[Any]:
    """The results of a method of a class of the page, filled while the example runs."""
    module, _, attribute = name.rpartition(".")
    owner = getattr(importlib.import_module(module), attribute)
    real, results = getattr(owner, method), []

    def counted(self: Any, *args: Any) -> Any:
        results.append(real(self, *args))
        return results[-1]

    monkeypatch.setattr(owner, method, counted)
    return results


def test_page_has_five_examples_of_at_most_40_lines() -> None:
    assert list(EXAMPLES) == ["A loss", "A pooling", "A backbone", "A reader", "A sampler"]
    for heading, example in EXAMPLES.items():
        assert sum(body.count("\n") for _, body in example) <= 40, heading
        assert [kind for kind, _ in example].count("") == 1, heading
    assert [kind for kind, _ in EXAMPLES["A pooling"]] == ["python", ""]


def test_loss_of_the_page_trains(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = count_calls(monkeypatch, "my_losses.Margin", "__call__")
    run_dir = run("A loss")
    assert len(values) == STEPS
    assert all(value.requires_grad and value.ndim == 0 for value in values)
    assert (run_dir / "model" / "model.safetensors").is_file()
    scores, targets = torch.tensor([[0.9, 0.2, 0.85], [0.1, 0.4, -torch.inf]]), torch.tensor([0, 0])
    loss = importlib.import_module("my_losses").Margin(margin=0.1)
    assert loss(scores, targets).item() == pytest.approx((0.05 + 0.4) / 2)


def test_pooling_of_the_page_trains_and_its_folder_loads(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = count_calls(monkeypatch, "my_poolings.WeightedMean", "__call__")
    model = run("A pooling") / "model"
    assert len(results) > STEPS
    assert json.loads((model / "caravan.json").read_text())["pooling"] == "my_poolings.WeightedMean"
    with refused("remote-code"):
        caravan.load(model)
    before = len(results)
    loaded = caravan.load(model, trust_remote_code=True, precision="float32")
    together = loaded.encode_queries(["camel", "salt and water and gold"])
    assert len(results) > before
    np.testing.assert_allclose(loaded.encode_queries(["camel"]), together[:1], atol=1e-5)
    states = torch.tensor([[[1.0], [4.0], [100.0]]])
    pooling = importlib.import_module("my_poolings").WeightedMean()
    assert pooling(states, torch.tensor([[1, 1, 0]])).item() == pytest.approx((1 + 2 * 4) / 3)


def test_backbone_of_the_page_trains_and_its_folder_needs_no_class(home: Path) -> None:
    model = run("A backbone") / "model"
    config = json.loads((model / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == ("qwen3", 128)
    _forget()
    (home / "my_backbones.py").unlink()
    assert caravan.load(model).dim == 128


def test_reader_of_the_page_trains_and_reports_a_broken_file(home: Path) -> None:
    run("A reader")
    (record,) = (home / ".cache" / "collections").glob("faq-*/collection.json")
    collection = Collection.open(record.parent)
    assert (len(collection.corpus), len(collection.queries)) == (20, 20)
    sizes = {split: len(collection.qrels(split)) for split in collection.splits}
    assert sizes == {"dev": 4, "train": 16}
    (home / "my-faq.jsonl").write_text('{"question": "what was salt worth?"}\n')
    with refused("unreadable", "my-faq.jsonl"):
        run("A reader")


def test_sampler_of_the_page_trains(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = count_calls(monkeypatch, "my_samplers.Neighbours", "group")
    run("A sampler")
    assert len(groups) >= STEPS * 6
    for group in groups:
        assert group.shape == (8,)
        assert len(set(group)) == 8
        assert np.abs(group - group[0]).max() <= 20


def test_sampler_of_the_page_repeats_a_group_and_leaves_out_positives(home: Path) -> None:
    collection = Beir("my-data").collection(home / ".cache")
    qrels = collection.qrels("train")
    kind = importlib.import_module("my_samplers").Neighbours
    one, other = kind(number=5), kind(number=5)
    one.open(collection, qrels, seed=1)
    other.open(collection, qrels, seed=1)
    for position, row in enumerate(qrels.queries.tolist()):
        group = one.group(row, 0, position)
        assert group[0] in qrels.positives(row)
        assert not np.isin(group[1:], qrels.positives(row)).any()
        np.testing.assert_array_equal(other.group(row, 0, position), group)
    narrow = kind(number=5, window=2)
    narrow.open(collection, qrels, seed=1)
    with refused("few-neighbours"):
        narrow.group(int(qrels.queries[0]), 0, 0)
