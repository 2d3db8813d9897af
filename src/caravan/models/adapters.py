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
from typing import Any, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from caravan.errors import InputError, first_line, reading
from caravan.hub import refuse_unreachable
from caravan.models.bidirectional import has_adapter
from caravan.models.loading import check_finite, check_keys


class LoRA:
    """Low-rank adapters (arXiv 2106.09685) on a frozen backbone; defaults are RepLLaMA's.

    Args:
        rank, alpha, dropout: as in PEFT.
        targets: names of linear layers; "all-linear" is all those of the blocks.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank (arXiv 2312.03732).
        quant_type: quantizes the base's linear layers to four bits while loading (QLoRA,
            arXiv 2305.14314); the adapter is saved on the unquantized base.
        bf16_norms: whether training in bf16 also holds the frozen norms and embeddings in bf16.
    """

    def __init__(
        self,
        rank: PositiveInt = 32,
        alpha: int = 64,
        dropout: float = 0.1,
        targets: list[str] | str = "all-linear",
        rslora: bool = False,
        quant_type: Literal["nf4", "fp4"] | None = None,
        bf16_norms: bool = False,
    ) -> None:
        self.settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
        self.settings |= {"target_modules": targets, "use_rslora": rslora}
        self.quant_type, self.bf16_norms = quant_type, bf16_norms

    def quantization(self) -> Any:
        """transformers' config of a base quantized to four bits, computing in bf16; or None."""
        from transformers import BitsAndBytesConfig

        if self.quant_type is None:
            return None
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quant_type,
            bnb_4bit_use_double_quant=True,
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
            revision=getattr(model, "revision", None),  # the adapter finds the same base again
            trainable_token_indices=list(rows) or None,
            **self.settings,
        )
        state = torch.get_rng_state()
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            text = f"peft.targets={self.settings['target_modules']}: {first_line(error)}"
            raise InputError("unknown-layers", text) from None
        # PEFT rounds the initial weights to the base's precision; this start does not depend on it.
        torch.set_rng_state(state)
        for name, weight in adapted.named_parameters():
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        return adapted


def _is_scorer(model: nn.Module) -> bool:
    return any(name in ("score", "classifier") for name, _ in model.named_children())


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

    stored = _of_trunk(_current_keys(_weights(name, revision)), model)
    config = adapter_config(name, revision)
    config.inference_mode = not trainable
    if config.task_type == "CAUSAL_LM" and not hasattr(model, "prepare_inputs_for_generation"):
        config.task_type = "SEQ_CLS" if _is_scorer(model) else "FEATURE_EXTRACTION"
    base = config.base_model_name_or_path
    with reading(name, "the adapter does not load"):
        peft = get_peft_model(model, config)
        config.base_model_name_or_path = base  # PEFT replaces it by the model's name
        wanted = get_peft_model_state_dict(peft, save_embedding_layers=False)
    wrong = [
        key
        for key in wanted.keys() & stored.keys()
        if wanted[key].shape != stored[key].shape or not stored[key].is_floating_point()
    ]
    missing, unused = wanted.keys() - stored.keys(), stored.keys() - wanted.keys()
    hint = "it is of another base, task or vocabulary (one without a head makes a retriever)"
    check_keys(f"{name} does not fit {type(model).__name__}", hint, missing, unused, wrong)
    with reading(name, "the adapter does not load"):
        set_peft_model_state_dict(peft, stored)
    return peft


def adapter_config(name: str, revision: str | None = None) -> Any:
    """PEFT's config of a folder or hub id.

    Raises:
        InputError: If it cannot be read, or names no base model.
    """
    from peft import PeftConfig

    file = Path(name) / "adapter_config.json"
    with reading(file if file.is_file() else name, "the adapter's config does not load"):
        config = PeftConfig.from_pretrained(name, revision=revision)
        base, own = config.base_model_name_or_path, config.revision
        if not isinstance(base, str | None) or not isinstance(own, str | None):
            raise ValueError("base_model_name_or_path and revision must be strings")
    if not base:
        raise InputError("no-base-model", f"{name}: its adapter_config.json names no base model")
    return config


def _weights(name: str, revision: str | None = None) -> dict[str, Tensor]:
    """The weights in an adapter's file; of a pickle only tensors are read."""
    from peft.utils import load_peft_weights

    try:
        with reading(name, "the adapter does not load"):
            weights = load_peft_weights(name, device="cpu", revision=revision)
            if not all(isinstance(weight, Tensor) for weight in weights.values()):
                raise ValueError("it holds other values than named weights")
    except InputError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise InputError(
            "unsafe-pickle",
            f"{name}: its adapter_model.bin is a pickle of more than tensors, which could run code,"
            " and is not opened; take an adapter in safetensors, or from another source",
        ) from None
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


def copy_adapter(peft: Any, name: str) -> None:
    """Copy a saved adapter into a new one, with its head if the new one has that too.

    Raises:
        InputError: If the new adapter has another rank or alpha, or other targets.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    prefix = getattr(peft.get_base_model(), "base_model_prefix", "")

    def short(key: str) -> str:  # a reranker's transformer is one level deeper
        for outer in ("base_model.model.", "backbone.", f"{prefix}."):
            key = key.removeprefix(outer)
        return key

    def shapes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
        kinds = (".lora_", "trainable_tokens")
        return {key: w.shape for key, w in weights.items() if any(kind in key for kind in kinds)}

    new = get_peft_model_state_dict(peft, save_embedding_layers=False)
    stored = {short(key): weight for key, weight in _weights(name).items()}
    saved, chosen = adapter_config(name), peft.active_peft_config
    if shapes(stored) != shapes({short(key): weight for key, weight in new.items()}) or any(
        getattr(saved, setting, None) != getattr(chosen, setting)
        for setting in ("lora_alpha", "use_rslora")
    ):
        raise InputError(
            "adapter-mismatch",
            f"the adapter of {name} has another rank, alpha or kind, or other targets or slots than"
            " this run; set peft.rank, peft.alpha, peft.targets, peft.rslora and encoding.slots to"
            " its own, or peft=none to merge it",
        )
    set_peft_model_state_dict(peft, {key: stored.get(short(key), new[key]) for key in new})
