"""Every mistake in a config is told, at once, with place and remedy; no target is imported."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from tests.small_conf import small_conf

from caravan.cli import schema
from caravan.cli.compose import compose
from caravan.cli.preflight import preflight
from caravan.encoding import Encoding, write_encoding
from caravan.errors import InputError


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    sys.path.insert(0, str(home))
    yield small_conf(home)
    sys.path.remove(str(home))


@pytest.fixture
def told(conf: Path) -> Callable[..., list[str]]:
    """The lines that a command line is answered with."""

    def tell(*overrides: str, root: str = "train") -> list[str]:
        try:
            preflight(list(overrides), conf, root, schema.ROOTS[root])
        except InputError as error:
            return str(error).splitlines()[1:]
        return []

    return tell


def write(conf: Path, name: str, text: str) -> str:
    """An experiment file, without the indentation of the test."""
    body = re.sub("^ {8}", "", text.strip("\n"), flags=re.MULTILINE)
    (conf / "experiment" / f"{name}.yaml").write_text("# @package _global_\n" + body + "\n")
    return f"experiment={name}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("folders")
    for kind in ("retriever", "reranker"):
        (home / kind).mkdir()
        write_encoding(home / kind, Encoding(kind=kind), {"weights": "full"})
    (home / "run/model").mkdir(parents=True)
    write_encoding(home / "run/model", Encoding(kind="retriever"), {"weights": "full"})
    (home / "empty").mkdir()
    (home / "some.trec").touch()
    return home


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ("retriever=bm25 reranker=HOME/retriever", "reranker .*is a retriever; give the folder of"),
        ("retriever=[bm25,HOME/reranker]", "retriever .*is a reranker; give the folder of a ret"),
        ("retriever=bm25 reranker=HOME/some.trec", "some.trec is a file; give the model folder"),
        ("retriever=bm25 reranker=HOME/empty", "empty has no caravan.json.*stage=reranker"),
        ("retriever=HOME/run", "run is a run and no model folder; give .*run/model"),
        ("retriever=bm25 rerank.weight=0", "rerank.weight .*above 0 and at most 1, not 0"),
        ("retriever=bm25 rerank.weight=1.5", "rerank.weight .*above 0 and at most 1, not 1.5"),
    ],
)
def test_a_stage_that_cannot_run_is_told_before_the_first_one(
    told: Callable[..., list[str]], folders: Path, overrides: str, wanted: str
) -> None:
    lines = told(*overrides.replace("HOME", str(folders)).split(), root="evaluate")
    assert len(lines) == 1
    assert re.search(wanted, lines[0])


@pytest.mark.parametrize("template", ["{text}{self}{self}", "{self} {text} {self}", "{text}{x}"])
def test_slots_stand_once_and_last(template: str) -> None:
    with pytest.raises(InputError, match="passage_template"):
        Encoding(passage_template=template, slots=1, append_eos=False)


def test_models_and_runs_that_suit_are_not_told(
    told: Callable[..., list[str]], folders: Path
) -> None:
    given = f"[bm25,{folders}/retriever,{folders}/some.trec]"
    assert told(f"retriever={given}", f"reranker={folders}/reranker", root="evaluate") == []


def test_a_right_config_has_no_mistakes(told: Callable[..., list[str]]) -> None:
    assert told() == []
    assert told("retriever=bm25", root="evaluate") == []


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ("trainer.max_step=5", "no argument 'max_step'; did you mean trainer.max_steps?"),
        ("+trainr.max_steps=5", "no setting 'trainr'; did you mean trainer.max_steps?"),
        ("trainr.max_steps=5", "no setting 'trainr'; did you mean trainer.max_steps?"),
        ("backbone=tiny_lama", "did you mean backbone=tiny_llama?"),
        ("backbone=mistral", "no backbone is called mistral; there is only tiny_llama"),
        ("stage=retreiver", "did you mean stage=retriever?"),
        ("trainer.max_steps=abc", "trainer.max_steps (command line): it must be an int, not 'abc'"),
        ("trainer.max_steps=1e3", "it must be an int, not 1000.0; write 1000"),
        ("seed=x", "seed (command line): it must be an int, not 'x'"),
        ("resume=maybe", "it must be true or false, not 'maybe'"),
        ("loss.rat=0.1", "no argument 'rat'; did you mean loss.rate?"),
        ("max_steps=5", "did you mean trainer.max_steps?"),
        ("loss.on=3", "it must be true or false, not 3"),
        ("loss.kind=dep", "it must be one of flat, deep, not 'dep'; did you mean deep?"),
        ("loss.betas=0.9", "it must be a list of numbers, not 0.9"),
        ("loss.options=3", "it must be a mapping or null, not 3"),
        ("loss.options={a:x}", "loss.options.a (command line): it must be an int, not 'x'"),
        ("loss.part={size:3}", "loss.part (command line): it has no _target_"),
        ("loss.part={_target_:parts.Prt}", "no 'Prt' in parts; did you mean parts.Part?"),
        ("loss._target_=part.Part", "no module 'part'; did you mean parts.Part?"),
        ("loss._target_=???", "loss._target_ (command line): it is not set (???)"),
        ("loss._partail_=true", "did you mean loss._partial_?"),
        ("data=beir", "data.path (conf/data/beir.yaml:2): it is not set (???); give data.path="),
        ("seed=???", "seed (command line): it is not set (???)"),
        ("name=${nme}", "name (command line): ${nme} refers to no setting"),
        ("seed=${oc.env:CARAVAN_NO_SUCH}", "'CARAVAN_NO_SUCH' not found"),
        ("encoding.poling=cls", "encoding has no setting 'poling'; did you mean encoding.pooling?"),
        ("encoding.pooling=max", "it is 'max'; it must be one of last, mean, cls"),
        (
            "encoding.query_length=3",
            "encoding.query_length (command line): it is 3; it must be at least",
        ),
        ("encoding.query_length=-1", "it must be at least 4"),
        ("batching.token_budget=0", "it must be at least 1, not 0"),
        ("batching=3", "batching (command line): it must be a mapping, not 3"),
        ("precision=bf61", "did you mean bf16?"),
        ("callbacks.mine.patience=3", "callbacks.mine (command line): it has no _target_"),
        ("callbacks.bset.monitor=x", "did you mean callbacks.best?"),
        ("callbacks.best.monitor=val/MRR@100", "nothing logs val/MRR@100; did you mean val/MRR@10"),
        ("seed=99999999999999", "it must be at most 4294967295, not 99999999999999"),
        ("seed=-1", "it must be at least 0, not -1"),
        ("callbacks.evaluation.measures=[MRR]", "is none of MRR@k"),
        ("callbacks.evaluation.measures=MRR@10", "a list of texts, not 'MRR@10'; write [MRR@10]"),
        ("index.k=5", "they ask for depth 10 but search keeps k=5; set index.k=10"),
        (
            "trainer.precision=bf16",
            "trainer.precision (command line): the run gives it to the Train",
        ),
        ("trainer.max_steps=-1 trainer.max_epochs=-1", "it would never end"),
        ("seed=1,2", "several values; add -m"),
        ("seed", "no setting; write key=value"),
        ("seed=[1", "cannot be read"),
        ("init_from=runs/seed=1/model", "into quotes: \"init_from='runs/seed=1/model'\""),
        ("~backbone", "nothing is chosen; give backbone=<option>"),
        ("+seed=3", "it is set already; leave the + out"),
        ("experiment=nothing", "no experiment is called nothing"),
        ("hydra.job.nam=x", "hydra.job.nam"),
        ("hydra/launcher=jobli", "there is no hydra/launcher/jobli"),
    ],
)
def test_one_mistake_is_told_with_its_remedy(
    overrides: str,
    wanted: str,
    conf: Path,
    told: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(conf.parent)
    (line,) = told(*overrides.split())
    assert wanted in line


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ("retriever=bm52", "there is no folder bm52 (nor run file, nor bm25); did you mean bm25?"),
        (
            "retriever=sentence-transformers/all-MiniLM-L6-v2",
            "python train.py backbone=hf backbone.name=sentence-transformers/all-MiniLM-L6-v2"
            " trainer.max_steps=0 name=all-MiniLM-L6-v2",
        ),
        (
            "retriever=bm25 reranker=BAAI/bge-reranker-base",
            "python train.py stage=reranker backbone=hf backbone.name=BAAI/bge-reranker-base",
        ),
        ("retriever=bm25 index.k=100", "depth 1000 but search keeps k=100; set index.k=1000"),
        ("retriever=bm25 measures=[nDCG10]", "did you mean nDCG@10?"),
        ("retriever=bm25 backbone=tiny_llama", "evaluate has no group 'backbone'"),
        ("", "retriever (conf/evaluate.yaml"),
    ],
)
def test_evaluate_has_a_root_of_its_own(
    overrides: str,
    wanted: str,
    conf: Path,
    told: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(conf.parent)
    (line,) = told(*overrides.split(), root="evaluate")
    assert wanted in line


def test_a_folder_that_is_not_there_is_told_with_its_neighbour(
    told: Callable[..., list[str]], tmp_path: Path
) -> None:
    (tmp_path / "scifact").mkdir()
    wrong = tmp_path / "scifcat"
    assert told("data=beir", f"data.path={tmp_path}/scifact") == []
    hint = f"there is no file or folder {wrong}; did you mean {tmp_path}/scifact?"
    assert told("data=beir", f"data.path={wrong}") == [f"  data.path (command line): {hint}"]


def test_all_mistakes_are_told_at_once(told: Callable[..., list[str]]) -> None:
    lines = told(
        *(
            "trainer.max_step=5",
            "+trainr.x=1",
            "backbone=tiny_lama",
            "seed=x",
            "encoding.pooling=a",
        ),
        *("stage=retreiver", "nonsense", "loss.kind=dep", "data=beir", "peft._target_=parts.Prt"),
    )
    assert len(lines) == 10, lines


def test_a_typo_in_an_experiment_file_is_told_with_file_and_line(
    conf: Path, told: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(conf.parent)
    experiment = write(
        conf,
        "typos",
        """
        trainr:
          max_steps: 3
        trainer:
          max_step: 4
        encoding:
          poling: mean
          query_length: -1
        callbacks:
          best:
            moniter: x
          early_stoping:
            patience: 3
          other: {_target_: parts.Chekpoint}
        optimizer: {rate: fast}
        batching: {tokens: 3}
        """,
    )
    lines = [line.strip() for line in told(experiment)]
    places = [line.partition(":")[0] + ":" + line.split(":")[1].partition(")")[0] for line in lines]
    file = "conf/experiment/typos.yaml"
    assert sorted(places) == sorted(
        f"{key} ({file}:{line}"
        for key, line in {
            "trainr": 2,
            "trainer.max_step": 5,
            "encoding.poling": 7,
            "encoding.query_length": 8,
            "callbacks.best.moniter": 11,
            "callbacks.early_stoping": 12,
            "callbacks.other._target_": 14,
            "optimizer.rate": 15,
            "batching.tokens": 16,
        }.items()
    )


def test_a_file_that_is_not_yaml_is_told_with_file_and_line(
    conf: Path, told: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(conf.parent)
    experiment = write(
        conf,
        "syntax",
        """
        name: x
        trainer:
          max_steps: 3
           max_epochs: 4
        """,
    )
    lines = told(experiment, "+trainr.x=3")
    assert len(lines) == 1
    assert "conf/experiment/syntax.yaml:5: not YAML" in lines[0]


def test_a_wrong_option_in_an_experiment_file_is_told_with_file_and_line(
    conf: Path, told: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(conf.parent)
    experiment = write(
        conf,
        "option",
        """
        defaults:
          - override /backbone: tiny_lama
        """,
    )
    (line,) = told(experiment)
    assert "conf/experiment/option.yaml:3: there is no backbone/tiny_lama" in line
    assert "did you mean tiny_llama?" in line


def test_a_broken_reference_is_told_once_where_it_stands(
    told: Callable[..., list[str]],
) -> None:
    assert len(told("name=${nme}")) == 1  # run_dir refers to name
    assert told("name=${run_dir}")[0].endswith("it refers to itself")


def test_keys_that_the_file_leaves_out_need_no_plus(conf: Path) -> None:
    cfg = compose(conf, "train", ["trainer.val_check_interval=5", "loss.options={a:3}"])
    assert cfg.trainer.val_check_interval == 5
    assert cfg.loss.options == {"a": 3}


def test_the_composed_config_is_typed(conf: Path) -> None:
    cfg = compose(conf, "train", ["name=2024", "validation.run=null"])
    assert (cfg.name, cfg.run_dir) == ("2024", "runs/2024")
    with pytest.raises(InputError, match=r"did you mean trainer\.max_steps"):
        compose(conf, "train", ["trainer.max_step=3"])


def test_own_configs_come_from_a_folder_of_ones_own(conf: Path, tmp_path: Path) -> None:
    (tmp_path / "loss").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("{_target_: parts.Part, size: 7}")
    cfg = compose(conf, "train", ["loss=mine"], more=tmp_path)
    assert cfg.loss.size == 7
    with pytest.raises(InputError, match="did you mean loss=mine"):
        compose(conf, "train", ["loss=min"], more=tmp_path)


def test_check_tells_lines_for_a_config_made_by_hand(conf: Path) -> None:
    cfg = compose(conf, "train", [])
    assert schema.check(cfg) == []
    OmegaConf.update(cfg, "trainer.max_step", 3, force_add=True)
    (line,) = schema.check(cfg)
    assert line.startswith("trainer.max_step: parts.Trainer has no argument 'max_step'")


class TestSweeps:
    def test_every_value_of_a_sweep_is_checked(self, told: Callable[..., list[str]]) -> None:
        lines = told("-m", "seed=1,2,x", "backbone=tiny_llama,tiny_lama", "trainer.max_step=1,2")
        assert [line.partition(" (")[0].strip() for line in lines] == [
            "trainer.max_step",
            "seed",
            "backbone=tiny_lama",
        ]
        assert "[in the job" in lines[1]
        assert "seed=x" in lines[1].partition("[in the job")[2]

    def test_the_file_of_a_sweep_is_checked(
        self, conf: Path, told: Callable[..., list[str]]
    ) -> None:
        (conf / "sweep" / "rates.yaml").write_text(
            "# @package _global_\n"
            "hydra: {sweeper: {params: {optimizer.rate: '0.1,0.2', trainer.max_step: '1,2'}}}\n"
        )
        (line,) = told("-m", "sweep=rates")
        assert "did you mean trainer.max_steps?" in line
        (line,) = told("sweep=rates", "~trainer")[-1:]
        assert "add -m" in line

    def test_folders_of_jobs_are_named_by_what_differs(self, conf: Path) -> None:
        argv = preflight(
            ["-m", "seed=1,2", "name=n", "backbone=tiny_llama"], conf, "train", schema.Train
        )
        assert argv[-2].endswith("exclude_keys=[run_dir,name,backbone]")
        assert argv[-1] == "hydra.sweep.dir='runs/n'"
        assert schema.folder_name("optimizer.lr=1e-3,seed=1") == "optimizer.lr=1e-3,seed=1"
        assert schema.folder_name("data.path=/a/b c").startswith("data.path=_a_b_c~")

    def test_unequal_overrides_have_unequal_folders(self) -> None:
        texts = ["in/a/b", "in/a_b", "in:a;b", "in a b", "IN/A_B", "'in/a_b'", "é", "e\u0301", "日"]
        texts += ["x" * 300 + end for end in "ab"] + ["日" * 100 + end for end in "ab"]
        names = [schema.folder_name(f"data.path={text}") for text in texts]
        on_a_mac = {unicodedata.normalize("NFC", name).casefold() for name in names}
        assert len(on_a_mac) == len(texts)
        assert max(len(name.encode()) for name in names) <= 120
        assert not any(set("/:;' ") & set(name) for name in names)


def test_a_recorded_config_opens_with_the_command_that_was_typed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg = OmegaConf.create({"name": "x", "run_dir": "runs/${name}"})
    monkeypatch.delenv(schema.COMMAND, raising=False)
    assert schema.recorded(cfg) == "name: x\nrun_dir: runs/x\n"
    monkeypatch.setenv(schema.COMMAND, "python train.py 'a=[1,\n2]'")
    head, rest = schema.recorded(cfg).split("\n", 1)
    assert head == "# python train.py 'a=[1, 2]'"
    assert rest == "name: x\nrun_dir: runs/x\n"
