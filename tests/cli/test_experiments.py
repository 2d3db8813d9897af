"""Every file of conf/experiment runs, a training step or an evaluation of a tiny collection, and so
does the first job of every sweep.

A tiny backbone takes the place of the one that a file names, and folders and runs made here that of
what it reads; all else is as the file has it. Those that are not slow are one of each kind.
"""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.commands import ROOT, TINY, evaluate
from tests.models.released import release, save_base
from tests.models.small import model_of, saved_base

from caravan import manifests
from caravan.cli.compose import compose
from caravan.cli.evaluate import evaluate as evaluate_config
from caravan.cli.train import train as train_config
from caravan.encoding import read_encoding

CONF = ROOT / "conf" / "experiment"
NAMES = sorted(str(path.relative_to(CONF).with_suffix("")) for path in CONF.rglob("*.yaml"))
SWEEPS = sorted(path.stem for path in (ROOT / "conf" / "sweep").glob("*.yaml"))
QUICK = {"papers/rankllama_document", "llara/adapt", "llara_adapt"}
EVALUATED = {name for name in NAMES if name.startswith("eval/")} | {"quickstart/pipeline"}
EVALUATED |= {"rerank_depth", "dimension"}
STEP = (
    *("trainer.max_steps=1", "trainer.max_epochs=1", "trainer.val_check_interval=1"),
    *("trainer.accumulate_grad_batches=1", "trainer.accelerator=cpu", "precision=float32"),
    *(
        "trainer.enable_progress_bar=false",
        "callbacks.progress=null",
        "trainer.log_every_n_steps=1",
    ),
    *("batching.queries_per_batch=2", "batching.num_workers=0", "optimizer.warmup_steps=0"),
    *("validation.queries=2", "validation.passages=30", "validation.run_depth=3"),
)


@dataclass
class Stand:
    """What stands in for the backbones, folders and runs that experiments name."""

    beir: Path
    decoder: Path
    encoder: Path
    texts: Path
    suite: Path
    models: dict[str, str]  # retriever, reranker, adapted
    runs: dict[str, Path]  # by split; and "beir", a folder of runs of each collection
    embedded: Path  # an evaluation of the retriever over the training queries


@pytest.fixture(scope="module")
def stand(
    beir: Path,
    suite: Path,
    bm25_runs: dict[str, Path],
    tokenizer: Any,
    folders: dict[str, str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Stand:
    home = tmp_path_factory.mktemp("experiments")
    decoder = save_base(home / "decoder", tokenizer)
    bert = model_of("bert", vocab_size=400, max_position_embeddings=512)
    encoder = saved_base(tokenizer, home / "encoder", bert)
    texts = home / "articles"
    texts.mkdir()
    rows = [{"title": "Salt", "text": "the caravan rests at the well. " * 30} for _ in range(8)]
    (texts / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate(suite, home / "beir", "bm25", "collections=[one,two]", "measures=[MRR@10]")
    runs = {**bm25_runs, "beir": home / "beir"}
    embedded = home / "embedded"
    evaluate(beir, embedded, folders["retriever"], "data.split=train", "measures=[MRR@10]")
    stand = Stand(beir, decoder, encoder, texts, suite, {**folders}, runs, embedded)
    given = _training("llara/adapt", stand, home / "adapted")
    places = [f"run_dir={home / 'adapted'}", f"cache_dir={home / 'cache'}", "trainer.max_steps=0"]
    train_config(compose(ROOT / "conf", "train", [*given, *places]))
    stand.models["adapted"] = str(home / "adapted/model")
    return stand


def _training(name: str, stand: Stand, run_dir: Path, group: str = "experiment") -> list[str]:
    """What takes the place of what an experiment or a sweep of train.py names."""
    cfg = compose_loosely("train", name, group)
    given = [f"{group}={name}", *STEP]
    if cfg.trainer.max_steps == 0:
        given.append("trainer.max_steps=0")
    if name.startswith("released/"):
        adapter = release(run_dir.parent / "released", stand.decoder, name.partition("/")[2])
        return [*given[:1], "trainer.max_steps=0", "precision=float32", f"backbone.name={adapter}"]
    if "folder" in cfg.backbone:
        given.append(f"backbone.folder={stand.models['adapted']}")
    elif "name" in cfg.backbone:
        base = stand.encoder if "MiniLM" in (cfg.backbone.name or "") else stand.decoder
        given += [f"backbone.name={base}", "backbone.layers=null"]
    else:
        given += [text for text in TINY if text.startswith("backbone.")]
    adapts = cfg.stage._target_.endswith("Adaptation")
    if adapts:
        given.append(f"data.path={stand.texts}")
        given += ["data.config=null"] if "config" in cfg.data else ["data=texts"]
        given.append("stage.words=20")
    elif "entries" in cfg.data:
        sources = [f"data.entries.{entry}.source" for entry in cfg.data.entries]
        given += [f"{source}.path={stand.beir}" for source in sources]
        given += [f"{source}.held_out=0" for source in sources]  # it has a dev split
    else:
        given += ["data=beir", f"data.path={stand.beir}", f"sampler.runs=[{stand.runs['train']}]"]
    if cfg.validation.run is not None or cfg.encoding.kind == "reranker":
        given.append(f"validation.run={stand.runs['dev']}")
    if cfg.distillation.teacher is not None:
        given += [f"distillation.teacher={stand.embedded}", "backbone.layers=1"]
    if cfg.sampler is not None and cfg.sampler.teacher is not None:
        given.append(f"sampler.teacher={stand.runs['train']}")
    return given


def _evaluation(name: str, stand: Stand, group: str = "experiment") -> list[str]:
    """What takes the place of what an experiment or a sweep of evaluate.py names."""
    cfg = compose_loosely("evaluate", name, group)
    given = [f"{group}={name}", "num_workers=0", "precision=float32"]
    several = cfg.collections is not None
    given += ["data=beir", f"data.path={stand.suite if several else stand.beir}"]
    given += ["collections=[one,two]"] if several else []
    if cfg.reranker is not None:
        given.append(f"reranker={stand.models['reranker']}")
    asked = cfg.retriever
    if name == "quickstart/pipeline":
        given.append(f"retriever=[bm25,{stand.models['retriever']}]")
    elif asked.endswith(".trec") and several:
        given.append(
            f"retriever={stand.runs['beir']}/${{data.name}}/runs/bm25.${{data.split}}.trec"
        )
    elif asked.endswith(".trec"):
        given.append(f"retriever={stand.runs[cfg.data.split]}")
    else:
        given.append(f"retriever={stand.models['retriever']}")
    lengths = [key for key in ("query_length", "passage_length") if cfg[key] is not None]
    return given + [f"{key}=24" for key in lengths]


def compose_loosely(root: str, name: str, group: str = "experiment", hydra: bool = False) -> Any:
    """The config of an experiment or a sweep without a look at what lies on this machine."""
    from caravan.cli.compose import Composer, without_hydra

    with Composer(ROOT / "conf", root) as composer:
        own = ["retriever=here"] if name.startswith("eval/") else []
        cfg = composer.compose([f"{group}={name}", *own])
        return cfg if hydra else without_hydra(cfg)


@pytest.mark.parametrize(
    ("group", "name"),
    [
        pytest.param(group, name, marks=[] if name in QUICK else [pytest.mark.slow])
        for group, names in (("experiment", NAMES), ("sweep", SWEEPS))
        for name in names
    ],
)
def test_an_experiment_or_the_first_job_of_a_sweep_runs_with_a_tiny_backbone_in_its_place(
    group: str, name: str, stand: Stand, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    if name in EVALUATED:
        root, given = "evaluate", _evaluation(name, stand, group)
    else:
        root, given = "train", _training(name, stand, run_dir, group)
    if group == "sweep":
        whole = compose_loosely(root, name, group, hydra=True)
        own = {text.partition("=")[0] for text in given}  # runs and models of other commands
        varied = {key: str(of) for key, of in whole.hydra.sweeper.params.items() if key not in own}
        given += [f"{key}={_first(values)}" for key, values in varied.items()]
    places = [f"run_dir={run_dir}", f"cache_dir={tmp_path / 'cache'}"]
    cfg = compose(ROOT / "conf", root, [*given, *places])
    if root == "evaluate":
        metrics = evaluate_config(cfg)
        assert set(metrics["overall"]) == set(cfg.measures)
        assert all(0 <= value <= 1 for value in metrics["overall"].values())
        return
    train_config(cfg)
    encoding, facts = read_encoding(run_dir / "model")
    assert encoding.kind == cfg.encoding.kind
    assert facts["weights"] == ("adapter" if cfg.peft or name.startswith("released/") else "full")
    if cfg.trainer.max_steps:
        record = json.loads((run_dir / "metrics.json").read_text())
        assert record["updates"] == cfg.trainer.max_steps == 1
    assert manifests.read(run_dir / "model") is not None


def _first(values: str) -> str:
    """The first value that a sweep gives a setting; of an interval its lower end."""
    inside = re.fullmatch(r"(?:tag\(log,)?(?:interval|choice)\((.+?)\)+", values)
    return (inside[1] if inside else values).split(",")[0]


@pytest.mark.slow
def test_the_search_finds_the_best_of_its_trials_and_goes_on(stand: Stand, tmp_path: Path) -> None:
    given = _training("search", stand, tmp_path / "run", "sweep")
    command = [sys.executable, "train.py", "-m", *given, f"run_dir={tmp_path / 'run'}"]
    command += [f"cache_dir={tmp_path / 'cache'}", "hydra.sweeper.n_trials=2"]
    for _ in range(2):
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run").rglob("job.json"))) == 2  # the same trials again
    assert "exists already" in done.stderr
    with (tmp_path / "run/sweep.csv").open() as file:
        best = max(float(row["val/MRR@10"]) for row in csv.DictReader(file))
    reported = re.search(r"Best value: ([\d.]+)", done.stderr)
    assert reported
    assert float(reported[1]) == pytest.approx(best)
