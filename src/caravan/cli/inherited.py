"""The encoding that a training takes from the files of its backbone, where the config has null."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from caravan.cli.check import is_class
from caravan.cli.signatures import locate
from caravan.distributed import is_main_process
from caravan.encoding import Encoding, has_instruction
from caravan.errors import InputError
from caravan.models.backbone import INHERITED, FromFolder, Pretrained
from caravan.models.released import Released, released_encoding

log = logging.getLogger(__name__)

MAY_BE_NULL = {*INHERITED, "query_length", "passage_length", "dim"} - {"bidirectional"}
"""Settings of the encoding that are null where the backbone's files state them."""
DEFAULTS = {"retriever": Encoding(), "reranker": Encoding("reranker", passage_length=164)}


def completed(cfg: DictConfig) -> tuple[DictConfig, dict[str, str]]:
    """A config in which values replace the nulls of the encoding, and what could not be read.

    The values are those of the backbone's files (a model folder, or files of
    sentence-transformers), else the defaults. Accepts a config that has not been checked; a model
    folder that cannot be read is reported by the check.

    Returns:
        The config, and for each key that needs a value, the reason why its files give none.
    """
    if not isinstance(cfg.get("encoding"), DictConfig):
        return cfg, {}
    cfg = copy.deepcopy(cfg)
    raw: Any = OmegaConf.to_container(cfg.encoding, resolve=False)
    unset = {name for name in MAY_BE_NULL if raw.get(name, "") is None}
    values: dict[str, Any] = vars(DEFAULTS[_kind(cfg)])
    found = _of_files(cfg)
    if "bidirectional" in found.settings and _given(cfg, "backbone.bidirectional") is None:
        cfg.backbone.bidirectional = found.settings["bidirectional"]
    for name in unset:
        cfg.encoding[name] = found.settings.get(name, values[name])
    templates = [_given(cfg, f"encoding.{side}_template") for side in ("query", "passage")]
    if not any(has_instruction(str(template)) for template in templates):
        for name in unset & {"instruction", "instructions"}:
            cfg.encoding[name] = values[name]
    return cfg, {f"encoding.{name}": text for name, text in found.problems.items() if name in unset}


def _of_files(cfg: DictConfig) -> Released:
    """What the files of the backbone state about the encoding."""
    try:
        target = locate(str(_given(cfg, "backbone._target_")))
    except LookupError:
        return Released({}, {})
    if is_class(target, FromFolder):
        try:
            return Released(FromFolder.inherited(Path(str(_given(cfg, "backbone.folder")))), {})
        except InputError:
            return Released({"bidirectional": False}, {})
    name, revision = _given(cfg, "backbone.name"), _given(cfg, "backbone.revision")
    if not is_class(target, Pretrained) or not isinstance(name, str):
        return Released({}, {})
    return released_encoding(name, revision and str(revision), _kind(cfg))


def _given(cfg: DictConfig, key: str) -> Any:
    """A value of a config; None where there is none."""
    try:
        return OmegaConf.select(cfg, key)
    except OmegaConfBaseException:
        return None


def _kind(cfg: DictConfig) -> str:
    return "reranker" if _given(cfg, "encoding.kind") == "reranker" else "retriever"


def log_encoding(cfg: DictConfig, given: Any) -> None:
    """Log the settings that come from files of sentence-transformers, and those that differ.

    Args:
        given: the encoding of the config before it was completed.
    """
    if "folder" in cfg.backbone or not is_main_process():
        return
    stated, name = _of_files(cfg).settings, cfg.backbone.get("name")
    taken = [f"{key}={value!r}" for key, value in stated.items() if given.get(key) is None]
    differing = [
        f"{key}={cfg.encoding[key]!r}, there {value!r}"
        for key, value in stated.items()
        if cfg.encoding[key] != value
    ]
    if taken:
        log.info("encoding from the files of %s: %s", name, ", ".join(taken))
    if differing:
        text = "the encoding differs from the files of %s: %s"
        log.warning(text, name, "; ".join(differing))
