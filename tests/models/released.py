"""Adapters in the layout of those that castorini released, on a tiny Llama saved as Meta's are.

PEFT 0.4's config and keys, `adapter_model.bin`, and no tokenizer of their own.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import processors
from torch import Tensor

RERANKERS = ["rankllama_passage_7b"]
RETRIEVER, RERANKER = "repllama_passage_7b", RERANKERS[0]
CONFIG_OF_THAT_TIME = {
    "auto_mapping": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "lora_alpha": 8,
    "lora_dropout": 0.1,
    "modules_to_save": None,
    "peft_type": "LORA",
    "r": 4,
    "revision": None,
}
OLDER_FIELDS = {"merge_weights": False, "enable_lora": None}
"""Of PEFT 0.2, which today's does not know."""
SIZES = {"q_proj": (32, 32), "k_proj": (32, 16), "v_proj": (32, 16), "o_proj": (32, 32)}
SIZES |= {"gate_proj": (32, 48), "up_proj": (32, 48), "down_proj": (48, 32)}


def save_base(path: Path, tokenizer: Any) -> Path:
    """A Llama as Meta released it: a causal language model without a padding token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 1, "intermediate_size": 48, "vocab_size": 400}
    LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=1, eos_token_id=2)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    text = (path / "tokenizer.json").read_text()
    saved = type(tokenizer).from_pretrained(path)
    saved.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", saved.bos_token_id)]
    )
    saved.pad_token = None
    saved.save_pretrained(path)
    assert (path / "tokenizer.json").read_text() != text
    return path


def adapter_weights(reranks: bool) -> dict[str, Tensor]:
    """Tensors under the keys of PEFT 0.4: the adapter sits on LlamaModel, or one level deeper."""
    generator = torch.Generator().manual_seed(1)
    inner = "base_model.model.model" if reranks else "base_model.model"
    weights = {}
    for layer in range(2):
        for name, (given, made) in SIZES.items():
            block = "self_attn" if name[0] in "qkvo" else "mlp"
            key = f"{inner}.layers.{layer}.{block}.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(4, given, generator=generator) * 0.2
            weights[f"{key}.lora_B.weight"] = torch.randn(made, 4, generator=generator) * 0.2
    if reranks:
        weights["base_model.model.score.weight"] = torch.randn(1, 32, generator=generator)
    return weights


def release(
    to: Path,
    base: Path,
    experiment: str,
    file: str = "adapter_model.bin",
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda weights: weights,
    **fields: Any,
) -> Path:
    """A folder with an adapter and nothing else."""
    to.mkdir(parents=True)
    reranks = experiment in RERANKERS
    settings = {
        **CONFIG_OF_THAT_TIME,
        "base_model_name_or_path": str(base),
        "target_modules": list(SIZES),
        "task_type": "SEQ_CLS" if reranks else "FEATURE_EXTRACTION",
        **fields,
    }
    (to / "adapter_config.json").write_text(json.dumps(settings))
    weights = change(adapter_weights(reranks))
    if file.endswith(".bin"):
        torch.save(weights, to / file)
    else:
        save_file(weights, to / file)
    return to
