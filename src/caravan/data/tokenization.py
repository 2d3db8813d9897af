"""Tokenization: add the prompt, truncate, then append EOS, in this order for every stage.

RepLLaMA pools at the EOS (arXiv 2310.08319, section 2.1), so truncating the EOS would silently give
a wrong embedding. Only the text is truncated, never the template's suffix or a special token. BOS,
[CLS] and [SEP] are added as by the tokenizer.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from caravan.distributed import is_main_process
from caravan.encoding import Encoding, slot_tokens, template_parts
from caravan.errors import InputError

log = logging.getLogger(__name__)

LEAST = 16  # tokens kept of every document; a longer query is truncated
CHARACTERS_A_TOKEN = 16
SPARE_TOKENS = 16
_WORD_END = re.compile(r"(?<=\S)(?=[ \t\n])")


def plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of whole texts without special tokens."""
    if not texts:
        return []
    settings = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, **settings)["input_ids"]
    return encoded


def beginning(text: str, room: int, start: int = 0) -> str:
    """The first `start` characters, and enough more for `room` tokens, cut at the end of a word."""
    end = _WORD_END.search(text, start + CHARACTERS_A_TOKEN * (room + SPARE_TOKENS))
    return text[: end.start()] if end else text


def token_ids(
    tokenizer: Any, texts: list[str], room: int, starts: Sequence[int] | None = None
) -> list[list[int]]:
    """Ids of texts without special tokens, of which the first `room` are correct.

    Only the beginning of a long text is tokenized, at least `starts[i]` characters, or the whole
    text if that gives too few tokens (380,000 characters: 123 ms; 4,000: 0.8 ms).
    """
    starts = starts or [0] * len(texts)
    cut = [beginning(text, room, start) for text, start in zip(texts, starts, strict=True)]
    encoded = plain_ids(tokenizer, cut)
    short = [
        i
        for i, ids in enumerate(encoded)
        if len(cut[i]) < len(texts[i]) and len(ids) <= room + SPARE_TOKENS
    ]
    for i, ids in zip(short, plain_ids(tokenizer, [texts[i] for i in short]), strict=True):
        encoded[i] = ids
    return encoded


def special_tokens(tokenizer: Any, pair: bool = False) -> tuple[list[int], list[int], list[int]]:
    """The special tokens before a text, between the texts of a pair, and after them."""
    texts = ("a", "b") if pair else ("a",)
    whole = tokenizer(*texts, add_special_tokens=True)["input_ids"]
    gaps, end = [], 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        starts = range(end, len(whole) - len(ids) + 1)
        start = next((i for i in starts if whole[i : i + len(ids)] == ids), None)
        if start is None:
            raise InputError(
                "unsupported-tokenizer",
                f"{tokenizer.name_or_path}: its special tokens change the tokens of the text; "
                + ("set encoding.pair=joined" if pair else "this tokenizer is not supported"),
            )
        gaps.append(whole[end:start])
        end = start + len(ids)
    return gaps[0], gaps[1] if pair else [], whole[end:]


def _around(
    tokenizer: Any, encoding: Encoding, pair: bool = False
) -> tuple[list[int], list[int], list[int]]:
    """`special_tokens`, with the EOS if the encoding appends one."""
    before, between, after = special_tokens(tokenizer, pair)
    eos = tokenizer.eos_token_id
    if encoding.append_eos and eos is None:
        raise InputError(
            "missing-eos",
            f"encoding.append_eos is set, but {tokenizer.name_or_path} has no EOS token; set"
            " encoding.append_eos=false",
        )
    if encoding.append_eos and after[-1:] != [eos]:
        after = [*after, eos]
    return before, between, after


def without_second_end(tokenizer: Any, encoding: Encoding) -> Encoding:
    """The encoding of a new model, without `append_eos` if the tokenizer adds another end token.

    Qwen3-Embedding appends <|endoftext|>, which is not its EOS, and was trained to pool there.
    """
    eos, token = tokenizer.eos_token_id, tokenizer.eos_token
    if not encoding.append_eos or eos is None:
        return encoding
    sides = ("passage", "query") if encoding.kind == "retriever" else ("passage",)
    for side in sides:
        if getattr(encoding, f"{side}_template").rstrip().endswith(token):
            raise InputError(
                "repeated-eos", f"remove {token} from encoding.{side}_template; append_eos adds it"
            )
    paired = encoding.kind == "reranker" and encoding.pair == "pair"
    after = special_tokens(tokenizer, paired)[2]
    if not after or after[-1] == eos:
        return encoding
    if is_main_process():
        end = tokenizer.convert_ids_to_tokens(after[-1])
        log.info("encoding.append_eos=false: texts end with %s, %s is not appended", end, token)
    return replace(encoding, append_eos=False)


class Template:
    """A template of the encoding, split into a part that can be truncated and a fixed suffix."""

    def __init__(self, template: str) -> None:
        self.body, self.suffix, self.slots = template_parts(template)
        self.untitled = re.sub(r"\{title\}\s?", "", self.body)

    def render(self, title: str, text: str) -> str:
        """The text before the suffix; an empty title leaves no double space.

        >>> Template("passage: {title} {text}").render("", "Ships of the desert.")
        'passage: Ships of the desert.'
        """
        return (self.body if title else self.untitled).format(title=title, text=text)

    def tail(self, tokenizer: Any, encoding: Encoding, after: list[int]) -> list[int]:
        """Ids after the text: the suffix, then either the slots or the special tokens."""
        ids = plain_ids(tokenizer, [self.suffix])[0] if self.suffix else []
        if not self.slots:
            return [*ids, *after]
        if after:
            raise InputError(
                "unsupported-tokenizer",
                f"{tokenizer.name_or_path} appends a token after {{self}} or {{next}}; remove"
                " them from the templates and set encoding.slots=0 encoding.append_eos=true",
            )
        known = tokenizer.get_vocab()
        tokens = slot_tokens(encoding, self.slots)
        missing = [token for token in tokens if token not in known]
        if missing:
            raise ValueError(f"the tokenizer lacks {missing[0]}: see `encoding.slot_tokens`")
        return [*ids, *(known[token] for token in tokens)]


def check_room(setting: str, room: int, taken: int) -> None:
    """Refuse a length without room for text; warn if less than half of it is for text."""
    problem = f"{setting} leaves {{}} for text: prompts and special tokens take {taken}; raise it"
    if room < 1:
        raise InputError("no-room-for-text", problem.format("no room"))
    if room < taken:
        _warn_once(problem.format(f"only {room} tokens"))


@functools.cache
def _warn_once(message: str) -> None:
    if is_main_process():
        log.warning(message)


class Templates:
    """Tokenizes inputs of a retriever; `before` and `tails[side]` are the ids around every text.

    Raises: InputError "missing-eos", "no-room-for-text", "unsupported-tokenizer".
    """

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self.tokenizer, self.encoding = tokenizer, encoding
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.before, _, self.after = _around(tokenizer, encoding)
        self._query = Template(encoding.query_template)
        self._passage = Template(encoding.passage_template)
        self.tails, self._room = {}, {}
        for side, template, length in (
            ("query", self._query, encoding.query_length),
            ("passage", self._passage, encoding.passage_length),
        ):
            self.tails[side] = template.tail(tokenizer, encoding, self.after)
            taken = len(self.before) + len(self.tails[side])
            self._room[side] = length - taken
            check_room(f"encoding.{side}_length={length}", length - taken, taken)

    def queries(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of (title, text) queries; the title is ignored."""
        return self._encode([self._query.render("", text) for _, text in texts], "query")

    def passages(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of (title, text) passages."""
        return self._encode([self._passage.render(*text) for text in texts], "passage")

    def _encode(self, texts: list[str], side: str) -> list[list[int]]:
        room, tail = self._room[side], self.tails[side]
        encoded = token_ids(self.tokenizer, texts, room)
        return [[*self.before, *ids[:room], *tail] for ids in encoded]


class Pair(NamedTuple):
    ids: list[int]
    second: int  # start of the passage, for models with token types; of the query for a likelihood


class PairTemplates:
    """Tokenizes (query, passage) pairs for a reranker, as one joined text or as a pair.

    RankLLaMA (arXiv 2310.08319, section 2.2) uses `query: {query} document: {title} {text}` with an
    EOS as one text; its released checkpoints, and encoders, use a pair with special tokens. The
    document is truncated, never the EOS; the query only if it leaves the document fewer than
    `LEAST` tokens (`cut` counts such pairs). For a likelihood the document and the query's prompt
    are the condition. `section` is the config section of the lengths, for messages.

    Raises: InputError, as `Templates`, and "invalid-template".
    """

    def __init__(self, tokenizer: Any, encoding: Encoding, section: str = "encoding") -> None:
        self.tokenizer, self.encoding = tokenizer, encoding
        self.pad_id = int(tokenizer.pad_token_id or 0)
        likelihood = encoding.scoring == "likelihood"
        self.typed = likelihood or "token_type_ids" in tokenizer.model_input_names
        self.length = encoding.query_length + encoding.passage_length
        paired = encoding.pair == "pair"
        self.before, self.between, self.after = _around(tokenizer, encoding, paired)
        self._query = Template(encoding.query_template)
        self._passage = Template(encoding.passage_template)
        prompt: list[int] = []
        if likelihood:
            self.after = []  # the likelihood is that of the query's tokens only
            self._before_query = f" {self._query.render('', '')}"
            prompt = plain_ids(tokenizer, [self._before_query])[0]
            ends = (tokenizer.bos_token_id, tokenizer.eos_token_id)
            self._start = next((token for token in ends if token is not None), None)
        if self._passage.suffix:
            raise InputError(
                "invalid-template", "encoding.passage_template of a reranker must end with {text}"
            )
        self.room = self.length - len(self.before) - len(self.between) - len(self.after)
        left = max(self.room - len(prompt), 0)
        if left < 2 * LEAST:
            raise InputError(
                "no-room-for-text",
                f"{section}.query_length + {section}.passage_length = {self.length} leaves {left}"
                f" tokens for the texts, which need {2 * LEAST}; increase one of them",
            )
        self.cut = 0

    def pairs(
        self, queries: Sequence[tuple[str, str]], passages: Sequence[tuple[str, str]]
    ) -> list[Pair]:
        """Token ids of (title, text) queries and passages; the query's title is ignored."""
        firsts = [self._query.render("", text) + self._query.suffix for _, text in queries]
        seconds = [self._passage.render(title, text) for title, text in passages]
        if self.encoding.scoring == "likelihood":
            return self._conditioned(firsts, seconds)
        if self.encoding.pair == "pair":
            return self._paired(firsts, seconds)
        return self._joined(firsts, seconds)

    def _joined(self, firsts: list[str], seconds: list[str]) -> list[Pair]:
        texts = [f"{first} {second}" for first, second in zip(firsts, seconds, strict=True)]
        most = self.room - LEAST
        # A token has at least one byte, so only long queries can have too many tokens.
        suspects = [text for text in dict.fromkeys(firsts) if len(text.encode()) > most]
        counted = token_ids(self.tokenizer, suspects, self.room)
        long = {text for text, ids in zip(suspects, counted, strict=True) if len(ids) > most}
        encoded = token_ids(self.tokenizer, texts, self.room, list(map(len, firsts)))
        pairs = []
        for first, text, ids in zip(firsts, texts, encoded, strict=True):
            if first in long and len(ids) > self.room:
                ids = self._without_end_of_query(first, text)
            whole = [*self.before, *ids[: self.room], *self.after]
            pairs.append(Pair(whole, len(whole)))
        return pairs

    def _without_end_of_query(self, first: str, text: str) -> list[int]:
        text = beginning(text, self.room, start=len(first))  # includes LEAST tokens of the document
        ids, of_query = self._with_offsets([text], len(first))[0]
        self._count_cut()
        document = ids[of_query : of_query + LEAST]
        return [*ids[: self.room - len(document)], *document]

    def _with_offsets(self, texts: list[str], end: int) -> list[tuple[list[int], int]]:
        """Ids of texts, and the number of ids within the first `end` characters."""
        encoded = self.tokenizer(
            texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        within = (sum(stop <= end for _, stop in of) for of in encoded["offset_mapping"])
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

    def _conditioned(self, firsts: list[str], seconds: list[str]) -> list[Pair]:
        """Pairs of passage and query, of which the query is scored by its likelihood."""
        texts = [f" {first}" for first in firsts]
        distinct = list(dict.fromkeys(texts))
        # A token that spans the end of the prompt and the start of the text is part of the query.
        coded = self._with_offsets(distinct, len(self._before_query)) if distinct else []
        known = dict(zip(distinct, coded, strict=True))
        pairs = []
        encoded = token_ids(self.tokenizer, seconds, self.room)
        for text, passage in zip(texts, encoded, strict=True):
            query, prompt = known[text]
            query = self._fitting(query, passage)
            head = [*self.before, *passage[: self.room - len(query)]]
            if not head and not prompt and self._start is not None:
                head, query = [self._start], query[: self.room - 1]  # scores the first token too
            pairs.append(Pair([*head, *query], len(head) + prompt))
        return pairs

    def _fitting(self, query: list[int], passage: list[int]) -> list[int]:
        """The query, truncated to leave at least `LEAST` tokens of the passage."""
        most = self.room - min(LEAST, len(passage))
        if len(query) > most:
            self._count_cut()
        return query[:most]

    def _count_cut(self) -> None:
        self.cut += 1
        if self.cut == 1:
            log.warning(
                "a query was truncated to the %d tokens that encoding.query_length +"
                " encoding.passage_length leave for it; increase one of them",
                self.room - LEAST,
            )
