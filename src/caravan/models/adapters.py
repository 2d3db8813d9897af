"""Low-rank adapters on a backbone: which layers have them, and the precision of frozen weights.

Saved adapters are read by `caravan.models.adapter_files`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from pydantic import PositiveInt
from torch import nn

from caravan.errors import InputError
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


def merged(peft: Any) -> nn.Module:
    """The base with the adapter added into its weights: plain layers, which pack and run faster."""
    model = peft.merge_and_unload()
    if hasattr(model, "peft_config"):
        del model.peft_config  # else a saved model would be taken for an adapter
    return model
