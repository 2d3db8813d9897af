"""A query and a passage as one input of a reranker: joined or paired, truncated, then EOS.

RankLLaMA (arXiv 2310.08319, section 2.2) reads `query: {query} document: {title} {text}` and an EOS
as one text; its released checkpoints, and encoders, take the two as a pair with special tokens of
the tokenizer's own. The document gives way to the length, never the query, never the EOS. For a
likelihood the document comes first, and the query's prompt belongs to what it is conditioned on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from caravan.data.tokenization import Template, beginning, special_tokens, token_ids
from caravan.distributed import is_main_process
from caravan.encoding import Encoding
from caravan.errors import InputError

log = logging.getLogger(__name__)

LEAST = 16
"""Tokens that a document keeps however long its query is; only beyond them is a query cut."""


class Pair(NamedTuple):
    """One input of a reranker."""

    ids: list[int]
    second: int  # where the passage begins, for models with token types; of a likelihood, the query


class PairTemplates:
    """Turns queries with passages into token ids as the encoding says.

    Args:
        tokenizer: a fast tokenizer of transformers.
        encoding: of a reranker.
        section: of the config, where the lengths are set; for messages.

    Attributes:
        cut: pairs so far whose query had to give way; the first is told in a warning.

    Raises:
        InputError: the encoding wants an EOS that the tokenizer lacks, or leaves no room.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding, section: str = "encoding") -> None:
        self.tokenizer = tokenizer
        self.encoding = encoding
        likelihood = encoding.scoring == "likelihood"
        self.typed = likelihood or "token_type_ids" in tokenizer.model_input_names
        self.length = encoding.query_length + encoding.passage_length
        if encoding.pair == "pair":
            self.before, self.between, self.after = pair_tokens(tokenizer)
        else:
            self.before, self.after = special_tokens(tokenizer)
            self.between = []
        eos = tokenizer.eos_token_id
        if encoding.append_eos and eos is None:
            raise InputError(
                f"encoding.append_eos is set, but {tokenizer.name_or_path or 'the tokenizer'} has"
                " no EOS token; set encoding.append_eos=false"
            )
        if encoding.append_eos and self.after[-1:] != [eos]:
            self.after = [*self.after, eos]
        self._query = Template(encoding.query_template)
        self._passage = Template(encoding.passage_template)
        prompt: list[int] = []
        if likelihood:
            self.after = []  # what is not of the query has no part in its likelihood
            self._before_query = f" {self._query.render('', '')}"
            prompt = token_ids(tokenizer, [self._before_query], [self._before_query], self.length)[
                0
            ]
            ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
            self._start = next((token for token in ends if token is not None), None)
        if self._passage.suffix:
            raise InputError(
                f"encoding.passage_template {encoding.passage_template!r} goes on after its last"
                " field, which a reranker's may not; end it with {text}"
            )
        self.room = self.length - len(self.before) - len(self.between) - len(self.after)
        left = max(self.room - len(prompt), 0)
        if left < 2 * LEAST:
            raise InputError(
                f"{section}.query_length + {section}.passage_length = {self.length} leaves {left}"
                f" tokens for query and document, which need {2 * LEAST}; raise one of them"
            )
        self.cut = 0

    @property
    def pad_id(self) -> int:
        """Fills padding. Any id does, since the mask decides what is real."""
        return int(self.tokenizer.pad_token_id or 0)

    def pairs(
        self, queries: Sequence[tuple[str, str]], passages: Sequence[tuple[str, str]]
    ) -> list[Pair]:
        """Token ids of pairs; queries and passages are (title, text), a query's title ignored."""
        firsts = [self._query.render("", text) + self._query.suffix for _, text in queries]
        seconds = [self._passage.render(title, text) for title, text in passages]
        if not firsts:
            return []
        if self.encoding.scoring == "likelihood":
            return self._conditioned(firsts, seconds)
        if self.encoding.pair == "pair":
            return self._paired(firsts, seconds)
        return self._joined(firsts, seconds)

    def _joined(self, firsts: list[str], seconds: list[str]) -> list[Pair]:
        texts = [f"{first} {second}" for first, second in zip(firsts, seconds, strict=True)]
        # A query is tokenised whole; of a document, no more than could stay.
        begun = [
            beginning(text, self.room, start=len(first))
            for first, text in zip(firsts, texts, strict=True)
        ]
        most = self.room - LEAST
        # A token is a byte at least, so only the tokens of a long query have to be counted.
        suspects = [text for text in dict.fromkeys(firsts) if len(text.encode()) > most]
        counted = token_ids(self.tokenizer, suspects, suspects, self.room)
        long = {text for text, ids in zip(suspects, counted, strict=True) if len(ids) > most}
        pairs = []
        for first, text, ids in zip(
            firsts, texts, token_ids(self.tokenizer, texts, begun, self.room), strict=True
        ):
            if first in long and len(ids) > self.room:
                ids = self._without_end_of_query(first, text)
            pairs.append(Pair([*self.before, *ids[: self.room], *self.after], 0))
        return [pair._replace(second=len(pair.ids)) for pair in pairs]

    def _without_end_of_query(self, first: str, text: str) -> list[int]:
        # Of the document, more than enough for its least number of tokens.
        begun = beginning(text, self.room, start=len(first))
        whole = self.tokenizer(
            begun, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        of_query = sum(end <= len(first) for _, end in whole["offset_mapping"])
        self._tell_cut()
        ids = whole["input_ids"]
        document = ids[of_query : of_query + LEAST]
        return [*ids[: self.room - len(document)], *document]

    def _paired(self, firsts: list[str], seconds: list[str]) -> list[Pair]:
        distinct = list(dict.fromkeys(firsts))  # a query stands beside many passages
        known = dict(
            zip(distinct, token_ids(self.tokenizer, distinct, distinct, self.room), strict=True)
        )
        begun = [beginning(text, self.room) for text in seconds]
        pairs = []
        for first, passage in zip(
            firsts, token_ids(self.tokenizer, seconds, begun, self.room), strict=True
        ):
            query = known[first]
            most = self.room - min(LEAST, len(passage))
            if len(query) > most:
                self._tell_cut()
                query = query[:most]
            head = [*self.before, *query, *self.between]
            ids = [*head, *passage[: self.room - len(query)], *self.after]
            pairs.append(Pair(ids, len(head) if self.typed else len(ids)))
        return pairs

    def _conditioned(self, firsts: list[str], seconds: list[str]) -> list[Pair]:
        """The passage, the query's prompt, and the query, whose likelihood is the score."""
        texts = [f" {first}" for first in firsts]
        distinct = list(dict.fromkeys(texts))
        coded = self.tokenizer(
            distinct, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        # Where the prompt's last token has grown into the text, it is of the query.
        begins = [
            sum(end <= len(self._before_query) for _, end in offsets)
            for offsets in coded["offset_mapping"]
        ]
        known = dict(zip(distinct, zip(coded["input_ids"], begins, strict=True), strict=True))
        begun = [beginning(text, self.room) for text in seconds]
        pairs = []
        for text, passage in zip(
            texts, token_ids(self.tokenizer, seconds, begun, self.room), strict=True
        ):
            query, begin = known[text]
            most = self.room - min(LEAST, len(passage))
            if len(query) > most:
                self._tell_cut()
                query = query[:most]
            head = [*self.before, *passage[: self.room - len(query)]]
            if not head and not begin and self._start is not None:
                head, query = [self._start], query[: self.room - 1]  # the first token is told too
            pairs.append(Pair([*head, *query], len(head) + begin))
        return pairs

    def _tell_cut(self) -> None:
        self.cut += 1
        if self.cut == 1:
            log.warning(
                "a query takes more than the %d tokens that encoding.query_length +"
                " encoding.passage_length leave it, and is cut; raise one of them",
                self.room - LEAST,
            )


def without_second_end(tokenizer: Any, encoding: Encoding) -> Encoding:
    """The encoding for a new model: `append_eos` is off if the tokenizer ends texts by itself.

    Qwen3-Embedding's tokenizer ends each text with <|endoftext|> and calls another token its EOS.
    With both, the state that is read would be one that the model was never trained to read.

    Raises:
        InputError: a template ends with the EOS, which would be there twice.
    """
    eos = tokenizer.eos_token_id
    if not encoding.append_eos or eos is None:
        return encoding
    last = ["passage_template", *["query_template"] * (encoding.kind == "retriever")]
    for setting in last:
        if getattr(encoding, setting).rstrip().endswith(tokenizer.eos_token):
            raise InputError(
                f"encoding.{setting} ends with {tokenizer.eos_token}, which encoding.append_eos"
                " appends; leave it out of the template"
            )
    paired = encoding.kind == "reranker" and encoding.pair == "pair"
    after = pair_tokens(tokenizer)[2] if paired else special_tokens(tokenizer)[1]
    if not after or after[-1] == eos:
        return encoding
    if is_main_process():
        log.info(
            "the tokenizer ends each text with %s, so its EOS %s is not appended:"
            " encoding.append_eos=false",
            *(tokenizer.convert_ids_to_tokens(after[-1]), tokenizer.eos_token),
        )
    return replace(encoding, append_eos=False)


def pair_tokens(tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
    """The ids that the tokenizer itself puts before, between and after the texts of a pair."""
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "b")]
    whole = tokenizer("a", "b")["input_ids"]
    for first in range(len(whole)):
        if whole[first : first + len(plain[0])] != plain[0]:
            continue
        rest = first + len(plain[0])
        for second in range(rest, len(whole)):
            if whole[second : second + len(plain[1])] == plain[1]:
                return whole[:first], whole[rest:second], whole[second + len(plain[1]) :]
    raise InputError(
        f"{tokenizer.name_or_path}: the special tokens of its pairs change the texts' own tokens;"
        " set encoding.pair=joined"
    )
