"""The folder that sentence-transformers (6.2) loads, without importing it.

    out/
      modules.json                  the modules, one after another, each with its folder
      config_sentence_transformers.json   prompts, similarity or activation, the version it needs
      sentence_bert_config.json     how the transformer is fed: lengths of queries and passages
      config.json  model.safetensors  tokenizer.json   the transformer
      1_Pooling/  2_Normalize/  ...

A query's and a passage's tails may differ (LLaRA's prompts); then a Router has a transformer for
each, with a tokenizer of its own, and the weights are two files, or one file with two names.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from caravan.encoding import read_encoding
from caravan.manifests import write_json

VERSION = ">=6.2"
"""Older ones know neither a length for each side nor the names of the modules."""
_MODULES = {
    "Transformer": "sentence_transformers.base.modules.transformer",
    "Router": "sentence_transformers.base.modules.router",
    "Normalize": "sentence_transformers.base.modules.normalize",
    "Dense": "sentence_transformers.base.modules.dense",
    "Pooling": "sentence_transformers.sentence_transformer.modules.pooling",
    "WordWeights": "sentence_transformers.sentence_transformer.modules.word_weights",
}
POOLINGS = {"last": "lasttoken", "mean": "mean", "cls": "cls", "slots": "mean"}


@dataclass(frozen=True)
class Module:
    """A module after the transformer: its class, its config and its weights."""

    name: str
    config: dict[str, Any]
    weights: dict[str, Any] = field(default_factory=dict)


def write(folder: Path, out: Path) -> None:
    """Write a retriever as a SentenceTransformer, a reranker as a CrossEncoder."""
    from caravan.export import reranker, retriever

    kinds = {"retriever": retriever.write, "reranker": reranker.write}
    kinds[read_encoding(folder)[0].kind](folder, out)


def write_modules(
    out: Path, kind: str, settings: dict[str, Any], first: str, modules: list[Module]
) -> None:
    """Write what names and configures the modules.

    Args:
        kind: SentenceTransformer or CrossEncoder.
        settings: of the whole, beside its kind and the version.
        first: Transformer or Router, whose files are in `out` itself.
    """
    from safetensors.torch import save_file

    names = [first, *(module.name for module in modules)]
    paths = ["", *(f"{i}_{name}" for i, name in enumerate(names[1:], 1))]
    for path, module in zip(paths[1:], modules, strict=True):
        (out / path).mkdir()
        write_json(out / path / "config.json", module.config)
        if module.weights:
            save_file(module.weights, out / path / "model.safetensors", {"format": "pt"})
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": class_of(name)}
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    write_json(out / "modules.json", listed)
    needed = {"requirements": {"sentence-transformers": VERSION}}
    write_json(
        out / "config_sentence_transformers.json", {"model_type": kind, **settings, **needed}
    )


def class_of(name: str) -> str:
    """A module's class as modules.json has it."""
    return f"{_MODULES[name]}.{name}"


def write_router(out: Path, routes: dict[str, Path]) -> None:
    """Write a Router that has a transformer, in a folder of its own, for each task.

    Without a task it refuses to guess.
    """
    types = {path.name: class_of("Transformer") for path in routes.values()}
    structure = {task: [path.name] for task, path in routes.items()}
    parameters: dict[str, Any] = {
        "default_route": None,
        "allow_empty_key": False,
        "route_mappings": {},
    }
    write_json(
        out / "router_config.json",
        {"types": types, "structure": structure, "parameters": parameters},
    )


def write_feeding(folder: Path, output: str, settings: dict[str, Any], chat: bool = False) -> None:
    """Write how a transformer is fed, beside its weights.

    Args:
        output: what it gives, "token_embeddings" or "scores".
        settings: lengths, truncation.
        chat: the tokenizer has a chat template, which makes one text of a pair; else the tokenizer
            takes texts and pairs as they are, whatever template it has.
    """
    task, output_name = {
        "token_embeddings": ("feature-extraction", "last_hidden_state"),
        "scores": ("sequence-classification", "logits"),
    }[output]
    text = {"method": "forward", "method_output_name": output_name}
    config = {
        "transformer_task": task,
        "modality_config": {
            "text": text,
            **({"message": {**text, "format": "flat"}} if chat else {}),
        },
        "module_output_name": output,
    }
    write_json(folder / "sentence_bert_config.json", {**config, **settings})


def pooling(size: int, how: str) -> Module:
    """The module that pools states of `size` numbers as the encoding's pooling says."""
    config = {"embedding_dimension": size, "pooling_mode": POOLINGS[how], "include_prompt": True}
    return Module("Pooling", config)


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a second file where the file system has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
