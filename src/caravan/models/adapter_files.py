"""Saved adapters: found, read, and put on the base that they were trained on.

PEFT loads an adapter onto the wrong base, or without its head, with no more than a warning; what
comes out then embeds or scores at random. Here every weight must find its place, and the base must
have the weights that it had when the adapter was saved. The keys of older versions of PEFT are read
too, and a pickle (.bin) as tensors alone, so that none of its code runs.
"""

from __future__ import annotations

import logging
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from caravan.distributed import is_main_process
from caravan.encoding import adapter_base, read_encoding
from caravan.errors import InputError, reading
from caravan.hub import refuse_unreachable
from caravan.manifests import content_digest, digest
from caravan.models.loading import refuse_not_finite

log = logging.getLogger(__name__)

BASE_WEIGHTS = "base_weights"
"""In an adapter folder's facts: the digest of the weights that the adapter was trained on."""
_Loaded = TypeVar("_Loaded")


def is_adapter(name: str, revision: str | None = None) -> bool:
    """Whether a hub id or folder holds an adapter and not a whole model.

    Raises:
        InputError: the hub cannot be asked.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    refuse_unreachable(name, revision)
    try:
        return find_adapter_config_file(name, revision=revision) is not None
    except (OSError, ValueError):
        return False  # a model that is not available is reported when its weights are loaded


def released_base(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The base model that an adapter names, as (hub id or folder, revision).

    Raises:
        InputError: it names none.
    """
    config = _config(name, {"revision": revision})
    if not config.base_model_name_or_path:
        raise InputError(f"{name}: its adapter_config.json names no base model; write it in")
    return str(config.base_model_name_or_path), config.revision


def load_adapter(
    model: nn.Module, name: str, revision: str | None = None, trainable: bool = False
) -> Any:
    """Put a saved adapter (.safetensors or .bin) on its base; PEFT's model.

    Args:
        name: folder or hub id.
        trainable: whether training goes on with it; else it is frozen.

    Raises:
        InputError: a weight of the adapter or of its head is missing, not used, or misshapen.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    hub: dict[str, Any] = {} if revision is None else {"revision": revision}
    stored = _of_trunk(_keys_of_today(_weights(name, hub)), model)
    config = _config(name, hub)
    with reading(name, "the adapter does not load"):
        embedding = _own_embedding(model, stored)
        if embedding is not None:
            model.resize_token_embeddings(len(stored[embedding]))  # type: ignore[operator]
        if config.task_type == "CAUSAL_LM" and not hasattr(model, "prepare_inputs_for_generation"):
            config.task_type = "SEQ_CLS" if hasattr(model, "score") else "FEATURE_EXTRACTION"
        config.inference_mode = not trainable
        base = config.base_model_name_or_path
        peft = get_peft_model(model, config)
        config.base_model_name_or_path = base  # as it was saved: PEFT writes down the model's name
        wanted = get_peft_model_state_dict(peft, save_embedding_layers=False)
    if embedding is not None and embedding not in wanted:
        wanted[embedding] = model.get_input_embeddings().weight  # type: ignore[operator]
        # The adapter alone is not the model, so a model folder holds whole weights.
        config.base_model_name_or_path = None
    missing, unused = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    wrong = sorted(
        key
        for key in wanted.keys() & stored.keys()
        if wanted[key].shape != stored[key].shape or not stored[key].is_floating_point()
    )
    if missing and not unused and all(".score." in key or ".classifier." in key for key in missing):
        raise InputError(
            f"{name} is an adapter without a head ({', '.join(missing)} missing), so a reranker of"
            " it would score at random; adopt it as a retriever (stage=retriever"
            " trainer.max_steps=0), and train a reranker with init_from that model folder"
        )
    if missing or unused or wrong:
        keys = [f"{key} missing" for key in missing] + [f"{key} not used" for key in unused]
        keys += [f"{key} mis-shaped" for key in wrong]
        also = f", {len(wrong)} mis-shaped" if wrong else ""
        raise InputError(
            f"{name} does not fit {type(model).__name__}: {len(missing)} weights missing,"
            f" {len(unused)} not used{also} ({', '.join(keys)[:300]}); it is of another base or"
            " task"
        )
    with reading(name, "the adapter does not load"):
        set_peft_model_state_dict(peft, stored)
    return peft


def _config(name: str, hub: dict[str, Any]) -> Any:
    """PEFT's config of a folder or hub id."""
    from peft import PeftConfig

    file = Path(name) / "adapter_config.json"
    with reading(file if file.is_file() else name, "the adapter's config does not load"):
        config = PeftConfig.from_pretrained(name, **hub)
        base, revision = config.base_model_name_or_path, config.revision
        if not isinstance(base, str | None) or not isinstance(revision, str | None):
            raise ValueError("base_model_name_or_path and revision are texts")
        return config


def _weights(name: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in an adapter's file; of a pickle tensors are read and nothing is run."""
    from peft.utils import load_peft_weights

    try:
        with reading(name, "the adapter does not load"):
            weights = load_peft_weights(name, device="cpu", **hub)
    except InputError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise InputError(
            f"{name}: its adapter_model.bin is a pickle of more than tensors, which could run code,"
            " and is not opened; take an adapter in safetensors, or from another source"
        ) from None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise InputError(f"{name}: its adapter_model.bin holds no weights by name; save it again")
    refuse_not_finite(name, weights)
    return weights


def _of_trunk(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """An adapter of a whole language model as one of the transformer inside of it.

    Its keys are one level deeper (`base_model.model.model.layers...`), and what it has of the
    output layer plays no part in embeddings or in the score of a head.
    """
    prefix = f"base_model.model.{model.base_model_prefix}."
    if model.base_model is not model:
        if hasattr(model, "score"):
            return {key: w for key, w in weights.items() if not _is_output(key)}
        return weights
    if not any(key.startswith(prefix) for key in weights):
        return weights
    return {
        key.replace(prefix, "base_model.model.", 1): weight
        for key, weight in weights.items()
        if not _is_output(key)
    }


def _is_output(key: str) -> bool:
    return key.startswith("base_model.model.lm_head.") and ".lora_" not in key


def _own_embedding(model: Any, weights: dict[str, Tensor]) -> str | None:
    """The key of the embedding that an adapter brings along, as one of a resized vocabulary does.

    PEFT saves it whole, beside the adapter.
    """
    words = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is words]
    key = f"base_model.model.{names[0]}.weight" if names else ""
    return key if key in weights and weights[key].dim() == 2 else None


def _keys_of_today(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the keys that PEFT gives them now.

    Older adapters may have the wrapper of a head in its key (`score.modules_to_save.weight`), the
    adapter's name (`lora_A.default.weight`), and beside a trained head the one that it replaced
    (`score.original_module.weight`), which has no part in a score.
    """
    renamed: dict[str, Tensor] = {}
    for key, weight in weights.items():
        today = re.sub(r"\.(modules_to_save|default)(?=\.)", "", key)
        renamed[key if today in weights else today] = weight
    replaced = [key for key in renamed if ".original_module." in key]
    for key in replaced:
        if key.replace(".original_module", "") in renamed:
            del renamed[key]
    return renamed


def copy_adapter(peft: Any, name: str) -> int:
    """Copy a saved adapter, with its head if the new one has that too; returns how many weights.

    A retriever's adapter sits on the transformer itself, a reranker's one level deeper.

    Raises:
        InputError: the new adapter has another rank or alpha, or other targets.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    prefix = getattr(peft.get_base_model(), "base_model_prefix", "")

    def short(key: str) -> str:
        for outer in ("base_model.model.", "backbone.", f"{prefix}."):
            key = key.removeprefix(outer)
        return key

    def low_rank(weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        kinds = (".lora_", "trainable_tokens")
        of_adapter = {key: w for key, w in weights.items() if any(kind in key for kind in kinds)}
        return {key: tuple(weight.shape) for key, weight in of_adapter.items()}

    stored = {short(key): weight for key, weight in _weights(name, {}).items()}
    new = get_peft_model_state_dict(peft, save_embedding_layers=False)
    saved, asked = (
        (getattr(config, "lora_alpha", None), getattr(config, "use_rslora", False))
        for config in (_config(name, {}), peft.active_peft_config)
    )
    wanted = low_rank({short(key): weight for key, weight in new.items()})
    if low_rank(stored) != wanted or saved != asked:
        raise InputError(
            f"init_from={name} has an adapter of another rank or alpha, of another kind, on other"
            " layers or with other slots than is asked for; set peft.rank, peft.alpha,"
            " peft.targets, peft.rslora, peft.dora and encoding.slots to its own, or peft=none to"
            " merge it"
        )
    taken = {key: stored[short(key)] for key in new if short(key) in stored}
    set_peft_model_state_dict(peft, {**new, **taken})
    return len(taken)


def weights_digest(base: str, revision: str | None = None) -> str | None:
    """A digest of the weights of a folder, or of a hub id's files in the cache.

    The content counts and not the commit, which changes with a model's card.

    Returns:
        None where no weights lie.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(base)
    if not folder.is_dir():
        config = try_to_load_from_cache(base, "config.json", revision=revision)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return digest([content_digest(path) for path in files]) if files else None


def load_base(folder: Path, load: Callable[..., _Loaded]) -> _Loaded:
    """Load the base of an adapter folder, by a function that is given its name and revision.

    Raises:
        InputError: its weights are not those that the adapter was trained on.
    """
    base, revision = adapter_base(folder)
    recorded = read_encoding(folder)[1].get(BASE_WEIGHTS)
    here = Path(base).is_dir()
    if here:
        _refuse_other_weights(folder, base, revision, recorded)
    loaded = load(base, revision=revision)
    if not here:  # by now its files are in the hub's cache
        _refuse_other_weights(folder, base, revision, recorded)
    return loaded


def _refuse_other_weights(
    folder: Path, base: str, revision: str | None, recorded: str | None
) -> None:
    if recorded is None:
        if is_main_process():
            log.info(
                "%s does not record the weights of its base %s, so they are not compared",
                *(folder, base),
            )
    elif weights_digest(base, revision) != recorded:
        raise InputError(
            f"{folder}: the weights of its base {base} are not those that the adapter was trained"
            " on; put those back, or write the place where they are into"
            f" {folder / 'adapter_config.json'} (base_model_name_or_path)"
        )
