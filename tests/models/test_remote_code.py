"""Remote code runs where the command allows it, and nowhere else."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import ROOT, evaluate, from_folder, train
from tests.files import ranked
from tests.models.remote_code import MODELING, write_model
from tests.refusals import refused
from tests.tiny import tiny_backbone

import caravan
from caravan.cli.compose import compose
from caravan.data.batch import pack
from caravan.data.collection import Collection
from caravan.encoding import Encoding, write_encoding
from caravan.models import folder
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder
from caravan.models.loading import load_tokenizer

ALLOW = "backbone.trust_remote_code=true"
SHORT = ("trainer.max_steps=2", "callbacks.best=null", "encoding.pooling=mean")
TEXTS = [[5, 6, 7], [8, 9, 10, 11], [12]]
SILENT = """
    @classmethod
    def from_pretrained(cls, name, *_, config=None, **rest):
        return cls(config)
"""


@pytest.fixture(autouse=True)
def _no_prompt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """transformers prompts on standard input without an explicit setting."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question: questions.append(question) or "n")
    yield
    assert not questions


@pytest.fixture(scope="module", autouse=True)
def _copies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies code to, to import it from there."""
    with pytest.MonkeyPatch.context() as patch:
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", modules)
        patch.setattr(sys, "path", [*sys.path])
        yield


@pytest.fixture(scope="module")
def mark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that the models' code makes when it runs."""
    return tmp_path_factory.mktemp("mark") / "it ran"


@pytest.fixture
def base(tokenizer: Any, mark: Path, tmp_path: Path) -> Path:
    mark.unlink(missing_ok=True)
    return write_model(tmp_path / "base", tokenizer, mark)


@pytest.fixture(scope="module", params=["none", "lora"])
def trained(
    request: pytest.FixtureRequest,
    beir: Path,
    tokenizer: Any,
    mark: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The model folder of a training that was allowed to run the code; the first was resumed."""
    home = tmp_path_factory.mktemp(request.param)
    base = write_model(home / "base", tokenizer, mark)
    given = ["backbone=hf", f"backbone.name={base}", ALLOW, *SHORT, f"peft={request.param}"]
    if request.param == "none":
        train(beir, home / "run", *given, "trainer.max_steps=1")
        shutil.rmtree(home / "run" / "model")
        given.append("resume=true")
    train(beir, home / "run", *given)
    return home / "run" / "model"


@pytest.mark.parametrize("part", ["tokenizer", "model", "scorer", "language_model"])
def test_no_part_of_a_model_is_loaded_by_code_that_is_not_allowed(
    part: str, base: Path, mark: Path, tokenizer: Any, tmp_path: Path
) -> None:
    backbone = Pretrained(str(base))
    given = (None, tmp_path) if part == "tokenizer" else (tokenizer,)
    with refused("remote-code", str(base), ALLOW):
        getattr(backbone, part)(*given)
    assert not mark.exists()


def test_a_tokenizers_code_is_refused_too(base: Path, mark: Path) -> None:
    shutil.copyfile(base / "configuration_own.py", base / "tokenization_own.py")
    path = base / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "tokenizer_class": "OwnTokenizer"}
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    path.write_text(json.dumps(settings))
    with refused("remote-code", str(base)):
        load_tokenizer(str(base))
    assert not mark.exists()


@pytest.mark.parametrize("record", [True, None, False])
def test_a_trained_folder_is_refused_without_the_setting_whatever_it_records(
    record: bool | None, trained: Path, mark: Path, tmp_path: Path
) -> None:
    copied = shutil.copytree(trained, tmp_path / "fresh")
    written = json.loads((copied / "caravan.json").read_text())
    assert written["facts"]["own_code"] is True
    written["facts"]["own_code"] = record
    (copied / "caravan.json").write_text(json.dumps(written))
    mark.unlink(missing_ok=True)
    with refused("remote-code", "trust_remote_code=true"):
        caravan.load(copied)
    assert not mark.exists()
    if record:
        caravan.load(copied, trust_remote_code=True)
        whole = written["facts"]["weights"] == "full"
        assert mark.exists() or not whole  # the code is what it is taken for
        assert (copied / "modeling_own.py").is_file() == whole


def test_a_folder_with_code_is_reported_by_the_check_before_a_training_loads_it(
    tmp_path: Path,
) -> None:
    write_encoding(tmp_path, Encoding(), {"weights": "full", "own_code": True})
    given = ["data=beir", "data.path=.", *from_folder(tmp_path)]
    with refused("config-mistakes", f"{tmp_path} ", "backbone.trust_remote_code=true"):
        compose(ROOT / "conf", "train", given)


def test_a_trained_folder_computes_what_its_training_did(
    trained: Path, beir: Path, collection: Collection, tmp_path: Path
) -> None:
    allowed = ("trust_remote_code=true", "precision=float32", "data.split=dev", "measures=[MRR@10]")
    evaluate(beir, tmp_path / "r", trained, *allowed, "index.k=60")
    (validated,) = (trained.parent / "runs").iterdir()
    found = tmp_path / "r" / "runs" / "retriever.dev.trec"
    evaluated = ranked(found, collection)
    for row, before in ranked(validated, collection).items():
        assert {p: evaluated[row][p] for p in before} == pytest.approx(before, abs=2e-3)


def test_a_training_starts_from_a_folder_with_code(
    trained: Path, beir: Path, tmp_path: Path
) -> None:
    given = (*from_folder(trained), ALLOW, "trainer.max_steps=0", "encoding.pooling=mean")
    train(beir, tmp_path / "run", *given)
    one, other = (
        folder.load(path, trust_remote_code=True)[0].embed(pack(TEXTS, 99))
        for path in (trained, tmp_path / "run" / "model")
    )
    torch.testing.assert_close(one, other)
    assert (tmp_path / "run" / "model" / "modeling_own.py").is_file()
    assert "trust_remote_code=True)" in (trained / "README.md").read_text()


def test_a_reranker_of_a_model_with_code_scores_from_its_folder(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    own = replace(encoding, kind="reranker", pooling="cls", append_eos=False)
    scorer = Pretrained(str(base), trust_remote_code=True).scorer(tokenizer)
    model = CrossEncoder(scorer, own).eval()
    folder.save(tmp_path / "m", model, tokenizer, own, {})
    with refused("remote-code", "trust_remote_code=true"):
        folder.load(tmp_path / "m")
    loaded = folder.load(tmp_path / "m", trust_remote_code=True)[0]
    with torch.no_grad():
        torch.testing.assert_close(loaded.score(pack(TEXTS, 99)), model.score(pack(TEXTS, 99)))


def test_what_was_trained_by_transformers_own_classes_is_read_by_them(
    tokenizer: Any, encoding: Encoding, mark: Path, tmp_path: Path
) -> None:
    mark.unlink(missing_ok=True)
    for name in ("base", "model"):
        path = tmp_path / name
        if name == "base":
            tiny_backbone().model(tokenizer).save_pretrained(path)
        else:
            model = BiEncoder(Pretrained(str(tmp_path / "base")).model(tokenizer), encoding)
            folder.save(path, model, tokenizer, encoding, {})
        config = json.loads((path / "config.json").read_text())
        config["auto_map"] = {"AutoModel": "modeling_own.OwnModel"}
        (path / "config.json").write_text(json.dumps(config))
        (path / "modeling_own.py").write_text(f"open({str(mark)!r}, 'w')")
    folder.load(tmp_path / "model", trust_remote_code=True)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("code", "error", "place"),
    [
        (MODELING + SILENT, "model-not-supported", "from_pretrained"),
        ("import nowhere_to_be_found\n" + MODELING, "unreadable", "nowhere_to_be_found"),
    ],
)
def test_code_that_reports_no_missing_weights_or_lacks_a_package_is_refused(
    code: str, error: str, place: str, tokenizer: Any, mark: Path, tmp_path: Path
) -> None:
    base = write_model(tmp_path / error.replace("-", "_"), tokenizer, mark)
    (base / "modeling_own.py").write_text(code)
    with refused(error, str(base), place):
        Pretrained(str(base), trust_remote_code=True).model(tokenizer)


def test_code_of_another_folder_is_not_taken_for_its_own(
    base: Path, tokenizer: Any, mark: Path, tmp_path: Path
) -> None:
    other = write_model(tmp_path / "other" / "base", tokenizer, mark)
    (other / "modeling_own.py").write_text(MODELING.replace("tanh", "sigmoid"))
    Pretrained(str(base), trust_remote_code=True).model(tokenizer)
    with refused("remote-code-conflict", str(other), "modeling_own.py"):
        Pretrained(str(other), trust_remote_code=True).model(tokenizer)
