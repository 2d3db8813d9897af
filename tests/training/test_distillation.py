"""Distillation of embeddings: against a loop in float64, in chunks, on two ranks, resumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.commands import ROOT, curves, evaluate, train, train_arguments
from tests.fitting import (
    Fit,
    KillAt,
    Sgd,
    assert_close,
    assert_loss_and_gradient,
    on_ranks,
    same_weights,
)
from tests.refusals import refused
from tests.tiny import write_beir
from tests.training.test_retriever import batch_of, module_of, naive_loss
from tests.two_ranks import TwoRanks

import caravan
from caravan.cli.compose import compose
from caravan.data.collection import Collection
from caravan.data.mixture import Entry, Mixture, open_parts
from caravan.data.negatives import Negatives
from caravan.data.readers.labelled import Beir
from caravan.encoding import Encoding
from caravan.training.datamodule import DataModule
from caravan.training.distillation import Distillation
from caravan.training.gradcache import GradCache
from caravan.training.losses import InfoNCE

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
    module = module_of(tokenizer, encoding, distillation=distillation)
    teachers = [torch.randn(n, distillation.width).half() for n in (3, 6)]
    batch = batch_of([[1, 2], [3, 4], [5, 6]], [[1], [3], [5]])
    batch = replace(batch, teacher_queries=teachers[0], teacher_passages=teachers[1])
    found = module.training_step(batch, 0)
    sides = []
    students = batch.sides(module.network.embed(batch.texts)[:, :32].double())
    for embedded, wanted in zip(students, teachers, strict=True):
        distances = []
        for student, target in zip(embedded, wanted.double(), strict=True):
            if projection:
                student = module.network.projection.weight.double() @ student
            cosine = student @ target / (student.norm() * target.norm())
            distances.append(1 - cosine if loss == "cosine" else ((student - target) ** 2).sum())
        sides.append(sum(distances) / len(distances))
    expected = scores_weight * naive_loss(module, batch) + 0.7 * (sides[0] + sides[1]) / 2
    assert_loss_and_gradient(module, found, expected)


def test_a_mixed_batch_has_the_embeddings_of_each_collection(
    suite: Path, teacher: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    folder = teacher.parent / "model" / "model"
    given = ("collections=[one,two]", "data.split=train", "measures=[MRR@10]")
    evaluate(suite, tmp_path / "run", folder, *given)
    source = Mixture({name: Entry(Beir(str(suite / name))) for name in ("one", "two")}, mixed=True)
    parts = open_parts(source, tmp_path / "cache", Negatives(number=1))
    module = module_of(tokenizer, encoding, distillation=of_width(tmp_path / "run"))
    training: Any = DataModule(source, parts, module, {}, 9, 64, 0).training
    training.open()
    item = next(iter(training.order(9)))
    batch, model = training[item].packed(), caravan.load(folder)
    passages = batch.teacher_passages.view(len(item), 2, WIDTH)
    assert set(item[:, 0]) == {0, 1}
    for i, (entry, epoch, position) in enumerate(item):
        collection = parts[entry].collection
        asked = collection.queries.get([training.sets[entry].permutation(epoch)[position]])
        read = collection.corpus.get(batch.passage_rows[i].numpy())
        for found, wanted in (
            (batch.teacher_queries[i : i + 1], model.encode_queries([text for _, text in asked])),
            (passages[i], model.encode_passages(read)),
        ):
            np.testing.assert_allclose(found.float().numpy(), wanted, atol=2e-3)


@pytest.mark.slow
def test_chunks_and_two_ranks_train_as_the_whole_batch(
    teacher: Path, fit: Fit, two_ranks: TwoRanks
) -> None:
    settings: dict[str, Any] = {"steps": 3, "optimizer": Sgd(), "queries_per_batch": 7}
    settings |= {"distillation": of_width(teacher, loss="mse"), "loss": InfoNCE(0.05, dims=[8])}
    whole, alone = fit.into("whole"), fit.into("alone")
    expected = whole(**settings).results
    assert expected["train/distance"] > 0
    found = [(alone, alone(**settings, gradcache=GradCache(2)).results)]
    for strategy, cache in (("ddp", None), ("ddp", GradCache(2)), ("fsdp", None)):
        other = fit.into(f"{strategy}{len(found)}")
        one, _ = two_ranks(on_ranks, other, strategy, **settings, gradcache=cache)
        found.append((other, one["metrics"]))
    for other, results in found:
        assert results == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert_close(whole.state()["state_dict"], other.state()["state_dict"])


def test_a_killed_run_resumes_with_the_weights_of_its_projection(teacher: Path, fit: Fit) -> None:
    settings: dict[str, Any] = {"distillation": of_width(teacher), "steps": 6}
    expected = fit.into("whole")(**settings)
    fit(**settings, kill=KillAt(3))
    assert same_weights(fit(**settings, resume=True).weights, expected.weights)
    last, best = (fit.state(name)["state_dict"] for name in ("last.ckpt", "best.ckpt"))
    name = "network.projection.weight"
    assert not torch.equal(last[name], best[name])


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
    first, *_, last = curves(tmp_path / "run")["train/distance"].values()
    assert last < 0.5 * first


def test_embeddings_of_other_data_or_of_several_models_are_refused(
    teacher: Path, beir: Path, collection: Collection, tmp_path: Path
) -> None:
    found = Distillation(str(teacher))
    other = Beir(str(write_beir(tmp_path / "other", seed=1))).collection(tmp_path / "cache")
    with refused("missing-embeddings", str(teacher), other.digest[:12]):
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
    with refused("several-teachers", str(tmp_path / "both")):
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
    read = Distillation(str(tmp_path / "run")).embeddings(collection, "train")
    queries = collection.qrels("train").queries[:1]
    read(queries, np.arange(16))
    with refused("missing-embeddings", str(shard.parent), "shard 1"):
        read(queries, np.arange(17))
    shard.unlink()
    with refused("missing-embeddings", str(shard.parent), "shard 1"):
        Distillation(str(tmp_path / "run")).embeddings(collection, "train")


def test_settings_that_cannot_work_are_refused(
    teacher: Path, tokenizer: Any, encoding: Encoding, beir: Path, tmp_path: Path
) -> None:
    with refused("other-width", str(teacher), "16", "32", "distillation.projection=true"):
        module_of(tokenizer, encoding, distillation=Distillation(str(teacher)))
    given = [f"distillation.teacher={teacher}", "stage=reranker", "validation.run=null"]
    with refused("config-mistakes", "distillation.teacher"):
        compose(ROOT / "conf", "train", train_arguments(beir, tmp_path / "run", *given))
