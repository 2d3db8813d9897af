"""The model folder: weights, tokenizer and contract, enough to embed with and nothing else needed.

    model/
      caravan.json        the contract (prompts, EOS, pooling, lengths, ...) and facts of training
      config.json  model.safetensors             full weights, as transformers reads them
      adapter_config.json  adapter_model.safetensors   or an adapter, as PEFT reads it
      tokenizer.json ...  README.md

It is written beside its final place and renamed, so there is a whole folder or none.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from caravan.contract import Contract, adapter_base, read_contract, write_contract
from caravan.errors import InputError
from caravan.models.backbone import load_tokenizer, load_weights
from caravan.models.biencoder import BiEncoder

_ADAPTER = "adapter_model.safetensors"


def save(
    folder: Path, model: BiEncoder, tokenizer: Any, contract: Contract, facts: dict[str, Any]
) -> None:
    """Write a model folder, whole or not at all; one that is there already is replaced.

    Args:
        facts: JSON data for the model card: base model, collection, steps, figures.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    adapter = hasattr(model.backbone, "peft_config")
    facts = {**facts, "weights": "adapter" if adapter else "full"}
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.backbone.save_pretrained(scratch)  # type: ignore[operator]
        tokenizer.save_pretrained(scratch)
        write_contract(scratch, contract, facts)
        (scratch / "README.md").write_text(_card(contract, facts), "utf-8")
        scratch.chmod(0o755)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(scratch, folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def load(
    folder: Path, dtype: torch.dtype = torch.float32
) -> tuple[BiEncoder, Any, Contract, dict[str, Any]]:
    """Load a model folder: (model in eval mode, tokenizer, contract, facts); adapters are merged.

    Raises:
        InputError: the contract is missing or broken, or a weight is missing, unknown or misshapen.
    """
    contract, facts = read_contract(folder)
    if facts["weights"] == "adapter":
        if not (folder / _ADAPTER).is_file():
            raise InputError(f"{folder} has no {_ADAPTER}; save the model again")
        backbone = _with_adapter(folder, dtype)
    else:
        if not any(folder.glob("*.safetensors")):
            raise InputError(f"{folder} has no weights (*.safetensors); save the model again")
        backbone = load_weights(str(folder), dtype, heads=False)
    model = BiEncoder(backbone, contract).eval()
    return model, load_tokenizer(str(folder)), contract, facts


def _with_adapter(folder: Path, dtype: torch.dtype) -> Any:
    """The base with the adapter added into its weights: plain layers, which pack and run faster."""
    from peft import PeftModel
    from safetensors import safe_open

    base, revision = adapter_base(folder)
    model = PeftModel.from_pretrained(load_weights(base, dtype, revision=revision), str(folder))
    with safe_open(folder / _ADAPTER, framework="pt") as file:
        stored = set(file.keys())
    wanted = {
        name.replace(".default", "") for name, _ in model.named_parameters() if ".lora_" in name
    }
    if stored != wanted:
        raise InputError(
            f"{folder / _ADAPTER} does not fit {base}: {len(wanted - stored)} weights missing,"
            f" {len(stored - wanted)} not used"
        )
    merged = model.merge_and_unload()
    if hasattr(merged, "peft_config"):
        del merged.peft_config  # else `save` would take the merged model for an adapter
    return merged


def _card(contract: Contract, facts: dict[str, Any]) -> str:
    figures = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""---
library_name: caravan
tags: [retrieval, {contract.kind}]
---
# {facts.get("name", "model")}

A {contract.kind} trained with Caravan. `caravan.json` holds all that its use needs: prompts, EOS,
pooling, lengths. Evaluate it on a BEIR folder:

    python evaluate.py retriever=<this folder> data=beir data.path=<collection>

| setting | value |
|---|---|
| query | `{contract.query_template}`, {contract.query_length} tokens |
| passage | `{contract.passage_template}`, {contract.passage_length} tokens |
| EOS | {"appended" if contract.append_eos else "as the tokenizer has it"} |
| embedding | {contract.pooling} pooling, {"unit length" if contract.normalize else "as it comes"} |
{figures}
"""
