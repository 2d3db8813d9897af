"""Whether a reranker's encoding is that of the released files of sentence-transformers, if any.

A `CrossEncoder` has a head of transformers, or the ids of two tokens in the config of its
`LogitScore`. It reads a pair as its tokenizer's pair, or by a chat template with the roles "query"
and "document"; the encoding must give the same ids.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from caravan.data.pairs import PairTemplates, answer_ids
from caravan.data.tokenization import log_once
from caravan.encoding import Encoding
from caravan.errors import InputError, reading
from caravan.models.released import (
    MODULES,
    SETTINGS,
    Reader,
    kind_of,
    longest_text,
    reader,
    reading_problem,
    transformer_config,
)

SCORE = "LogitScore"
MODULES_OF = {"head": ["Transformer"], "token": ["Transformer", SCORE]}
"""The modules of a CrossEncoder by `Encoding.scoring`."""
INCREASING = {"Identity", "Sigmoid", "Tanh", "LogSigmoid"}
"""Activations of torch that keep the order of the scores."""
PAIR = (("", "Which animals cross the desert?"), ("", "Camels cross it, by night."))
LONG = 1 << 10
"""Tokens that are enough for `PAIR`, whatever the prompts."""
TASKS = {"head": "sequence-classification", "token": "text-generation"}
CALLED = ("text.max_length", "text.truncation", "chat_template.restore_suffix")
"""Settings of the tokenizer's call that only concern truncation."""
_ROLE = re.compile(r"['\"]document['\"]")


def check_released(name: str, revision: str | None, tokenizer: Any, encoding: Encoding) -> None:
    """Check that the encoding of a reranker is that of its released files, where they have one.

    Args:
        name, revision: hub id or folder of the released model.

    Raises:
        InputError: If the files name other tokens, another way to score, another prompt, another
            chat template, or other ids of a pair.
    """
    read = reader(name, revision)
    with reading(name, "its files of sentence-transformers cannot be read"):
        modules, transformer = read(MODULES), transformer_config(read)
        if encoding.scoring in MODULES_OF:
            _check_activation(name, read)
            if modules is not None:
                _check_modules(name, read, modules, tokenizer, encoding)
                task = TASKS[encoding.scoring]
                if problem := reading_problem(read, transformer, task, "logits", CALLED):
                    raise InputError("not-readable", f"{name} {problem}; choose another model")
        prompt = _prompt(read)
        longest = longest_text(read, transformer)
    length = encoding.query_length + encoding.passage_length
    if encoding.scoring != "head" and length > longest:  # for a head, the lengths are compared
        log_once(
            f"encoding.query_length + encoding.passage_length is {length}, and the files of {name}"
            f" truncate a pair at {longest} tokens; lower them to read no more"
        )
    template = tokenizer.chat_template
    if modules is not None:
        chat = "message" in (transformer.get("modality_config") or {})
        _check_pair(name, tokenizer, encoding, prompt, chat)
    elif encoding.pair == "joined" and isinstance(template, str) and _ROLE.search(template):
        _check_pair(name, tokenizer, encoding, prompt, chat=True)
    elif not encoding.template("query").format(text="").startswith(prompt):
        raise InputError(
            "other-prompt",
            f"{name} reads its prompt {prompt!r} before a query, and encoding.query_template is"
            f" {encoding.query_template!r}; set it to the prompt and {{text}}",
        )


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
    (own,) = PairTemplates(tokenizer, replace(encoding, passage_length=LONG)).pairs(
        PAIR[:1], PAIR[1:]
    )
    if found != own.ids:
        kind, pair = ("chat template", "joined") if chat else ("tokenizer", "pair")
        settings = ".prefix, .query_template, .passage_template, .suffix and .instruction"
        if not chat:
            settings = ".pair, .append_eos, .query_template and .passage_template"
        raise InputError(
            "other-chat-template" if chat else "other-pair",
            f"{name}: its {kind} writes {text[:400]!r} for a pair, which is not what encoding"
            f"{settings} write; set them to it, with encoding.pair={pair}",
        )


def _check_modules(
    name: str, read: Reader, modules: list[dict[str, Any]], tokenizer: Any, encoding: Encoding
) -> None:
    """Refuse other modules, or other tokens."""
    paths = {kind_of(module): str(module["path"]) for module in modules}
    if list(paths) != (expected := MODULES_OF[encoding.scoring]):
        raise InputError(
            "not-readable",
            f"{name} is a folder of sentence-transformers with the modules {', '.join(paths)}, not"
            f" {', '.join(expected)}, as for encoding.scoring={encoding.scoring}; choose another"
            " stage, or another model",
        )
    if encoding.scoring == "head":
        return
    score = read(f"{paths[SCORE]}/config.json") or {}
    found = (score.get("true_token_id"), score.get("false_token_id"))
    if found != (answers := answer_ids(tokenizer, encoding)):
        raise InputError(
            "other-tokens",
            f"{name} is scored by the tokens {found[0]} and {found[1]}, and encoding.positive and"
            f" encoding.negative are {answers[0]} and {answers[1]}; set them to its own",
        )


def _check_activation(name: str, read: Reader) -> None:
    """Refuse an activation that changes the order of scores."""
    config, model = read(SETTINGS) or {}, read("config.json") or {}
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


def _prompt(read: Reader) -> str:
    """The prompt that a CrossEncoder reads if a call names none."""
    config = read(SETTINGS) or {}
    return (config.get("prompts") or {}).get(config.get("default_prompt_name")) or ""
