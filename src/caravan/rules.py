"""Rules for what no single value of a config shows: combinations, ranges, folders.

A rule is a function from the composed config to mistakes; to add one, write it and list it in
RULES. It asks with `value`, which is None for whatever is missing or broken: that is told already.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caravan import suite
from caravan.checking.annotations import is_int
from caravan.checking.definitions import did_you_mean
from caravan.checking.signatures import signature
from caravan.checking.walk import Mistake
from caravan.checking.walk import Path as KeyPath
from caravan.contract import Contract, read_contract
from caravan.errors import InputError

Rule = Callable[[DictConfig], Iterator[Mistake]]
PRECISIONS = ("auto", "bf16", "float32")
MEASURES = ("MRR", "nDCG", "R", "MAP", "P")
MEASURE = re.compile(rf"(?!nDCG\()({'|'.join(MEASURES)})(\(rel=[1-9]\d*\))?@[1-9]\d*")
"""What `caravan.retrieval.metrics.parse_measure` takes."""
DISTILLING = ("KL", "MarginMSE")
"""Losses of `caravan.training.losses` that learn from a teacher."""
OF_HUB = ("HubTexts", "Tevatron", "FlagEmbedding")
"""Readers whose `path` may be a dataset of the Hugging Face hub."""
LIKE_PATHS, LIKE_FILES = ("/", "./", "../", "~"), (".jsonl", ".json", ".gz", ".tsv", ".txt")
GIVEN_BY_RUN = (
    *("precision", "strategy", "logger", "callbacks", "plugins", "default_root_dir"),
    *("use_distributed_sampler", "num_sanity_val_steps"),
)
"""What `caravan.training.run` passes to the Trainer beside conf/trainer."""
AT_LEAST = {
    "batching.queries_per_batch": 1,
    "batching.token_budget": 1,
    "batching.num_workers": 0,
    "gradcache.chunk": 1,
    "validation.passages": 1,
    "validation.queries": 1,
    "validation.train_queries": 1,
    "validation.run_depth": 1,
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
    "backbone.layers": 1,
    "backbone.heads": 1,
    "backbone.hidden_size": 1,
    "backbone.intermediate_size": 1,
    "backbone.vocab_size": 1,
    "peft.rank": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.accumulate_grad_batches": 1,
    "callbacks.resume_point.every_n_steps": 1,
    "trainer.max_steps": -1,
    "trainer.max_epochs": -1,
}


def value(cfg: DictConfig, place: str) -> Any:
    """A value, or None where there is none, it is `???`, or its interpolation is broken."""
    try:
        return OmegaConf.select(cfg, place)
    except OmegaConfBaseException:
        return None


def contract_holds(cfg: DictConfig) -> Iterator[Mistake]:
    """Pooling, temperature, lengths and templates, as `Contract` wants them."""
    settings = value(cfg, "contract")
    if not isinstance(settings, DictConfig):
        return
    try:
        Contract(
            **{key.name: settings[key.name] for key in fields(Contract) if key.name in settings}
        )
    except InputError as error:
        for problem in str(error).split("; contract."):
            setting, _, text = problem.removeprefix("contract.").partition(" ")
            yield Mistake(("contract", setting), f"it {text}")
    except (TypeError, OmegaConfBaseException):
        return  # the walk tells those


def numbers_are_large_enough(cfg: DictConfig) -> Iterator[Mistake]:
    """Lengths, counts and budgets."""
    for place, least in AT_LEAST.items():
        given = value(cfg, place)
        if _is_number(given) and given < least:
            yield Mistake(tuple(place.split(".")), f"it must be at least {least}, not {given}")


def heads_divide_the_width(cfg: DictConfig) -> Iterator[Mistake]:
    """Each head has an even width: rotary positions turn pairs of numbers."""
    width, heads = value(cfg, "backbone.hidden_size"), value(cfg, "backbone.heads")
    if is_int(width) and is_int(heads) and min(width, heads) >= 1 and width % (2 * heads):
        text = f"it must be a multiple of twice the heads ({2 * heads}), not {width}"
        yield Mistake(("backbone", "hidden_size"), text)


def optimizer_can_step(cfg: DictConfig) -> Iterator[Mistake]:
    """The learning rate and Adam's decay rates."""
    rate, betas = value(cfg, "optimizer.lr"), value(cfg, "optimizer.betas")
    if _is_number(rate) and not 0 < rate < math.inf:
        yield Mistake(("optimizer", "lr"), f"it must be a finite number above 0, not {rate}")
    numbers = isinstance(betas, ListConfig) and all(map(_is_number, betas))
    if numbers and (len(betas) != 2 or not all(0 <= beta < 1 for beta in betas)):
        text = f"it must be two numbers from 0 to below 1, not {list(betas)}"
        yield Mistake(("optimizer", "betas"), text)


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


def precision_is_known(cfg: DictConfig) -> Iterator[Mistake]:
    """The names that `caravan.models.hardware` knows."""
    given = value(cfg, "precision")
    if isinstance(given, str) and given not in PRECISIONS:
        near = did_you_mean(given, PRECISIONS)
        hint = f"; did you mean {near}?" if near else ""
        yield Mistake(("precision",), f"it must be one of {', '.join(PRECISIONS)}{hint}")


def measures_are_known(cfg: DictConfig) -> Iterator[Mistake]:
    """Names such as MRR@10, before hours of encoding and not after them."""
    for path, node in _mappings(cfg, ()):
        if isinstance(asked := value(node, "measures"), ListConfig) and not asked:
            yield Mistake((*path, "measures"), "it is empty; write [MRR@10]")
        for i, measure in enumerate(_listed(node, "measures")):
            if MEASURE.fullmatch(measure) is None:
                near = did_you_mean(measure.partition("@")[0], MEASURES, cutoff=0.5)
                given = measure.partition("@")[2]
                cutoff = given if given.isdigit() and int(given) else "10"
                hint = f"did you mean {near}@{cutoff}?" if near else "write MRR@10"
                known = ", ".join(f"{name}@k" for name in MEASURES)
                yield Mistake((*path, "measures", i), f"{measure!r} is none of {known}; {hint}")


def monitored_is_logged(cfg: DictConfig) -> Iterator[Mistake]:
    """Checkpoints and early stopping go by a measure that the validation computes."""
    callbacks = value(cfg, "callbacks")
    measures = [name for _, node in _mappings(callbacks, ()) for name in _listed(node, "measures")]
    if not measures or not all(map(MEASURE.fullmatch, measures)):
        return
    logged = [f"val/{name}" for name in measures]
    for path, node in _mappings(callbacks, ("callbacks",)):
        watched = value(node, "monitor")
        if isinstance(watched, str) and "@" in watched and watched not in logged:
            near = did_you_mean(watched, logged)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(logged)}"
            yield Mistake((*path, "monitor"), f"nothing logs {watched}; {hint}")


def best_checkpoints_have_names(cfg: DictConfig) -> Iterator[Mistake]:
    """Several best checkpoints under one name would overwrite each other."""
    best = value(cfg, "callbacks.best")
    if not isinstance(best, DictConfig):
        return
    kept, name = value(best, "save_top_k"), value(best, "filename")
    if is_int(kept) and kept not in (0, 1) and isinstance(name, str) and "{" not in name:
        text = (
            "the checkpoints would overwrite each other; set"
            " \"callbacks.best.filename='best-{step}'\", with both quotes"
        )
        yield Mistake(("callbacks", "best", "save_top_k"), text)


def run_has_a_name(cfg: DictConfig) -> Iterator[Mistake]:
    """An empty name would put a run into the folder of all runs."""
    name = value(cfg, "name")
    if isinstance(name, str) and not name.strip("/ ."):
        yield Mistake(("name",), "it is empty; give the run a name of its own")


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
    for path, node in _mappings(cfg, ()):
        index = value(node, "index")
        if not isinstance(index, DictConfig):
            continue
        cutoffs = [re.search(r"@(\d+)$", measure) for measure in _listed(node, "measures")]
        depth = max((int(cutoff[1]) for cutoff in cutoffs if cutoff), default=0)
        kept = _given_or_default(index, "k")
        if is_int(kept) and kept < depth:
            yield Mistake(
                (*path, "measures"),
                f"they ask for depth {depth} but search keeps k={kept}; set index.k={depth}",
            )


def stage_suits_the_contract(cfg: DictConfig) -> Iterator[Mistake]:
    """A retriever embeds and a reranker scores: what the model folder says it does."""
    target, kind = value(cfg, "stage._target_"), value(cfg, "contract.kind")
    if not isinstance(target, str) or not isinstance(kind, str):
        return
    if ".Reranker" in target and kind != "reranker":
        yield Mistake(("contract", "kind"), "the stage trains a reranker; set it to reranker")
    if ".Retriever" in target and kind != "retriever":
        yield Mistake(("contract", "kind"), "the stage trains a retriever; set it to retriever")
    if ".Adaptation" in target and kind != "retriever":
        yield Mistake(("contract", "kind"), "what is adapted embeds; set it to retriever")
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
    promised, asked = value(cfg, "contract.bidirectional"), value(cfg, "backbone.bidirectional")
    place = ("backbone", "bidirectional")
    if promised is not None and promised != (asked or False):
        text = "it is what backbone.bidirectional is; set that"
        yield Mistake(("contract", "bidirectional"), text)
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
        contract, _ = read_contract(Path(folder))
    except InputError:
        return  # it is told where the folder is opened
    if contract.bidirectional:
        yield Mistake(place, f"{folder} was trained to look both ways; leave it out", "folder")


def teacher_is_there(cfg: DictConfig) -> Iterator[Mistake]:
    """A loss that distils learns from the scores of a run."""
    sampler, loss = value(cfg, "sampler"), value(cfg, "loss")
    if not isinstance(sampler, DictConfig) or value(cfg, "sampler.teacher") is not None:
        return
    if value(cfg, "sampler.teacher_margin") is not None:
        text = "it needs the scores of a run; set sampler.teacher"
        yield Mistake(("sampler", "teacher_margin"), text)
    for path, node in _mappings(loss, ("loss",)):
        target = str(value(node, "_target_")).rpartition(".")[2]
        if target in DISTILLING or (target == "RankNet" and value(node, "distils") is True):
            text = f"{target} learns from a teacher's scores; give a run with them: sampler.teacher"
            yield Mistake((*path, "_target_"), text, "folder")


def loss_suits_the_scores(cfg: DictConfig) -> Iterator[Mistake]:
    """A likelihood is a score of its own kind; any other loss compares the scores of a group."""
    reranks = value(cfg, "contract.kind") == "reranker"
    likely = reranks and value(cfg, "contract.scoring") == "likelihood"
    found = [
        path
        for path, node in _mappings(value(cfg, "loss"), ("loss",))
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
    likely = value(cfg, "contract.scoring") == "likelihood"
    if attention == "unpadded" and (".Adaptation" in stage or likely):
        reads = (
            "prompts are read under masks of their own" if not likely else "likelihoods are padded"
        )
        yield Mistake(("backbone", "attention"), f"{reads}; set it to auto or sdpa")
    selective = value(cfg, "backbone.checkpointing") == "selective"
    if selective and value(cfg, "backbone.compile") is True:
        text = "what a compiled layer keeps is torch.compile's choice; set it to true or false"
        yield Mistake(("backbone", "checkpointing"), text)
    on_cpu = value(cfg, "trainer.accelerator") == "cpu"
    if isinstance(attention, str) and attention.startswith("flash") and on_cpu:
        text = f"{attention} runs on GPUs alone; set it to auto or sdpa"
        yield Mistake(("backbone", "attention"), text)
    if value(cfg, "trainer.max_steps") == 0:
        return
    of_training = value(cfg, "validation.train_queries")
    if of_training is not None and value(cfg, "contract.kind") == "reranker":
        text = "a reranker's candidates are those of dev queries; leave it null, and rerank a run"
        yield Mistake(
            ("validation", "train_queries"), f"{text} over the training queries with evaluate.py"
        )
    devices, nodes = _number_of(value(cfg, "trainer.devices")), value(cfg, "trainer.num_nodes")
    queries = value(cfg, "batching.queries_per_batch")
    if is_int(devices) and is_int(nodes) and is_int(queries) and 0 < queries < devices * nodes:
        text = f"{queries} queries cannot be shared out over {devices * nodes} ranks; set it to"
        yield Mistake(("batching", "queries_per_batch"), f"{text} {devices * nodes} or more")


def retrievers_are_names(cfg: DictConfig) -> Iterator[Mistake]:
    """bm25, a model folder or a run file, or a list of these."""
    if "retriever" not in cfg or OmegaConf.is_missing(cfg, "retriever"):
        return
    given = value(cfg, "retriever")
    names = list(given) if isinstance(given, ListConfig) else [given]
    if given is None and "model" in cfg:
        text = "nothing says what searches; give a model folder, or retriever=bm25"
        yield Mistake(("model",), text)
    elif not names or not all(isinstance(name, str) for name in names):
        text = f"it must be bm25, a model folder, a run file, or a list of these, not {given}"
        yield Mistake(("retriever",), text)


def questions_are_searched_for(cfg: DictConfig) -> Iterator[Mistake]:
    """A question that is typed is in no run, and one setting says what searches for it."""
    if "model" not in cfg or value(cfg, "retriever") is None:
        return
    for name in _retrievers(cfg):
        if isinstance(name, str) and Path(name).is_file():
            text = f"{name} is a file, and no run knows new questions; give a model folder or bm25"
            yield Mistake(_place_of_retriever(cfg), text, "folder")
    if value(cfg, "model") is not None and not OmegaConf.is_interpolation(cfg, "retriever"):
        text = "retriever is given too, and says what searches; leave one of them out"
        yield Mistake(("model",), text)


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
    if _is_number(weight) and not 0 < weight <= 1:
        text = f"it must be above 0 and at most 1, not {weight}"
        yield Mistake(("rerank", "weight"), text)


def models_suit_their_stage(cfg: DictConfig) -> Iterator[Mistake]:
    """A retriever embeds and a reranker scores, as their folders say; told before any stage."""
    if "reranker" not in cfg:
        return
    places = [("retriever", _place_of_retriever(cfg), name) for name in _retrievers(cfg)]
    for wanted, place, name in [*places, ("reranker", ("reranker",), value(cfg, "reranker"))]:
        if not isinstance(name, str) or not Path(name).exists():
            continue  # told already
        if Path(name).is_file():
            if wanted == "reranker":
                text = f"{name} is a file; give the model folder of a reranker"
                yield Mistake(place, text, "folder")
            continue
        try:
            kind = read_contract(Path(name))[0].kind
        except InputError as error:
            yield Mistake(place, str(error), "folder")
            continue
        if kind != wanted:
            yield Mistake(place, f"{name} is a {kind}; give the folder of a {wanted}", "folder")


def runs_can_be_fused(cfg: DictConfig) -> Iterator[Mistake]:
    """A weight for each run."""
    runs, weights = value(cfg, "retriever"), value(cfg, "fuse.weights")
    fused = isinstance(runs, ListConfig) and len(runs) > 1
    if fused and isinstance(weights, ListConfig) and len(weights) != len(runs):
        text = f"there are {len(weights)} weights for {len(runs)} runs; give one for each"
        yield Mistake(("fuse", "weights"), text)


def collections_are_there(cfg: DictConfig) -> Iterator[Mistake]:
    """Each entry of `collections` is a folder in data.path, or a pattern that finds some."""
    entries = value(cfg, "collections")
    if not isinstance(entries, ListConfig):
        return
    if not entries:
        yield Mistake(("collections",), "it is empty; name folders in data.path, or write null")
    if "path" not in (value(cfg, "data") or {}):
        text = "the data is one collection; choose data=beir data.path=<the folder they lie in>"
        yield Mistake(("collections",), text)
        return
    base, names = suite.asked(cfg)
    if not base.is_dir():
        return  # told already
    for i, name in enumerate(names):
        found = suite.members(base, [name])
        if not found:
            text = f"{base / name} finds no collection (a folder with corpus.jsonl)"
            yield Mistake(("collections", i), text, "folder")
        for member in found:
            if not (base / member.name).is_dir():
                near = did_you_mean(member.name, [path.name for path in base.iterdir()])
                hint = f"; did you mean {near}?" if near else ""
                text = f"there is no folder {base / member.name}{hint}"
                yield Mistake(("collections", i), text, "folder")


def folders_exist(cfg: DictConfig) -> Iterator[Mistake]:
    """The collection, and the models and runs that are read."""
    data = value(cfg, "data")
    places: list[tuple[KeyPath, Any]] = [
        ((*path, "path"), value(node, "path"))
        for path, node in _mappings(data, ("data",))
        if "path" in node and not _is_hub_id(node)
    ]
    places += [((name,), value(cfg, name)) for name in ("init_from", "reranker")]
    searches = _place_of_retriever(cfg)
    of_suite = suite.asked(cfg)[1] and not OmegaConf.is_missing(cfg, "retriever")
    for one in suite.each(cfg).values() if of_suite else [cfg]:
        places += [(searches, name) for name in _retrievers(one) if (searches, name) not in places]
    for path, given in places:
        of_retriever = path == searches
        if not isinstance(given, str) or (of_retriever and given == "bm25"):
            continue
        if not Path(given).exists():
            also = " (nor run file, nor bm25)" if path == ("retriever",) else ""
            near = _nearest(given, "bm25") if of_retriever else _nearest(given)
            hint = f"; did you mean {near}?" if near else ""
            kind = "file or folder" if path[0] == "data" else "folder"
            yield Mistake(path, f"there is no {kind} {given}{also}{hint}", "folder")


RULES: list[Rule] = [
    contract_holds,
    numbers_are_large_enough,
    heads_divide_the_width,
    optimizer_can_step,
    trainer_can_count,
    precision_is_known,
    measures_are_known,
    search_is_deep_enough,
    monitored_is_logged,
    best_checkpoints_have_names,
    run_has_a_name,
    training_ends,
    trainer_leaves_the_rest_to_the_run,
    stage_suits_the_contract,
    both_ways_suits,
    teacher_is_there,
    loss_suits_the_scores,
    parts_work_together,
    retrievers_are_names,
    questions_are_searched_for,
    reranking_is_possible,
    folders_exist,
    collections_are_there,
    models_suit_their_stage,
    runs_can_be_fused,
]


def _number_of(devices: Any) -> Any:
    """How many devices `trainer.devices` names; None if it leaves that to the machine."""
    if isinstance(devices, ListConfig):
        return len(devices)
    if isinstance(devices, str) and devices.isdigit():
        return int(devices)
    return devices if is_int(devices) and devices > 0 else None


def _is_number(given: Any) -> bool:
    return isinstance(given, int | float) and not isinstance(given, bool)


def _mappings(node: Any, path: KeyPath) -> Iterator[tuple[KeyPath, DictConfig]]:
    """A mapping and all mappings in it, those behind interpolations left out."""
    if not isinstance(node, DictConfig):
        return
    yield path, node
    for key in map(str, node):
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            yield from _mappings(node.get(key), (*path, key))


def _listed(node: DictConfig, key: str) -> list[str]:
    """The texts of a list, empty where there is none."""
    given = value(node, key)
    return (
        [text for text in given if isinstance(text, str)] if isinstance(given, ListConfig) else []
    )


def _given_or_default(node: DictConfig, name: str) -> Any:
    """An argument as the config gives it, else the default of what `_target_` names."""
    given = value(node, name)
    if given is not None:
        return given
    try:
        parameter = signature(str(value(node, "_target_"))).parameters[name]
    except LookupError:
        return None
    return getattr(parameter.default, "value", None)


def _retrievers(cfg: DictConfig) -> list[Any]:
    """What `retriever` names."""
    given = value(cfg, "retriever")
    return list(given) if isinstance(given, ListConfig) else [given]


def _place_of_retriever(cfg: DictConfig) -> KeyPath:
    """Where the user has said what searches: search has a shorter word for it."""
    shorter = "model" in cfg and OmegaConf.is_interpolation(cfg, "retriever")
    return ("model",) if shorter else ("retriever",)


def _is_hub_id(node: DictConfig) -> bool:
    """Whether `path` may name a dataset of the hub, and does not look like a path."""
    of_hub = str(value(node, "_target_")).rpartition(".")[2] in OF_HUB
    path = str(value(node, "path"))
    return of_hub and not path.startswith(LIKE_PATHS) and not path.endswith(LIKE_FILES)


def _nearest(path: str, *others: str) -> str | None:
    """The existing path, or one of `others`, that is most like a path that does not exist."""
    near = did_you_mean(path, others)
    if near is not None:
        return near
    above = Path(path)
    while not above.exists() and above != above.parent:
        above, below = above.parent, above.name
    if above.is_dir() and (near := did_you_mean(below, os.listdir(above), cutoff=0.7)):
        return str(above / near)
    return None
