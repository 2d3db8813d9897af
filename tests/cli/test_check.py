"""Every mistake in a config is reported, at once, with its place and its remedy."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Protocol

import hydra
import pytest
from omegaconf import OmegaConf
from pydantic import PositiveInt, ValidationError
from tests.cli.conftest import Lines
from tests.cli.small_conf import CONF

from caravan.cli import schema
from caravan.cli.check import Config
from caravan.cli.compose import check, compose
from caravan.cli.signatures import RESERVED, locate, takes
from caravan.data.readers.labelled import Beir
from caravan.encoding import Encoding, write_encoding
from caravan.models.remote_code import FACT


class Shape(Enum):
    ROUND = "round"


class Named(Protocol):
    name: str


@dataclass
class Base:
    size: PositiveInt
    rate: float = 0.1


@dataclass
class Own(Beir):
    extra: int = 0


@dataclass
class Derived(Base):
    flags: tuple[bool, ...] = ()


class Owner:
    """Needs an argument beside one with a dataclass."""

    def __init__(self, needed: int, owned: Base) -> None: ...


class Wide(Derived):
    """Inherits its arguments."""


def typed(
    whole: int = 1,
    text: str = "a",
    switch: bool = True,
    choice: Literal["a", "b"] = "a",
    pair: tuple[float, float] = (0.0, 1.0),
    several: list[str] | str = "a",
    numbers: dict[str, int] | None = None,
    path: Path = Path(),
    shape: Shape = Shape.ROUND,
    ranged: PositiveInt = 1,
    part: Base | None = None,
    named: Named | None = None,
    call: Callable[[int], int] | None = None,
    lost: NoSuchType = None,  # type: ignore[name-defined]  # noqa: F821
    old: int = None,  # type: ignore[assignment]  # noqa: RUF013
    copy: Any = None,
) -> None: ...


def mistakes(**values: Any) -> list[str]:
    """What is wrong with the arguments of `typed`, as the root `Train` has them in `loss`."""
    cfg = OmegaConf.create({"loss": {"_target_": f"{__name__}.typed", **values}})
    found = Config(cfg, schema.Train).mistakes
    return [f"{one.key}: {one.text}" for one in found if one.key.startswith("loss.")]


@pytest.mark.parametrize(
    "values",
    [
        {"whole": 3, "text": "x", "switch": False, "choice": "b", "pair": [1, 0.5]},
        {"several": "a", "numbers": {"a": 1}, "path": "runs/x", "shape": "round"},
        {"several": ["a", "b"], "numbers": None, "old": None, "copy": [{"a": 1}], "lost": "x"},
        {"part": {"_target_": f"{__name__}.Base", "size": 3}, "named": "anything"},
        {"part": "${loss.call}", "call": {"_target_": f"{__name__}.typed", "_partial_": True}},
        {"_convert_": "all", "_recursive_": False},
    ],
)
def test_values_that_fit_their_annotations(values: dict[str, Any]) -> None:
    assert mistakes(**values) == []


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ({"whole": "abc"}, "whole: .*integer, not 'abc'"),
        ({"whole": 1000.0}, "whole: .*integer, not 1000.0"),
        ({"whole": True}, "whole: .*integer, not True"),
        ({"whole": None}, "whole: .*not None"),
        ({"text": 3}, r"text: .*string, not 3; .*\"loss\.text='\.\.\.'\""),
        ({"switch": 3}, "switch: .*not 3"),
        ({"choice": "aa"}, r"choice: .*'a' or 'b', not 'aa'; did you mean a\?"),
        ({"pair": 0.9}, "pair: .*not 0.9"),
        ({"pair": [1, "x"]}, r"pair\[1\]: .*number, not 'x'"),
        ({"several": 3}, "several: .* or .*not 3"),
        ({"several": ["a", 3]}, r"several\[1\]: .*not 3"),
        ({"numbers": {"a": "x"}}, r"numbers\.a: .*integer, not 'x'"),
        ({"pair": [1]}, r"pair\[1\]: .*needs it"),
        ({"shape": "square"}, "shape: .*'round'"),
        ({"ranged": 0}, "ranged: .*greater than 0, not 0"),
        ({"old": "x"}, "old: .*integer, not 'x'"),
        ({"call": {"a": 3}}, "call: .*no _target_"),
        ({"part": {"size": 3}}, "part: .*no _target_"),  # the keys of its class
        ({"owned": {"size": 3}, "_target_": f"{__name__}.Owner", "_partial_": True}, "owned: .*no"),
        ({"_partial_": False, "_target_": f"{__name__}.Base"}, r"size: .*needs it"),
        ({"call": "x"}, "call: .*object, with a _target_, not 'x'"),
        ({"part": {"_target_": f"{__name__}.Base"}}, r"part\.size: .*Base needs it"),
        ({"part": {"_target_": f"{__name__}.Bse"}}, r"part\._target_: .*did you mean .*\.Base\?"),
        ({"_partial_": "x"}, "_partial_: .*not 'x'"),
        ({"hole": 3}, r"hole: .*no setting 'hole'; did you mean loss\.whole\?"),
    ],
)
def test_values_that_do_not_fit(values: dict[str, Any], wanted: str) -> None:
    (line,) = mistakes(**values)
    assert re.fullmatch(rf"loss\.{wanted}.*", line), line


def arguments(target: Any) -> list[str | None]:
    model = takes(target)
    assert model is not None
    names = [field.alias for field in model.model_fields.values()]
    return [name for name in names if name not in RESERVED]


def test_arguments_are_inherited_and_resolved_where_they_are_defined() -> None:
    assert arguments(Wide) == ["size", "rate", "flags"]
    assert arguments(locate("torch.optim.AdamW"))[:2] == ["params", "lr"]
    assert takes(dict) is None
    assert takes(locate("transformers.AutoModel.from_pretrained")) is not None
    source = takes(Own)  # whose module lacks the names in inherited annotations
    assert source is not None
    source.model_validate_json('{"path": "x", "unknown_ids": "count"}')
    with pytest.raises(ValidationError, match="unknown_ids"):
        source.model_validate_json('{"path": "x", "unknown_ids": "cuont"}')


@pytest.mark.parametrize(
    ("target", "hint"),
    [
        ("parts.Prt", "did you mean parts.Part?"),
        ("parts", "no class or function 'parts'"),
        ("torch.nn", "no class or function 'torch.nn'"),
        ("caravan.nope.X", "no class or function 'caravan.nope.X'"),
        ("pytorch_lightning.Traner", "did you mean pytorch_lightning.Trainer?"),
        ("broken_module.X", "broken_module.X cannot be imported: ZeroDivisionError"),
        ("needs_module.X", "No module named 'no_such_thing'"),
    ],
)
def test_a_target_that_cannot_be_located(conf: Path, target: str, hint: str) -> None:
    (conf.parent / "broken_module.py").write_text("1 / 0\n")
    (conf.parent / "needs_module.py").write_text("import no_such_thing\n")
    with pytest.raises(LookupError) as caught:
        locate(target)
    assert hint in str(caught.value)


TOGETHER = (
    {
        "trainer.max_step=5": "trainer.max_step (command line): parts.Trainer has no setting"
        " 'max_step'; did you mean trainer.max_steps?",
        "+trainr.max_steps=5": "no setting 'trainr'; did you mean trainer?",
        "backbone=tiny_lama": "did you mean backbone=tiny_llama?",
        "seed=x": "seed (command line)",
        "loss.part={size:3}": "loss.part (command line): it has no _target_",
        "loss._partail_=true": "did you mean loss._partial_?",
        "peft._target_=parts.Prt": "peft._target_ (command line): there is no class",
        "data=beir": "data.path (conf/data/beir.yaml:2): it is not set (???); give data.path=",
        "encoding.query_template='q:\\n{text}'": "encoding.query_template (command line): it has",
        "encoding.poling=cls": "encoding has no setting 'poling'; did you mean encoding.pooling?",
        "batching.token_budget=0": "greater than 0, not 0",
        "validation.readings=[{segment:best},{query_length:2}]": "validation.readings[1].query_l",
        "gradcache=3": "gradcache (command line)",
        "precision=bf61": "did you mean bf16?",
        "name=": "name (command line)",
        "callbacks.bset.monitor=x": "did you mean callbacks.best?",
        "callbacks.evaluation.measures=[MRR]": "callbacks.evaluation.measures[0] (command line)",
        "optimizer.rate=${nme}": "optimizer.rate (command line): ${nme} has no value",
        "sampler.size=${oc.env:CARAVAN_NO_SUCH}": "'CARAVAN_NO_SUCH' not found",
        "nonsense": "not a setting; write key=value",
        "hydra.job.nam=x": "hydra.job.nam",
        "hydra/launcher=jobli": "there is no hydra/launcher/jobli",
        "~index.k": "index.k (command line): it is needed; give index.k=",
        "~cache_dir": "cache_dir (",
    },
    {
        "seed=???": "seed (command line): it is not set (???)",
        "name=${run_dir}": "${run_dir} has no value",
        "~backbone": "backbone (command line): it has no _target_",
        "encoding.query_length=-1": "encoding.query_length (command line)",
        "encoding.pooling=max": "encoding.pooling (command line): it",
        "batching=3": "batching (command line)",
        "callbacks.evaluation.measures=MRR@10": "evaluation.measures (command line)",
        "++loss=infonce": "write loss=infonce, without +",
        "stage=[1": "cannot be read",
    },
    {
        "seed=99999999999999": "seed (command line)",
        "max_steps=5": "max_steps (command line): the config has no setting 'max_steps'; did you"
        " mean trainer.max_steps?",
        "name=null": "name (command line)",
        "backbone=mistral": "there is no backbone/mistral; there are tiny_llama",
        "index.k=5": "set index.k=10",
        "callbacks.mine.patience=3": "callbacks.mine (command line): it has no _target_",
        "loss._target_=???": "loss._target_ (command line): it is not set (???)",
        "validation.run_depth=1,2": "several values; add -m",
    },
    {
        "+experiment=no": "+experiment=no (command line): write experiment=no, without +",
        "optimizer=[3]": "optimizer=[3] (command line)",
        "loss=3": "loss=3 (command line)",
        "": "write key=value",  # as of an empty variable of the shell
        "name=josé": "name='...'",
        "data.split=~/a": "$HOME",
    },
)


@pytest.mark.parametrize("mistakes", TOGETHER, ids=range(len(TOGETHER)))
def test_all_mistakes_are_reported_at_once(lines: Lines, mistakes: dict[str, str]) -> None:
    found = lines(*mistakes)
    for override, wanted in mistakes.items():
        assert any(wanted in line for line in found), (override, found)
    assert len(found) <= len(mistakes), found


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ("retriever=bm52", "did you mean bm25?"),
        ("retriever=sentence-transformers/all-MiniLM-L6-v2", "python train.py backbone=hf"),
        ("retriever=bm25 reranker=BAAI/bge-reranker-base", "stage=reranker for one that scores"),
        ("retriever=bm25 index.k=100", "set index.k=1000"),
        ("retriever=bm25 measures=[nDCG10]", "measures[0] (command line)"),
        ("retriever=bm25 measures=[]", "measures (command line)"),
        ("retriever=bm25 backbone=tiny_llama", "backbone=tiny_llama (command line)"),
        ("retriever=[]", "retriever (command line)"),
        ("retriever=[2024_1,bm25]", "retriever[0] (command line)"),
        ("retriever=[bm25,bm25] fuse.weights=[1]", "fuse.weights (command line)"),
        ("", "retriever (conf/evaluate.yaml"),
        ("retriever=bm25 reranker=HOME/retriever", "is a retriever; give the folder of"),
        ("retriever=[bm25,HOME/reranker]", "is a reranker; give the folder of a retriever"),
        ("retriever=bm25 reranker=HOME/some.trec", "some.trec is a file; give the model folder"),
        ("retriever=bm25 reranker=HOME/empty", "empty has no caravan.json"),
        (
            "retriever=HOME/remote",
            "needs remote code; review that code, then set trust_remote_code",
        ),
        ("retriever=bm25 rerank.weight=1.5", "rerank.weight (command line)"),
    ],
)
def test_mistakes_in_an_evaluation(
    lines: Lines, tmp_path: Path, overrides: str, wanted: str
) -> None:
    for name, kind in {
        "retriever": "retriever",
        "reranker": "reranker",
        "remote": "retriever",
    }.items():
        (tmp_path / name).mkdir()
        facts = {"weights": "full", FACT: name == "remote"}
        write_encoding(tmp_path / name, Encoding(kind=kind), facts)
    (tmp_path / "empty").mkdir()
    (tmp_path / "some.trec").touch()
    given = overrides.replace("HOME", str(tmp_path)).split()
    (line,) = lines(*given, root="evaluate")
    assert wanted in line
    some = f"retriever=[bm25,{tmp_path}/retriever,{tmp_path}/some.trec]"
    assert lines(some, f"reranker={tmp_path}/reranker", root="evaluate") == []
    assert len(lines("retriever=[runs/none/a,runs/none/b]", root="evaluate")) == 2


def test_mistakes_in_a_file_are_reported_with_file_and_line(conf: Path, lines: Lines) -> None:
    text = """# @package _global_
trainr:
  max_steps: 3
trainer:
  max_step: 4
encoding:
  poling: mean
callbacks:
  best:
    moniter: x
  early_stoping:
    patience: 3
  other: {_target_: parts.Chekpoint}
optimizer: {rate: fast}
batching: {tokens: 3}
name: 2024_11_29
"""
    (conf / "experiment/typos.yaml").write_text(text)
    places = {line.partition("): ")[0] for line in lines("experiment=typos")}
    wanted = {
        "trainr": 2,
        "trainer.max_step": 5,
        "encoding.poling": 7,
        "callbacks.best.moniter": 10,
        "callbacks.early_stoping": 11,
        "callbacks.other._target_": 13,
        "optimizer.rate": 14,
        "batching.tokens": 15,
        "name": 16,
    }
    assert places == {f"{key} (conf/experiment/typos.yaml:{line}" for key, line in wanted.items()}


def test_own_configs_come_from_a_further_folder(conf: Path, lines: Lines, tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("{_target_: parts.Part, size: 7}")
    assert compose(conf, "train", ["loss=mine"], more=tmp_path).loss.size == 7
    more = ("--config-dir", str(tmp_path))
    (line,) = lines(*more, "loss=min")
    assert "did you mean loss=mine" in line
    (tmp_path / "experiment" / "own").mkdir(parents=True)
    (tmp_path / "experiment" / "own" / "first.yaml").write_text("# @package _global_\nseed: 3")
    (line,) = lines(*more, "experiment=own/fist")
    assert "did you mean experiment/own=first" in line
    (tmp_path / "loss" / "mine.yaml").write_text("_target_: parts.Part\nsiz: 7\n")
    (line,) = lines(*more, "loss=mine")
    assert line.startswith(f"loss.siz ({tmp_path}/loss/mine.yaml:2): parts.Part has no setting")


def test_a_notebook_composes_with_hydra_alone() -> None:
    schema.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = hydra.compose("train", ["experiment=quickstart/unadapted"])
    assert check(cfg, schema.Train) == []
    OmegaConf.update(cfg, "trainer.max_step", 3, force_add=True)
    assert [one.key for one in check(cfg, schema.Train)] == ["trainer.max_step"]


def test_unequal_overrides_have_unequal_folders() -> None:
    texts = ["in/a/b", "in/a_b", "in:a;b", "in a b", "IN/A_B", "'in/a_b'", "é", "e\u0301", "日"]
    texts += [part + end for part in ("x" * 300, "日" * 100) for end in "ab"]
    names = [schema.folder_name(f"data.path={one}") for one in texts]
    on_macos = {unicodedata.normalize("NFC", name).casefold() for name in names}
    assert len(on_macos) == len(texts)
    assert max(len(name.encode()) for name in names) <= 120
    assert not any(set("/:;' ") & set(name) for name in names)
    assert schema.folder_name("optimizer.lr=1e-3,seed=1") == "optimizer.lr=1e-3,seed=1"


def test_a_recorded_config_starts_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = OmegaConf.create({"name": "x", "run_dir": "runs/${name}"})
    monkeypatch.delenv(schema.COMMAND, raising=False)
    assert schema.recorded(cfg) == "name: x\nrun_dir: runs/x\n"
    monkeypatch.setenv(schema.COMMAND, "python train.py 'a=[1,\n2]'")
    assert schema.recorded(cfg).startswith("# python train.py 'a=[1, 2]'\nname: x\n")
