"""Tokenization: add the prompt, truncate, then append EOS, in this order for every stage.

RepLLaMA pools at the EOS (arXiv 2310.08319, section 2.1), so truncating the EOS would silently give
a wrong embedding. Only the text is truncated, never the template's suffix or a special token. BOS,
[CLS] and [SEP] are added as by the tokenizer. A pair of a reranker is put together in
`caravan.data.pairs`.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from caravan.distributed import is_main_process
from caravan.encoding import Encoding, has_instruction, slot_tokens, template_parts
from caravan.errors import InputError

log = logging.getLogger(__name__)

CHARACTERS_A_TOKEN = 16
SPARE_TOKENS = 16
MOST_INSTRUCTIONS = 1024  # of queries, whose templates are kept
_WORD_END = re.compile(r"(?<=\S)(?=[ \t\n])")


def plain_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of whole texts without special tokens."""
    if not texts:
        return []
    settings = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    encoded: list[list[int]] = tokenizer(texts, add_special_tokens=False, **settings)["input_ids"]
    return encoded


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of one text without special tokens; none of an empty text."""
    return plain_ids(tokenizer, [text])[0] if text else []


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
    for i, (ids, text) in enumerate(zip(encoded, texts, strict=True)):
        if len(cut[i]) < len(text) and len(ids) <= room + SPARE_TOKENS:
            encoded[i] = ids_of(tokenizer, text)
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


def around(
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
        # Escaped braces stay, as in "{{title}}".
        self.untitled = re.sub(r"(\{\{|\}\})|\{title\}\s?", r"\1", self.body)

    def render(self, title: str, text: str) -> str:
        """The text before the suffix; an empty title leaves no double space.

        >>> Template("passage: {title} {text}").render("", "Ships of the desert.")
        'passage: Ships of the desert.'
        """
        return (self.body if title else self.untitled).format(title=title, text=text)

    def tail(self, tokenizer: Any, encoding: Encoding, after: list[int]) -> list[int]:
        """Ids after the text: the suffix, then either the slots or the special tokens."""
        ids = ids_of(tokenizer, self.suffix)
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


template_of = functools.lru_cache(maxsize=MOST_INSTRUCTIONS)(Template)
"""The template of a text; those of the instructions of queries are many."""


def check_room(setting: str, room: int, taken: int) -> None:
    """Refuse a length without room for text; warn if less than half of it is for text."""
    problem = f"{setting} leaves {{}} for text: prompts and special tokens take {taken}; raise it"
    if room < 1:
        raise InputError("no-room-for-text", problem.format("no room"))
    if room < taken:
        log_once(problem.format(f"only {room} tokens"))


@functools.cache
def log_once(message: str, level: int = logging.WARNING) -> None:
    """Log a message in the main process, the first time only."""
    if is_main_process():
        log.log(level, message)


def warn_if_unused(encoding: Encoding) -> None:
    """Log once that queries have instructions, if the templates have no place for them."""
    if not encoding.uses_instruction:
        log_once(
            "queries have instructions (prompt), which are not used; add"
            " {instruction} to encoding.query_template"
        )


class _Side(NamedTuple):
    """What is around the texts of one side, and the tokens that it leaves for prompt and text."""

    template: Template
    tail: list[int]
    room: int


class Templates:
    """Tokenizes inputs of a retriever; `before` and `tails[side]` are the ids around every text.

    Raises: InputError "missing-eos", "no-room-for-text", "unsupported-tokenizer".
    """

    def __init__(self, tokenizer: Any, encoding: Encoding) -> None:
        self.tokenizer, self.encoding = tokenizer, encoding
        self.pad_id = int(tokenizer.pad_token_id or 0)
        self.before, _, self.after = around(tokenizer, encoding)
        self._sides: dict[tuple[str, str], _Side] = {}
        self.tails = {side: self._side(side).tail for side in ("query", "passage")}

    def queries(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of queries, (instruction, text) each; "" stands for the encoding's."""
        if any(instruction for instruction, _ in texts):
            warn_if_unused(self.encoding)
        sides = [self._side("query", instruction) for instruction, _ in texts]
        return self._encode(sides, [("", text) for _, text in texts])

    def passages(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of (title, text) passages."""
        return self._encode([self._side("passage")] * len(texts), texts)

    def _side(self, name: str, instruction: str = "") -> _Side:
        if (name, instruction) not in self._sides:
            template = Template(self.encoding.template(name, instruction or None))
            tail = template.tail(self.tokenizer, self.encoding, self.after)
            length = getattr(self.encoding, f"{name}_length")
            room = length - len(self.before) - len(tail)
            taken = length - room
            if has_instruction(getattr(self.encoding, f"{name}_template")):
                taken += len(ids_of(self.tokenizer, template.render("", "").rstrip()))
            check_room(f"encoding.{name}_length={length}", length - taken, taken)
            if len(self._sides) > MOST_INSTRUCTIONS:
                self._sides.clear()
            self._sides[name, instruction] = _Side(template, tail, room)
        return self._sides[name, instruction]

    def _encode(self, sides: Sequence[_Side], texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of (title, text)."""
        room = max((side.room for side in sides), default=0)
        rendered = [side.template.render(*text) for side, text in zip(sides, texts, strict=True)]
        encoded = token_ids(self.tokenizer, rendered, room)
        return [
            [*self.before, *ids[: side.room], *side.tail]
            for ids, side in zip(encoded, sides, strict=True)
        ]


def instruction_for(encoding: Encoding, collection: str) -> dict[str, str]:
    """The instruction of a collection, as the argument and the input that it is.

    A collection without one gets the default, which is logged once. Empty if no template has a
    place for an instruction.
    """
    if not encoding.uses_instruction:
        return {}
    own = encoding.instruction_of(collection)
    if own is None:
        known = ", ".join(encoding.instructions)
        others = f" (it has those of {known})" if known else ""
        text = f"the model has no instruction for {collection}{others}; its default is used"
        log_once(f"{text}: {encoding.instruction!r}", logging.INFO)
    return {"instruction": encoding.instruction if own is None else own}
