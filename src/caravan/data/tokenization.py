"""Text to token ids: prompt, truncate, then EOS, in this order for every stage.

RepLLaMA reads its embedding at the EOS (arXiv 2310.08319, section 2.1), so an EOS that truncation
cuts off is a wrong embedding without an error. Here the text gives way, never what the template
puts after it, nor a special token. BOS, [CLS] and [SEP] come as the tokenizer itself adds them.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from typing import Any

from caravan.distributed import is_main_process
from caravan.encoding import Encoding, slot_tokens, template_parts
from caravan.errors import InputError

log = logging.getLogger(__name__)

CHARACTERS_A_TOKEN = 16
SPARE_TOKENS = 16
"""Only the beginning of a long text is tokenised, since the rest would be cut off (380,000
characters: 123 ms, their first 4,000: 0.8 ms). Tokenizers divide texts where a space follows a word
or near by; if the beginning does not give the spare tokens beyond the room, the text is tokenised
whole, so that the ids are the same."""

_WORD_END = re.compile(r"(?<=\S)(?=[ \t\n])")


class Template:
    """One template of the encoding, split into what may be truncated and what may not."""

    def __init__(self, template: str) -> None:
        self.body, self.suffix, self.slots = template_parts(template)
        self.untitled = re.sub(r"\{title\}\s?", "", self.body)

    def render(self, title: str, text: str) -> str:
        """The text before the suffix; an empty title leaves no double space.

        >>> Template("passage: {title} {text}").render("", "Ships of the desert.")
        'passage: Ships of the desert.'
        """
        return (self.body if title else self.untitled).format(title=title, text=text)


class Templates:
    """Turns queries and passages into token ids as the encoding says.

    Args:
        tokenizer: a fast tokenizer of transformers.
        encoding: templates, lengths and EOS.

    Attributes:
        before: ids that stand before every text.
        tails: ids that stand after a "query" and after a "passage", however long it is.

    Raises:
        InputError: the encoding wants an EOS that the tokenizer lacks, or a length leaves no room.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self.tokenizer = tokenizer
        self.encoding = encoding
        self.before, self.after = special_tokens(tokenizer)
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
        self.tails = {
            side: prompt_end(tokenizer, encoding, template, self.after)
            for side, template in (("query", self._query), ("passage", self._passage))
        }
        for side, tail in self.tails.items():
            taken = len(self.before) + len(tail)
            told = (
                f"encoding.{side}_length={self._length(side)} leaves {{}} for text: the prompt's"
                f" end and the special tokens take {taken} tokens; raise it"
            )
            if self._room(side) < 1:
                raise InputError(told.format("no room"))
            if self._room(side) < taken:
                _warn_once(told.format(f"no more than {self._room(side)} tokens"))

    @property
    def pad_id(self) -> int:
        """Fills padding. Any id does, since the mask decides what is real."""
        return int(self.tokenizer.pad_token_id or 0)

    def queries(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of queries, given as (title, text); a query's title is ignored."""
        rendered = [self._query.render("", text) for _, text in texts]
        return self._encode(rendered, "query")

    def passages(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of passages, given as (title, text)."""
        rendered = [self._passage.render(title, text) for title, text in texts]
        return self._encode(rendered, "passage")

    def _length(self, side: str) -> int:
        return self.encoding.query_length if side == "query" else self.encoding.passage_length

    def _room(self, side: str) -> int:
        """Tokens of text, at most."""
        return self._length(side) - len(self.before) - len(self.tails[side])

    def _encode(self, texts: list[str], side: str) -> list[list[int]]:
        if not texts:
            return []
        room, tail = self._room(side), self.tails[side]
        begun = [beginning(text, room) for text in texts]
        encoded = token_ids(self.tokenizer, texts, begun, room)
        return [[*self.before, *ids[:room], *tail] for ids in encoded]


@functools.cache
def _warn_once(message: str) -> None:
    if is_main_process():
        log.warning(message)


class JointTemplates:
    """Turns texts into token ids that end with several prompts, for one pass (`models.slots`).

    Args:
        encoding: its passage template gives what stands before the text, `passage_length` is the
            length of the whole.
        prompts: what follows the text for each task, such as `{self}`'s.

    Raises:
        InputError: the length leaves no room, or the prompts differ in their slots.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding, prompts: Sequence[str]) -> None:
        single = Templates(tokenizer, encoding)
        self.tokenizer = tokenizer
        self.before, self.pad_id = single.before, single.pad_id
        self._text = Template(encoding.passage_template)
        ends = [
            prompt_end(tokenizer, encoding, Template(f"{{text}}{prompt}"), single.after)
            for prompt in prompts
        ]
        self.prompts = tuple(map(len, ends))
        self.end = [token for end in ends for token in end]
        # A space before the text goes with its first word.
        opening = self._text.untitled.partition("{text}")[0].rstrip()
        self.skipped = len(self.before) + (len(_ids(tokenizer, [opening])[0]) if opening else 0)
        self.room = encoding.passage_length - len(self.before) - len(self.end)
        if self.room < 1:
            raise InputError(
                f"encoding.passage_length={encoding.passage_length} leaves no room for text: the"
                f" prompts take {len(self.end)} tokens; raise it"
            )
        if self.room < len(self.end):
            _warn_once(
                f"encoding.passage_length={encoding.passage_length} leaves no more than"
                f" {self.room} tokens for text: the prompts take {len(self.end)}; raise it"
            )

    def encode(self, texts: Sequence[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids of (title, text) with the prompts, and those of the text alone."""
        rendered = [self._text.render(title, text) for title, text in texts]
        if not rendered:
            return [], []
        begun = [beginning(text, self.room) for text in rendered]
        found = token_ids(self.tokenizer, rendered, begun, self.room)
        read = [ids[: self.room] for ids in found]
        opening = self.skipped - len(self.before)
        return [[*self.before, *ids, *self.end] for ids in read], [ids[opening:] for ids in read]

    def beginning_of(self, text: str, ids: Sequence[int]) -> str:
        """The part of a text that its token ids stand for, if it was too long to be read."""
        if len(ids) < self.room - (self.skipped - len(self.before)):
            return text
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def plain(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts without anything around them, as many as would be read."""
        begun = [beginning(text, self.room) for text in texts]
        return [
            ids[: self.room] for ids in token_ids(self.tokenizer, list(texts), begun, self.room)
        ]


def prompt_end(
    tokenizer: Any, encoding: Encoding, template: Template, after: list[int]
) -> list[int]:
    """Ids of what follows the text: the prompt's end, then the slots, or what always follows."""
    ids = _ids(tokenizer, [template.suffix])[0] if template.suffix else []
    if not template.slots:
        return [*ids, *after]
    if after:
        raise InputError(
            f"{tokenizer.name_or_path or 'the tokenizer'} puts a token of its own after every text,"
            " where {self} or {next} must be last; let the EOS be the slot: encoding.slots=0,"
            " encoding.append_eos=true, and templates without {self} and {next}"
        )
    known = tokenizer.get_vocab()
    tokens = slot_tokens(encoding, template.slots)
    missing = [token for token in tokens if token not in known]
    if missing:
        raise ValueError(f"the tokenizer lacks {missing[0]}: see `encoding.slot_tokens`")
    return [*ids, *(known[token] for token in tokens)]


def beginning(text: str, room: int, start: int = 0) -> str:
    """The part of a long text that is tokenised first, up to the end of a word.

    Args:
        start: characters that are kept in any case.
    """
    end = _WORD_END.search(text, start + CHARACTERS_A_TOKEN * (room + SPARE_TOKENS))
    return text[: end.start()] if end else text


def token_ids(tokenizer: Any, texts: list[str], begun: list[str], room: int) -> list[list[int]]:
    """Ids of texts without special tokens, right up to `room`; each text's beginning may do.

    Args:
        begun: beginnings of the texts, as `beginning` gives them.
    """
    encoded = _ids(tokenizer, begun)
    short = [
        i
        for i, ids in enumerate(encoded)
        if len(begun[i]) < len(texts[i]) and len(ids) <= room + SPARE_TOKENS
    ]
    for i, ids in zip(short, _ids(tokenizer, [texts[i] for i in short]), strict=True):
        encoded[i] = ids
    return encoded


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    encoded: list[list[int]] = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    return encoded


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer itself puts before and after a single text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(whole) - len(plain) + 1):
        if whole[start : start + len(plain)] == plain:
            return whole[:start], whole[start + len(plain) :]
    raise InputError(
        f"{tokenizer.name_or_path}: its special tokens change the text's own tokens; this tokenizer"
        " is not supported"
    )
