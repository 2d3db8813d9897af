"""Rules for a training: what its parts want of one another."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from string import Formatter
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from caravan.cli.checking.annotations import is_int
from caravan.cli.checking.definitions import did_you_mean
from caravan.cli.checking.walk import Mistake
from caravan.cli.rules.asking import (
    given_or_default,
    listed,
    mappings,
    value,
)
from caravan.cli.rules.values import MEASURE
from caravan.encoding import read_encoding
from caravan.errors import InputError

DISTILLING = ("KL", "MarginMSE")
"""Losses of `caravan.training.losses` that learn from a teacher."""
ENCODERS = (
    *("bert", "modernbert", "roberta", "xlm-roberta", "distilbert", "albert", "electra", "mpnet"),
    *("deberta", "deberta-v2", "deberta-v3", "all-minilm"),
)
"""What encoders are called: types of transformers' models, and beginnings of names on the hub."""
LOGGED = (
    *("train/loss", "train/accuracy", "train/negatives", "train/gradient_norm"),
    *("train/tokens_per_second", "train/padding", "epoch", "step"),
)
"""What can be monitored beside the measures of a validation."""
LOGGERS = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "TensorBoardLogger": "tensorboard"}
"""Lightning's loggers and the packages that they import."""
GIVEN_BY_RUN = (
    *("precision", "strategy", "logger", "callbacks", "plugins", "default_root_dir"),
    *("use_distributed_sampler", "num_sanity_val_steps"),
)
"""What `caravan.training.fit` passes to the Trainer beside conf/trainer."""


def monitored_is_logged(cfg: DictConfig) -> Iterator[Mistake]:
    """Checkpoints and early stopping monitor a value that the stage or the validation logs."""
    callbacks = value(cfg, "callbacks")
    measures = [name for _, node in mappings(callbacks, ()) for name in listed(node, "measures")]
    if not measures or not all(map(MEASURE.fullmatch, measures)):
        return
    logged = [f"val/{name}" for name in measures]
    if value(cfg, "encoding.kind") == "reranker":
        logged += [f"val/first_stage/{name}" for name in measures]
    known = _logs_only_known(cfg)
    for path, node in mappings(callbacks, ("callbacks",)):
        watched = value(node, "monitor")
        if not isinstance(watched, str) or watched in logged:
            continue
        if "@" in watched or (known and watched not in (*LOGGED, *_of_tasks(cfg))):
            there = [*logged, *LOGGED[:1]]
            near = did_you_mean(watched, there)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(there)}"
            yield Mistake((*path, "monitor"), f"nothing logs {watched}; {hint}")


def _of_tasks(cfg: DictConfig) -> list[str]:
    """What adaptation logs of each of its tasks."""
    tasks = str(value(cfg, "stage.tasks") or "").split("+")
    return [f"train/{task}{end}" for task in tasks for end in ("", "_above_floor", "_hits")]


def _logs_only_known(cfg: DictConfig) -> bool:
    """Whether only Caravan and Lightning log values; other code may log any name."""
    nodes = [node for name in ("callbacks", "stage") for _, node in mappings(value(cfg, name), ())]
    targets = [str(value(node, "_target_") or "caravan.") for node in nodes]
    return all(target.startswith(("caravan.", "pytorch_lightning.")) for target in targets)


def best_checkpoints_have_names(cfg: DictConfig) -> Iterator[Mistake]:
    """Several best checkpoints under one name would overwrite each other."""
    best = value(cfg, "callbacks.best")
    if not isinstance(best, DictConfig):
        return
    kept, name = value(best, "save_top_k"), value(best, "filename")
    try:
        list(Formatter().parse(str(name)))
    except ValueError as error:
        yield Mistake(("callbacks", "best", "filename"), f"{name!r} has no name in braces: {error}")
    if is_int(kept) and kept not in (0, 1) and isinstance(name, str) and "{" not in name:
        text = (
            "the checkpoints would overwrite each other; set"
            " \"callbacks.best.filename='best-{step}'\", with both quotes"
        )
        yield Mistake(("callbacks", "best", "save_top_k"), text)


def run_has_a_name(cfg: DictConfig) -> Iterator[Mistake]:
    """An empty name would put a run into the folder of all runs."""
    for key in ("name", "run_dir", "cache_dir", "store"):
        text = value(cfg, key) if key in cfg else None
        if not isinstance(text, str):
            continue
        if not text.strip("/ .") if key == "name" else not text.strip():
            yield Mistake((key,), f"it is empty; give the run a {key} of its own")
        elif not OmegaConf.is_interpolation(cfg, key) and re.search(r"[\x00-\x1f\x7f]", text):
            yield Mistake((key,), f"it holds a control character: {text!r}; leave that out")


def loggers_are_installed(cfg: DictConfig) -> Iterator[Mistake]:
    """Some of Lightning's loggers need a package of their own."""
    loggers = value(cfg, "logger")
    for path, node in mappings(loggers, ("logger",)):
        package = LOGGERS.get(str(value(node, "_target_")).rpartition(".")[2])
        if package is not None and importlib.util.find_spec(package) is None:
            text = f"the package {package} is not installed; pip install {package}"
            yield Mistake((*path, "_target_"), text, "folder")


def training_ends(cfg: DictConfig) -> Iterator[Mistake]:
    """Lightning trains on for ever where neither steps nor epochs nor time are limited."""
    trainer = value(cfg, "trainer")
    if not isinstance(trainer, DictConfig) or value(trainer, "max_time") is not None:
        return
    if value(trainer, "max_steps") == -1 and value(trainer, "max_epochs") == -1:
        yield Mistake(("trainer",), "it would never end; set trainer.max_steps or .max_epochs")


def trainer_leaves_the_rest_to_the_run(cfg: DictConfig) -> Iterator[Mistake]:
    """Arguments of the Trainer that the run gives itself, so that they would change nothing."""
    trainer = value(cfg, "trainer")
    for name in GIVEN_BY_RUN if isinstance(trainer, DictConfig) else ():
        if name in trainer:
            hint = f"set {name} at the root" if name in cfg else "leave it out"
            yield Mistake(("trainer", name), f"the run gives it to the Trainer itself; {hint}")


def search_is_deep_enough(cfg: DictConfig) -> Iterator[Mistake]:
    """No measure looks deeper than the search beside it: R@1000 of 100 results is R@100."""
    for path, node in mappings(cfg, ()):
        index = value(node, "index")
        if not isinstance(index, DictConfig):
            continue
        cutoffs = [re.search(r"@(\d+)$", measure) for measure in listed(node, "measures")]
        depth = max((int(cutoff[1]) for cutoff in cutoffs if cutoff), default=0)
        kept = given_or_default(index, "k")
        if is_int(kept) and kept < depth:
            yield Mistake(
                (*path, "measures"),
                f"they ask for depth {depth} but search keeps k={kept}; set index.k={depth}",
            )


def stage_suits_the_encoding(cfg: DictConfig) -> Iterator[Mistake]:
    """A retriever embeds and a reranker scores: what the model folder says it does."""
    target, kind = value(cfg, "stage._target_"), value(cfg, "encoding.kind")
    if not isinstance(target, str) or not isinstance(kind, str):
        return
    if ".Reranker" in target and kind != "reranker":
        yield Mistake(("encoding", "kind"), "the stage trains a reranker; set it to reranker")
    if ".Retriever" in target and kind != "retriever":
        yield Mistake(("encoding", "kind"), "the stage trains a retriever; set it to retriever")
    if ".Adaptation" in target and kind != "retriever":
        yield Mistake(("encoding", "kind"), "what is adapted embeds; set it to retriever")
    trains = value(cfg, "trainer.max_steps") != 0
    if (
        kind == "reranker"
        and trains
        and "validation" in cfg
        and value(cfg, "validation.run") is None
    ):
        text = "a reranker's validation puts a run's candidates into order; give a run over the dev"
        yield Mistake(
            ("validation", "run"), f"{text} queries (evaluate.py data.split=dev)", "folder"
        )


def both_ways_suits(cfg: DictConfig) -> Iterator[Mistake]:
    """What looks both ways cannot tell what comes next, and cannot begin what looks one way."""
    promised, asked = value(cfg, "encoding.bidirectional"), value(cfg, "backbone.bidirectional")
    place = ("backbone", "bidirectional")
    if promised is not None and promised != (asked or False):
        text = "it is what backbone.bidirectional is; set that"
        yield Mistake(("encoding", "bidirectional"), text)
    if asked is True and ".Adaptation" in str(value(cfg, "stage._target_")):
        text = (
            "LLaRA's tasks are told by a decoder that looks to the left; set it to false, and to"
            " true where a retriever begins with the adapted model"
        )
        yield Mistake(place, text)
    folder = value(cfg, "init_from")
    if asked or not isinstance(folder, str) or not Path(folder).is_dir():
        return
    try:
        encoding, _ = read_encoding(Path(folder))
    except InputError:
        return  # it is told where the folder is opened
    if encoding.bidirectional:
        yield Mistake(place, f"{folder} was trained to look both ways; leave it out", "folder")


def adaptation_wants_a_decoder(cfg: DictConfig) -> Iterator[Mistake]:
    """LLaRA's slots are read by a model that looks to the left; an encoder is no such."""
    if ".Adaptation" not in str(value(cfg, "stage._target_")) or value(cfg, "init_from"):
        return
    name = value(cfg, "backbone.name")
    if isinstance(name, str) and _is_encoder(name):
        text = f"{name} is an encoder, and LLaRA adapts decoders; choose one, such as"
        yield Mistake(("backbone", "name"), f"{text} backbone=qwen3_0_6b or backbone=tiny_llama")


def _is_encoder(name: str) -> bool:
    """By the config of a folder, by its beginning of a model of the hub; others are tried later."""
    if not Path(name).is_dir():
        return name.rpartition("/")[2].lower().startswith(tuple(f"{kind}-" for kind in ENCODERS))
    try:
        config = json.loads((Path(name) / "config.json").read_text("utf-8"))
        return config["model_type"] in ENCODERS and not config.get("is_decoder")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return False  # it is told where the folder is opened


def teacher_is_there(cfg: DictConfig) -> Iterator[Mistake]:
    """A loss that distils learns from the scores of a run."""
    sampler, loss = value(cfg, "sampler"), value(cfg, "loss")
    if not isinstance(sampler, DictConfig) or value(cfg, "sampler.teacher") is not None:
        return
    if value(cfg, "sampler.teacher_margin") is not None:
        text = "it needs the scores of a run; set sampler.teacher"
        yield Mistake(("sampler", "teacher_margin"), text)
    for path, node in mappings(loss, ("loss",)):
        target = str(value(node, "_target_")).rpartition(".")[2]
        if target in DISTILLING or (target == "RankNet" and value(node, "needs_teacher") is True):
            text = f"{target} learns from a teacher's scores; give a run with them: sampler.teacher"
            yield Mistake((*path, "_target_"), text, "folder")


def loss_suits_the_scores(cfg: DictConfig) -> Iterator[Mistake]:
    """A likelihood is a score of its own kind; any other loss compares the scores of a group."""
    reranks = value(cfg, "encoding.kind") == "reranker"
    likely = reranks and value(cfg, "encoding.scoring") == "likelihood"
    found = [
        path
        for path, node in mappings(value(cfg, "loss"), ("loss",))
        if str(value(node, "_target_")).rpartition(".")[2] == "Likelihood"
    ]
    for path in [] if likely else found:
        text = (
            "Likelihood wants scores that are log probabilities; choose stage=reranker_likelihood"
        )
        yield Mistake((*path, "_target_"), text)
    trains = value(cfg, "trainer.max_steps") != 0
    if reranks and trains and not found and value(cfg, "sampler.number") == 0:
        text = "a reranker compares a positive with its negatives; set it to 1 or more"
        yield Mistake(("sampler", "number"), text)


def parts_work_together(cfg: DictConfig) -> Iterator[Mistake]:
    """Parts of training that are right each by itself, and that no run can have at once."""
    stage, chunk = str(value(cfg, "stage._target_")), value(cfg, "gradcache.chunk")
    if ".Adaptation" in stage and chunk is not None:
        text = "the loss of adaptation compares no texts with one another; lower"
        yield Mistake(
            ("gradcache", "chunk"), f"{text} batching.queries_per_batch and leave it null"
        )
    kind = value(cfg, "peft.quant_type")
    sharded = str(value(cfg, "strategy._target_")).endswith("FullySharded")
    if kind is not None and sharded:
        text = "weights of four bits cannot be shared out over ranks; choose strategy=ddp, or"
        yield Mistake(("peft", "quant_type"), f"{text} peft=lora with strategy=fsdp")
    random = str(value(cfg, "backbone._target_")).endswith("TinyLlama")
    if kind is not None and random and value(cfg, "init_from") is None:
        text = "only saved weights are quantised, and this backbone begins from random ones; choose"
        yield Mistake(("peft", "quant_type"), f"{text} another backbone, or peft=lora")
    attention = value(cfg, "backbone.attention")
    likely = value(cfg, "encoding.scoring") == "likelihood"
    if attention == "unpadded" and (".Adaptation" in stage or likely):
        reads = (
            "prompts are read under masks of their own" if not likely else "likelihoods are padded"
        )
        yield Mistake(("backbone", "attention"), f"{reads}; set it to auto or sdpa")
    selective = value(cfg, "backbone.checkpointing") == "selective"
    if selective and value(cfg, "backbone.compile") is True:
        text = "what a compiled layer keeps is torch.compile's choice; set it to true or false"
        yield Mistake(("backbone", "checkpointing"), text)
    if sharded and value(cfg, "backbone.compile") is True:
        text = "ranks that share weights compute with copies of layers that are not compiled"
        yield Mistake(("backbone", "compile"), f"{text}; set it to false, or strategy=ddp")
    on_cpu = value(cfg, "trainer.accelerator") == "cpu"
    if isinstance(attention, str) and attention.startswith("flash") and on_cpu:
        text = f"{attention} runs on GPUs alone; set it to auto or sdpa"
        yield Mistake(("backbone", "attention"), text)
    if value(cfg, "trainer.max_steps") == 0:
        return
    of_training = value(cfg, "validation.train_queries")
    if of_training is not None and value(cfg, "encoding.kind") == "reranker":
        text = "a reranker's candidates are those of dev queries; leave it null, and rerank a run"
        yield Mistake(
            ("validation", "train_queries"), f"{text} over the training queries with evaluate.py"
        )
    devices, nodes = _number_of(value(cfg, "trainer.devices")), value(cfg, "trainer.num_nodes")
    queries = value(cfg, "batching.queries_per_batch")
    if is_int(devices) and is_int(nodes) and is_int(queries) and 0 < queries < devices * nodes:
        text = f"{queries} queries cannot be shared out over {devices * nodes} ranks; set it to"
        yield Mistake(("batching", "queries_per_batch"), f"{text} {devices * nodes} or more")


def _number_of(devices: Any) -> Any:
    """How many devices `trainer.devices` names; None if it leaves that to the machine."""
    if isinstance(devices, ListConfig):
        return len(devices)
    if isinstance(devices, str) and devices.isdigit():
        return int(devices)
    return devices if is_int(devices) and devices > 0 else None
