"""Rules between the objects of a training; see `caravan.cli.rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from omegaconf import ListConfig
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from caravan.cli.check import Checker, Mistake, dotted, is_class
from caravan.cli.rules import of_folder
from caravan.cli.signatures import did_you_mean
from caravan.data.negatives import Negatives, Sampler
from caravan.models.backbone import FromFolder
from caravan.models.tiny_llama import TinyLlama
from caravan.training.adaptation import Adaptation
from caravan.training.fsdp import FullySharded
from caravan.training.losses import Likelihood, Loss
from caravan.training.reranker import Reranker
from caravan.training.retriever import Retriever

PACKAGES = {WandbLogger: "wandb", MLFlowLogger: "mlflow", TensorBoardLogger: "tensorboard"}
OF_RUN = (
    "precision",
    "strategy",
    "logger",
    "callbacks",
    "plugins",
    "default_root_dir",
    "use_distributed_sampler",
    "num_sanity_val_steps",
)
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


def stage_suits_the_encoding(config: Checker) -> Iterator[Mistake]:
    """The model folder says what the stage has trained."""
    kind, place = config.get("encoding.kind"), ("encoding", "kind")
    if config.is_a("stage", Reranker) and kind != "reranker":
        yield Mistake(place, "the stage trains a reranker; set it to reranker")
    if config.is_a("stage", (Retriever, Adaptation)) and kind != "retriever":
        yield Mistake(place, "the stage trains an embedding model; set it to retriever")
    if config.get("encoding.bidirectional") != (config.get("backbone.bidirectional") or False):
        text = "it follows backbone.bidirectional; set that"
        yield Mistake(("encoding", "bidirectional"), text)
    if config.is_a("stage", Adaptation) and config.get("backbone.bidirectional") is True:
        text = "LLaRA adaptation needs causal attention; set it to false here, and to true"
        text += " when a retriever is fine-tuned from the adapted model"
        yield Mistake(("backbone", "bidirectional"), text)


def backbone_has_its_folder(config: Checker) -> Iterator[Mistake]:
    """The model folder is there, and may run the code that it needs."""
    if config.is_a("backbone", FromFolder):
        yield from of_folder(config, ("backbone", "folder"), "", config.get("backbone.folder"))


def reranker_has_candidates(config: Checker) -> Iterator[Mistake]:
    """A reranker is validated on a run, and trained on negatives."""
    if not config.is_a("stage", Reranker) or not trains(config):
        return
    if config.get("validation.run") is None:
        text = "the validation of a reranker needs the candidates of the dev queries; give a run"
        text += " (evaluate.py data.split=dev)"
        yield Mistake(("validation", "run"), text, "folder")
    if config.get("validation.train_queries") is not None:
        text = "a reranker has candidates for the dev queries only; leave it null, and rerank a run"
        text += " of the training queries with evaluate.py"
        yield Mistake(("validation", "train_queries"), text)
    if config.get("sampler.number") == 0 and not any(losses(config, Likelihood)):
        text = "a reranker compares a positive with its negatives; set it to 1 or more"
        yield Mistake(("sampler", "number"), text)


def loss_has_its_scores(config: Checker) -> Iterator[Mistake]:
    """Distillation needs the scores of a teacher; Likelihood needs log probabilities."""
    sampler: Any = config.targets.get(("sampler",))
    by_run = (Sampler.teacher_scores, Negatives.teacher_scores)
    own = isinstance(sampler, type) and Sampler in sampler.__mro__
    gives_scores = own and sampler.teacher_scores not in by_run
    if config.get("sampler.teacher") is None:
        if config.get("sampler.teacher_margin") is not None:
            text = "it needs the scores of a run; set sampler.teacher"
            yield Mistake(("sampler", "teacher_margin"), text)
        for path, target, node in () if gives_scores else config.nodes("loss"):
            teaches = node.get("needs_teacher")
            if teaches is None and isinstance(target, type) and Loss in target.__mro__:
                loss: type[Loss] = target
                teaches = loss.needs_teacher is True  # a property where it depends on arguments
            if teaches:
                text = "it learns from the scores of a teacher; give a run with them:"
                yield Mistake((*path, "_target_"), f"{text} sampler.teacher", "folder")
    if config.get("encoding.scoring") != "likelihood":
        for path in losses(config, Likelihood):
            text = "its scores are log probabilities; choose stage=reranker_likelihood"
            yield Mistake((*path, "_target_"), text)


def parts_work_together(config: Checker) -> Iterator[Mistake]:
    """Parts that are valid alone and that no run can combine."""
    adapts = config.is_a("stage", Adaptation)
    if adapts and config.get("gradcache.chunk") is not None:
        text = "the adaptation loss compares no texts; lower batching.queries_per_batch instead"
        yield Mistake(("gradcache", "chunk"), text)
    sharded = config.is_a("strategy", FullySharded)
    if config.get("peft.quant_type") is not None:
        if sharded:
            text = "4-bit weights cannot be sharded; choose strategy=ddp, or peft=lora"
            yield Mistake(("peft", "quant_type"), text)
        if config.is_a("backbone", TinyLlama):
            text = "only saved weights are quantized, and this backbone has random ones; choose"
            yield Mistake(("peft", "quant_type"), f"{text} another backbone, or peft=lora")
    attention = config.get("backbone.attention")
    if attention == "unpadded" and (adapts or config.get("encoding.scoring") == "likelihood"):
        text = f"{'adaptation' if adapts else 'a likelihood'} needs padding; set it to auto or sdpa"
        yield Mistake(("backbone", "attention"), text)
    if str(attention).startswith("flash") and config.get("trainer.accelerator") == "cpu":
        text = f"{attention} runs on GPUs only; set it to auto or sdpa"
        yield Mistake(("backbone", "attention"), text)
    if config.get("backbone.compile") is True:
        if config.get("backbone.checkpointing") == "selective":
            text = "torch.compile chooses what to keep of a layer; set it to true or false"
            yield Mistake(("backbone", "checkpointing"), text)
        if sharded:
            text = "FSDP copies the layers without their compilation; set it to false, or choose"
            yield Mistake(("backbone", "compile"), f"{text} strategy=ddp")


def trainer_suits_the_run(config: Checker) -> Iterator[Mistake]:
    """Arguments of the Trainer that the run passes itself, or that would never end."""
    if not config.is_a("trainer", Trainer):
        return
    for group in ("stage", "trainer"):
        if config.get(f"{group}._partial_") is not True:
            text = "it must be true, since the run adds arguments; leave the override out"
            yield Mistake((group, "_partial_"), text)
    for name in OF_RUN:
        if name in config.cfg.trainer:
            hint = f"set {name} at the root" if name in config.cfg else "leave it out"
            yield Mistake(("trainer", name), f"the run passes it to the Trainer itself; {hint}")
    for name, least in AT_LEAST.items():
        given = config.get(f"trainer.{name}")
        if isinstance(given, int | float) and not given >= least:  # NaN is not
            text = f"it must be greater than or equal to {least}, not {given}"
            yield Mistake(("trainer", name), text)
    limits = [config.get(f"trainer.{name}") for name in ("max_steps", "max_epochs", "max_time")]
    if limits[:2] == [-1, -1] and limits[2] is None:
        yield Mistake(("trainer",), "it would never end; set trainer.max_steps or .max_epochs")
    every = config.get("trainer.val_check_interval")
    if isinstance(every, float) and config.get("trainer.check_val_every_n_epoch") is None:
        text = f"it counts batches over all epochs: it must be a whole number, not {every}; for a"
        text += " part of an epoch set trainer.check_val_every_n_epoch=1"
        yield Mistake(("trainer", "val_check_interval"), text)
    devices, nodes = config.get("trainer.devices"), config.get("trainer.num_nodes")
    devices = len(devices) if isinstance(devices, ListConfig) else devices
    queries = config.get("batching.queries_per_batch")
    if all(str(one).isdigit() for one in (devices, nodes, queries)) and trains(config):
        ranks = int(devices) * int(nodes)
        if int(queries) < ranks:
            text = (
                f"{queries} queries cannot be split over {ranks} ranks; set it to {ranks} or more"
            )
            yield Mistake(("batching", "queries_per_batch"), text)


def callbacks_suit_the_run(config: Checker) -> Iterator[Mistake]:
    """Monitored values are logged, and the best checkpoints do not overwrite one another."""
    measures: list[Any] = []
    for path, _, _ in config.nodes("callbacks"):
        measures += config.get(dotted((*path, "measures"))) or []
    logged = [f"val/{name}" for name in measures]
    if config.is_a("stage", Reranker):
        logged += [f"val/first_stage/{name}" for name in measures]
    for path, target, node in config.nodes("callbacks"):
        watched = config.get(dotted((*path, "monitor")))
        monitors = is_class(target, (EarlyStopping, ModelCheckpoint)) and isinstance(watched, str)
        if monitors and watched.startswith("val/") and logged and watched not in logged:
            near = did_you_mean(watched, logged)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(logged)}"
            yield Mistake((*path, "monitor"), f"the validation does not log {watched}; {hint}")
        kept, name = node.get("save_top_k", 1), node.get("filename")
        several = isinstance(kept, int) and kept not in (0, 1)
        if is_class(target, ModelCheckpoint) and several and name and "{" not in name:
            text = f'the checkpoints would overwrite each other; set "{dotted(path)}.filename='
            yield Mistake((*path, "save_top_k"), f"{text}'best-{{step}}'\", with both quotes")


def loggers_are_installed(config: Checker) -> Iterator[Mistake]:
    """Some loggers of Lightning need an additional package."""
    for path, target, _ in config.nodes("logger"):
        for kind, package in PACKAGES.items():
            if is_class(target, kind) and find_spec(package) is None:
                text = f"the package {package} is not installed; pip install {package}"
                yield Mistake((*path, "_target_"), text, "folder")


def trains(config: Checker) -> bool:
    """Whether the run updates weights; else it makes a model folder of the backbone as it is."""
    return config.get("trainer.max_steps") != 0


def losses(config: Checker, kind: Any) -> Iterator[tuple[str | int, ...]]:
    """The paths of the losses of some classes, also inside of other losses."""
    return (path for path, target, _ in config.nodes("loss") if is_class(target, kind))


RULES: list[Callable[[Checker], Iterator[Mistake]]] = [
    stage_suits_the_encoding,
    backbone_has_its_folder,
    reranker_has_candidates,
    loss_has_its_scores,
    parts_work_together,
    trainer_suits_the_run,
    callbacks_suit_the_run,
    loggers_are_installed,
]
