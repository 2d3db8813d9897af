"""A tiny encoder in a folder with code of its own, as nomic-bert, gte and jina are on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONFIGURATION = """
from pathlib import Path
from transformers import PreTrainedConfig

Path("{mark}").touch()

class OwnConfig(PreTrainedConfig):
    model_type = "own"

    def __init__(self, vocab_size=400, hidden_size=32, **rest):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = 1
        super().__init__(**rest)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_own import OwnConfig

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    base_model_prefix = "own"

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([nn.Linear(config.hidden_size, config.hidden_size)])
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings

    def forward(self, input_ids, attention_mask=None, **_):
        states = self.embeddings(input_ids)
        seen = attention_mask.unsqueeze(-1)  # it wants a mask, as nomic-bert does
        mean = (states * seen).sum(1, keepdim=True) / seen.sum(1, keepdim=True)
        return BaseModelOutput(last_hidden_state=torch.tanh(self.layers[0](states + mean)))
"""
CONFIG = {
    "model_type": "own",
    "architectures": ["OwnModel"],
    "vocab_size": 400,
    "hidden_size": 32,
    "auto_map": {
        "AutoConfig": "configuration_own.OwnConfig",
        "AutoModel": "modeling_own.OwnModel",
    },
}


def write_model(folder: Path, tokenizer: Any, mark: Path) -> Path:
    """Write the model; its code makes the file `mark` when it runs."""
    folder.mkdir(parents=True)
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(mark=mark))
    (folder / "modeling_own.py").write_text(MODELING)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    generator = torch.Generator().manual_seed(0)
    shapes = {"embeddings.weight": (400, 32), "layers.0.weight": (32, 32), "layers.0.bias": (32,)}
    weights = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder
