"""The task of `train.py`: build a training run from the config and run it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from caravan.cli.check import Config, Rule, is_class, measures_are_computed, model_folder
from caravan.cli.inherited import completed, log_encoding
from caravan.cli.schema import build, recorded
from caravan.cli.signatures import did_you_mean
from caravan.data.mixture import Mixture
from caravan.data.negatives import Negatives, Sampler
from caravan.data.segments import Reading
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.models import hardware
from caravan.models.backbone import FromFolder
from caravan.training import fit
from caravan.training.adaptation import Adaptation
from caravan.training.distillation import Distillation
from caravan.training.fsdp import FullySharded
from caravan.training.losses import Likelihood, Loss
from caravan.training.reranker import Reranker
from caravan.training.retriever import Retriever

SAME = ("backbone", "peft", "stage", "loss", "optimizer", "sampler", "trainer", "strategy")
"""Keys of the root that `fit.Training` calls the same."""
OF_RUN = (
    "precision", "strategy", "logger", "callbacks", "plugins", "default_root_dir",
    "use_distributed_sampler", "num_sanity_val_steps",
)  # fmt: skip
"""Arguments of the Trainer that a run passes itself."""
AT_LEAST = {
    "max_steps": -1,
    "max_epochs": -1,
    "gradient_clip_val": 0,
    "accumulate_grad_batches": 1,
    "log_every_n_steps": 1,
    "val_check_interval": 0.0001,
}
"""What Lightning refuses late, or not at all."""


def train(cfg: DictConfig) -> float | None:
    """Train with a composed and checked config.

    Returns:
        The monitored metric of the best checkpoint, for sweepers; None without validation.
    """
    given = cfg.encoding
    cfg, unread = completed(cfg)
    if unread:  # in a config that was not checked
        text = "; ".join(f"{key}: {reason}" for key, reason in unread.items())
        raise InputError("config-mistakes", text)
    log_encoding(cfg, given)
    hardware.refuse_attention(cfg.backbone.get("attention", "auto"))
    settings: Any = OmegaConf.to_container(cfg, resolve=True)
    parts = {name: build(cfg, name) for name in (*SAME, "data", "logger", "callbacks")}
    validation = {**settings["validation"], "ignore_identical_ids": cfg.ignore_identical_ids}
    given_teacher = settings["distillation"]["teacher"]
    run = fit.Training(
        **{name: parts[name] for name in SAME},
        **{name: settings[name] for name in ("name", "seed", "resume", "precision", "batching")},
        run_dir=Path(cfg.run_dir),
        cache_dir=Path(cfg.cache_dir),
        source=parts["data"],
        encoding=Encoding(**settings["encoding"]),
        max_steps=cfg.trainer.max_steps,
        loggers=[logger for logger in (parts["logger"] or {}).values() if logger is not None],
        callbacks=[callback for callback in parts["callbacks"].values() if callback is not None],
        train_queries=validation.pop("train_queries"),
        readings=[Reading(**one) for one in validation.pop("readings")],
        validation=validation,
        gradcache=cfg.gradcache.chunk,
        distillation=Distillation(**settings["distillation"]) if given_teacher else None,
        settings=settings,
        config=recorded(cfg),
        facts={**source_facts(parts["data"]), "recipe": recipe(cfg)},
    )
    return fit.train(run)


def source_facts(source: Any) -> dict[str, Any]:
    """The dataset's id on the hub and its language, if the data source knows them."""
    sources = [source]
    if isinstance(source, Mixture):
        sources = [entry.source for entry in source.entries.values()]
    found = {}
    for fact, name in (("datasets", "hub_id"), ("language", "language")):
        values = dict.fromkeys(getattr(one, name, None) for one in sources)
        found[fact] = [value for value in values if value]
    return {fact: values for fact, values in found.items() if values}


def recipe(cfg: DictConfig) -> dict[str, Any]:
    """The hyperparameters for the model card; unset ones are omitted."""

    def given(key: str) -> Any:
        return OmegaConf.select(cfg, key)

    def class_of(key: str) -> str:
        return str(given(f"{key}._target_") or "").rpartition(".")[2]

    losses = range(len(given("loss.losses") or ()))
    accumulated = given("trainer.accumulate_grad_batches") or 1
    rows = {
        "stage": class_of("stage"),
        "loss": " + ".join(class_of(f"loss.losses[{i}]") for i in losses) or class_of("loss"),
        "temperature": given("loss.temperature"),
        "dimensions": ", ".join(map(str, given("loss.dims") or ())),
        "queries an update": cfg.batching.queries_per_batch * accumulated,
        "teacher of embeddings": Path(given("distillation.teacher") or "").name,
        "negatives a query": given("sampler.number"),
        "negatives from": ", ".join(Path(run).name for run in given("sampler.runs") or ()),
        "optimizer": class_of("optimizer"),
        "learning rate": given("optimizer.lr"),
        "warm-up steps": given("optimizer.warmup_steps"),
        "LoRA": None if given("peft.rank") is None else f"rank {given('peft.rank')}",
        "seed": cfg.seed,
    }
    return {name: value for name, value in rows.items() if value not in (None, "")}


def stage_suits_the_encoding(config: Config) -> None:
    """The model folder says what the stage has trained."""
    direction = config.get("backbone.bidirectional") or False
    for kind, stages in (("reranker", [Reranker]), ("retriever", [Retriever, Adaptation])):
        if config.is_a("stage", *stages) and config.get("encoding.kind") != kind:
            config.add("encoding.kind", f"the stage trains a {kind}; set it to {kind}")
    if config.get("encoding.bidirectional") != direction:
        config.add("encoding.bidirectional", "it follows backbone.bidirectional; set that")
    if config.is_a("stage", Adaptation) and direction is True:
        text = "LLaRA adaptation needs causal attention; set it to false here, and to true"
        text += " when a retriever is fine-tuned from the adapted model"
        config.add("backbone.bidirectional", text)
    for side in ("query", "passage"):
        if r"\n" in str(config.get(f"encoding.{side}_template")):
            text = "it has \\n as two characters; give line breaks, in bash as $'\"...\\n...\"'"
            config.add(f"encoding.{side}_template", text)
    if config.is_a("backbone", FromFolder):
        model_folder(config, "backbone.folder", setting="backbone.trust_remote_code")


def reranker_has_candidates(config: Config) -> None:
    """A reranker is validated on a run, and trained on negatives."""
    if not config.is_a("stage", Reranker) or config.get("trainer.max_steps") == 0:
        return
    entries = _entries(config)
    given = [entry.get("validation_run") for entry in entries.values()]
    if config.get("validation.run") is None and (not given or None in given):
        text = "the validation of a reranker needs the candidates of the dev queries; give a run"
        config.add("validation.run", f"{text} (evaluate.py data.split=dev)", "folder")
    if config.get("validation.train_queries") is not None:
        text = "a reranker has candidates for the dev queries only; leave it null, and rerank a run"
        text += " of the training queries with evaluate.py"
        config.add("validation.train_queries", text)
    numbers = {f"data.entries.{name}.number": one.get("number") for name, one in entries.items()}
    for key, number in {"sampler.number": config.get("sampler.number"), **numbers}.items():
        if number == 0 and not _likelihoods(config):
            config.add(
                key, "a reranker compares a positive with its negatives; set it to 1 or more"
            )


def mixture_has_comparisons(config: Config) -> None:
    """Each query of a mixture has something to be compared with."""
    stage = config.get("stage") or {}
    for name, entry in _entries(config).items():
        key, number = f"data.entries.{name}.in_batch", entry.get("number")
        number = config.get("sampler.number") if number is None else number
        if entry.get("in_batch") is True and stage.get("in_batch") is False:
            config.add(key, "stage.in_batch is false; set that to true")
        if entry.get("in_batch") is False and number == 0:
            text = "without negatives of the batch a query needs its own; set number to 1 or more"
            config.add(key, text)


def _entries(config: Config) -> dict[str, dict[str, Any]]:
    """The entries of a mixture; none of another data source."""
    found = config.get("data.entries") if config.is_a("data", Mixture) else None
    entries = found if isinstance(found, dict) else {}
    return {name: entry for name, entry in entries.items() if isinstance(entry, dict)}


def loss_has_its_scores(config: Config) -> None:
    """A loss has a teacher's scores or embeddings, or log probabilities, if it needs them."""
    for key in ("loss.dims", "distillation.teacher"):
        if config.get(key) is not None and not config.is_a("stage", Retriever):
            config.add(key, "only stage=retriever has embeddings; set it to null")
    sampler: Any = config.targets.get(("sampler",))
    by_run = (Sampler.teacher_scores, Negatives.teacher_scores)
    gives_scores = is_class(sampler, Sampler) and sampler.teacher_scores not in by_run
    if config.get("sampler.teacher") is None:
        for key, target, node in () if gives_scores else config.nodes("loss"):
            teaches = node.get("needs_teacher")
            if teaches is None and is_class(target, Loss):
                teaches = target.needs_teacher is True  # a property if it depends on arguments
            if teaches:
                text = "it learns from the scores of a teacher; give a run with them:"
                config.add(f"{key}._target_", f"{text} sampler.teacher", "folder")
    if config.get("encoding.scoring") != "likelihood":
        for key in _likelihoods(config):
            text = "its scores are log probabilities; choose stage=reranker_likelihood"
            config.add(f"{key}._target_", text)


def _likelihoods(config: Config) -> list[str]:
    """The keys of the losses by likelihood, also inside of other losses."""
    return [key for key, target, _ in config.nodes("loss") if is_class(target, Likelihood)]


def parts_work_together(config: Config) -> None:
    """Parts that are valid alone and that no run can combine."""
    adapts, sharded = config.is_a("stage", Adaptation), config.is_a("strategy", FullySharded)
    if adapts and config.get("gradcache.chunk") is not None:
        text = "the adaptation loss compares no texts; lower batching.queries_per_batch instead"
        config.add("gradcache.chunk", text)
    if sharded and config.get("peft.quant_type") is not None:
        text = "4-bit weights cannot be sharded; choose strategy=ddp, or peft=lora"
        config.add("peft.quant_type", text)
    if config.get("peft.bf16_norms") is True:
        text = "set it to false, or choose"
        if config.get("precision") == "float32":
            config.add("peft.bf16_norms", f"the run computes in float32; {text} precision=bf16")
        elif sharded:
            text = f"FSDP computes norms and embeddings in bf16 anyway; {text} strategy=ddp"
            config.add("peft.bf16_norms", text)
    padded = adapts or config.get("encoding.scoring") == "likelihood"
    if padded and config.get("backbone.attention") == "unpadded":
        text = "adaptation and likelihoods need padding; set it to auto or sdpa"
        config.add("backbone.attention", text)
    attention = str(config.get("backbone.attention"))
    if attention.startswith("flash") and config.get("trainer.accelerator") == "cpu":
        text = f"{attention} runs on GPUs only; set it to auto or sdpa"
        config.add("backbone.attention", text)
    if sharded and config.get("backbone.compile") is True:
        text = "FSDP copies the layers without their compilation; set it to false, or choose"
        config.add("backbone.compile", f"{text} strategy=ddp")


def trainer_suits_the_run(config: Config) -> None:
    """Arguments of the Trainer that the run passes itself, or that would never end."""
    if not config.is_a("trainer", Trainer):
        return
    for group in ("stage", "trainer"):
        if config.get(f"{group}._partial_") is not True:
            text = "it must be true, since the run adds arguments; leave the override out"
            config.add(f"{group}._partial_", text)
    for name in OF_RUN:
        if name in config.values["trainer"]:
            hint = f"set {name} at the root" if name in config.values else "leave it out"
            config.add(f"trainer.{name}", f"the run passes it to the Trainer itself; {hint}")
    given = {name: config.get(f"trainer.{name}") for name in (*AT_LEAST, "max_time")}
    for name, least in AT_LEAST.items():
        if given[name] is not None and not given[name] >= least:  # NaN is not
            config.add(f"trainer.{name}", f"it must be at least {least}, not {given[name]}")
    if given["max_steps"] == given["max_epochs"] == -1 and given["max_time"] is None:
        config.add("trainer", "it would never end; set trainer.max_steps or .max_epochs")
    every = given["val_check_interval"]
    if isinstance(every, float) and config.get("trainer.check_val_every_n_epoch") is None:
        text = f"it counts batches over all epochs, so {every} must be a whole number; for a part"
        text += " of an epoch set trainer.check_val_every_n_epoch=1"
        config.add("trainer.val_check_interval", text)
    devices, nodes = config.get("trainer.devices"), config.get("trainer.num_nodes")
    devices = len(devices) if isinstance(devices, list) else devices
    queries = config.get("batching.queries_per_batch")
    if all(str(one).isdigit() for one in (devices, nodes, queries)) and given["max_steps"] != 0:
        ranks = int(devices) * int(nodes)
        if queries < ranks:
            text = f"{queries} queries cannot be split over {ranks} ranks; set it to {ranks}"
            config.add("batching.queries_per_batch", f"{text} or more")


def callbacks_suit_the_run(config: Config) -> None:
    """Monitored values are logged, and the best checkpoints do not overwrite one another."""
    nodes = list(config.nodes("callbacks"))
    measures = [name for _, _, node in nodes for name in node.get("measures") or ()]
    if config.is_a("stage", Reranker):
        measures += [f"first_stage/{name}" for name in measures]
    logged = [f"val/{name}" for name in measures]
    logged += [f"val/{entry}/{name}" for entry in _entries(config) for name in measures]
    for key, target, node in nodes:
        watched = str(config.get(f"{key}.monitor"))
        monitors = is_class(target, EarlyStopping, ModelCheckpoint) and logged
        if monitors and watched.startswith("val/") and watched not in logged:
            near = did_you_mean(watched, logged)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(logged)}"
            config.add(f"{key}.monitor", f"the validation does not log {watched}; {hint}")
        several = node.get("save_top_k", 1) not in (0, 1)
        if is_class(target, ModelCheckpoint) and several and "{" not in node.get("filename", "{"):
            text = f'the checkpoints would overwrite each other; set "{key}.filename='
            config.add(f"{key}.save_top_k", f"{text}'best-{{step}}'\", with both quotes")


RULES: list[Rule] = [
    measures_are_computed,
    stage_suits_the_encoding,
    reranker_has_candidates,
    mixture_has_comparisons,
    loss_has_its_scores,
    parts_work_together,
    trainer_suits_the_run,
    callbacks_suit_the_run,
]
