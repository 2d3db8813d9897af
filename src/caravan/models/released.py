"""What the files of a released reranker say about its scores, compared before it is adopted.

A folder of sentence-transformers has the ids of the two tokens in the config of its `LogitScore`,
and a chat template with the roles "query" and "document".
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from caravan.data.pairs import PairTemplates, answer_ids
from caravan.encoding import Encoding
from caravan.errors import InputError, reading

SCORE = "LogitScore"
PAIR = (("", "Which animals cross the desert?"), ("", "Camels cross it, by night."))
_ROLE = re.compile(r"['\"]document['\"]")


def check_released(name: str, revision: str | None, tokenizer: Any, encoding: Encoding) -> None:
    """Check that the encoding of a reranker is that of its released files, where they have one.

    Args:
        name, revision: hub id or folder of the released model.

    Raises:
        InputError: If the files name other tokens, another way to score, or another chat template.
    """
    if encoding.scoring == "token":
        _check_modules(name, revision, answer_ids(tokenizer, encoding))
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


def _check_modules(name: str, revision: str | None, answers: tuple[int, int]) -> None:
    modules = _read(name, "modules.json", revision)
    if modules is None:
        return
    kinds = {str(module["type"]).rpartition(".")[2]: str(module["path"]) for module in modules}
    if SCORE not in kinds:
        raise InputError(
            "not-token-scored",
            f"{name} is a folder of sentence-transformers with the modules {', '.join(kinds)}, and"
            f" no {SCORE}; choose a model that is scored by two tokens, or a plain language model",
        )
    score = _read(name, f"{kinds[SCORE]}/config.json", revision) or {}
    found = (score.get("true_token_id"), score.get("false_token_id"))
    if found != answers:
        raise InputError(
            "other-tokens",
            f"{name} is scored by the tokens {found[0]} and {found[1]}, and encoding.positive and"
            f" encoding.negative are {answers[0]} and {answers[1]}; set them to its own",
        )


def _read(name: str, file: str, revision: str | None) -> Any:
    """A JSON file of a hub id or folder; None if there is none."""
    from transformers.utils import cached_file

    given: dict[str, Any] = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
    with reading(f"{name}/{file}", "it cannot be read"):
        path = cached_file(name, file, **given)
        return None if path is None else json.loads(Path(path).read_text("utf-8"))
