"""Mutated overrides and experiment files compose or are answered: never another exception."""

from __future__ import annotations

import contextlib
import random
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from caravan.cli.compose import Composer, preflight
from caravan.errors import InputError

SECONDS = 10
"""The longest that a mutant may take, of the processor: other programs may slow this one."""
OVERRIDES = {
    "train": (
        "name=some/run", "seed=3", "data=beir", "data.path=.", "data.split=dev", "resume=true",
        "encoding.pooling=mean", "encoding.query_template='query: {text}'", "loss.rate=1e-3",
        "trainer.max_steps=5", "loss.options={a:3}", "loss.betas=[0.9,0.99]", "precision=bf16",
        "backbone=tiny_llama", "+callbacks.mine={_target_:parts.Part}", "~callbacks.best",
        "run_dir=runs/${name}", "validation.readings=[{query_length:8}]", "cache_dir=.cache",
    ),
    "evaluate": (
        "retriever=bm25", "name=x", "measures=[MRR@10,R@100]", "index.k=1000", "data=beir",
        "data.path=.", "rerank.depth=10", "rerank.weight=0.3", "collections=null",
        "store=runs/store", "bm25.k1=0.9", "precision=auto", "fuse=rrf", "query_length=32",
    ),
}  # fmt: skip
VALUES = (
    "", "null", "true", "1_0", "1e3", "-0", "inf", "nan", "9" * 5000, "x" * 5000, "é",
    "日本", "~/x", "a b", "a,b", "a=b", "a(1)",
    "[1,[2]]", "{a:1}", "{a:{b:[c]}}", "[" * 80 + "]" * 80, "'", '"',
    "${name}", "${no.such}", "${oc.env:CARAVAN_NO_SUCH}", "${oc.decode:${name}}", "${", "${nope:1}",
    "???", "glob(*)", "range(1,3)", "range(1,1e15)", "interval(0,1)", "choice(a,b)", "choice()",
    "shuffle(1,2)", "tag(a,b)", "extend_list(1)", "\\", "\\,", "#", "&", "\t", "\x1b[31m", "\udcff",
    "parts.Part", "nope.X", "caravan.nope.X", "subprocess.run", "parts", "tiny_llama", ".", "/",
)  # fmt: skip
KEYS = (
    "", "a", "_target_", "name", "data", "data.path", "loss._target_", "loss._partial_", "hydra",
    "hydra.run.dir", "hydra.sweep.dir", "hydra.job.chdir", "hydra/launcher", "experiment", "x.y.z",
    "experiment@a", "backbone@loss", "encoding", "callbacks", "callbacks.best", "0", "é", "a[0]",
)  # fmt: skip
YAML = """\
# @package _global_
defaults:
  - override /data: beir
name: some/run
data: {path: .}
encoding: &c
  pooling: mean
  normalize: true
trainer:
  max_steps: 5
callbacks:
  mine: {_target_: parts.Part, size: 3}
validation: {readings: [{passage_length: 64}, {segment: best}]}
"""
PIECES = (
    "? x", "- y", "*c", "&d [*d]", "<<: *c", "!!python/name:os.system", "!x", "| \n  text", "---",
    "defaults: [experiment/mutant]", "defaults: {a: b}", "defaults: [_self_, nope]", "\t", "'", "{",
    "1: 2", "null: 3", "hydra: {job: {chdir: true}}", "hydra: 3", "[a]: b", "a: {b: {c: {}}}", "%",
    "# @package a.b", "trainer: null", "data: 3", "name: [x]", "name: 2024_11_29", "_target_: x",
    "name: " + "[" * 200 + "]" * 200, "x: " + "9" * 5000, "seed: 1e999", "seed: .nan", "\ufeff",
)  # fmt: skip


def mutated_overrides(root: str, seed: int) -> list[str]:
    """A few overrides, one of them mutated."""
    rng = random.Random(f"{root} {seed}")
    given = rng.sample(OVERRIDES[root], k=rng.randint(1, 2))
    key, _, value = rng.choice(given).partition("=")
    where = rng.randint(0, len(value))
    special = rng.choice("()[]{}:=,;'\"\\$~@#&!?*é \t")
    mutant = rng.choice(
        [
            f"{key}={rng.choice(VALUES)}",
            f"{rng.choice(KEYS)}={rng.choice(VALUES)}",
            f"{rng.choice(KEYS)}={value}",
            f"{key}={value[:where]}{special}{value[where:]}",
            f"{key}={value[:where]}{rng.choice(VALUES)}{value[where:]}",
            f"{rng.choice(['+', '++', '~'])}{key}={value}",
            f"~{key}",
            f"{key}={value[:where]}",
            f"{key}.{rng.choice(KEYS)}={value}",
        ]
    )
    return [*given, mutant]


def mutated_yaml(seed: int) -> bytes:
    """An experiment file with one or two mutations."""
    rng = random.Random(seed)
    lines = YAML.splitlines()
    for _ in range(rng.randint(1, 2)):
        at = rng.randrange(len(lines))
        key = lines[at].partition(":")[0]
        lines[at] = rng.choice(
            [
                rng.choice(PIECES),
                f"{lines[at]}\n{rng.choice(PIECES)}",
                f" {lines[at]}",
                lines[at].strip(),
                f"{lines[at]}\n{lines[at]}",
                f"{key}: {rng.choice(VALUES)}",
                f"{key}: {rng.choice(PIECES)}",
                "",
            ]
        )
    data = bytearray("\n".join(lines).encode(errors="surrogateescape"))
    if rng.random() < 0.3:
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def check(composer: Composer, overrides: list[str]) -> None:
    """Compose and check; what composes resolves, and a name is the text that was typed."""
    started = time.process_time()
    cfg, lines = composer.collect(overrides)
    assert time.process_time() - started < SECONDS
    assert all(line.strip() and "Traceback" not in line for line in lines)
    if lines or cfg is None:
        return
    del cfg.hydra
    OmegaConf.to_container(cfg, resolve=True)
    named = [text for text in overrides if text.startswith("name=")]
    typed = named[-1].partition("=")[2] if named else ""
    if typed.strip().isalnum():
        assert cfg.name == typed.strip()


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 400, 40))
@pytest.mark.parametrize("root", ["train", "evaluate"])
def test_mutated_overrides_are_run_or_answered(conf: Path, root: str, start: int) -> None:
    for seed in range(start, start + 40):
        overrides = mutated_overrides(root, seed)
        with Composer(conf, root) as composer:
            check(composer, overrides)
        started = time.process_time()
        with contextlib.suppress(InputError):
            preflight(["-m", "--", *overrides], conf, root)
        assert time.process_time() - started < SECONDS, overrides


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 400, 40))
def test_mutated_experiments_compose_or_are_answered(conf: Path, start: int) -> None:
    with Composer(conf, "train") as composer:
        for seed in range(start, start + 40):
            (conf / "experiment/mutant.yaml").write_bytes(mutated_yaml(seed))
            check(composer, ["experiment=mutant"])
