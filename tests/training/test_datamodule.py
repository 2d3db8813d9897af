"""Trainings on a mixture of collections: resumed, on two ranks, validated on each."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.commands import ROOT, TINY, evaluate
from tests.fitting import Fit, KillAt, assert_close, on_ranks
from tests.refusals import refused
from tests.tiny import write_beir
from tests.training.test_callbacks import resumes
from tests.two_ranks import TwoRanks

from caravan.cli.compose import compose
from caravan.cli.train import train as train_config
from caravan.data.mixture import Entry, Mixture
from caravan.data.readers.labelled import Beir
from caravan.encoding import read_encoding

SIZES = {"one": 24, "two": 40, "three": 20}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("mixture")
    for seed, (name, queries) in enumerate(SIZES.items()):
        write_beir(home / name, passages=2 * queries, queries=queries, seed=seed)
    return home


@pytest.fixture
def mixture(fit: Fit, home: Path) -> Fit:
    entries = {name: Entry(Beir(str(home / name))) for name in SIZES}
    entries["two"] = replace(entries["two"], number=1, in_batch=False, weight=2)
    return replace(fit, source=Mixture(entries))


def train(home: Path, run_dir: Path, *more: str) -> float | None:
    """Train on the mixture."""
    entries = [f"+data@data.entries.{name}.source=beir" for name in SIZES]
    paths = [f"data.entries.{name}.source.path={home / name}" for name in SIZES]
    cache = f"cache_dir={run_dir.parent / 'cache'}"
    own = ("loss.temperature=0.05", f"run_dir={run_dir}", cache)
    given = ["data=mixture", *entries, *paths, *TINY, *own, *more]
    return train_config(compose(ROOT / "conf", "train", given))


@pytest.mark.parametrize("mixed", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_killed_training_resumes_exactly_and_the_mean_of_collections_is_monitored(
    mixture: Fit, home: Path, mixed: bool
) -> None:
    if mixed:
        source = Mixture({name: Entry(Beir(str(home / name))) for name in SIZES}, mixed=True)
        mixture = replace(mixture, source=source)
    found = resumes(mixture, KillAt(3), KillAt(4, "validation"), KillAt(7))
    for measure in ("MRR@10", "nDCG@10", "R@100"):
        each = [found.metrics[f"val/{name}/{measure}"] for name in SIZES]
        assert found.metrics[f"val/{measure}"] == pytest.approx(np.mean(each), abs=1e-6)
        assert len(set(each)) > 1 or measure == "R@100"
    best = float(found.trainer.checkpoint_callback.best_model_score)
    assert best >= found.metrics["val/MRR@10"] - 1e-6
    assert {path.name for path in mixture.folder.glob("run.*")} == {
        f"run.{name}.trec" for name in SIZES
    }


def test_two_ranks_equal_one_process(mixture: Fit, two_ranks: TwoRanks) -> None:
    one = mixture.into("one")
    alone = one()
    two, _ = two_ranks(on_ranks, mixture, "ddp")
    assert two["metrics"] == pytest.approx(alone.results, rel=2e-5, abs=1e-5)
    assert_close(one.state()["state_dict"], mixture.state()["state_dict"])


def test_a_training_writes_instructions_and_validates_what_it_does_not_train_on(
    home: Path, tmp_path: Path
) -> None:
    entry = "data.entries"
    more = (
        *("encoding.query_template='{instruction} query: {text}'", "encoding.instruction=camel"),
        *(f"{entry}.one.instruction=salt", f"{entry}.three.weight=0", "encoding.query_length=24"),
        *("validation.train_queries=4", "validation.readings=[{passage_length:12}]"),
    )
    best = train(home, tmp_path / "run", *more)
    encoding, facts = read_encoding(tmp_path / "run" / "model")
    assert encoding.instructions == {"one": "salt", "two": "camel", "three": "camel"}
    assert facts["validation"]["collection"] == "mean of one, two, three"
    found = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert found["best"] == best
    scores = found["read"][0]["scores"]
    each = [scores[f"{name}/MRR@10"] for name in SIZES]
    assert scores["MRR@10"] == pytest.approx(np.mean(each), abs=1e-6)
    assert set(found["train"]) == set(scores)
    assert [line.split(" (")[0] for line in found["collection"].split(", ")] == list(SIZES)
    manifest = json.loads((tmp_path / "run" / "model.manifest.json").read_text())
    assert set(manifest["inputs"]["collection"]) == set(SIZES)
    assert train(home, tmp_path / "run", *more) == best  # not repeated
    suite = f"collections=[{','.join(SIZES)}]"
    metrics = evaluate(home, tmp_path / "all", tmp_path / "run" / "model", suite)
    assert set(metrics["collections"]) == set(SIZES)


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        (["data.entries.one.weigth=2"], "data.entries.one has no setting 'weigth'"),
        (["data.entries.one.weight=-1"], "data.entries.one.weight"),
        (["data.entries.one.source.path=none"], "there is no folder none"),
        (["data.entries.two.in_batch=false", "sampler.number=0"], "data.entries.two.in_batch"),
        (["data.entries.two.in_batch=true", "stage.in_batch=false"], "data.entries.two.in_batch"),
        (["callbacks.best.monitor=val/four/MRR@10"], "does not log val/four/MRR@10"),
        pytest.param(
            ["stage=reranker", "loss=listwise", "data.entries.one.number=0"],
            "entries.one.number",
            marks=pytest.mark.slow,
        ),
        (["data.alpha=2"], "data.alpha"),
    ],
)
def test_a_mistake_in_an_entry_is_refused_with_its_key(
    home: Path, tmp_path: Path, settings: list[str], place: str
) -> None:
    with refused(("config-mistakes", "folder-not-found")["none" in place], place):
        train(home, tmp_path / "run", *settings)


def test_without_negatives_of_the_batch_a_query_has_its_own_group(mixture: Fit) -> None:
    """The loss of a batch without in-batch negatives is that of `stage.in_batch=false`."""
    found = {}
    for name, flags in (("off", False), ("none", None)):
        entries = {
            key: replace(entry, in_batch=flags) for key, entry in mixture.source.entries.items()
        }
        one = replace(mixture.into(name), source=Mixture(entries))
        settings = {} if flags is False else {"in_batch": False}
        found[name] = one(steps=4, **settings).losses
    assert found["off"] == pytest.approx(found["none"], abs=1e-5)
    assert torch.tensor(list(found["off"].values())).std() > 0
