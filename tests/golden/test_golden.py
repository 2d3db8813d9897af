"""What Caravan computes stays what it was: a whole pipeline on a tiny collection.

See README.md beside this file. Nothing here knows of Caravan's modules: it is driven by its
commands, and looked at through the files that they leave.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden.json"
UPDATE = os.environ.get("CARAVAN_UPDATE_GOLDENS") == "1"

# Settings of how texts are read, and the name of their group.
READING = "encoding"
ADAPTED = (f"{READING}.query_length=24", f"{READING}.passage_length=40")
RETRIEVED = (*ADAPTED, "loss.temperature=0.05")
RERANKED = (f"{READING}.query_length=24", f"{READING}.passage_length=48")

DATA = ("data=beir", "data.path=collection", "cache_dir=cache", "precision=float32")
BACKBONE = (
    *("backbone=tiny_llama", "backbone.vocab_size=400", "backbone.hidden_size=32"),
    *("backbone.heads=2", "backbone.intermediate_size=48", "backbone.max_length=128"),
)
TRAINING = (
    *("batching.queries_per_batch=8", "batching.num_workers=0", "batching.token_budget=256"),
    *("optimizer.lr=5e-3", "optimizer.warmup_steps=2", "logger=tensorboard"),
    *("trainer.max_epochs=100", "trainer.max_steps=16", "trainer.val_check_interval=8"),
    *("trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "callbacks.progress=null"),
    "callbacks.resume_point.every_n_steps=3",
)
STOPPED_AFTER = 10  # updates: one more than the latest point to resume from
ADAPTATION = (
    *("stage=adaptation", "stage.tasks=ebae+ebar+lm", "stage.words=8"),
    *("stage.self_prompt=' moon:'", "stage.next_prompt=' star:'"),
)
RETRIEVER = (
    *(
        "stage=retriever",
        "backbone=from_folder",
        "backbone.folder=runs/adapt/model",
        "peft=lora",
        "peft.rank=4",
    ),
    *("sampler.runs=[runs/bm25/runs/bm25.train.trec]", "sampler.number=2", "sampler.depth=20"),
)
RERANKER = (
    *(
        "stage=reranker",
        "backbone=from_folder",
        "backbone.folder=runs/adapt/model",
        "loss=infonce",
    ),
    *("sampler.runs=[runs/mined/runs/retriever.train.trec]", "sampler.number=3"),
    *("sampler.depth=20", "validation.run=runs/candidates/runs/bm25.dev.trec"),
    "validation.run_depth=10",
)
MEASURES = ("measures=[MRR@10,nDCG@10,R@5]", "index.k=20", "num_workers=0", "token_budget=256")
PIPELINE = (
    *("retriever=[bm25,runs/retriever/model]", "fuse=weighted", "fuse.weights=[1.0,0.5]"),
    *("reranker=runs/reranker/model", "rerank.depth=10", "rerank.weight=0.5", "rerank.rest=keep"),
)

TRAININGS = ("adapt", "retriever", "reranker")
RUNS = (
    *("bm25/runs/bm25.train.trec", "candidates/runs/bm25.dev.trec"),
    *("retriever/runs/validation.trec", "mined/runs/retriever.train.trec"),
    "reranker/runs/validation.trec",
    *("pipeline/runs/bm25.test.trec", "pipeline/runs/retriever.test.trec"),
    *("pipeline/runs/fused.test.trec", "pipeline/runs/reranked.test.trec"),
)
EVALUATIONS = ("bm25", "candidates", "mined", "pipeline")
CURVES = ("train/loss", "train/lm", "train/ebae", "train/ebar", "val/MRR@10")
SUBJECTS = (
    "silver flute drum song string bow chord tune",
    "camel dune oasis sand well caravan salt tent",
    "harbour lamp ship rope sail anchor gull tide",
    "loom thread dye wool cloth needle silk weave",
    "oven bread flour salt yeast crust knead grain",
    "star moon night comet orbit lens dome tide",
)
TEXTS = ["silver flute", "a camel rests", "The lamp of the harbour.", "thread, loom and dye"]

NEAR = {"metrics": 0.02, "curves": 5e-3, "embeddings": 2e-3, "tensors": 1e-2}
"""How far values may be from the golden ones on another machine; of tensors it is relative."""

SAME_KERNELS = {
    "OMP_NUM_THREADS": "1",
    "MKL_CBWR": "COMPATIBLE",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
"""Has processors with more of x86's instructions compute as those with AVX2 do."""


def train(name: str, *overrides: str) -> list[str]:
    backbone = () if "backbone=from_folder" in overrides else BACKBONE
    given = (*DATA, *backbone, *TRAINING, f"run_dir=runs/{name}", *overrides)
    return [str(ROOT / "train.py"), *given]


def evaluate(name: str, *overrides: str) -> list[str]:
    return [str(ROOT / "evaluate.py"), *DATA, *MEASURES, f"run_dir=runs/{name}", *overrides]


def commands() -> list[dict[str, Any]]:
    """In order; the last but one is a training that is stopped, and the last goes on with it."""
    retriever = (*RETRIEVED, *RETRIEVER)
    export = ("-m", "caravan.export", "sentence-transformers", "runs/retriever/model")
    whole = [
        evaluate("bm25", "retriever=bm25", "data.split=train"),
        evaluate("candidates", "retriever=bm25", "data.split=dev"),
        train("adapt", *ADAPTED, *ADAPTATION),
        train("retriever", *retriever),
        evaluate("mined", "retriever=runs/retriever/model", "data.split=train"),
        train("reranker", *RERANKED, *RERANKER),
        evaluate("pipeline", *PIPELINE, "data.split=test"),
        [*export, "exported"],
    ]
    return [
        *({"command": one} for one in whole),
        {"command": train("resumed", *retriever), "stop_after": STOPPED_AFTER},
        {"command": train("resumed", *retriever, "resume=true")},
    ]


def write_collection(folder: Path) -> None:
    """A BEIR folder: passages of random words of a subject, queries of three words of theirs."""
    random_words = random.Random(0)  # random() gives the same numbers in every Python

    def draw(words: list[str], number: int) -> str:
        return " ".join(words[int(random_words.random() * len(words))] for _ in range(number))

    subjects = [subject.split() for subject in SUBJECTS]
    passages = []
    for row in range(72):
        words = draw(subjects[row % len(subjects)], 8 + int(random_words.random() * 16))
        passages.append(words.capitalize() + ".")
    asked = [draw(passage.lower().rstrip(".").split(), 3) for passage in passages[:52]]
    corpus = [
        {"_id": f"p{row}", "title": "" if row % 3 else f"Of {text.split()[1]}", "text": text}
        for row, text in enumerate(passages)
    ]
    queries = [{"_id": f"q{row}", "text": text} for row, text in enumerate(asked)]
    (folder / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, "utf-8")
    splits = {"train": range(32), "dev": range(32, 40), "test": range(40, 52)}
    for split, numbers in splits.items():
        judged = [f"q{row}\tp{row}\t2\n" for row in numbers]
        judged += [f"q{row}\tp{(row + 24) % 72}\t1\n" for row in numbers if row % 4 == 0]
        text = "query-id\tcorpus-id\tscore\n" + "".join(judged)
        (folder / "qrels" / f"{split}.tsv").write_text(text, "utf-8")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def run_digest(path: Path) -> str:
    """Of queries, passages and ranks as they are, and of scores to four decimals."""
    kept = []
    for line in path.read_text("utf-8").splitlines():
        query, _, passage, rank, score, _ = line.split()
        kept.append(f"{query} {passage} {rank} {round(float(score), 4) + 0.0:.4f}\n")
    return f"{len(kept)} lines {hashlib.sha256(''.join(kept).encode()).hexdigest()}"


def weights(model: Path) -> Path:
    (path,) = [*model.glob("model.safetensors"), *model.glob("adapter_model.safetensors")]
    return path


def model_digests(model: Path) -> dict[str, str]:
    """Of the weights, the tokenizer and, where there is one, the config."""
    paths = [weights(model), model / "tokenizer.json", model / "config.json"]
    return {path.name: sha256(path) for path in paths if path.exists()}


def tensors(model: Path) -> dict[str, dict[str, Any]]:
    """Shape, dtype, sum and norm of each, by name."""
    from safetensors.torch import load_file

    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype),
            "sum": float(f"{tensor.double().sum().item():.5g}"),
            "norm": float(f"{tensor.double().norm().item():.5g}"),
        }
        for name, tensor in sorted(load_file(weights(model)).items())
    }


def curve(events: Path, name: str) -> list[tuple[int, float]]:
    """Steps and values, of a folder of TensorBoard's or of one of its files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    if name not in read.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in read.Scalars(name)]


def curves(run_dir: Path) -> dict[str, dict[str, float]]:
    """Values by step."""
    found = {name: curve(run_dir / "tensorboard", name) for name in CURVES}
    return {
        name: {str(step): float(f"{value:.5g}") for step, value in points}
        for name, points in found.items()
        if points
    }


def metrics(run_dir: Path) -> dict[str, dict[str, float]]:
    """Figures of each stage of an evaluation, to four decimals."""
    record = json.loads((run_dir / "metrics.json").read_text("utf-8"))
    stages = {stage["stage"]: stage["overall"] for stage in record["stages"]}
    return {
        name: {measure: round(value, 4) for measure, value in figures.items()}
        for name, figures in (stages | {"last": record["overall"]}).items()
    }


def beginnings(embeddings: dict[str, list[list[float]]]) -> dict[str, list[list[float]]]:
    """The first four numbers of each embedding, to four decimals."""
    return {
        side: [[round(number, 4) for number in row[:4]] for row in rows]
        for side, rows in embeddings.items()
    }


def different(found: Any, golden: Any, off: float, at: str = "") -> list[str]:
    """Where two values differ, numbers by more than `off`; a tensor's by more than `off` of it."""
    if isinstance(found, dict) and isinstance(golden, dict) and found.keys() == golden.keys():
        if "norm" in golden:
            off *= max(abs(golden["norm"]), abs(golden["sum"]))
        return [
            line
            for key in golden
            for line in different(found[key], golden[key], off, f"{at}/{key}")
        ]
    if isinstance(found, list) and isinstance(golden, list) and len(found) == len(golden):
        pairs = enumerate(zip(found, golden, strict=True))
        return [line for row, two in pairs for line in different(*two, off, f"{at}/{row}")]
    if isinstance(found, float) and isinstance(golden, float):
        same = abs(found - golden) <= off + 1e-12
    else:
        same = found == golden
    return [] if same else [f"{at}: {found} is not {golden}"]


@dataclass
class Pipeline:
    """A pipeline that was run, what was found in its files, and what should have been."""

    home: Path
    embeddings: dict[str, dict[str, list[list[float]]]]
    found: dict[str, Any]
    golden: dict[str, Any]

    @property
    def exact(self) -> bool:
        return bool(self.found["environment"] == self.golden["environment"])

    def off(self, kind: str) -> list[str]:
        """What is not as it was: anywhere values, and where the golden file is from every digit."""
        found, golden = self.found[kind], self.golden[kind]
        return different(found, golden, 0.0 if self.exact else NEAR[kind])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    home = tmp_path_factory.mktemp("golden")
    runs = home / "runs"
    write_collection(home / "collection")
    embed = {"model": "runs/retriever/model", "export": "exported", "texts": TEXTS}
    (home / "plan.json").write_text(json.dumps({"commands": commands(), "embed": embed}), "utf-8")
    child = [sys.executable, str(ROOT / "tests/golden/child.py"), "plan.json", "found.json"]
    own = {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    env = os.environ | own | SAME_KERNELS
    done = subprocess.run(child, cwd=home, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    measured = json.loads((home / "found.json").read_text("utf-8"))
    found = {
        "environment": measured["environment"],
        "metrics": {name: metrics(runs / name) for name in EVALUATIONS},
        "curves": {name: curves(runs / name) for name in TRAININGS},
        "embeddings": beginnings(measured["embeddings"]["caravan"]),
        "tensors": {name: tensors(runs / name / "model") for name in TRAININGS},
        "models": {name: model_digests(runs / name / "model") for name in TRAININGS},
        "runs": {name: run_digest(runs / name) for name in RUNS},
    }
    if UPDATE:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    golden = json.loads(GOLDEN.read_text("utf-8"))
    return Pipeline(home, measured["embeddings"], found, golden)


@pytest.mark.parametrize("kind", NEAR)
def test_values_are_what_they_were(kind: str, pipeline: Pipeline) -> None:
    off = pipeline.off(kind)
    assert not off, "\n".join(off)


@pytest.mark.parametrize("kind", ["models", "runs"])
def test_files_are_what_they_were(kind: str, pipeline: Pipeline) -> None:
    if not pipeline.exact:
        pytest.skip("another machine or other libraries than the golden file's: last digits differ")
    off = different(pipeline.found[kind], pipeline.golden[kind], 0)
    assert not off, "\n".join(off)


def test_a_stopped_training_goes_on_to_the_same_weights(pipeline: Pipeline) -> None:
    runs = pipeline.home / "runs"
    _, second = sorted((runs / "resumed/tensorboard").glob("events*"))
    first = curve(second, "train/loss")[0][0]
    assert 1 < first <= STOPPED_AFTER, "the second command started over, or nothing was stopped"
    best_step, _ = max(curve(runs / "retriever/tensorboard", "val/MRR@10"), key=lambda at: at[1])
    assert best_step > STOPPED_AFTER, "the best weights are older than the stop: compares nothing"
    one, other = (weights(runs / name / "model") for name in ("retriever", "resumed"))
    assert one.read_bytes() == other.read_bytes()
    assert curves(runs / "resumed") == curves(runs / "retriever")


def test_an_export_has_the_embeddings_of_its_model(pipeline: Pipeline) -> None:
    if "sentence_transformers" not in pipeline.embeddings:
        pytest.skip("sentence-transformers is not installed")
    ours, theirs = (pipeline.embeddings[name] for name in ("caravan", "sentence_transformers"))
    assert len(ours["queries"]) == len(ours["passages"]) == len(TEXTS)
    off = different(theirs, ours, 1e-5)
    assert not off, "\n".join(off)
