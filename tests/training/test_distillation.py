"""Distillation of embeddings: against a loop in float64, in chunks, on two ranks, resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.commands import ROOT, evaluate, train, train_arguments
from tests.fitting import (
    Fit,
    Fitted,
    KillAt,
    Sgd,
    assert_close,
    assert_loss_and_gradient,
    on_ranks,
    same_weights,
)
from tests.refusals import refused
from tests.tiny import tiny_backbone, write_beir
from tests.two_ranks import TwoRanks

import caravan
from caravan.cli.compose import compose
from caravan.data.batch import TrainBatch, pack
from caravan.data.batching import Groups
from caravan.data.collection import Collection
from caravan.data.mixture import Entry, Mixture, open_parts
from caravan.data.negatives import Negatives
from caravan.data.readers.labelled import Beir
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding
from caravan.training.datamodule import Reads
from caravan.training.distillation import Distillation
from caravan.training.gradcache import GradCache
from caravan.training.losses import InfoNCE
from caravan.training.optim import AdamW
from caravan.training.retriever import Retriever

WIDTH = 16


@pytest.fixture(scope="session")
def teacher(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The evaluation of a teacher with narrower embeddings over the training queries."""
    home = tmp_path_factory.mktemp("teacher")
    train(beir, home / "model", "trainer.max_steps=0", f"backbone.hidden_size={WIDTH}")
    given = ("data.split=train", "block=16", "measures=[MRR@10]")
    evaluate(beir, home / "run", home / "model" / "model", *given)
    return home / "run"


def of_width(teacher: Path, **settings: Any) -> Distillation:
    return Distillation(str(teacher), projection=True, **settings)


def _module(tokenizer: Any, encoding: Encoding, distillation: Distillation) -> Retriever:
    parts = (tiny_backbone(), None, tokenizer, encoding, InfoNCE(0.05), AdamW(), 0)
    module = Retriever(*parts, distillation=distillation)
    module.configure_model()
    return module


def _batch(width: int) -> TrainBatch:
    texts = [np.random.default_rng(i).integers(5, 300, 3 + i).tolist() for i in range(9)]
    rng = torch.Generator().manual_seed(0)
    rows = torch.arange(6).view(3, 2)
    return TrainBatch(
        texts=pack(texts, 64),
        passage_rows=rows,
        passage_keys=rows,
        excluded_keys=rows[:, :1],
        teacher_queries=torch.randn(3, width, generator=rng).half(),
        teacher_passages=torch.randn(6, width, generator=rng).half(),
    )


@pytest.mark.parametrize("loss", ["cosine", "mse"])
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("scores_weight", [1.0, 0.0])
def test_loss_and_gradient_equal_a_naive_reference(
    teacher: Path,
    tokenizer: Any,
    encoding: Encoding,
    loss: Any,
    projection: bool,
    scores_weight: float,
) -> None:
    settings: dict[str, Any] = {"loss": loss, "weight": 0.7, "scores_weight": scores_weight}
    distillation = of_width(teacher, **settings)
    distillation.projection = projection
    distillation.width = WIDTH if projection else 32
    module, batch = _module(tokenizer, encoding, distillation), _batch(distillation.width)
    found = module.training_step(batch, 0)

    embedded = batch.sides(module.model.embed(batch.texts)[:, :32].double())
    sides = []
    for students, teachers in zip(
        embedded, (batch.teacher_queries, batch.teacher_passages), strict=True
    ):
        distances = []
        for student, target in zip(students, teachers.double(), strict=True):
            if projection:
                student = module.model.projection.weight.double() @ student
            cosine = student @ target / (student.norm() * target.norm())
            distances.append(1 - cosine if loss == "cosine" else ((student - target) ** 2).sum())
        sides.append(sum(distances) / len(distances))
    scores = embedded[0] @ embedded[1].T / 0.05
    terms = [row.logsumexp(0) - row[2 * i] for i, row in enumerate(scores)]
    expected = scores_weight * sum(terms) / 3 + 0.7 * (sides[0] + sides[1]) / 2
    assert_loss_and_gradient(module, found, expected)


def test_a_batch_has_the_teachers_embeddings_of_its_texts(
    teacher: Path, collection: Collection, tokenizer: Any, encoding: Encoding
) -> None:
    groups = Groups(
        *(collection, collection.qrels("train"), Negatives(number=2)),
        *(Templates(tokenizer, encoding), 64, 0),
    )
    groups.teacher_embeddings = Distillation(str(teacher)).embeddings(collection, "train")
    groups.open()
    batch = groups[0, np.arange(16)].packed()
    model = caravan.load(teacher.parent / "model" / "model")
    rows, passages = groups.permutation(0), batch.passage_rows.flatten().numpy()
    for found, wanted in (
        (batch.teacher_queries, model.encode_queries([t for _, t in collection.queries.get(rows)])),
        (batch.teacher_passages, model.encode_passages(collection.corpus.get(passages))),
    ):
        np.testing.assert_allclose(found.float().numpy(), wanted, atol=2e-3)


def test_a_mixed_batch_has_the_embeddings_of_each_collection(
    teacher: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    names, folder = ("one", "two"), teacher.parent / "model" / "model"
    for seed, name in enumerate(names):
        write_beir(tmp_path / "data" / name, seed=seed)
    given = ("collections=[one,two]", "data.split=train", "measures=[MRR@10]")
    evaluate(tmp_path / "data", tmp_path / "run", folder, *given)
    source = Mixture(
        {name: Entry(Beir(str(tmp_path / "data" / name))) for name in names}, mixed=True
    )
    parts = open_parts(source, tmp_path / "cache", Negatives(number=1))
    module = _module(tokenizer, encoding, of_width(tmp_path / "run"))
    batching = {"queries_per_batch": 9, "token_budget": 64, "num_workers": 0}
    training: Any = Reads(source, parts, module, {}).data_module(batching).training
    training.open()
    item = next(iter(training.order(9)))
    batch, model, first = training[item].packed(), caravan.load(folder), 0
    assert set(item[:, 0]) == {0, 1}
    for entry in (0, 1):
        positions = item[item[:, 0] == entry, 2]
        collection, own = parts[entry].collection, slice(first, first + len(positions))
        asked = collection.queries.get(training.sets[entry].permutation(0)[positions])
        read = collection.corpus.get(batch.passage_rows[own].flatten().numpy())
        for found, wanted in (
            (batch.teacher_queries[own], model.encode_queries([text for _, text in asked])),
            (batch.teacher_passages[2 * own.start : 2 * own.stop], model.encode_passages(read)),
        ):
            np.testing.assert_allclose(found.float().numpy(), wanted, atol=2e-3)
        first = own.stop


@pytest.mark.slow
def test_chunks_and_two_ranks_train_as_the_whole_batch(
    teacher: Path, fit: Fit, two_ranks: TwoRanks
) -> None:
    settings: dict[str, Any] = {"steps": 3, "optimizer": Sgd(), "queries_per_batch": 7}
    settings |= {"distillation": of_width(teacher, loss="mse"), "loss": InfoNCE(0.05, dims=[8])}
    whole = fit.into("whole")
    expected = whole(**settings)
    assert expected.metrics["train/distance"] > 0
    names = set(expected.metrics) - {"train/tokens_per_second", "train/padding"}
    for number, (strategy, cached) in enumerate(
        [("auto", True), ("ddp", False), ("ddp", True), ("fsdp", False)]
    ):
        other = fit.into(f"other{number}")
        given = {**settings, "gradcache": GradCache(2) if cached else None}
        if strategy == "auto":
            metrics = other(**given).metrics
        else:
            metrics = two_ranks(on_ranks, other, strategy, **given)[0]["metrics"]
        for name in names:
            assert metrics[name] == pytest.approx(expected.metrics[name], rel=1e-4, abs=1e-5), name
        assert_close(whole.state()["state_dict"], other.state()["state_dict"])


def test_a_killed_run_resumes_with_the_weights_of_its_projection(teacher: Path, fit: Fit) -> None:
    settings: dict[str, Any] = {"distillation": of_width(teacher), "steps": 6}
    expected: Fitted = fit.into("whole")(**settings)
    fit(**settings, kill=KillAt(3))
    resumed = fit(**settings, resume=True)
    assert same_weights(resumed.weights, expected.weights)
    name = "network.projection.weight"
    assert name in fit.state()["state_dict"]
    assert not torch.equal(
        fit.state()["state_dict"][name], fit.state("best.ckpt")["state_dict"][name]
    )


@pytest.mark.slow
def test_a_student_is_an_ordinary_model_folder_and_learns_the_embeddings(
    teacher: Path, beir: Path, tmp_path: Path
) -> None:
    alone = ("distillation.scores_weight=0", f"distillation.teacher={teacher}")
    student = ("distillation.projection=true", "trainer.max_steps=60", *alone)
    train(beir, tmp_path / "run", *student)
    model = tmp_path / "run" / "model"
    assert not any("projection" in name for name in load_file(model / "model.safetensors"))
    assert caravan.load(model).encode_queries(["camel"]).shape == (1, 32)
    inputs = json.loads((tmp_path / "run" / "model.manifest.json").read_text())["inputs"]
    (products,) = inputs["embeddings"].values()
    assert [name.rpartition(".")[0] for name in products] == ["queries.train", "passages"]
    events = (tmp_path / "run" / "tensorboard").rglob("*")
    distances = curve(next(path for path in events if path.is_file()).parent, "train/distance")
    assert distances[-1] < 0.5 * distances[0]


def curve(folder: Path, name: str) -> list[float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.value for event in EventAccumulator(str(folder)).Reload().Scalars(name)]


def test_embeddings_of_other_data_or_of_several_models_are_refused(
    teacher: Path, beir: Path, collection: Collection, tmp_path: Path
) -> None:
    found = Distillation(str(teacher))
    other = Beir(str(write_beir(tmp_path / "other", seed=1))).collection(tmp_path / "cache")
    with refused("other-collection", str(teacher), other.digest[:12]):
        found.embeddings(other, "train")
    with refused("missing-embeddings", str(teacher), "dev queries"):
        found.embeddings(collection, "dev")
    with refused("missing-embeddings", str(tmp_path)):
        Distillation(str(tmp_path))
    given = ("data.split=train", "block=16", "measures=[MRR@10]", "passage_length=20")
    store = f"store={tmp_path / 'both'}"
    evaluate(beir, tmp_path / "short", teacher.parent / "model" / "model", *given, store)
    evaluate(beir, tmp_path / "long", teacher.parent / "model" / "model", *given[:-1], store)
    with refused("several-teachers", str(tmp_path / "both"), "passages."):
        Distillation(str(tmp_path / "both")).embeddings(collection, "train")
    given = (*given[:-1], "dim=8", store)
    evaluate(beir, tmp_path / "cut", teacher.parent / "model" / "model", *given)
    with refused("several-teachers", "2 models"):
        Distillation(str(tmp_path / "both"))


def test_a_missing_or_damaged_shard_is_refused(
    beir: Path, teacher: Path, collection: Collection, tmp_path: Path
) -> None:
    given = ("data.split=train", "block=16", "measures=[MRR@10]")
    evaluate(beir, tmp_path / "run", teacher.parent / "model" / "model", *given)
    (shard,) = (tmp_path / "run").rglob("passages.*/00000001.npy")
    content = bytearray(shard.read_bytes())
    content[200] ^= 1
    shard.write_bytes(content)
    opened = Distillation(str(tmp_path / "run")).embeddings(collection, "train")
    opened.passages.get(np.arange(16))
    with refused("missing-embeddings", str(shard.parent), "shard 1"):
        opened.passages.get(np.arange(17))
    shard.unlink()
    with refused("missing-embeddings", str(shard.parent), "shard 1"):
        Distillation(str(tmp_path / "run")).embeddings(collection, "train")


def test_settings_that_cannot_work_are_refused(
    teacher: Path, tokenizer: Any, encoding: Encoding, beir: Path, tmp_path: Path
) -> None:
    with refused("other-width", str(teacher), "16", "32", "distillation.projection=true"):
        _module(tokenizer, encoding, Distillation(str(teacher)))
    for given in (
        [f"distillation.teacher={teacher}", "stage=reranker", "validation.run=null"],
        [f"distillation.teacher={tmp_path / 'none'}"],
    ):
        with refused("config-mistakes", "distillation.teacher"):
            compose(ROOT / "conf", "train", train_arguments(beir, tmp_path / "run", *given))
