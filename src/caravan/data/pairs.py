"""Tokenization of pairs: a query and a passage as the input of a reranker.

RankLLaMA (arXiv 2310.08319, section 2.2) uses `query: {query} document: {title} {text}` with an EOS
as one text; its released checkpoints, and encoders, use a pair with special tokens. A language
model that is scored by a token reads a chat template around the one text (Qwen3-Reranker).
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from caravan.data.tokenization import (
    Template,
    around,
    beginning,
    ids_of,
    log_once,
    plain_ids,
    template_of,
    token_ids,
    warn_if_unused,
)
from caravan.encoding import Encoding
from caravan.errors import InputError

MIN_PASSAGE = 16  # tokens kept of a passage; a query that leaves fewer is truncated or refused
CHAT_IDS = "chat_ids"
"""Key in the facts of a model folder: ids of the chat template, and of the scored tokens."""
_MARKERS = re.compile(r"<\|[^|<>]+\|>")


class Pair(NamedTuple):
    ids: list[int]
    second: int  # start of the passage, for models with token types; of the query for a likelihood


class PairTemplates:
    """Tokenizes (query, passage) pairs for a reranker, as one joined text or as a pair.

    The document is truncated. The query is truncated only if it leaves fewer than `MIN_PASSAGE`
    tokens for the document; in a chat template such a query is an error.
    For a likelihood the document and the query's prompt are the condition.
    `section` is the config section of the lengths, for messages.

    Attributes:
        opening, closing: special tokens before the prefix and after the suffix.
        before, between, after: ids around the texts, with prefix and suffix.

    Raises: InputError, as `Templates`, "invalid-template", and from `pairs` "query-too-long".
    """

    def __init__(self, tokenizer: Any, encoding: Encoding, section: str = "encoding") -> None:
        self.tokenizer, self.encoding = tokenizer, encoding
        self.pad_id = int(tokenizer.pad_token_id or 0)
        likelihood = encoding.scoring == "likelihood"
        self.typed = likelihood or "token_type_ids" in tokenizer.model_input_names
        paired = encoding.pair == "pair"
        self.opening, self.between, self.closing = around(tokenizer, encoding, paired)
        prefix, suffix = chat_ids(tokenizer, encoding)
        if self.opening == prefix[: len(self.opening)]:
            self.opening = []  # the chat template has the BOS
        self._framed = bool(prefix or suffix) or encoding.scoring == "token"
        if suffix or encoding.scoring == "token":
            self.closing = [tokenizer.eos_token_id] if encoding.append_eos else []
        self.before, self.after = [*self.opening, *prefix], [*suffix, *self.closing]
        prompt: list[int] = []
        if likelihood:
            self.after = []  # the likelihood is that of the query's tokens only
            prompt = ids_of(tokenizer, _prompt(self._template("query")))
            ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
            self._starts = [token for token in ends if token is not None]
        if self._template("passage").suffix:
            raise InputError(
                "invalid-template", "encoding.passage_template of a reranker must end with {text}"
            )
        self.length = encoding.query_length + encoding.passage_length
        self.room = self.length - len(self.before) - len(self.between) - len(self.after)
        self._lengths = f"{section}.query_length + {section}.passage_length"
        left = max(self.room - len(prompt), 0)
        if left < 2 * MIN_PASSAGE:
            raise InputError(
                "no-room-for-text",
                f"{self._lengths} = {self.length} leaves {left} tokens for the texts, which need"
                f" {2 * MIN_PASSAGE}; increase one of them",
            )

    def pairs(
        self, queries: Sequence[tuple[str, str]], passages: Sequence[tuple[str, str]]
    ) -> list[Pair]:
        """Token ids of queries, (instruction, text) each, and (title, text) passages.

        An empty instruction stands for the encoding's.
        """
        if any(instruction for instruction, _ in queries):
            warn_if_unused(self.encoding)
        templates = [self._template("query", instruction) for instruction, _ in queries]
        firsts = [
            template.render("", text) + template.suffix
            for template, (_, text) in zip(templates, queries, strict=True)
        ]
        seconds = [
            self._template("passage", instruction).render(*passage)
            for (instruction, _), passage in zip(queries, passages, strict=True)
        ]
        if self.encoding.scoring == "likelihood":
            prompts = [len(_prompt(template)) for template in templates]
            return self._conditioned(firsts, prompts, seconds)
        if self.encoding.pair == "pair":
            return self._paired(firsts, seconds)
        return self._joined(firsts, seconds)

    def _template(self, side: str, instruction: str = "") -> Template:
        return template_of(self.encoding.template(side, instruction or None))

    def _joined(self, firsts: list[str], seconds: list[str]) -> list[Pair]:
        texts = [f"{first} {second}" for first, second in zip(firsts, seconds, strict=True)]
        most = self.room - MIN_PASSAGE
        # A token has at least one byte, so only long queries can have too many tokens.
        suspects = [text for text in dict.fromkeys(firsts) if len(text.encode()) > most]
        counted = token_ids(self.tokenizer, suspects, self.room)
        long = {text for text, ids in zip(suspects, counted, strict=True) if len(ids) > most}
        encoded = token_ids(self.tokenizer, texts, self.room, list(map(len, firsts)))
        pairs = []
        for first, text, ids in zip(firsts, texts, encoded, strict=True):
            if first in long and len(ids) > self.room:
                if self._framed:
                    raise InputError(
                        "query-too-long",
                        f"a query with its instruction ({reprlib.repr(first)}) has more than the"
                        f" {most} tokens that {self._lengths} leave for it; increase one of them",
                    )
                ids = self._without_end_of_query(first, text)
            whole = [*self.before, *ids[: self.room], *self.after]
            pairs.append(Pair(whole, len(whole)))
        return pairs

    def _without_end_of_query(self, first: str, text: str) -> list[int]:
        # includes MIN_PASSAGE tokens of the document
        text = beginning(text, self.room, start=len(first))
        ids, of_query = self._with_offsets([(text, len(first))])[0]
        self._warn_of_cut(self.room - MIN_PASSAGE)
        document = ids[of_query : of_query + MIN_PASSAGE]
        return [*ids[: self.room - len(document)], *document]

    def _with_offsets(self, texts: list[tuple[str, int]]) -> list[tuple[list[int], int]]:
        """For each (text, n), its ids and the number of ids within the first n characters."""
        encoded = self.tokenizer(
            [text for text, _ in texts],
            add_special_tokens=False,
            return_offsets_mapping=True,
            verbose=False,
        )
        within = (
            sum(stop <= end for _, stop in of)
            for of, (_, end) in zip(encoded["offset_mapping"], texts, strict=True)
        )
        return list(zip(encoded["input_ids"], within, strict=True))

    def _paired(self, firsts: list[str], seconds: list[str]) -> list[Pair]:
        distinct = list(dict.fromkeys(firsts))  # a query occurs with many passages
        known = dict(zip(distinct, plain_ids(self.tokenizer, distinct), strict=True))
        pairs = []
        encoded = token_ids(self.tokenizer, seconds, self.room)
        for first, passage in zip(firsts, encoded, strict=True):
            query = self._fitting(known[first], passage)
            head = [*self.before, *query, *self.between]
            ids = [*head, *passage[: self.room - len(query)], *self.after]
            pairs.append(Pair(ids, len(head) if self.typed else len(ids)))
        return pairs

    def _conditioned(self, firsts: list[str], prompts: list[int], seconds: list[str]) -> list[Pair]:
        """Pairs of passage and query, of which the query is scored by its likelihood.

        Args:
            prompts: characters before the text of each query, with a space.
        """
        texts = [(f" {first}", end) for first, end in zip(firsts, prompts, strict=True)]
        distinct = list(dict.fromkeys(texts))
        # A token that spans the end of the prompt and the start of the text is part of the query.
        coded = self._with_offsets(distinct) if distinct else []
        known = dict(zip(distinct, coded, strict=True))
        pairs = []
        encoded = token_ids(self.tokenizer, seconds, self.room)
        for text, passage in zip(texts, encoded, strict=True):
            query, prompt = known[text]
            query = self._fitting(query, passage)
            head = [*self.before, *passage[: self.room - len(query)]]
            if not head and not prompt and self._starts:
                head, query = self._starts[:1], query[: self.room - 1]  # scores the first token too
            pairs.append(Pair([*head, *query], len(head) + prompt))
        return pairs

    def _fitting(self, query: list[int], passage: list[int]) -> list[int]:
        """The query, truncated to leave at least `MIN_PASSAGE` tokens of the passage."""
        most = self.room - min(MIN_PASSAGE, len(passage))
        if len(query) > most:
            self._warn_of_cut(most)
        return query[:most]

    def _warn_of_cut(self, kept: int) -> None:
        log_once(
            f"a query was truncated to the {kept} tokens that {self._lengths} leave for it;"
            " increase one of them"
        )


def _prompt(template: Template) -> str:
    """What a likelihood reads before the text of a query."""
    return f" {template.render('', '')}"


def chat_ids(tokenizer: Any, encoding: Encoding) -> tuple[list[int], list[int]]:
    """Ids of the prefix and of the suffix, each tokenized alone, as by Qwen3-Reranker's code."""
    for marker in _MARKERS.findall(encoding.prefix + encoding.suffix):
        if len(ids_of(tokenizer, marker)) > 1:
            log_once(
                f"{tokenizer.name_or_path} has no token {marker}, so encoding.prefix and"
                " encoding.suffix are not its chat template; set them before you use it untrained"
            )
            break
    return ids_of(tokenizer, encoding.prefix), ids_of(tokenizer, encoding.suffix)


def answer_ids(tokenizer: Any, encoding: Encoding) -> tuple[int, int]:
    """Ids of the positive and the negative token, as they follow the suffix.

    Raises:
        InputError: "not-a-token", one is not a single token there, or both are the same.
    """
    positive, negative = (
        _answer_id(tokenizer, encoding, name) for name in ("positive", "negative")
    )
    if positive == negative:
        raise InputError(
            "not-a-token",
            f"encoding.negative={encoding.negative!r} is the same token as encoding.positive;"
            " choose another",
        )
    return positive, negative


def _answer_id(tokenizer: Any, encoding: Encoding, name: str) -> int:
    text, suffix = getattr(encoding, name), ids_of(tokenizer, encoding.suffix)
    whole = ids_of(tokenizer, encoding.suffix + text)
    follows = whole[: len(suffix)] == suffix
    # GPT-2's tokenizer divides line breaks by what follows, and the suffix is read alone.
    ids = whole[len(suffix) :] if follows else ids_of(tokenizer, text)
    merged = not follows and encoding.suffix.endswith(" ")
    if merged or len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise InputError(
            "not-a-token",
            f"encoding.{name}={text!r} is not one known token after encoding.suffix, which ends"
            f" with {encoding.suffix[-16:]!r}, for {tokenizer.name_or_path or 'the tokenizer'};"
            " choose a text that is one token there",
        )
    return ids[0]


def chat_facts(tokenizer: Any, encoding: Encoding) -> dict[str, Any]:
    """The chat template and the scored tokens as ids, for `caravan.json`; empty without them."""
    facts: dict[str, Any] = {}
    if encoding.prefix or encoding.suffix:
        facts["prefix"], facts["suffix"] = chat_ids(tokenizer, encoding)
    if encoding.scoring == "token":
        facts["positive"], facts["negative"] = answer_ids(tokenizer, encoding)
    return {CHAT_IDS: facts} if facts else {}
