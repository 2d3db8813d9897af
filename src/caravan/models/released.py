"""What the files of a released model state about its encoding, read before it is adopted.

A folder of sentence-transformers has its modules in `modules.json`, the pooling in the config of
its `Pooling`, the length in `sentence_bert_config.json`, and prompts and similarity in
`config_sentence_transformers.json`. A reranker has the ids of its two tokens in the config of its
`LogitScore`, and a chat template with the roles "query" and "document". Each file is JSON and is
read without sentence-transformers; whatever cannot be expressed exactly is reported.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from caravan.data.pairs import PairTemplates, answer_ids
from caravan.encoding import INSTRUCTION, LONGEST, Encoding
from caravan.errors import InputError, reading
from caravan.hub import is_available

Reader = Callable[[str], Any]
"""Returns the content of a file by its name; None if there is none."""

MODULES, SETTINGS = "modules.json", "config_sentence_transformers.json"
TRANSFORMER = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
"""Names that the config of the Transformer has had."""
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
HARMLESS = {
    *("trust_remote_code", "padding_side", "attn_implementation", "dtype", "torch_dtype"),
    *("unpad_inputs", "use_memory_efficient_attention"),
}
"""Arguments of the model or tokenizer that change no embedding."""
POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""Older configs of a Pooling have a flag for each mode."""
OUTPUTS = ("module_input_name", "module_output_name")
SCORE = "LogitScore"
INCREASING = {"Identity", "Sigmoid", "Tanh", "LogSigmoid"}
"""Activations of torch that keep the order of the scores."""
PAIR = (("", "Which animals cross the desert?"), ("", "Camels cross it, by night."))
_ROLE = re.compile(r"['\"]document['\"]")
_INSTRUCT = re.compile(r"(Instruct: )([^\n]+)(\nQuery: ?)")
"""The prompt of Qwen3-Embedding and E5-Mistral."""


class Released(NamedTuple):
    """Settings of `Encoding` that files state, and why they do not state another one, by name."""

    settings: dict[str, Any]
    problems: dict[str, str]


def released_encoding(name: str, revision: str | None = None, kind: str = "retriever") -> Released:
    """The encoding that the files of sentence-transformers state; empty if there are none.

    Args:
        name, revision: hub id or folder of the released model.
        kind: of the model to adopt; of a "reranker" only the lengths are read.
    """
    if not is_available(name, revision):
        return Released({}, {})
    read = partial(_read, name, revision=revision)
    try:
        with reading(name, "its files of sentence-transformers cannot be read"):
            if kind == "reranker":
                return Released(_pair_lengths(read), {})
            modules = read(MODULES)
            return Released({}, {}) if modules is None else _retriever(name, read, modules)
    except InputError as error:
        return Released({}, {"pooling": f"{error}; repair the file, or set it"})


def _retriever(name: str, read: Reader, modules: list[dict[str, Any]]) -> Released:
    """The encoding of a bi-encoder: Transformer, Pooling, perhaps a cut and Normalize."""
    problems: dict[str, str] = {}
    settings: dict[str, Any] = {"append_eos": False}  # the tokenizer adds it, or nothing does
    config, transformer = read(SETTINGS) or {}, _transformer(read)
    prompts = {key: text for key, text in (config.get("prompts") or {}).items() if text}
    cuts = [_cut(read, module) for module in modules]
    uncut = [module for module, cut in zip(modules, cuts, strict=True) if not cut]
    pooling, problem = _pooling(read, uncut, transformer, bool(prompts))
    if problem:
        text = f"{name} {problem}, which a model folder cannot do"
        problems["pooling"] = f"{text}; set it to use the transformer without that"
    else:
        settings["pooling"] = pooling
    scaled = any(_kind(module) == "Normalize" for module in modules)
    similarity = config.get("similarity_fn_name")
    truncated = config.get("truncate_dim") or (cuts[-1] if scaled else 0)  # after Normalize
    settings["normalize"] = scaled or similarity == "cosine"
    # A folder cuts embeddings before it normalizes them; a cosine does not depend on the order.
    dims = {*cuts, truncated} - {0, (read("config.json") or {}).get("hidden_size")}
    settings["dim"] = min(dims, default=0)
    if truncated and scaled and similarity == "dot":
        problems["normalize"] = (
            f"{name} truncates normalized embeddings (truncate_dim) and compares them by the dot"
            " product, which a model folder cannot do; set it to true for the cosine"
        )
    elif not scaled and similarity not in ("cosine", "dot"):
        problems["normalize"] = (
            f"{name} names {similarity or 'no'} similarity and has no Normalize; set it to true"
            " for the cosine (the default of sentence-transformers), to false for the dot product"
        )
    for side, key, others in (
        ("query", "query", prompts.keys() - {"document", "passage", "corpus"}),
        ("passage", "document", prompts.keys() & {"passage", "corpus"}),
    ):
        fields = "{text}" if side == "query" else "{title} {text}"
        prompt = prompts.get(key, "")
        match = _INSTRUCT.fullmatch(prompt)
        if match and side == "query":
            settings["instruction"] = match[2]
            settings["query_template"] = f"{match[1]}{INSTRUCTION}{match[3]}{fields}"
        elif prompt or not others:
            escaped = prompt.replace("{", "{{").replace("}", "}}")
            settings[f"{side}_template"] = escaped + fields
        else:
            listed = ", ".join(f"{other}: {prompts[other]!r}" for other in sorted(others)[:8])
            problems[f"{side}_template"] = (
                f"{name} has no prompt named {key}, but others ({listed}); set it to the prompt"
                f" to use and {fields}, or to {fields} alone"
            )
    longest = _longest(read, transformer)
    settings["query_length"] = transformer.get("query_length") or longest
    settings["passage_length"] = transformer.get("document_length") or longest
    return Released(settings, problems)


def _cut(read: Reader, module: dict[str, Any]) -> int:
    """How many dimensions a Dense keeps that only cuts embeddings, as in an export; 0 if none."""
    if _kind(module) != "Dense":
        return 0
    config = read(f"{module['path']}/config.json") or {}
    weights = read(f"{module['path']}/model.safetensors") or {}
    plain = str(config.get("activation_function")).endswith(".Identity")
    outputs = {config.get(key) or "sentence_embedding" for key in OUTPUTS}
    if list(weights) != ["linear.weight"] or not plain or outputs != {"sentence_embedding"}:
        return 0
    weight = weights["linear.weight"].float()
    return len(weight) if torch.equal(weight, torch.eye(*weight.shape)) else 0


def _pooling(
    read: Reader, modules: list[dict[str, Any]], transformer: dict[str, Any], prompted: bool
) -> tuple[str, str]:
    """The pooling, and what a model folder cannot do; one of them is empty.

    Args:
        transformer: the config of the Transformer.
        prompted: whether there are prompts.
    """
    own = all(str(module["type"]).startswith("sentence_transformers.") for module in modules)
    kinds = [_kind(module) for module in modules]
    known = kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    if not known or not own:
        return "", f"has the modules {', '.join(str(module['type']) for module in modules)}"
    if modules[0]["path"]:
        return "", f"has its transformer in the folder {modules[0]['path']}"
    if problem := _reading_problem(read, transformer):
        return "", problem
    config = read(f"{modules[1]['path']}/config.json") or {}
    mode = config.get("pooling_mode") or [FLAGS[key] for key in FLAGS if config.get(key)]
    modes = [mode] if isinstance(mode, str) else list(mode) or ["mean"]
    if len(modes) > 1 or modes[0] not in POOLINGS:
        return "", f"has the pooling {' and '.join(modes)}"
    if prompted and config.get("include_prompt") is False:
        return "", "leaves its prompts out of the pooling"
    return POOLINGS[modes[0]], ""


def _reading_problem(read: Reader, config: dict[str, Any]) -> str:
    """How a Transformer reads texts otherwise than a model folder; empty if it does not.

    Args:
        config: of the Transformer.
    """
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        return f"has the task {config['transformer_task']}"
    given = config.get("modality_config") or {"text": FORWARD}
    if given.get("text") != FORWARD or "message" in given:
        return "reads texts by a chat template, or other states than the last ones"
    arguments = [key for key in config if key.endswith(("_args", "_kwargs"))]
    for key in arguments:
        unknown = sorted((config[key] or {}).keys() - HARMLESS)
        if unknown and key != "processing_kwargs":
            return f"sets {', '.join(unknown)} in {key}"
    if config.get("query_expansion"):
        return "expands queries"
    processing = config.get("processing_kwargs") or {}
    if processing.keys() - {"text"} or (processing.get("text") or {}).keys() - {"max_length"}:
        return f"sets processing_kwargs {processing}"
    tokenizer = read("tokenizer_config.json") or {}
    if tokenizer.get("truncation_side", "right") != "right":
        return "truncates texts on the left"
    if config.get("do_lower_case") and tokenizer.get("do_lower_case") is not True:
        normalizer = json.dumps((read("tokenizer.json") or {}).get("normalizer"))
        if not re.search(r'"lowercase": true|"type": "Lowercase"', normalizer):
            return "lowercases texts (do_lower_case), unlike its tokenizer"
    return ""


def _pair_lengths(read: Reader) -> dict[str, int]:
    """The lengths of a released cross-encoder, which has a limit for the whole pair."""
    architectures = (read("config.json") or {}).get("architectures") or [""]
    if not architectures[0].endswith("ForSequenceClassification"):
        return {}
    longest = _longest(read, _transformer(read))
    query = min(32, longest // 4)
    return {"query_length": query, "passage_length": longest - query}


def _transformer(read: Reader) -> dict[str, Any]:
    """The config of the Transformer; empty if there is none."""
    return next(filter(None, map(read, TRANSFORMER)), {})


def _longest(read: Reader, transformer: dict[str, Any]) -> int:
    """Tokens of the longest text, with special tokens, that is not truncated."""
    processing = (transformer.get("processing_kwargs") or {}).get("text") or {}
    if given := processing.get("max_length") or transformer.get("max_seq_length"):
        return int(given)
    tokens = (read("tokenizer_config.json") or {}).get("model_max_length")
    positions = (read("config.json") or {}).get("max_position_embeddings")
    return int(min(one for one in (tokens, positions, LONGEST) if one and one > 0))


def check_released(name: str, revision: str | None, tokenizer: Any, encoding: Encoding) -> None:
    """Check that the encoding of a reranker is that of its released files, where they have one.

    Args:
        name, revision: hub id or folder of the released model.

    Raises:
        InputError: If the files name other tokens, another way to score, another prompt, or
            another chat template.
    """
    read = partial(_read, name, revision=revision)
    if encoding.scoring == "token":
        _check_modules(name, read, answer_ids(tokenizer, encoding))
    elif encoding.scoring == "head":
        _check_cross_encoder(name, read, encoding)
    template = tokenizer.chat_template
    if encoding.pair != "joined" or not isinstance(template, str) or not _ROLE.search(template):
        return
    roles = zip(("query", "document"), PAIR, strict=True)
    messages = [{"role": role, "content": text} for role, (_, text) in roles]
    with reading(name, "its chat template cannot write a pair"):
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        found = tokenizer(text, add_special_tokens=False)["input_ids"]
    (own,) = PairTemplates(tokenizer, encoding).pairs(PAIR[:1], PAIR[1:])
    if found != own.ids:
        raise InputError(
            "other-chat-template",
            f"{name}: its chat template writes {text[:400]!r} for a pair,"
            " which is not what encoding.prefix, .query_template, .passage_template, .suffix and"
            " .instruction write; set them to it",
        )


def _check_modules(name: str, read: Reader, answers: tuple[int, int]) -> None:
    modules = read(MODULES)
    if modules is None:
        return
    paths = {_kind(module): str(module["path"]) for module in modules}
    if SCORE not in paths:
        raise InputError(
            "not-token-scored",
            f"{name} is a folder of sentence-transformers with the modules {', '.join(paths)}, and"
            f" no {SCORE}; choose a model that is scored by two tokens, or a plain language model",
        )
    score = read(f"{paths[SCORE]}/config.json") or {}
    found = (score.get("true_token_id"), score.get("false_token_id"))
    if found != answers:
        raise InputError(
            "other-tokens",
            f"{name} is scored by the tokens {found[0]} and {found[1]}, and encoding.positive and"
            f" encoding.negative are {answers[0]} and {answers[1]}; set them to its own",
        )


def _check_cross_encoder(name: str, read: Reader, encoding: Encoding) -> None:
    """Refuse modules, an activation or a prompt with which scores would be in another order."""
    modules, config = read(MODULES), read(SETTINGS) or {}
    kinds = [_kind(module) for module in modules or ()]
    if modules is not None and kinds != ["Transformer"]:
        raise InputError(
            "not-readable",
            f"{name} is a folder of sentence-transformers with the modules {', '.join(kinds)}; only"
            " a head of transformers (...ForSequenceClassification) can be adopted",
        )
    model = read("config.json") or {}
    activation = (
        config.get("activation_fn")
        or (model.get("sentence_transformers") or {}).get("activation_fn")
        or model.get("sbert_ce_default_activation_function")
        or "torch.nn.modules.linear.Identity"
    )
    package, _, kind = activation.rpartition(".")
    if not package.startswith("torch.") or kind not in INCREASING:
        raise InputError(
            "not-readable",
            f"{name}: its scores go through {activation}, which may change their order, and a model"
            " folder has the scores of the head; choose another model",
        )
    default = config.get("default_prompt_name")
    prompt = (config.get("prompts") or {}).get(default) or ""
    if not encoding.template("query").format(text="").startswith(prompt):
        raise InputError(
            "other-prompt",
            f"{name} reads its prompt {prompt!r} before a query, and encoding.query_template is"
            f" {encoding.query_template!r}; set it to the prompt and {{text}}",
        )


def _kind(module: dict[str, Any]) -> str:
    return str(module["type"]).rpartition(".")[2]


def _read(name: str, file: str, revision: str | None) -> Any:
    """A JSON file, or weights, of a hub id or folder; None if there are none.

    A file that the hub does not give counts as missing.
    """
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    optional = ("missing_entries", "gated_repo", "connection_errors")
    given: dict[str, Any] = {f"_raise_exceptions_for_{problem}": False for problem in optional}
    with reading(f"{name}/{file}", "it cannot be read"):
        path = cached_file(name, file, revision=revision, **given)
        if path is None:
            return None
        weights = file.endswith(".safetensors")
        return load_file(path) if weights else json.loads(Path(path).read_bytes())
