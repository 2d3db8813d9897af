"""Weights, configs and tokenizers from the hub or a folder; no weight missing, unused or misshapen.

transformers initializes weights that a file lacks at random, with a warning; here that is an error
that names the weights.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caravan.encoding import SLOTS, Encoding, slot_tokens
from caravan.errors import InputError, first_line, reading
from caravan.hub import refuse_unreachable
from caravan.models import cpu, varlen
from caravan.models.crossencoder import Head, head_of, with_head
from caravan.models.remote_code import SETTING, RemoteCodeError, is_remote_code

CLASSIFIER = "ForSequenceClassification"
MOST_LAYERS = 4096
"""No model has more; transformers would create them until memory is exhausted."""


def load_tokenizer(name: str, trust_remote_code: bool = False, **hub: Any) -> Any:
    """A tokenizer of the hub or of a folder; `trust_remote_code` runs its remote code."""
    from transformers import AutoTokenizer

    refuse_unreachable(name, hub.get("revision"))
    with _loading(name, "no tokenizer could be loaded", trust_remote_code):
        auto = AutoTokenizer.from_pretrained
        tokenizer = auto(name, trust_remote_code=trust_remote_code, **hub)
        tokenizer("a")  # some settings fail at the first text only
    return tokenizer


def has_tokenizer(name: str, revision: str | None = None) -> bool:
    """Whether a hub id or folder holds a tokenizer; an adapter may leave it to its base."""
    from transformers.utils import cached_file

    refuse_unreachable(name, revision)
    given: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    with reading(name, "no tokenizer could be loaded"):
        files = ("tokenizer_config.json", "tokenizer.json")
        return any(cached_file(name, file, **given) for file in files)


def load_config(name: str, trust_remote_code: bool = False, **hub: Any) -> Any:
    """transformers' config of the hub or of a folder."""
    from transformers import AutoConfig

    refuse_unreachable(name, hub.get("revision"))
    file = Path(name) / "config.json"
    place = str(file) if file.is_file() else name
    with _loading(place, "no model could be loaded", trust_remote_code):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **hub)
        layers = getattr(config.get_text_config(), "num_hidden_layers", None)
        if isinstance(layers, int) and layers > MOST_LAYERS:
            raise ValueError(f"it has {layers} layers")
    return config


def load_weights(
    name: str,
    dtype: torch.dtype | str,
    attention: str = "auto",
    heads: bool = True,
    auto: Any = None,
    quantization: Any = None,
    trust_remote_code: bool = False,
    **hub: Any,
) -> nn.Module:
    """A transformer from the hub or a folder; every weight must be there.

    Args:
        heads: whether the file may hold heads (lm_head, classifier, ...), which are left out;
            weights of layers beyond the config's number are refused nevertheless.
        auto: transformers' class to load it with; None is AutoModel, which has no head.
        quantization: transformers' config to quantize linear layers while loading.

    Raises:
        InputError: If it cannot be loaded, or weights are missing, misshapen, unused or not finite.
    """
    from transformers import AutoModel
    from transformers.utils import logging

    load_config(name, trust_remote_code, **hub)  # an invalid config is reported as such
    logging.disable_progress_bar()
    given = {"trust_remote_code": trust_remote_code, "output_loading_info": True, **hub}
    if quantization is not None:
        given["quantization_config"] = quantization
    with quiet(), _loading(name, "no model could be loaded", trust_remote_code):
        loaded = (auto or AutoModel).from_pretrained(name, dtype=dtype, **given)
    if not isinstance(loaded, tuple):  # remote code may ignore output_loading_info
        raise InputError(
            "model-not-supported",
            f"{name}: its remote code overrides from_pretrained and does not report missing"
            " weights, which would stay random; choose a model that transformers supports",
        )
    model, report = loaded
    _check_code(name, model)
    # The pooler is a head of BERT's pretraining; embeddings are pooled from the states.
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler.")]
    wrong = [str(key[0]) for key in report.get("mismatched_keys", ())]
    unused = report["unexpected_keys"]
    if heads:
        kinds = {_unnumbered(key) for key, _ in model.named_parameters()}
        prefix = f"{model.base_model_prefix}."
        unused = [key for key in unused if _unnumbered(key.removeprefix(prefix)) in kinds]
    hint = "the folder is incomplete or of another model"
    check_keys(f"{name} does not match its architecture", hint, missing, unused, wrong)
    rounded = any(b.is_floating_point() and b.itemsize < 4 for b in model.buffers())
    if dtype == "auto" and rounded:  # no file has them in full, such as Gemma's embedding scale
        del model
        return load_weights(
            name, torch.float32, attention, heads, auto, quantization, trust_remote_code, **hub
        )
    drop_pooler(model)
    check_finite(name, dict(model.named_parameters()))
    model.revision = hub.get("revision")
    for layer in model.modules() if quantization is not None else ():
        # On a CPU bitsandbytes lays weights out for inference at the first use without gradients,
        # in a validation say, after which no gradient passes through them.
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
    return set_attention(model, attention)


def check_keys(
    text: str, hint: str, missing: Iterable[str], unused: Iterable[str], misshapen: Iterable[str]
) -> None:
    """Raise an InputError with the names of all weights that differ, if there are any."""
    kinds = {"missing": missing, "misshapen": misshapen, "not used": unused}
    found = [f"{key} {kind}" for kind, keys in kinds.items() for key in sorted(keys)]
    if found:
        listed = ", ".join(found)[:300]
        raise InputError(
            "weights-mismatch", f"{text}: {len(found)} weights differ ({listed}); {hint}"
        )


def _unnumbered(key: str) -> str:
    """The name of a weight in whichever layer: `layers.3.norm.weight` is `layers.#.norm.weight`."""
    return re.sub(r"\d+", "#", key)


def drop_pooler(model: Any) -> None:
    """Remove the pooler of BERT's pretraining, which no embedding uses."""
    if getattr(model, "pooler", None) is not None:
        model.pooler = None


def load_language_model(
    name: str, dtype: torch.dtype | str = torch.float32, **settings: Any
) -> Any:
    """A decoder with its pretrained output layer; settings and errors as `load_weights`."""
    from transformers import AutoModelForCausalLM

    return load_weights(name, dtype, auto=AutoModelForCausalLM, **settings)


def is_classifier(config: Any) -> bool:
    """Whether a model has a trained head for sequence classification."""
    return any(kind.endswith(CLASSIFIER) for kind in config.architectures or ())


def load_scorer(
    name: str, dtype: torch.dtype | str, pad_id: int | None = None, **settings: Any
) -> nn.Module:
    """A transformer with a head that scores a text: its own if `is_classifier`, else a new one.

    Args:
        settings: of `load_weights`.

    Raises:
        InputError: As `load_weights`, or if its head has several labels.
    """
    from transformers import AutoModelForSequenceClassification

    hub = {key: settings[key] for key in ("trust_remote_code", "revision") if key in settings}
    config = load_config(name, **hub)
    if not is_classifier(config):
        return with_head(load_weights(name, dtype, **settings), pad_id)
    if config.num_labels != 1:
        text = f"{name} has a head of {config.num_labels} labels; a reranker has one score"
        raise InputError("several-labels", text)
    scorer = load_weights(name, dtype, auto=AutoModelForSequenceClassification, **settings)
    if found := head_of(scorer):
        scorer.set_submodule(found[0], Head.of(found[1]))
    return scorer


def fit_vocabulary(model: Any, tokenizer: Any) -> Any:
    """Resize the embedding to the tokenizer, in place: slots are added to a released vocabulary."""
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        with quiet():
            model.resize_token_embeddings(len(tokenizer))
    return model


def add_slots(tokenizer: Any, encoding: Encoding) -> list[int]:
    """Add the encoding's slots to the tokenizer as special tokens; returns their ids."""
    tokens = [token for name in SLOTS for token in slot_tokens(encoding, name)]
    if tokens:
        tokenizer.add_tokens(tokens, special_tokens=True)
    return [int(token) for token in tokenizer.convert_tokens_to_ids(tokens)]


def set_attention(model: Any, attention: str) -> nn.Module:
    """Choose the attention implementation; "auto" is `caravan.models.cpu` where that is suitable.

    Raises:
        InputError: If the architecture does not support the implementation.
    """
    if attention == "auto" and not cpu.is_suitable(model):
        return model
    if attention == varlen.NAME:
        varlen.check_architecture(model)
    try:
        model.set_attn_implementation(cpu.NAME if attention == "auto" else attention)
    except (ValueError, ImportError, KeyError) as error:
        if attention != "auto":
            raise InputError(
                "attention-not-supported",
                f"attention={attention} is not supported by {type(model).__name__}"
                f" ({first_line(error)})",
            ) from None
    return model


def _check_code(name: str, model: Any) -> None:
    """Of two folders with the same name and config, transformers runs the code of the first."""
    if not is_remote_code(model):
        return
    run = Path(inspect.getfile(type(model)))
    own = Path(name) / run.name
    if own.is_file() and own.read_bytes() != run.read_bytes():
        raise InputError(
            "remote-code-conflict",
            f"{name}: this process already runs a different {run.name} of another folder; use each"
            " folder in a separate command, or rename one",
        )


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' warnings, which Caravan's own checks replace."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def _loading(place: str, problem: str, trusted: bool) -> Iterator[None]:
    """`reading`, with a RemoteCodeError where transformers' error suggests its setting."""
    try:
        with reading(place, problem):
            yield
    except InputError as error:
        if not trusted and SETTING in str(error.__cause__):
            raise RemoteCodeError(place.removesuffix("/config.json")) from None
        raise


@torch.no_grad()
def is_finite(weight: Tensor) -> bool:
    """Whether a weight has no NaN and no infinity; its extremes show it without a copy."""
    if weight.is_meta or not weight.is_floating_point() or not weight.numel():
        return True
    if weight.dtype.itemsize < 2:  # float8, which has no extremes
        weight = weight.to(torch.bfloat16)
    low, high = weight.aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def check_finite(name: str, weights: Mapping[str, Tensor]) -> None:
    """A single NaN in a weight can give embeddings that are finite and wrong.

    Args:
        name: the folder, file or hub id of the weights.

    Raises:
        InputError: With the first weight that holds NaN or infinity.
    """
    for key, weight in weights.items():
        if not is_finite(weight):
            raise InputError(
                "not-finite",
                f"{name}: {key} holds values that are NaN or infinite; the file is damaged, or its"
                " training has diverged: save or download it again",
            )
