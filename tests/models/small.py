"""Small instances of real architectures, and texts for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import tiny_backbone
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

from caravan.data.batch import pack
from caravan.data.collection import Collection
from caravan.data.pairs import PairTemplates
from caravan.encoding import Encoding
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.models.bidirectional import DECODERS
from caravan.models.biencoder import BiEncoder

TEXTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15], [16, 17, 18, 19], list(range(20, 39))]
ARCHITECTURES = ["bert", "modernbert", "qwen3", "mistral"]
SHAPE = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
GROUPED = {"num_key_value_heads": 1, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False}
EXPERTS = {"num_local_experts": 2, "num_experts_per_tok": 1}
HALF = {"head_dim": 16}
SETTINGS: dict[str, dict[str, Any]] = {
    "bert": {},
    "distilbert": {},
    "electra": {},
    "modernbert": {"local_attention": 8},
    "gpt_neox": {},
    "gpt2": {},
    "gpt_oss": {**GROUPED, **EXPERTS, **HALF},
    "gemma": {**GROUPED, **HALF},
    "gemma2": {**GROUPED, **HALF, "attn_logit_softcapping": 0.05},
    "gemma3_text": {**GROUPED, **HALF, "sliding_window": 8},
    "cohere2": {**GROUPED, "sliding_window": 8, "layer_types": None},
    "exaone4": {**GROUPED, "sliding_window": 8},
    "mamba": {},
    "ministral": {**GROUPED, **HALF, "sliding_window": 8},
    "mistral": {**GROUPED, "sliding_window": 8},
    "mixtral": {**GROUPED, **EXPERTS, "sliding_window": 8},
    "olmo3": {**GROUPED, "sliding_window": 8},
    "phi3": {**GROUPED, "sliding_window": 8},
    "qwen2": {**GROUPED, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {**GROUPED, **HALF},
    "qwen3_moe": {**GROUPED, **HALF, "num_experts": 2, "num_experts_per_tok": 1},
    "starcoder2": {**GROUPED, "sliding_window": 8},
}
"""Of each model type; others take SHAPE and GROUPED."""
CORE = ("gemma2", "gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3")
EVERY_DECODER = [
    pytest.param(name, attention, marks=[] if name in CORE else [pytest.mark.slow])
    for name in sorted(DECODERS)
    for attention in ("auto", "eager")
]


def config_of(kind: str, **more: Any) -> Any:
    settings = SETTINGS.get(kind, GROUPED)
    return CONFIG_MAPPING[kind](**{**SHAPE, **settings, **more})


def model_of(kind: str, noise: float = 0.0, **more: Any) -> Any:
    """A transformer of fixed random weights in eval mode; noise makes every weight matter."""
    torch.manual_seed(0)
    model = AutoModel.from_config(config_of(kind, **more))
    if kind in ("bert", "electra"):
        model.pooler = None
    return shaken(model, noise).eval()


def language_model_of(kind: str, noise: float = 0.1, **more: Any) -> Any:
    torch.manual_seed(0)
    return shaken(AutoModelForCausalLM.from_config(config_of(kind, **more)), noise).eval()


def shaken(model: Any, noise: float = 0.1, seed: int = 0) -> Any:
    """The model with noise on its trainable weights: new adapters would not change its results."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if noise and weight.requires_grad:
                weight.add_(noise * torch.randn(weight.shape, generator=generator))
    return model


def padded(texts: list[list[int]], side: str, width: int = 24) -> tuple[Tensor, Tensor]:
    ids = torch.zeros(len(texts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, text in enumerate(texts):
        span = slice(0, len(text)) if side == "right" else slice(width - len(text), width)
        ids[i, span] = torch.tensor(text)
        mask[i, span] = 1
    return ids, mask


def close(found: Any, expected: Any, atol: float = 1e-5, rtol: float = 0) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)


def saved_base(tokenizer: Any, to: Path, model: Any = None) -> Path:
    """A folder of transformers of the model: if None, a tiny Llama without its output layer."""
    torch.manual_seed(0)
    for part in (model or tiny_backbone().model(tokenizer), tokenizer):
        part.save_pretrained(to)
    return to


def save_adapter(
    base: str | Path, to: Path, tokenizer: Any, encoding: Encoding, **settings: Any
) -> BiEncoder:
    """Save a retriever with an adapter that changes its embeddings; returns it.

    Args:
        settings: of `LoRA`, and the `revision` of the base.
    """
    backbone = Pretrained(str(base), revision=settings.pop("revision", None))
    adapters = LoRA(**{"rank": 2, "alpha": 4, "dropout": 0.0, **settings})
    torch.manual_seed(0)
    model = BiEncoder(shaken(adapters.apply(backbone.model(tokenizer))), encoding).eval()
    folder.save(to, model, tokenizer, encoding, {})
    return model


def embedded(model: BiEncoder | Path) -> Tensor:
    """Embeddings of a few texts by a model or a model folder."""
    loaded = folder.load(model)[0] if isinstance(model, Path) else model
    with torch.no_grad():
        found: Tensor = loaded.embed(pack([[5, 6, 7], [8, 9, 10, 11], [12]], 99))
    return found


def alone(model: Any, ids: list[int]) -> Tensor:
    """What a model computes of one text or pair without padding: its embedding or its score."""
    with torch.no_grad():
        found: Tensor = model(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0]
    return found


def scored_alone(path: Path, query: int, rows: Any, collection: Collection) -> list[float]:
    """Scores of a query's pairs with the passages in `rows` by a model folder, pair by pair."""
    model, tokenizer, encoding, _ = folder.load(path)
    queries = collection.queries.get([query]) * len(rows)
    pairs = PairTemplates(tokenizer, encoding).pairs(queries, collection.corpus.get(rows))
    return [float(alone(model, pair.ids)) for pair in pairs]


def edit_weights(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
