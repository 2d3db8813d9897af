"""Low-rank adapters: put on a backbone, and loaded without a weight lost or left over.

PEFT loads an adapter onto the wrong base, or without its head, with no more than a warning; what
comes out then embeds or scores at random. Here every weight must find its place. The keys of older
versions of PEFT are read too, and a pickle (.bin) as tensors alone, so that none of its code runs.
"""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from caravan.errors import InputError
from caravan.hub import refuse_unreachable
from caravan.models.pooling import blocks


class LoRA:
    """Low-rank adapters (arXiv 2106.09685) on a frozen backbone; defaults are RepLLaMA's.

    Args:
        rank, alpha, dropout: as in PEFT.
        targets: which linear layers of the blocks: "all-linear", those of "attention" or of the
            "mlp", or names.
        rslora: scale by alpha / sqrt(rank) and not alpha / rank (arXiv 2312.03732).
        dora: learn the size of each weight's columns apart (arXiv 2402.09353).
        quant_type: "nf4" or "fp4", the base's linear layers have four bits (QLoRA, arXiv
            2305.14314); None leaves them whole. The base is quantised as it is loaded to be
            trained; the model folder holds the adapter alone, on the base as it was released.
        double_quant: quantise the scales too.
    """

    def __init__(
        self,
        rank: int = 32,
        alpha: int = 64,
        dropout: float = 0.1,
        targets: list[str] | str = "all-linear",
        rslora: bool = False,
        dora: bool = False,
        quant_type: str | None = None,
        double_quant: bool = True,
    ) -> None:
        if quant_type not in (None, "nf4", "fp4"):
            raise InputError(f"peft.quant_type is {quant_type!r}; it must be null, nf4 or fp4")
        self.settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
        self.settings.update(use_rslora=rslora, use_dora=dora)
        self.targets = targets
        self.quant_type, self.double_quant = quant_type, double_quant

    def quantization(self) -> Any:
        """transformers' config of a quantised base, whose arithmetic is bf16; None of a whole."""
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
        """Freeze the model and put adapters on it; these and a reranker's head are trained.

        Args:
            rows: of the input embedding, trained too: tokens that the model has never seen.
        """
        from peft import LoraConfig, TaskType, get_peft_model

        if hasattr(model, "peft_config"):
            raise InputError(
                "backbone.name is an adapter already; train it with peft=none, or adopt it"
                " (trainer.max_steps=0) and start from that model folder with init_from"
            )
        task = TaskType.FEATURE_EXTRACTION
        if hasattr(model, "score") or hasattr(model, "classifier"):
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
            told = str(error).strip().splitlines()[0]
            raise InputError(f"peft.targets={self.targets}: {told}") from None
        # PEFT rounds the start to the precision of the base, however that was loaded.
        torch.set_rng_state(state)
        for name, weight in adapted.named_parameters():
            if ".lora_A." in name:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        return adapted


def quantization(peft: Any) -> Any:
    """How the base is quantised; None where it stays whole, as with adapters of one's own."""
    return peft.quantization() if hasattr(peft, "quantization") else None


def frozen_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of the transformer's blocks whose weights are not trained."""
    return [
        layer
        for block in blocks(model)
        for layer in block.modules()
        if isinstance(layer, nn.Linear) and not layer.weight.requires_grad
    ]


def halvable(model: nn.Module) -> list[nn.Linear]:
    """Frozen linear layers that may be kept in bf16, where they compute in it anyway.

    What they compute under autocast stays the same to the bit. There are none where a base is in
    no folder, so that it will be saved with the adapter merged into it, nor with DoRA, which takes
    the norms of its columns.
    """
    adapted: Any = next((m for m in model.modules() if hasattr(m, "peft_config")), None)
    config = getattr(adapted, "active_peft_config", None)
    if config is None or not config.base_model_name_or_path or getattr(config, "use_dora", False):
        return []
    return frozen_linears(model)


def precisions(network: nn.Module, bf16: bool) -> Iterator[tuple[nn.Parameter, torch.dtype]]:
    """Each weight with the precision that it is trained in, whatever its file has.

    Args:
        bf16: the arithmetic; frozen linear layers are kept in it, all else in float32. Weights of
            four bits are left out.
    """
    halved = {id(layer.weight) for layer in halvable(network)} if bf16 else set()
    for weight in network.parameters():
        if weight.is_floating_point():
            yield weight, torch.bfloat16 if id(weight) in halved else torch.float32


def settle_precisions(network: nn.Module, bf16: bool) -> None:
    """Bring each weight to the precision that it is trained in (`precisions`)."""
    for weight, dtype in precisions(network, bf16):
        weight.data = weight.data.to(dtype)


def _of_group(model: nn.Module, targets: list[str] | str) -> list[str] | str:
    """The linear layers of a group, by name; what is no group comes back as it is."""
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
        raise InputError(
            f"peft.targets={targets}: {type(model).__name__} has no such layers; give their names"
        )
    return found


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
        return False  # what is not to be had is told when the weights are loaded


def released_base(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """The base model that an adapter names, as (hub id or folder, revision).

    Raises:
        InputError: it names none.
    """
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(name, revision=revision)
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
    from peft import (
        PeftConfig,
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    hub: dict[str, Any] = {} if revision is None else {"revision": revision}
    stored = _keys_of_today(_weights(name, hub))
    try:
        config = PeftConfig.from_pretrained(name, **hub)
        config.inference_mode = not trainable
        base = config.base_model_name_or_path
        peft = get_peft_model(model, config)
        config.base_model_name_or_path = base  # as it was saved: PEFT writes down the model's name
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        told = str(error).strip().splitlines()[0].rstrip(".")
        raise InputError(f"{name}: the adapter does not load ({told})") from None
    wanted = get_peft_model_state_dict(peft, save_embedding_layers=False)
    missing, unused = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    wrong = sorted(
        key for key in wanted.keys() & stored.keys() if wanted[key].shape != stored[key].shape
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
    set_peft_model_state_dict(peft, stored)
    return peft


def _weights(name: str, hub: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in an adapter's file; of a pickle tensors are read and nothing is run."""
    from peft.utils import load_peft_weights
    from safetensors import SafetensorError

    try:
        weights = load_peft_weights(name, device="cpu", **hub)
    except pickle.UnpicklingError:
        raise InputError(
            f"{name}: its adapter_model.bin is a pickle of more than tensors, which could run code,"
            " and is not opened; take an adapter in safetensors, or from another source"
        ) from None
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError) as error:
        told = str(error).strip().splitlines()[0].rstrip(".") if str(error) else "it ends too soon"
        raise InputError(f"{name}: the adapter does not load ({told})") from None
    if not isinstance(weights, dict) or not all(isinstance(w, Tensor) for w in weights.values()):
        raise InputError(f"{name}: its adapter_model.bin holds no weights by name; save it again")
    return weights


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


def merged(peft: Any) -> nn.Module:
    """The base with the adapter added into its weights: plain layers, which pack and run faster."""
    model = peft.merge_and_unload()
    if hasattr(model, "peft_config"):
        del model.peft_config  # else a saved model would be taken for an adapter
    return model


def copy_adapter(peft: Any, name: str) -> int:
    """Copy a saved adapter, with its head if the new one has that too; returns how many weights.

    A retriever's adapter sits on the transformer itself, a reranker's one level deeper.

    Raises:
        InputError: the new adapter has another rank or alpha, or other targets.
    """
    from peft import PeftConfig, get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    prefix = getattr(peft.get_base_model(), "base_model_prefix", "")

    def short(key: str) -> str:
        for outer in ("base_model.model.", "backbone.", f"{prefix}."):
            key = key.removeprefix(outer)
        return key

    def low_rank(weights: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        kinds = (".lora_", "trainable_tokens")
        of_adapter = {key: w for key, w in weights.items() if any(kind in key for kind in kinds)}
        return {key: tuple(weight.shape) for key, weight in of_adapter.items()}

    stored = {short(key): weight for key, weight in load_peft_weights(name, device="cpu").items()}
    new = get_peft_model_state_dict(peft, save_embedding_layers=False)
    saved, asked = (
        (getattr(config, "lora_alpha", None), getattr(config, "use_rslora", False))
        for config in (PeftConfig.from_pretrained(name), peft.active_peft_config)
    )
    wanted = low_rank({short(key): weight for key, weight in new.items()})
    if low_rank(stored) != wanted or saved != asked:
        raise InputError(
            f"init_from={name} has an adapter of another rank or alpha, of another kind, on other"
            " layers or with other slots than is asked for; set peft.rank, peft.alpha,"
            " peft.targets, peft.rslora, peft.dora and contract.slots to its own, or peft=none to"
            " merge it"
        )
    taken = {key: stored[short(key)] for key in new if short(key) in stored}
    set_peft_model_state_dict(peft, {**new, **taken})
    return len(taken)
