"""The model folder: weights, tokenizer and encoding, all that is needed to embed or to score.

    model/
      caravan.json        the encoding (prompts, EOS, pooling, lengths, ...) and facts of training
      config.json  model.safetensors             full weights, as transformers reads them
      adapter_config.json  adapter_model.safetensors   or an adapter, as PEFT reads it, if its base
                                                 is a folder or on the hub
      score.safetensors   the head of an encoder; decoders have it in their weights or adapter
      tokenizer.json ...
      README.md           the model card (`caravan.export.model_card`); not read by Caravan

The folder is written under a temporary name and renamed, so it is always complete.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from caravan.data.pairs import CHAT_IDS, answer_ids, chat_facts
from caravan.encoding import Encoding, read_encoding, write_encoding
from caravan.errors import InputError, reading
from caravan.files import replacing_folder
from caravan.models.adapters import load_adapter, merged
from caravan.models.bidirectional import has_adapter, make_bidirectional
from caravan.models.biencoder import BiEncoder, refuse_large
from caravan.models.crossencoder import (
    CrossEncoder,
    Headed,
    QueryLikelihood,
    TokenScorer,
    head_of,
)
from caravan.models.digests import adapter_base, weights_digest
from caravan.models.llara import SlotEncoder
from caravan.models.loading import (
    check_finite,
    fit_vocabulary,
    is_classifier,
    load_config,
    load_language_model,
    load_scorer,
    load_tokenizer,
    load_weights,
    set_attention,
)
from caravan.models.positions import refuse_too_long
from caravan.models.remote_code import FACT, is_allowed, is_remote_code

ADAPTER = "adapter_model.safetensors"
HEAD = "score.safetensors"
ROLES = ("bos_token", "eos_token", "cls_token", "sep_token", "pad_token")
"""Special tokens that texts get."""
BASE_WEIGHTS = "base_weights"
"""Key in the facts of an adapter folder: the digest of the base weights."""
Model = BiEncoder | CrossEncoder
_Loaded = TypeVar("_Loaded")


def save(
    folder: Path, model: Model, tokenizer: Any, encoding: Encoding, facts: dict[str, Any]
) -> None:
    """Write a model folder atomically; an existing one is replaced.

    Args:
        facts: JSON data for the model card: base model, collection, metrics.
    """
    from safetensors.torch import save_file
    from transformers.utils import logging as verbosity

    verbosity.disable_progress_bar()
    transformer: Any = model.transformer
    adapter = has_adapter(transformer)
    if adapter and not transformer.active_peft_config.base_model_name_or_path:
        transformer = merged(copy.deepcopy(transformer))  # a random base that is not saved
        adapter = False
    remote = any(map(is_remote_code, (tokenizer, *transformer.modules())))
    facts = {key: facts[key] for key in facts.keys() - {BASE_WEIGHTS, CHAT_IDS}}
    facts["weights"] = "adapter" if adapter else "full"
    facts |= chat_facts(tokenizer, encoding)
    facts[FACT] = remote or encoding.has_custom_pooling
    if isinstance(model, SlotEncoder) and transformer is model.transformer and not adapter:
        facts["language_model"] = type(transformer).__name__
    if adapter:
        facts[BASE_WEIGHTS] = _settle_base(transformer.active_peft_config, folder)
    with replacing_folder(folder) as scratch:
        if isinstance(transformer, Headed):
            transformer.backbone.save_pretrained(scratch)
            head = {"score.weight": transformer.score.weight.detach().contiguous()}
            save_file(head, scratch / HEAD)
        elif adapter:  # added embedding rows are in the base or in the adapter
            transformer.save_pretrained(scratch, save_embedding_layers=False)
        else:
            transformer.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        write_encoding(scratch, encoding, facts)


def _settle_base(config: Any, folder: Path) -> str | None:
    """Make the path of an adapter's base absolute if needed; returns the digest of its weights."""
    base = Path(config.base_model_name_or_path)
    above = Path.cwd() in folder.resolve().parents  # `adapter_base` looks in these
    if base.is_dir() and not base.is_absolute() and not above:
        config.base_model_name_or_path = str(base.resolve())
    return weights_digest(config.base_model_name_or_path, config.revision)


def load(
    folder: Path,
    dtype: torch.dtype | str = torch.float32,
    attention: str = "auto",
    trust_remote_code: bool = False,
) -> tuple[Any, Any, Encoding, dict[str, Any]]:
    """Load a model folder; adapters are merged.

    Args:
        dtype: dtype of the transformer's weights; the head of a reranker is float32.
        attention: transformers' implementation, or "unpadded" (`caravan.models.varlen`).
        trust_remote_code: run remote code of the model or of its adapter's base
            (`caravan.models.remote_code`).

    Returns:
        The model (a BiEncoder or a CrossEncoder in eval mode), tokenizer, encoding and facts.

    Raises:
        InputError: If the folder is incomplete, a weight is missing, unused,
            not finite or of the wrong shape, an adapter's base has other weights, the lengths
            exceed the model's positions, or remote code is needed but not allowed.
    """
    encoding, facts = read_encoding(folder)
    adapter = facts["weights"] == "adapter"
    tokenizers = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json")
    needed = {
        ADAPTER: not adapter or (folder / ADAPTER).is_file(),
        "weights (*.safetensors)": any(folder.glob("[!.]*.safetensors")),
        "tokenizer_config.json": (folder / "tokenizer_config.json").is_file(),
        "tokenizer.json": any((folder / name).is_file() for name in tokenizers),
    }
    if missing := [name for name, found in needed.items() if not found]:
        text = f"{folder} lacks {', '.join(missing)}; save the model again"
        raise InputError("incomplete-folder", text)
    trusted = is_allowed(folder, encoding, facts, trust_remote_code)
    tokenizer = load_tokenizer(str(folder), trust_remote_code=trusted)
    ids = chat_facts(tokenizer, encoding).get(CHAT_IDS)
    if facts.get(CHAT_IDS, ids) != ids:
        raise InputError(
            "other-token-ids",
            f"{folder}: its tokenizer reads the chat template or the scored tokens as other ids"
            " than caravan.json records; restore the tokenizer's files, or save the model again",
        )
    build, fetch = _kind(tokenizer, encoding)
    fetch = partial(fetch, dtype=dtype, trust_remote_code=trusted)
    if adapter:
        base = load_base(folder, fetch)
        if encoding.kind == "retriever":
            fit_vocabulary(base, tokenizer)
        transformer = load_adapter(base, str(folder))
        with reading(folder / "adapter_config.json", "the adapter cannot be merged into its base"):
            transformer = merged(transformer)
    else:
        # The output layer of an adapted model does not affect embeddings; it is adapted further.
        heads = encoding.kind == "reranker" or "language_model" in facts
        transformer = fetch(str(folder), heads=heads and not (folder / HEAD).is_file())
        if build is CrossEncoder:
            _read_head(transformer, folder)
    _refuse_other_vocabulary(folder, transformer, tokenizer)
    if encoding.bidirectional:  # an adapter's base has another config
        make_bidirectional(transformer)
    if attention != "auto":
        transformer = set_attention(transformer, attention)
    return build(transformer, encoding).eval(), tokenizer, encoding, facts


def _refuse_other_vocabulary(folder: Path, transformer: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose end, padding, ... has no embedding.

    Tokens that no text gets may have none, such as the images' of a model for texts.
    """
    try:
        rows = transformer.get_input_embeddings().weight.shape[0]
    except (NotImplementedError, AttributeError):  # of remote code
        return
    tokens = [token for role in ROLES if (token := getattr(tokenizer, role, None))]
    ids = zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True)
    if unknown := [token for token, number in ids if number is not None and number >= rows]:
        raise InputError(
            "other-token-ids",
            f"{folder}: the model has {rows} embeddings, and none for {unknown[0]!r} of its"
            " tokenizer; restore the tokenizer's files, or save the model again",
        )


def _kind(tokenizer: Any, encoding: Encoding) -> tuple[Any, Callable[..., Any]]:
    """The class of a model, and the function that loads its transformer."""
    if encoding.kind == "retriever":
        return BiEncoder, load_weights
    if encoding.scoring == "head":
        return CrossEncoder, load_scorer
    if encoding.scoring == "likelihood":
        return QueryLikelihood, load_language_model
    return partial(TokenScorer, tokens=answer_ids(tokenizer, encoding)), load_language_model


def load_base(folder: Path, load: Callable[..., _Loaded]) -> _Loaded:
    """Load the base of an adapter folder.

    Args:
        load: called with the base's name and `revision`.

    Raises:
        InputError: If the adapter was trained on other base weights.
    """
    base, revision = adapter_base(folder)
    loaded = load(base, revision=revision)  # the files of a hub's model are then in the cache
    recorded = read_encoding(folder)[1].get(BASE_WEIGHTS)  # folders of older versions have none
    if recorded is not None and weights_digest(base, revision) != recorded:
        raise InputError(
            "other-base-weights",
            f"{folder}: the weights of its base {base} are not those that the adapter was trained"
            " on; restore those, or write their path into"
            f" {folder / 'adapter_config.json'} (base_model_name_or_path)",
        )
    return loaded


@torch.no_grad()
def _read_head(scorer: Any, folder: Path) -> None:
    """Load the head in float32, where `dtype` may have rounded it.

    Raises:
        InputError: If no file has it, and it is new.
    """
    from safetensors import safe_open

    name, head = head_of(scorer) or ("", nn.Identity())
    missing = {f"{name}.{part}": weight for part, weight in head.named_parameters()}
    for path in sorted(folder.glob("[!.]*.safetensors")):
        with reading(path, "its head cannot be loaded"), safe_open(path, framework="pt") as file:
            for key in missing.keys() & set(file.keys()):
                check_finite(str(path), {key: file.get_tensor(key)})
                missing.pop(key).copy_(file.get_tensor(key))
    if missing and not is_classifier(scorer.config):
        raise InputError(
            "no-trained-head",
            f"{folder} has no trained head, so its scores would be random; save the model again,"
            f" or train a head (stage=reranker backbone=from_folder backbone.folder={folder})",
        )


def refuse_unsuitable(
    folder: Path, encoding: Encoding, section: str = "encoding.", trust_remote_code: bool = False
) -> None:
    """Check the lengths and the size of embeddings against a folder's model, without its weights.

    Args:
        encoding: the folder's encoding with the settings of an evaluation.
        section: prefix of these settings in the config, with its dot, for messages.

    Raises:
        InputError: If a text could have more tokens than the model has positions, or an embedding
            more dimensions than its states.
    """
    from transformers import AutoModel

    config = config_of(folder, trust_remote_code)
    refuse_large(config, encoding.dim, section)
    if is_remote_code(config):
        return  # its classes are unknown before loading, which checks the folder's lengths
    with reading(folder, "no model could be loaded"), torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=False)
    refuse_too_long(model, encoding, section)


def config_of(folder: Path, trust_remote_code: bool = False) -> Any:
    """transformers' config of a folder's model; of an adapter, that of its base."""
    encoding, facts = read_encoding(folder)
    trusted = is_allowed(folder, encoding, facts, trust_remote_code)
    adapter = facts["weights"] == "adapter"
    name, revision = adapter_base(folder) if adapter else (str(folder), None)
    return load_config(name, trusted, revision=revision)
