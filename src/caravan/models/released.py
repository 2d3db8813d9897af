"""Read the `Encoding` (pooling, prompts, lengths) that the files of a released model declare.

A model of sentence-transformers has its modules in `modules.json`, the pooling in the config of its
`Pooling`, the length in `sentence_bert_config.json`, and prompts and similarity in
`config_sentence_transformers.json`. Each file is JSON and is read without sentence-transformers;
whatever cannot be expressed exactly is reported. A `CrossEncoder` reads a pair as its tokenizer's
pair, or by a chat template with the roles "query" and "document".
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from caravan.data.pairs import PairTemplates, answer_ids
from caravan.data.tokenization import log_once
from caravan.encoding import INSTRUCTION, LONGEST, Encoding, escaped
from caravan.errors import InputError, reading
from caravan.hub import is_available

CONFIG, TOKENIZER = "config.json", "tokenizer_config.json"
MODULES, ENCODING = "modules.json", "config_sentence_transformers.json"
TRANSFORMER = [
    f"sentence_{kind}_config.json"
    for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
"""Names that the config of the Transformer has had."""
MODULES_OF = {
    "retriever": (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]),
    "head": (["Transformer"],),
    "token": (["Transformer", "LogitScore"],),
}
"""The modules that a model folder can replace; of a reranker by `Encoding.scoring`."""
ANY = (
    "max_seq_length=*", "query_length=*", "document_length=*", "do_lower_case=False",
    "processing_kwargs.text.max_length=*", "module_output_name=*",
    "modality_config.text.method=forward",
    "unpad_inputs=*", "*args.unpad_inputs=*", "*args.padding_side=*", "*args.*dtype=*",
    "*args.trust_remote_code=*", "*args.attn_implementation=*",
    "*args.use_memory_efficient_attention=*",
)  # fmt: skip
PAIRS = (
    "modality_config.text.method_output_name=logits", "modality_config.message.*",
    "processing_kwargs.text.truncation=*", "processing_kwargs.chat_template.restore_suffix=*",
)  # fmt: skip
STATES = "modality_config.text.method_output_name=last_hidden_state"
SETTINGS = {
    "retriever": (*ANY, STATES, "transformer_task=feature-extraction"),
    "head": (*ANY, *PAIRS, "transformer_task=sequence-classification"),
    "token": (*ANY, *PAIRS, "transformer_task=text-generation"),
}
"""Settings of the Transformer that are read, or change neither an embedding nor a score."""
POOLINGS = {
    "": "mean",
    "pooling_mode=cls": "cls",
    "pooling_mode=mean": "mean",
    "pooling_mode=lasttoken": "last",
    "pooling_mode_cls_token=True": "cls",
    "pooling_mode_mean_tokens=True": "mean",
    "pooling_mode_lasttoken=True": "last",
}
"""Modes in the config of a Pooling; older ones have a flag for each."""
UNSCALED = {"dot", "euclidean", "manhattan"}
"""Similarities that depend on the length of embeddings."""
PASSAGES = {"document", "passage", "corpus"}
"""Names of prompts that are not those of queries."""
PAIR = (("", "Which animals cross the desert?"), ("", "Camels cross it, by night."))
_INCREASING = re.compile(r"torch\..*\b(Identity|Sigmoid|Tanh|LogSigmoid)")
_INSTRUCT = re.compile(r"(Instruct: )([^\n]+)(\nQuery: ?)")  # Qwen3-Embedding's, E5-Mistral's
_LOWERCASE = re.compile(r'"lowercase": true|"type": "Lowercase"')
_ROLE = re.compile(r"['\"]document['\"]")


class Released(NamedTuple):
    """Settings of `Encoding` that files state, and why they do not state another one, by name."""

    settings: dict[str, Any]
    problems: dict[str, str]


class Files(dict[str, Any]):
    """The JSON files of a hub id or folder, by name; a missing or unreachable one is empty."""

    def __init__(self, name: str, revision: str | None) -> None:
        super().__init__()
        self.name, self.revision = name, revision

    def __missing__(self, file: str) -> Any:
        from transformers.utils import cached_file

        optional = ("missing_entries", "gated_repo", "connection_errors")
        given: dict[str, Any] = {f"_raise_exceptions_for_{problem}": False for problem in optional}
        with reading(f"{self.name}/{file}", "it cannot be read"):
            path = cached_file(self.name, file, revision=self.revision, **given)
            self[file] = {} if path is None else json.loads(Path(path).read_bytes())
        return self[file]

    @property
    def modules(self) -> list[str]:
        """The classes of the modules, with the package if it is not the library's own."""
        kinds = [str(module["type"]) for module in self[MODULES]]
        own = "sentence_transformers."
        return [kind.rpartition(".")[2] if kind.startswith(own) else kind for kind in kinds]

    @property
    def transformer(self) -> dict[str, Any]:
        """The config of the module Transformer."""
        found = (self[file] for file in TRANSFORMER)
        return {"transformer_task": "feature-extraction", **next(filter(None, found), {})}

    @property
    def prompts(self) -> dict[str, str]:
        prompts = self[ENCODING].get("prompts") or {}
        return {name: text for name, text in prompts.items() if text}

    def second(self) -> dict[str, Any]:
        """The config of the module after the Transformer."""
        return self[f"{self[MODULES][1]['path']}/config.json"]

    def length(self, side: str = "") -> int:
        """Maximum length of a text in tokens, with special tokens.

        Args:
            side: "query", "document", or "" for a pair.
        """
        config = self.transformer
        call = (config.get("processing_kwargs") or {}).get("text") or {}
        stated = (config.get(f"{side}_length"), config.get("max_seq_length"))
        if given := next(filter(None, (call.get("max_length"), *stated)), None):
            return int(given)
        limits = [self[TOKENIZER].get("model_max_length"), LONGEST]
        limits.append(self[CONFIG].get("max_position_embeddings"))
        return int(min(limit for limit in limits if limit and limit > 0))

    def problem(self, kind: str) -> str:
        """What the modules do that a model folder cannot reproduce; empty if nothing.

        Args:
            kind: a key of `MODULES_OF`.
        """
        if self.modules not in MODULES_OF.get(kind, ()):
            return f"has the modules {', '.join(self.modules)}"
        if folder := self[MODULES][0]["path"]:
            return f"has its transformer in the folder {folder}"
        for setting in _settings(self.transformer):
            known = any(fnmatchcase(setting, pattern) for pattern in SETTINGS[kind])
            if not known and not (setting == "do_lower_case=True" and self._lowercases()):
                return f"has a Transformer with {setting}"
        if self[TOKENIZER].get("truncation_side", "right") != "right":
            return "truncates texts on the left"
        return ""

    def _lowercases(self) -> bool:
        normalizer = json.dumps(self["tokenizer.json"].get("normalizer"))
        return self[TOKENIZER].get("do_lower_case") is True or bool(_LOWERCASE.search(normalizer))


def _settings(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """The values of nested settings that are not null, as `outer.inner=value`."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _settings(value, f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}={value}"


def released_encoding(name: str, revision: str | None = None, kind: str = "retriever") -> Released:
    """The encoding that the files of sentence-transformers state; empty if there are none.

    Args:
        name, revision: hub id or folder of the released model.
        kind: of the model to adopt; of a "reranker" only the lengths are read.
    """
    if not is_available(name, revision):
        return Released({}, {})
    files = Files(name, revision)
    try:
        with reading(name, "its files of sentence-transformers cannot be read"):
            if kind == "reranker":
                return Released(_pair_lengths(files), {})
            return _retriever(files) if files[MODULES] else Released({}, {})
    except InputError as error:
        return Released({}, {"pooling": f"{error}; repair the file, or set it"})


def _pair_lengths(files: Files) -> dict[str, int]:
    """The lengths of a released cross-encoder, which has a limit for the whole pair."""
    architectures = files[CONFIG].get("architectures") or [""]
    if not architectures[0].endswith("ForSequenceClassification"):
        return {}
    longest = files.length()
    query = min(32, longest // 4)
    return {"query_length": query, "passage_length": longest - query}


def _retriever(files: Files) -> Released:
    name, found = files.name, Released({}, {})
    settings, problems = found
    settings["append_eos"] = False  # the tokenizer adds it, or nothing does
    pooling, problem = _pooling(files)
    if problem:
        text = f"{name} {problem}, which a model folder cannot reproduce"
        problems["pooling"] = f"{text}; set it to pool the transformer without that"
    else:
        settings["pooling"] = pooling
    scaled = "Normalize" in files.modules
    similarity = files[ENCODING].get("similarity_fn_name")
    settings["normalize"] = scaled or similarity == "cosine"
    truncated = files[ENCODING].get("truncate_dim") or 0  # after Normalize
    # A folder cuts embeddings before it normalizes them; a cosine does not depend on the order.
    settings["dim"] = 0 if truncated == files[CONFIG].get("hidden_size") else truncated
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
    for side, key, fields in (
        ("query", "query", "{text}"),
        ("passage", "document", "{title} {text}"),
    ):
        settings[f"{side}_length"] = files.length(key)
        prompt = files.prompts.get(key, "")
        others = sorted(one for one in files.prompts if (one in PASSAGES) == (side == "passage"))
        match = _INSTRUCT.fullmatch(prompt)
        if match and side == "query":
            settings["instruction"] = match[2]
            settings["query_template"] = f"{match[1]}{INSTRUCTION}{match[3]}{fields}"
        elif prompt or not others:
            settings[f"{side}_template"] = escaped(prompt) + fields
        else:
            listed = ", ".join(f"{other}: {files.prompts[other]!r}" for other in others[:8])
            problems[f"{side}_template"] = (
                f"{name} has no prompt named {key}, but others ({listed}); set it to the prompt"
                f" to use and {fields}, or to {fields} alone"
            )
    return found


def _pooling(files: Files) -> tuple[str, str]:
    """The pooling, and what a model folder cannot do; one of them is empty."""
    if problem := files.problem("retriever"):
        return "", problem
    config = files.second()
    if not config:
        return "", "lacks the config of its Pooling"
    if files.prompts and config.get("include_prompt") is False:
        return "", "leaves its prompts out of the pooling"
    modes = [one for one in _settings(config) if re.match("pooling_mode.*=(?!False)", one)]
    stated = ", ".join(modes)
    return (POOLINGS[stated], "") if stated in POOLINGS else ("", f"has a Pooling with {stated}")


def check_released(name: str, revision: str | None, tokenizer: Any, encoding: Encoding) -> None:
    """Check that the encoding of a reranker is that of its released files, where they have one.

    Args:
        name, revision: hub id or folder of the released model.

    Raises:
        InputError: If the files name other tokens, another way to score, another prompt, another
            chat template, or other ids of a pair.
    """
    files, answers = Files(name, revision), None
    with reading(name, "its files of sentence-transformers cannot be read"):
        problem = _activation_problem(files)
        if files.modules and not problem:
            problem = files.problem(encoding.scoring)
        if problem:
            text = f"{name} {problem}, which this stage cannot reproduce"
            raise InputError("not-readable", f"{text}; choose another stage, or another model")
        if files.modules and encoding.scoring == "token":
            config = files.second()
            answers = config.get("true_token_id"), config.get("false_token_id")
        prompt = files.prompts.get(files[ENCODING].get("default_prompt_name") or "", "")
        modalities = files.transformer.get("modality_config") or {}
        longest = files.length()
    length = encoding.query_length + encoding.passage_length
    if encoding.scoring != "head" and length > longest:  # for a head, the lengths are compared
        log_once(
            f"encoding.query_length + encoding.passage_length is {length}, and the files of {name}"
            f" truncate a pair at {longest} tokens; lower them to read no more"
        )
    if answers is not None and answers != (own := answer_ids(tokenizer, encoding)):
        raise InputError(
            "other-tokens",
            f"{name} is scored by the tokens {answers[0]} and {answers[1]}, and encoding.positive"
            f" and encoding.negative are {own[0]} and {own[1]}; set them to its own",
        )
    template = tokenizer.chat_template
    if files.modules:
        _check_pair(name, tokenizer, encoding, prompt, chat="message" in modalities)
    elif encoding.pair == "joined" and isinstance(template, str) and _ROLE.search(template):
        _check_pair(name, tokenizer, encoding, prompt, chat=True)
    elif not encoding.template("query").format(text="").startswith(prompt):
        raise InputError(
            "other-prompt",
            f"{name} reads its prompt {prompt!r} before a query, and encoding.query_template is"
            f" {encoding.query_template!r}; set it to the prompt and {{text}}",
        )


def _activation_problem(files: Files) -> str:
    """Names an activation that may change the order of scores; empty if there is none."""
    activation = (
        files[ENCODING].get("activation_fn")
        or (files[CONFIG].get("sentence_transformers") or {}).get("activation_fn")
        or files[CONFIG].get("sbert_ce_default_activation_function")
    )
    if not activation or _INCREASING.fullmatch(activation):
        return ""
    return f"applies {activation} to its scores"


def _check_pair(name: str, tokenizer: Any, encoding: Encoding, prompt: str, chat: bool) -> None:
    """Compare the ids of a pair.

    Args:
        prompt: before the query, or of the system in a chat template.
    """
    query, document = (text for _, text in PAIR)
    with reading(name, "its tokenizer cannot write a pair"):
        if chat:
            roles = {"system": prompt, "query": query, "document": document}
            messages = [{"role": role, "content": text} for role, text in roles.items() if text]
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            found = tokenizer(prompt + query, document)["input_ids"]
            text = tokenizer.decode(found)
    templates = PairTemplates(tokenizer, replace(encoding, passage_length=1024))
    own = templates.pairs(PAIR[:1], PAIR[1:])[0].ids
    if found != own:
        writer = "chat template" if chat else "tokenizer"
        raise InputError(
            "other-chat-template" if chat else "other-pair",
            f"{name}: its {writer} writes a pair as {text[:400]!r}, and the encoding as"
            f" {tokenizer.decode(own)[:400]!r}; set encoding.pair, .append_eos and the templates so"
            " that they write the same",
        )
