"""What the files of a released model state about its encoding, read before it is adopted.

A folder of sentence-transformers has its modules in `modules.json`, the pooling in the config of
its `Pooling`, the length in `sentence_bert_config.json`, and prompts and similarity in
`config_sentence_transformers.json`. Each file is JSON and is read without sentence-transformers;
whatever cannot be expressed exactly is reported. Rerankers: `caravan.models.released_pairs`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from caravan.encoding import INSTRUCTION, LONGEST
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
HARMLESS = {
    "trust_remote_code", "padding_side", "attn_implementation", "dtype", "torch_dtype",
    "unpad_inputs", "use_memory_efficient_attention",
}  # fmt: skip
"""Arguments of the model or tokenizer that change no embedding."""
UNSCALED = {"dot", "euclidean", "manhattan"}
"""Similarities that depend on the length of embeddings."""
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
    read = reader(name, revision)
    try:
        with reading(name, "its files of sentence-transformers cannot be read"):
            if kind == "reranker":
                return Released(_pair_lengths(read), {})
            modules = read(MODULES)
            return Released({}, {}) if modules is None else _retriever(name, read, modules)
    except InputError as error:
        return Released({}, {"pooling": f"{error}; repair the file, or set it"})


def _retriever(name: str, read: Reader, modules: list[dict[str, Any]]) -> Released:
    """The encoding of a bi-encoder: Transformer, Pooling, perhaps Normalize."""
    problems: dict[str, str] = {}
    settings: dict[str, Any] = {"append_eos": False}  # the tokenizer adds it, or nothing does
    config, transformer = read(SETTINGS) or {}, transformer_config(read)
    prompts = {key: text for key, text in (config.get("prompts") or {}).items() if text}
    pooling, problem = _pooling(read, modules, transformer, bool(prompts))
    if problem:
        text = f"{name} {problem}, which a model folder cannot do"
        problems["pooling"] = f"{text}; set it to use the transformer without that"
    else:
        settings["pooling"] = pooling
    scaled = any(kind_of(module) == "Normalize" for module in modules)
    similarity = config.get("similarity_fn_name")
    truncated = config.get("truncate_dim") or 0  # after Normalize
    settings["normalize"] = scaled or similarity == "cosine"
    # A folder cuts embeddings before it normalizes them; a cosine does not depend on the order.
    whole = truncated == (read("config.json") or {}).get("hidden_size")
    settings["dim"] = 0 if whole else truncated
    if scaled and (similarity == "manhattan" or (truncated and similarity in UNSCALED)):
        cut = "truncates normalized embeddings (truncate_dim)" if truncated else "has a Normalize"
        problems["normalize"] = (
            f"{name} {cut} and compares by the similarity {similarity}, which a model folder cannot"
            " do; set it to true for the cosine"
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
    longest = longest_text(read, transformer)
    for side, key in (("query", "query_length"), ("passage", "document_length")):
        settings[f"{side}_length"] = _called(transformer) or transformer.get(key) or longest
    return Released(settings, problems)


def _pooling(
    read: Reader, modules: list[dict[str, Any]], transformer: dict[str, Any], prompted: bool
) -> tuple[str, str]:
    """The pooling, and what a model folder cannot do; one of them is empty.

    Args:
        transformer: the config of the Transformer.
        prompted: whether there are prompts.
    """
    own = all(str(module["type"]).startswith("sentence_transformers.") for module in modules)
    kinds = [kind_of(module) for module in modules]
    known = kinds in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"])
    if not known or not own:
        return "", f"has the modules {', '.join(str(module['type']) for module in modules)}"
    if modules[0]["path"]:
        return "", f"has its transformer in the folder {modules[0]['path']}"
    if "message" in (transformer.get("modality_config") or {}):
        return "", "reads texts by a chat template"
    if problem := reading_problem(read, transformer):
        return "", problem
    config = read(f"{modules[1]['path']}/config.json")
    if not config:
        return "", "lacks the config of its Pooling"
    mode = config.get("pooling_mode") or [FLAGS[key] for key in FLAGS if config.get(key)]
    modes = [mode] if isinstance(mode, str) else list(mode) or ["mean"]
    if len(modes) > 1 or modes[0] not in POOLINGS:
        return "", f"has the pooling {' and '.join(modes)}"
    if prompted and config.get("include_prompt") is False:
        return "", "leaves its prompts out of the pooling"
    return POOLINGS[modes[0]], ""


def reading_problem(
    read: Reader,
    config: dict[str, Any],
    task: str = "feature-extraction",
    output: str = "last_hidden_state",
    called: Collection[str] = ("text.max_length",),
) -> str:
    """How a Transformer reads texts otherwise than a model folder; empty if it does not.

    Args:
        config: of the Transformer.
        task: its expected task.
        output: of the model, that it must use.
        called: the settings of the tokenizer's call that are allowed.
    """
    if config.get("transformer_task", "feature-extraction") != task:
        return f"has the task {config.get('transformer_task')}"
    forward = {"method": "forward", "method_output_name": output}
    if (config.get("modality_config") or {"text": forward}).get("text") != forward:
        return f"has other outputs than {output}"
    arguments = [key for key in config if key.endswith(("_args", "_kwargs"))]
    for key in arguments:
        unknown = sorted((config[key] or {}).keys() - HARMLESS)
        if unknown and key != "processing_kwargs":
            return f"sets {', '.join(unknown)} in {key}"
    if config.get("query_expansion"):
        return "expands queries"
    processing = config.get("processing_kwargs") or {}
    settings = [f"{part}.{key}" for part, values in processing.items() for key in values]
    if unknown := sorted(set(settings) - set(called)):
        return f"sets {', '.join(unknown)} in processing_kwargs"
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
    longest = longest_text(read, transformer_config(read))
    query = min(32, longest // 4)
    return {"query_length": query, "passage_length": longest - query}


def transformer_config(read: Reader) -> dict[str, Any]:
    """The config of the Transformer; empty if there is none."""
    return next(filter(None, map(read, TRANSFORMER)), {})


def _called(transformer: dict[str, Any]) -> int:
    """The length with which the tokenizer is called, which wins over all others; 0 if none."""
    processing = (transformer.get("processing_kwargs") or {}).get("text") or {}
    return int(processing.get("max_length") or 0)


def longest_text(read: Reader, transformer: dict[str, Any]) -> int:
    """Tokens of the longest text, with special tokens, that is not truncated."""
    if given := _called(transformer) or transformer.get("max_seq_length"):
        return int(given)
    tokens = (read("tokenizer_config.json") or {}).get("model_max_length")
    positions = (read("config.json") or {}).get("max_position_embeddings")
    return int(min(one for one in (tokens, positions, LONGEST) if one and one > 0))


def kind_of(module: dict[str, Any]) -> str:
    """The class of an entry of `modules.json`, without its package."""
    return str(module["type"]).rpartition(".")[2]


def reader(name: str, revision: str | None) -> Reader:
    """Reads the files of a released model."""
    return partial(_read, name, revision=revision)


def _read(name: str, file: str, revision: str | None) -> Any:
    """A JSON file of a hub id or folder; None if there is none, or the hub does not give it."""
    from transformers.utils import cached_file

    optional = ("missing_entries", "gated_repo", "connection_errors")
    given: dict[str, Any] = {f"_raise_exceptions_for_{problem}": False for problem in optional}
    with reading(f"{name}/{file}", "it cannot be read"):
        path = cached_file(name, file, revision=revision, **given)
        return None if path is None else json.loads(Path(path).read_bytes())
