"""The model folder: weights, tokenizer and encoding; nothing else is needed to embed or to score.

    model/
      caravan.json        the encoding (prompts, EOS, pooling, lengths, ...) and facts of training
      config.json  model.safetensors             full weights, as transformers reads them
      adapter_config.json  adapter_model.safetensors   or an adapter, as PEFT reads it, where the
                                                 weights that it was trained on have a name
      score.safetensors   an encoder's head; a decoder's is in its weights, or in its adapter
      tokenizer.json ...
      README.md           the card (`caravan.export.model_card`), which nothing reads

It is written beside its final place and renamed, so there is a whole folder, the old or the new.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caravan.encoding import Encoding, adapter_base, read_encoding, write_encoding
from caravan.errors import InputError, reading
from caravan.files import replacing_folder
from caravan.models.adapter_files import BASE_WEIGHTS, load_adapter, load_base, weights_digest
from caravan.models.adapters import merged
from caravan.models.bidirectional import look_both_ways
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, Headed, head_of, with_head
from caravan.models.llara import SlotEncoder
from caravan.models.loading import (
    fit_vocabulary,
    load_config,
    load_language_model,
    load_scorer,
    load_tokenizer,
    load_weights,
    refuse_not_finite,
    set_attention,
)
from caravan.models.positions import refuse_too_long
from caravan.models.query_likelihood import QueryLikelihood
from caravan.models.remote_code import FACT, allowed, is_own_code

ADAPTER = "adapter_model.safetensors"
HEAD = "score.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
Model = BiEncoder | CrossEncoder


def save(
    folder: Path, model: Model, tokenizer: Any, encoding: Encoding, facts: dict[str, Any]
) -> None:
    """Write a model folder, whole or not at all; one that is there already is replaced.

    Args:
        facts: JSON data, kept in the encoding's file for the card: base model, collection, figures.
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
    facts.pop(BASE_WEIGHTS, None)  # of a folder that this model has come from
    if adapter:
        facts[BASE_WEIGHTS] = _settle_base(transformer.active_peft_config, folder)
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
        write_encoding(scratch, encoding, facts)


def _settle_base(config: Any, folder: Path) -> str | None:
    """The digest of an adapter's base, whose path is made one that is found from anywhere."""
    base = Path(config.base_model_name_or_path)
    above = Path.cwd() in folder.resolve().parents  # `adapter_base` looks in these
    if base.is_dir() and not base.is_absolute() and not above:
        config.base_model_name_or_path = str(base.resolve())
    return weights_digest(config.base_model_name_or_path, config.revision)


def load(
    folder: Path,
    dtype: torch.dtype | str = torch.float32,
    kind: str | None = None,
    attention: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any, Encoding, dict[str, Any]]:
    """Load a model folder: (model in eval mode, tokenizer, encoding, facts); adapters are merged.

    Args:
        dtype: of the transformer's weights; a reranker's head is float32.
        kind: what it must be, "retriever" or "reranker"; None takes both.
        attention: transformers' implementation, or "unpadded" (`caravan.models.varlen`).
        trust_remote_code: run code that the model brings along, or its adapter's base
            (`caravan.models.remote_code`); nothing in the folder can.

    Returns:
        The model is a BiEncoder or a CrossEncoder.

    Raises:
        InputError: the encoding is missing or broken, a weight (a reranker's head among them) is
            missing, unknown, misshapen, NaN or infinite, the base of an adapter is another, the
            encoding's lengths exceed the model's positions, the folder is of another kind, or wants
            code of its own that may not run.
    """
    encoding, facts = read_encoding(folder)
    if kind is not None and encoding.kind != kind:
        raise InputError(f"{folder} is a {encoding.kind}; give the folder of a {kind}")
    adapter = facts["weights"] == "adapter"
    if adapter and not (folder / ADAPTER).is_file():
        raise InputError(f"{folder} has no {ADAPTER}; save the model again")
    if not any(folder.glob("[!.]*.safetensors")):
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
    if encoding.kind == "reranker":
        if encoding.scoring == "likelihood":
            language_model = _language_model(folder, dtype, adapter, trusted)
            model = QueryLikelihood(_as_asked(language_model, encoding, attention), encoding)
        else:
            scorer = _scorer(folder, dtype, adapter, trusted)
            model = CrossEncoder(_as_asked(scorer, encoding, attention), encoding)
    else:
        backbone = _backbone(folder, dtype, facts, tokenizer, trusted)
        model = BiEncoder(_as_asked(backbone, encoding, attention), encoding)
    return model.eval(), tokenizer, encoding, facts


def _as_asked(transformer: nn.Module, encoding: Encoding, attention: str) -> nn.Module:
    """Which way an adapter's base looks stands in the encoding alone."""
    if encoding.bidirectional:
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
    model = fit_vocabulary(load_base(folder, fetch), tokenizer)
    return _with_adapter(model, folder)


def _with_adapter(base: nn.Module, folder: Path) -> Any:
    """The base with a folder's adapter merged into it."""
    adapted = load_adapter(base, str(folder))
    with reading(folder / "adapter_config.json", "the adapter cannot be merged into its base"):
        return merged(adapted)


def _scorer(folder: Path, dtype: torch.dtype | str, adapter: bool, trusted: bool) -> nn.Module:
    scorer: Any
    fetch = partial(load_scorer, dtype=dtype, trust_remote_code=trusted)
    if adapter:
        scorer = _with_adapter(load_base(folder, fetch)[0], folder)
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
    return _with_adapter(load_base(folder, fetch), folder)


def _read_head(scorer: Any, folder: Path) -> None:
    """Fill the head with its weights as they were saved, which `dtype` may have rounded."""
    from safetensors import safe_open

    found = head_of(scorer)
    if found is None:
        return
    name, head = found
    missing = dict(head.named_parameters())
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with (
            reading(path, "its head does not load"),
            safe_open(path, framework="pt") as file,
            torch.no_grad(),
        ):
            stored = set(file.keys())
            for part in list(missing):
                for key in (f"{name}.{part}", f"base_model.model.{name}.{part}"):
                    if key in stored:
                        refuse_not_finite(str(path), {key: file.get_tensor(key)})
                        missing.pop(part).copy_(file.get_tensor(key))
                        break
    if missing and isinstance(scorer, Headed):
        raise InputError(f"{folder} has no weights of its head; save the model again")


def refuse_lengths(
    folder: Path, encoding: Encoding, section: str = "encoding.", trust_remote_code: bool = False
) -> None:
    """Compare lengths with the positions of a folder's model, whose weights are not read.

    Args:
        encoding: the folder's, with the lengths of an evaluation in place of its own.
        section: of the config, where these are set, with its dot.

    Raises:
        InputError: a text could be longer than the model has positions for.
    """
    from transformers import AutoModel

    name, hub, facts = str(folder), {}, read_encoding(folder)[1]
    if facts["weights"] == "adapter":
        name, hub["revision"] = adapter_base(folder)
    config = load_config(name, allowed(folder, facts, trust_remote_code), **hub)
    if is_own_code(config):
        return  # its classes are known when it is loaded, which checks the folder's own lengths
    with reading(name, "no model could be loaded"), torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    refuse_too_long(model, encoding, section)
