"""LoRA adapters: which layers have them, and saved adapters on their base.

PEFT loads an adapter onto the wrong base, or without its head, with no more than a warning, and the
model then embeds or scores at random. Here every weight must find its place. Keys of older PEFT
versions are read too, and a pickle (.bin) as tensors alone, so that none of its code runs.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from caravan.errors import InputError, first_line, reading
from caravan.hub import refuse_unreachable
from caravan.models.bidirectional import has_adapter
from caravan.models.loading import check_finite, mismatches


class LoRA:
    """Low-rank adapters (arXiv 2106.09685) on a frozen backbone; defaults are RepLLaMA's.

    Args:
        rank, alpha, dropout: as in PEFT.
        targets: the linear layers of the blocks: "all-linear", those of "attention" or of the
            "mlp", or names.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
        dora: train the norm of each weight's columns separately (arXiv 2402.09353).
        quant_type: "nf4" or "fp4" quantizes the base's linear layers to four bits while loading
            (QLoRA, arXiv 2305.14314); None does not. It is saved on the unquantized base.
        double_quant: quantize the scales too.

    Raises:
        InputError: If quant_type is unknown.
    """

    def __init__(
        self,
        rank: PositiveInt = 32,
        alpha: int = 64,
        dropout: float = 0.1,
        targets: list[str] | str = "all-linear",
        rslora: bool = False,
        dora: bool = False,
        quant_type: str | None = None,
        double_quant: bool = True,
    ) -> None:
        if quant_type not in (None, "nf4", "fp4"):
            text = f"peft.quant_type is {quant_type!r}; it must be null, nf4 or fp4"
            raise InputError("unknown-quantization", text)
        self.settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
        self.settings.update(use_rslora=rslora, use_dora=dora)
        self.targets = targets
        self.quant_type, self.double_quant = quant_type, double_quant

    def quantization(self) -> Any:
        """transformers' config of a base quantized to four bits, computing in bf16; or None."""
        from transformers import BitsAndBytesConfig

        if self.quant_type is None:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=self.double_quant,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )

    def apply(self, model: Any, rows: Sequence[int] = ()) -> nn.Module:
        """Freeze the model and add adapters, which are trained with a reranker's head.

        Args:
            rows: of the input embedding, trained too: tokens that the model has never seen.

        Raises:
            InputError: If the model has an adapter already, or no such layers.
        """
        from peft import LoraConfig, TaskType, get_peft_model

        if has_adapter(model):
            raise InputError(
                "adapter-on-adapter",
                "backbone.name is an adapter already; train it with peft=none, or adopt it"
                " (trainer.max_steps=0) and start from that model folder (backbone=from_folder)",
            )
        task = TaskType.FEATURE_EXTRACTION
        if _is_scorer(model):
            task = TaskType.SEQ_CLS
        elif hasattr(model, "get_output_embeddings") and model.get_output_embeddings() is not None:
            task = TaskType.CAUSAL_LM
        config = LoraConfig(
            task_type=task,
            target_modules=_of_group(model, self.targets),
            revision=getattr(model, "revision", None),  # the adapter finds the same base again
            trainable_token_indices=list(rows) or None,
            **self.settings,
        )
        state = torch.get_rng_state()
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            text = f"peft.targets={self.targets}: {first_line(error)}"
            raise InputError("unknown-layers", text) from None
        # PEFT rounds the initial weights to the base's precision; this start does not depend on it.
        torch.set_rng_state(state)
        for name, weight in adapted.named_parameters():
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        return adapted


def _is_scorer(model: nn.Module) -> bool:
    return any(name in ("score", "classifier") for name, _ in model.named_children())


def _of_group(model: nn.Module, targets: list[str] | str) -> list[str] | str:
    """The names of a group's linear layers; other targets unchanged."""
    if targets not in ("attention", "mlp"):
        return targets
    from transformers.pytorch_utils import Conv1D

    names = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and any(map(str.isdigit, name.split(".")))
    ]
    attends = {name for name in names if "attn" in name.lower() or "attention" in name.lower()}
    found = [name for name in names if (name in attends) == (targets == "attention")]
    if not found:
        text = f"peft.targets={targets}: {type(model).__name__} has no such layers; give names"
        raise InputError("unknown-layers", text)
    return found


def merged(peft: Any) -> nn.Module:
    """The base with the adapter added to its weights."""
    model = peft.merge_and_unload()
    if has_adapter(model):
        del model.peft_config  # else the model would be saved as an adapter
    return model


def is_adapter(name: str, revision: str | None = None) -> bool:
    """Whether a hub id or folder holds an adapter instead of a whole model.

    Raises:
        InputError: If the hub cannot be reached.
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
        InputError: If it names none.
    """
    config = _config(name, {"revision": revision})
    if not config.base_model_name_or_path:
        raise InputError("no-base-model", f"{name}: its adapter_config.json names no base model")
    return str(config.base_model_name_or_path), config.revision


def load_adapter(
    model: nn.Module, name: str, revision: str | None = None, trainable: bool = False
) -> Any:
    """Put a saved adapter (.safetensors or .bin) on its base.

    Args:
        name: folder or hub id.
        trainable: else the adapter is frozen.

    Returns:
        PEFT's model.

    Raises:
        InputError: If a weight of the adapter or of its head is missing, unused, or misshapen.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    hub: dict[str, Any] = {} if revision is None else {"revision": revision}
    stored = _of_trunk(_current_keys(_weights(name, hub)), model)
    config = _config(name, hub)
    with reading(name, "the adapter does not load"):
        embedding = _own_embedding(model, stored)
        if embedding is not None:
            model.resize_token_embeddings(len(stored[embedding]))  # type: ignore[operator]
        if config.task_type == "CAUSAL_LM" and not hasattr(model, "prepare_inputs_for_generation"):
            config.task_type = "SEQ_CLS" if _is_scorer(model) else "FEATURE_EXTRACTION"
        config.inference_mode = not trainable
        base = config.base_model_name_or_path
        peft = get_peft_model(model, config)
        config.base_model_name_or_path = base  # PEFT replaces it by the model's name
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
            "adapter-without-head",
            f"{name} is an adapter without a head ({', '.join(missing)} missing), so a reranker"
            " would score at random; adopt it as a retriever (stage=retriever"
            " trainer.max_steps=0), and train a reranker from that model folder",
        )
    if problems := mismatches(missing, unused, wrong):
        raise InputError(
            "weights-mismatch",
            f"{name} does not fit {type(model).__name__}: {len(missing)} weights missing,"
            f" {len(unused)} not used, {len(wrong)} misshapen ({', '.join(problems)[:300]}); it is"
            " of another base or task",
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
            raise ValueError("base_model_name_or_path and revision must be strings")
        return config


def _weights(name: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in an adapter's file; of a pickle only tensors are read."""
    from peft.utils import load_peft_weights

    try:
        with reading(name, "the adapter does not load"):
            weights = load_peft_weights(name, device="cpu", **hub)
    except InputError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise InputError(
            "unsafe-pickle",
            f"{name}: its adapter_model.bin is a pickle of more than tensors, which could run code,"
            " and is not opened; take an adapter in safetensors, or from another source",
        ) from None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise InputError("weights-mismatch", f"{name}: its adapter_model.bin has no named weights")
    check_finite(name, weights)
    return weights


def _of_trunk(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """The weights without the language model around the transformer, and without its output layer.

    An adapter on a language model has keys one level deeper (`base_model.model.model.layers...`).
    """
    prefix = f"base_model.model.{model.base_model_prefix}."
    on_trunk = model.base_model is model
    if on_trunk and not any(key.startswith(prefix) for key in weights):
        return weights
    if not on_trunk and not _is_scorer(model):
        return weights
    kept = {
        key: weight
        for key, weight in weights.items()
        if not key.startswith("base_model.model.lm_head.") or ".lora_" in key
    }
    if not on_trunk:
        return kept
    return {key.replace(prefix, "base_model.model.", 1): weight for key, weight in kept.items()}


def _own_embedding(model: Any, weights: dict[str, Tensor]) -> str | None:
    """The key of the embedding that PEFT saves beside an adapter with a resized vocabulary."""
    words = model.get_input_embeddings()
    names = [name for name, module in model.named_modules() if module is words]
    key = f"base_model.model.{names[0]}.weight" if names else ""
    return key if key in weights and weights[key].dim() == 2 else None


def _current_keys(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the keys of the current PEFT version.

    Older ones may contain a wrapper (`score.modules_to_save.weight`), the adapter's name
    (`lora_A.default.weight`), or the head that was replaced (`score.original_module.weight`).
    """
    renamed: dict[str, Tensor] = {}
    for key, weight in weights.items():
        current = re.sub(r"\.(modules_to_save|default)(?=\.)", "", key)
        renamed[key if current in weights else current] = weight
    for key in [key for key in renamed if ".original_module." in key]:
        if key.replace(".original_module", "") in renamed:
            del renamed[key]
    return renamed


def copy_adapter(peft: Any, name: str) -> int:
    """Copy a saved adapter into a new one, with its head if the new one has that too.

    Returns:
        The number of weights copied.

    Raises:
        InputError: If the new adapter has another rank or alpha, or other targets.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    prefix = getattr(peft.get_base_model(), "base_model_prefix", "")

    def short(key: str) -> str:  # a reranker's transformer is one level deeper
        for outer in ("base_model.model.", "backbone.", f"{prefix}."):
            key = key.removeprefix(outer)
        return key

    def shapes(weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        kinds = (".lora_", "trainable_tokens")
        own = {short(key): w for key, w in weights.items() if any(kind in key for kind in kinds)}
        return {key: tuple(weight.shape) for key, weight in own.items()}

    weights = _weights(name, {})
    new = get_peft_model_state_dict(peft, save_embedding_layers=False)
    saved, requested = (
        (getattr(config, "lora_alpha", None), getattr(config, "use_rslora", False))
        for config in (_config(name, {}), peft.active_peft_config)
    )
    if shapes(weights) != shapes(new) or saved != requested:
        raise InputError(
            "adapter-mismatch",
            f"the adapter of {name} has another rank, alpha or kind, or other targets or slots than"
            " this run; set peft.rank, peft.alpha, peft.targets, peft.rslora, peft.dora and"
            " encoding.slots to its own, or peft=none to merge it",
        )
    stored = {short(key): weight for key, weight in weights.items()}
    taken = {key: stored[short(key)] for key in new if short(key) in stored}
    set_peft_model_state_dict(peft, {**new, **taken})
    return len(taken)
