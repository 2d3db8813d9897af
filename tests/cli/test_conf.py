"""The files of conf/ compose and pass the checks, as do the commands in their comments."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from tests.cli.conftest import Lines
from tests.cli.small_conf import CONF

from caravan.cli import schema
from caravan.cli.check import Mistake
from caravan.cli.compose import Composer, check, compose, preflight, without_hydra
from caravan.data.negatives import Sampler
from caravan.errors import InputError

COMMAND = re.compile(r"^# *python (train|evaluate)\.py (.+)$", re.M)
FILES = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Program and overrides of the commands in a file's comments."""
    return [(program, shlex.split(line)) for program, line in COMMAND.findall(text)]


def real_mistakes(composer: Composer, overrides: list[str]) -> list[Mistake]:
    """Mistakes, except for `???` and for folders that the user has to give."""
    found = check(without_hydra(composer.compose(overrides)), composer.root)
    return [mistake for mistake in found if mistake.kind == "wrong"]


def command_for(path: Path) -> tuple[str, list[str]]:
    """The root and the overrides that bring a file of conf/ into a config."""
    group, option = "/".join(path.parts[:-1]), path.stem
    shown = commands((CONF / path).read_text())
    if path.parts[0] in ("experiment", "sweep"):
        name = "/".join((*path.parts[1:-1], option))
        assert f"{path.parts[0]}={name}" in shown[0][1], f"{path} starts with another command"
    if shown:
        return shown[0]
    root = "evaluate" if option == "evaluate" or group == "fuse" else "train"
    required = ["retriever=bm25"] if root == "evaluate" else []
    return root, [f"{group}={option}", *required] if group else required


@pytest.mark.parametrize("root", schema.ROOTS)
def test_every_file_of_conf_composes_and_checks(root: str) -> None:
    given = [
        (path, overrides)
        for path in FILES
        for name, overrides in [command_for(path)]
        if name == root
    ]
    assert given
    with Composer(CONF, root) as composer:
        wrong = {
            str(path): found
            for path, overrides in given
            if (found := real_mistakes(composer, [one for one in overrides if one != "-m"]))
        }
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("root", schema.ROOTS)
def test_the_other_commands_in_comments_compose_and_check(root: str) -> None:
    wrong = []
    with Composer(CONF, root) as composer:
        for path in FILES:
            for program, overrides in commands((CONF / path).read_text())[1:]:
                if program == root and "-m" not in overrides:
                    wrong += [(path, one) for one in real_mistakes(composer, overrides)]
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", sorted((CONF / "sweep").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_sweep_starts_with_its_command(path: Path) -> None:
    root, overrides = command_for(path.relative_to(CONF))
    assert overrides[0] == "-m"
    try:
        preflight(overrides, CONF, root)
    except InputError as error:  # runs, models and data that are not here
        found = str(error).splitlines()[1:]
        assert all("there is no" in line or "remote code" in line for line in found), found


def test_the_jobs_of_the_scoring_sweep_differ_in_the_scoring_alone() -> None:
    """The same backbone, batches, updates, texts and lengths; a suffix only for two tokens."""
    own = {"scoring", "append_eos", "positive", "negative", "suffix"}
    jobs: dict[str, Any] = {}
    with Composer(CONF, "train") as composer:
        sweep = composer.compose(["sweep=reranker_scoring"]).hydra.sweeper.params
        for stage in str(sweep.stage).split(","):
            cfg = without_hydra(composer.compose(["sweep=reranker_scoring", f"stage={stage}"]))
            jobs[cfg.encoding.scoring] = OmegaConf.to_container(cfg, resolve=False)
    suffixes = {name: job["encoding"]["suffix"] for name, job in jobs.items()}
    rest = []
    for job in jobs.values():
        job["encoding"] = {key: job["encoding"][key] for key in job["encoding"].keys() - own}
        rest.append(job)
    assert set(jobs) == {"head", "token", "likelihood"}
    assert rest[1:] == rest[:-1]
    assert suffixes["head"] == suffixes["likelihood"] == "" != suffixes["token"]


@pytest.mark.parametrize(
    ("root", "chosen", "wrong", "elsewhere"),
    [
        (
            "train",
            "",
            "optimizer.lr=0 optimizer.betas=[0.9,1.0] optimizer.warmup_steps=-1 optimizer.eps=-1"
            " optimizer.schedule=steps backbone.heads=0 backbone.checkpointing=selected"
            " trainer.max_steps=-5 trainer.gradient_clip_val=-1 trainer.val_check_interval=0"
            " trainer.accumulate_grad_batches=0 trainer.precision=bf16 trainer.devices=64"
            " loss.temperature=0 loss.dims=[64,32] callbacks.resume_point.every_n_steps=0"
            " callbacks.best.monitor=val/nope callbacks.best.save_top_k=3"
            " encoding.bidirectional=true",
            {
                "optimizer.betas": "optimizer.betas[1]",
                "trainer.devices": "batching.queries_per_batch",
            },
        ),
        (
            "train",
            "peft=lora index=exact callbacks=early_stopping",
            "peft.rank=0 index.query_chunk=0 optimizer.lr=nan loss.temperature=inf loss.dims=[]"
            " callbacks.early_stopping.monitor=val/x trainer.val_check_interval=0.5"
            " trainer.max_epochs=-1 trainer.devices='64'",
            {"trainer.max_epochs": "trainer", "trainer.devices": "batching.queries_per_batch"},
        ),
        (
            "train",
            "stage=adaptation",
            "stage.words=0 stage.ebae=-1 stage.lm=inf stage.targets=some gradcache.chunk=4"
            " backbone.bidirectional=true backbone.attention=unpadded",
            {},
        ),
        (
            "train",
            "stage=reranker",
            "sampler.number=0 validation.run=null validation.train_queries=5 loss.dims=[32]"
            " encoding.kind=retriever",
            {},
        ),
        (
            "evaluate",
            "retriever=bm25 fuse=weighted",
            "bm25.k1=-1 bm25.b=nan bm25.method=bm25 bm25.tokenizer=letters rerank.weight=0"
            " rerank.segment=last fuse.normalise=softmax",
            {},
        ),
    ],
)
def test_settings_that_no_run_can_have(
    lines: Lines, root: str, chosen: str, wrong: str, elsewhere: dict[str, str]
) -> None:
    keys = [text.partition("=")[0] for text in wrong.split()]
    found = lines(*chosen.split(), *wrong.split(), root=root, conf=CONF)
    places = [line.partition(" (")[0] for line in found]
    assert sorted(places) == sorted(elsewhere.get(key, key) for key in keys)


@pytest.mark.parametrize(
    ("overrides", "wanted"),
    [
        ("optimizer._target_=caravan.training.optim.AdamV", "caravan.training.optim.AdamW"),
        ("callbacks.best.moniter=val/MRR@10", "callbacks.best.monitor"),
        ("backbone=from_folder backbone.folder=nowhere", "there is no folder nowhere"),
        ("loss=kl", "sampler.teacher"),
        ("loss=likelihood", "choose stage=reranker_likelihood"),
        ("stage=reranker_likelihood validation.run=src encoding.pair=pair", "encoding.pair"),
        ("trainer.devices=8 trainer.num_nodes=8", "set it to 64 or more"),
        ("peft=qlora backbone=qwen3_0_6b strategy=fsdp", "strategy=ddp"),
        ("backbone.compile=true strategy=fsdp", "strategy=ddp"),
        ("peft=lora peft.bf16_norms=true precision=bf16 strategy=fsdp", "strategy=ddp"),
        ("peft=lora peft.bf16_norms=true precision=float32", "precision=bf16"),
    ],
)
def test_parts_that_no_run_can_have(lines: Lines, overrides: str, wanted: str) -> None:
    (line,) = lines(*overrides.split(), conf=CONF)
    assert wanted in line


@pytest.mark.parametrize(
    "overrides",
    [
        "trainer.val_check_interval=0.5 trainer.check_val_every_n_epoch=1",
        "trainer.devices=-1",
        "trainer.devices=auto",
        "trainer.devices=64 trainer.max_steps=0",
        "optimizer.warmup_steps=0 optimizer.betas=[0,0.95]",
        "backbone.attention=unpadded",
        "callbacks.best.monitor=train/loss callbacks.best.mode=min",
        "callbacks.best.monitor=mine/score +callbacks.mine._target_=tests.fitting.Losses",
        "stage=adaptation peft=none ~loss",
        "peft=qlora backbone=qwen3_0_6b strategy=ddp",
        "experiment=llara/adapt",
        "logger=csv",
    ],
)
def test_parts_that_work_together(lines: Lines, overrides: str) -> None:
    assert lines(*overrides.split(), conf=CONF) == []


class Scoring(Sampler):
    """A sampler that gives scores."""

    number = 1

    def teacher_scores(self, query_row: int, rows: np.ndarray) -> np.ndarray:
        return np.zeros(len(rows), np.float32)


def test_a_sampler_may_give_a_teachers_scores_itself(lines: Lines) -> None:
    own = ("~sampler", f"+sampler._target_={__name__}.Scoring")
    assert lines("loss=kl", *own, conf=CONF) == []


def test_a_backbone_brings_its_encoding() -> None:
    cfg = compose(CONF, "train", ["backbone=minilm"])
    assert (cfg.encoding.pooling, cfg.encoding.append_eos) == ("mean", False)
    cfg = compose(CONF, "train", ["backbone=minilm", "encoding.pooling=cls"])
    assert cfg.encoding.pooling == "cls"
    for backbone in ("tiny_llama", "smollm2_135m", "minilm"):
        cfg = compose(CONF, "train", [f"backbone={backbone}", "backbone.bidirectional=true"])
        assert cfg.encoding.bidirectional is True
