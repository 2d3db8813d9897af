"""The model folder: weights, tokenizer and contract; nothing else is needed to embed or to score.

    model/
      caravan.json        the contract (prompts, EOS, pooling, lengths, ...) and facts of training
      config.json  model.safetensors             full weights, as transformers reads them
      adapter_config.json  adapter_model.safetensors   or an adapter, as PEFT reads it, where the
                                                 weights that it was trained on have a name
      score.safetensors   an encoder's head; a decoder's is in its weights, or in its adapter
      tokenizer.json ...
      README.md           the card (`caravan.cards`), which nothing reads

It is written beside its final place and renamed, so there is a whole folder, the old or the new.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caravan.atomic import replacing_folder
from caravan.contract import Contract, adapter_base, read_contract, write_contract
from caravan.errors import InputError
from caravan.models.adapters import load_adapter, merged
from caravan.models.bidirectional import look_both_ways
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, Headed, head_of, with_head
from caravan.models.likelihood import QueryLikelihood
from caravan.models.loading import (
    fit_vocabulary,
    load_language_model,
    load_scorer,
    load_tokenizer,
    load_weights,
    set_attention,
)
from caravan.models.slots import SlotEncoder
from caravan.trust import FACT, allowed, is_own_code

ADAPTER = "adapter_model.safetensors"
HEAD = "score.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
Model = BiEncoder | CrossEncoder


def save(
    folder: Path, model: Model, tokenizer: Any, contract: Contract, facts: dict[str, Any]
) -> None:
    """Write a model folder, whole or not at all; one that is there already is replaced.

    Args:
        facts: JSON data, kept in the contract's file for the card: base model, collection, figures.
    """
    from safetensors.torch import save_file
    from transformers.utils import logging

    logging.disable_progress_bar()
    transformer: Any = model.transformer
    adapter = hasattr(transformer, "peft_config")
    if adapter and not transformer.active_peft_config.base_model_name_or_path:
        transformer = merged(copy.deepcopy(transformer))  # on random weights, which no folder has
        adapter = False
    own_code = any(map(is_own_code, (tokenizer, *transformer.modules())))
    facts = {**facts, "weights": "adapter" if adapter else "full", FACT: own_code}
    if isinstance(model, SlotEncoder) and transformer is model.transformer and not adapter:
        facts["language_model"] = type(transformer).__name__
    with replacing_folder(folder) as scratch:
        if isinstance(transformer, Headed):
            transformer.backbone.save_pretrained(scratch)
            head = {"score.weight": transformer.score.weight.detach().contiguous()}
            save_file(head, scratch / HEAD)
        elif adapter:  # an embedding whose rows were added is its base's, or in the adapter
            transformer.save_pretrained(scratch, save_embedding_layers=False)
        else:
            transformer.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_contract(scratch, contract, facts)


def load(
    folder: Path,
    dtype: torch.dtype | str = torch.float32,
    kind: str | None = None,
    attention: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any, Contract, dict[str, Any]]:
    """Load a model folder: (model in eval mode, tokenizer, contract, facts); adapters are merged.

    Args:
        dtype: of the transformer's weights; a reranker's head is float32.
        kind: what it must be, "retriever" or "reranker"; None takes both.
        attention: transformers' implementation, or "unpadded" (`caravan.models.unpadded`).
        trust_remote_code: run code that the model brings along, or its adapter's base
            (`caravan.trust`); nothing in the folder can.

    Returns:
        The model is a BiEncoder or a CrossEncoder.

    Raises:
        InputError: the contract is missing or broken, a weight (a reranker's head among them) is
            missing, unknown or misshapen, the folder is of another kind, or wants code of its own
            that may not run.
    """
    contract, facts = read_contract(folder)
    if kind is not None and contract.kind != kind:
        raise InputError(f"{folder} is a {contract.kind}; give the folder of a {kind}")
    adapter = facts["weights"] == "adapter"
    if adapter and not (folder / ADAPTER).is_file():
        raise InputError(f"{folder} has no {ADAPTER}; save the model again")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"{folder} has no weights (*.safetensors); save the model again")
    if not (folder / "tokenizer_config.json").is_file() or not any(
        (folder / name).is_file() for name in TOKENIZERS
    ):
        raise InputError(
            f"{folder} lacks its tokenizer (tokenizer_config.json and {TOKENIZERS[0]}); save the"
            " model again"
        )
    trusted = allowed(folder, facts, trust_remote_code)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trusted)
    model: Model
    if contract.kind == "reranker":
        if contract.scoring == "likelihood":
            language_model = _language_model(folder, dtype, adapter, trusted)
            model = QueryLikelihood(_as_asked(language_model, contract, attention), contract)
        else:
            scorer = _scorer(folder, dtype, adapter, trusted)
            model = CrossEncoder(_as_asked(scorer, contract, attention), contract)
    else:
        backbone = _backbone(folder, dtype, facts, tokenizer, trusted)
        model = BiEncoder(_as_asked(backbone, contract, attention), contract)
    return model.eval(), tokenizer, contract, facts


def _as_asked(transformer: nn.Module, contract: Contract, attention: str) -> nn.Module:
    """Which way an adapter's base looks stands in the contract alone."""
    if contract.bidirectional:
        look_both_ways(transformer)
    return transformer if attention == "auto" else set_attention(transformer, attention)


def _backbone(
    folder: Path, dtype: torch.dtype | str, facts: dict[str, Any], tokenizer: Any, trusted: bool
) -> nn.Module:
    adapter = facts["weights"] == "adapter"
    fetch = partial(load_weights, dtype=dtype, trust_remote_code=trusted)
    if not adapter:
        # A language model's output layer has no part in embeddings; those who adapt it on need it.
        return fetch(str(folder), heads="language_model" in facts)
    base, revision = adapter_base(folder)
    model = fit_vocabulary(fetch(base, revision=revision), tokenizer)
    return merged(load_adapter(model, str(folder)))


def _scorer(folder: Path, dtype: torch.dtype | str, adapter: bool, trusted: bool) -> nn.Module:
    scorer: Any
    fetch = partial(load_scorer, dtype=dtype, trust_remote_code=trusted)
    if adapter:
        base, revision = adapter_base(folder)
        scorer = fetch(base, revision=revision)[0]
        scorer = merged(load_adapter(scorer, str(folder)))
    elif (folder / HEAD).is_file():
        model = load_weights(str(folder), dtype, heads=False, trust_remote_code=trusted)
        scorer = with_head(model)
    else:
        scorer, new = fetch(str(folder))
        if new:
            raise InputError(
                f"{folder} has no trained head, so its scores would be random; train one"
                f" (stage=reranker init_from={folder}) or save the model again"
            )
    _read_head(scorer, folder)
    return scorer


def _language_model(
    folder: Path, dtype: torch.dtype | str, adapter: bool, trusted: bool
) -> nn.Module:
    fetch = partial(load_language_model, dtype=dtype, trust_remote_code=trusted)
    if not adapter:
        return fetch(str(folder))
    base, revision = adapter_base(folder)
    model = fetch(base, revision=revision)
    return merged(load_adapter(model, str(folder)))


def _read_head(scorer: Any, folder: Path) -> None:
    """Fill the head with its weights as they were saved, which `dtype` may have rounded."""
    from safetensors import SafetensorError, safe_open

    found = head_of(scorer)
    if found is None:
        return
    name, head = found
    missing = dict(head.named_parameters())
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file, torch.no_grad():
                stored = set(file.keys())
                for part in list(missing):
                    for key in (f"{name}.{part}", f"base_model.model.{name}.{part}"):
                        if key in stored:
                            missing.pop(part).copy_(file.get_tensor(key))
                            break
        except (SafetensorError, RuntimeError) as error:
            raise InputError(f"{path}: its head does not load ({error}); save it again") from None
    if missing and isinstance(scorer, Headed):
        raise InputError(f"{folder} has no weights of its head; save the model again")
