"""Rules for values by themselves: ranges, counts, and words out of a few."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import fields

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caravan.cli.checking.annotations import is_int
from caravan.cli.checking.definitions import did_you_mean
from caravan.cli.checking.walk import Mistake
from caravan.cli.rules.asking import (
    is_number,
    listed,
    mappings,
    value,
)
from caravan.encoding import Encoding
from caravan.errors import InputError

ATTENTIONS = (
    *("auto", "sdpa", "eager", "unpadded", "flex_attention"),
    *("flash_attention_2", "flash_attention_3", "flash_attention_4"),
)
PRECISIONS = ("auto", "bf16", "float32")
MEASURES = ("MRR", "nDCG", "R", "MAP", "P")
MEASURE = re.compile(rf"(?!nDCG\()({'|'.join(MEASURES)})(\(rel=[1-9]\d*\))?@[1-9]\d*")
"""What `caravan.retrieval.metrics.parse_measure` takes."""
AT_LEAST = {
    "batching.queries_per_batch": 1,
    "batching.token_budget": 1,
    "batching.num_workers": 0,
    "gradcache.chunk": 1,
    "validation.passages": 1,
    "validation.queries": 1,
    "validation.train_queries": 1,
    "validation.run_depth": 1,
    "stage.words": 1,
    "query_length": 4,
    "passage_length": 4,
    "token_budget": 1,
    "num_workers": 0,
    "block": 1,
    "show": 1,
    "index.k": 1,
    "rerank.depth": 1,
    "rerank.block": 1,
    "rerank.query_length": 4,
    "rerank.passage_length": 4,
    "rerank.segment_words": 1,
    "fuse.k": 0,
    "index.query_chunk": 1,
    "index.passage_chunk": 1,
    "seed": 0,
    "optimizer.warmup_steps": 0,
    "optimizer.eps": 0,
    "optimizer.weight_decay": 0,
    "trainer.gradient_clip_val": 0,
    "backbone.layers": 1,
    "backbone.heads": 1,
    "backbone.hidden_size": 1,
    "backbone.intermediate_size": 1,
    "backbone.vocab_size": 1,
    "peft.rank": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.accumulate_grad_batches": 1,
    "callbacks.last.every_n_steps": 1,
    "trainer.max_steps": -1,
    "trainer.max_epochs": -1,
}
NEEDED = ("index.k", "trainer.max_steps", "trainer._partial_", "stage._partial_")
"""Keys that a run reads itself, although what `_target_` names has a default for them."""

AT_MOST = {"seed": 2**32 - 1}  # of numpy's generators


def encoding_holds(cfg: DictConfig) -> Iterator[Mistake]:
    """Pooling, lengths and templates, as `Encoding` wants them."""
    settings = value(cfg, "encoding")
    if not isinstance(settings, DictConfig):
        return
    try:
        Encoding(
            **{key.name: settings[key.name] for key in fields(Encoding) if key.name in settings}
        )
    except InputError as error:
        for problem in str(error).split("; encoding."):
            setting, _, text = problem.removeprefix("encoding.").partition(" ")
            yield Mistake(("encoding", setting), f"it {text}")
    except (TypeError, OmegaConfBaseException):
        return  # the walk tells those


def numbers_are_in_range(cfg: DictConfig) -> Iterator[Mistake]:
    """Lengths, counts, budgets and seeds."""
    for place, least in AT_LEAST.items():
        given = value(cfg, place)
        if is_number(given) and not given >= least:  # NaN is not
            yield Mistake(tuple(place.split(".")), f"it must be at least {least}, not {given}")
    lengths = value(cfg, "validation.read_lengths")
    for i, length in enumerate(lengths if isinstance(lengths, ListConfig) else ()):
        if is_int(length) and length < AT_LEAST["passage_length"]:
            text = f"it must be at least {AT_LEAST['passage_length']}, not {length}"
            yield Mistake(("validation", "read_lengths", i), text)
    for place, most in AT_MOST.items():
        given = value(cfg, place)
        if is_number(given) and given > most:
            yield Mistake(tuple(place.split(".")), f"it must be at most {most}, not {given}")


def needed_keys_are_there(cfg: DictConfig) -> Iterator[Mistake]:
    """`~index.k` removes a key that the run reads; the run needs `_partial_` to add arguments."""
    for place in NEEDED:
        group, _, key = place.partition(".")
        node = value(cfg, group)
        if not isinstance(node, DictConfig) or OmegaConf.is_missing(node, key):
            continue
        if key not in node.keys():  # noqa: SIM118  `in` denies what is ???
            text = f"it is removed, but needed; leave ~{place} out, or give {place}=<value>"
            yield Mistake((group, key), text)
        elif key == "_partial_" and value(node, key) is not True:
            yield Mistake((group, key), "it must be true: the run gives further arguments")


def heads_divide_the_width(cfg: DictConfig) -> Iterator[Mistake]:
    """Each head has an even width: rotary positions turn pairs of numbers."""
    width, heads = value(cfg, "backbone.hidden_size"), value(cfg, "backbone.heads")
    if is_int(width) and is_int(heads) and min(width, heads) >= 1 and width % (2 * heads):
        text = f"it must be a multiple of twice the heads ({2 * heads}), not {width}"
        yield Mistake(("backbone", "hidden_size"), text)


def optimizer_can_step(cfg: DictConfig) -> Iterator[Mistake]:
    """The learning rate and Adam's decay rates."""
    rate, betas = value(cfg, "optimizer.lr"), value(cfg, "optimizer.betas")
    if is_number(rate) and not 0 < rate < math.inf:
        yield Mistake(("optimizer", "lr"), f"it must be a finite number above 0, not {rate}")
    numbers = isinstance(betas, ListConfig) and all(map(is_number, betas))
    if numbers and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
        text = f"it must be two numbers from 0 to below 1, not {list(betas)}"
        yield Mistake(("optimizer", "betas"), text)


def temperatures_are_positive(cfg: DictConfig) -> Iterator[Mistake]:
    """A loss divides the scores by its temperature."""
    for path, node in mappings(value(cfg, "loss"), ("loss",)):
        for name in ("temperature", "teacher_temperature"):
            given = value(node, name)
            if is_number(given) and not 0 < given < math.inf:
                text = f"it is {given}; it must be above 0 and finite"
                yield Mistake((*path, name), text)


def trainer_can_count(cfg: DictConfig) -> Iterator[Mistake]:
    """How often to validate, and on how many devices: what Lightning tells in a traceback."""
    trainer = value(cfg, "trainer")
    if not isinstance(trainer, DictConfig):
        return
    every, devices = value(trainer, "val_check_interval"), value(trainer, "devices")
    by_batches = "check_val_every_n_epoch" in trainer and trainer.check_val_every_n_epoch is None
    if is_int(every) and every < 1:
        yield Mistake(("trainer", "val_check_interval"), f"it must be at least 1, not {every}")
    elif isinstance(every, float) and by_batches:
        text = f"it counts batches over all epochs: it must be a whole number, not {every}"
        remedy = "; for a part of an epoch set trainer.check_val_every_n_epoch=1"
        yield Mistake(("trainer", "val_check_interval"), text + remedy)
    elif isinstance(every, float) and not 0 < every <= 1:
        text = f"it must be a whole number, or a part of an epoch up to 1.0, not {every}"
        yield Mistake(("trainer", "val_check_interval"), text)
    if devices in (0, "0", []):
        yield Mistake(("trainer", "devices"), "it must be at least 1, or -1 for all")


def attention_is_known(cfg: DictConfig) -> Iterator[Mistake]:
    """transformers knows more kernels than these; what is nearly one of these is a slip."""
    for place in ("backbone.attention", "attention"):
        given = value(cfg, place)
        near = did_you_mean(given, ATTENTIONS) if isinstance(given, str) else None
        if near is not None and given not in ATTENTIONS:
            text = f"no attention is called {given}; did you mean {near}?"
            yield Mistake(tuple(place.split(".")), text)


def precision_is_known(cfg: DictConfig) -> Iterator[Mistake]:
    """The names that `caravan.models.hardware` knows."""
    given = value(cfg, "precision")
    if isinstance(given, str) and given not in PRECISIONS:
        near = did_you_mean(given, PRECISIONS)
        hint = f"; did you mean {near}?" if near else ""
        yield Mistake(("precision",), f"it must be one of {', '.join(PRECISIONS)}{hint}")


def measures_are_known(cfg: DictConfig) -> Iterator[Mistake]:
    """Names such as MRR@10, before hours of encoding and not after them."""
    for path, node in mappings(cfg, ()):
        if isinstance(asked := value(node, "measures"), ListConfig) and not asked:
            yield Mistake((*path, "measures"), "it is empty; write [MRR@10]")
        for i, measure in enumerate(listed(node, "measures")):
            if MEASURE.fullmatch(measure) is None:
                near = did_you_mean(measure.partition("@")[0], MEASURES, cutoff=0.5)
                given = measure.partition("@")[2]
                cutoff = given if given.isdigit() and int(given) else "10"
                hint = f"did you mean {near}@{cutoff}?" if near else "write MRR@10"
                known = ", ".join(f"{name}@k" for name in MEASURES)
                yield Mistake((*path, "measures", i), f"{measure!r} is none of {known}; {hint}")


def reranking_is_possible(cfg: DictConfig) -> Iterator[Mistake]:
    """What `caravan.retrieval.rerank.Reranking` wants."""
    for name, allowed in (("rest", ("drop", "keep")), ("segment", (None, "first", "best"))):
        given = value(cfg, f"rerank.{name}")
        if isinstance(given, str) and given not in allowed:
            near = did_you_mean(given, [text for text in allowed if text])
            hint = f"; did you mean {near}?" if near else ""
            known = ", ".join("null" if text is None else text for text in allowed)
            yield Mistake(("rerank", name), f"it must be one of {known}, not {given}{hint}")
    weight = value(cfg, "rerank.weight")
    if is_number(weight) and not 0 < weight <= 1:
        text = f"it must be above 0 and at most 1, not {weight}"
        yield Mistake(("rerank", "weight"), text)
