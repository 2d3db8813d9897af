"""The encoding of a model folder: prompts, EOS, pooling, normalization, lengths.

Encoding with other settings than those of training costs users of other toolkits their results (a
forgotten prefix: 39.7 instead of 41.2 MRR@10). The settings are therefore saved with the weights,
as `caravan.json`: training reads them from the config, everything after training from the folder.
Defaults are RepLLaMA's (arXiv 2310.08319, section 2).
"""

from __future__ import annotations

import json
import re
import reprlib
import string
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from caravan.errors import InputError, reading

FILE = "caravan.json"
FORMAT = 1
CHAT = ("prefix", "suffix", "instruction", "instructions", "positive", "negative")
"""Settings of instructions and chat templates, which most models do without."""
LATER = {"bidirectional", "scoring", "slots", "dim", *CHAT}
"""Settings that older folders lack; their models were trained with today's defaults."""
CHOICES = {
    "kind": ("retriever", "reranker"),
    "pair": ("joined", "pair"),
    "scoring": ("head", "likelihood", "token"),
}
POOLINGS = ("last", "mean", "cls", "slots")
"""The built-in ones of `caravan.models.pooling`; others are named by a dotted path."""
INSTRUCTION = "{instruction}"
SLOTS = ("self", "next")
"""Fields of a template that stand for the slots of LLaRA's two tasks (arXiv 2312.15503)."""
_FIELDS = re.compile(r"\{\{|\}\}|\{[^{}]*\}")
LONGEST = 1 << 20
"""Tokens; no model reads longer texts."""


@dataclass(frozen=True)
class Encoding:
    """The settings that a model was trained with and must be used with.

    Attributes:
        kind: a "retriever" embeds queries and passages, a "reranker" scores pairs of them.
        query_template, passage_template: the text to tokenize, with `{text}` and, for passages,
            `{title}`; an empty title is left out with the space after it. What follows the last
            field is never truncated. A template may end with `{self}` or `{next}`, the slots of
            LLaRA's two tasks, and have `{instruction}` anywhere.
        append_eos: append the tokenizer's EOS after truncation.
        pooling: the state that becomes the embedding or is scored: "last" real token, "cls" (the
            first token), for retrievers also "mean" of the real tokens or of the "slots"; or the
            dotted path of your own `caravan.models.pooling.Pooling`.
        normalize: scale embeddings to unit length.
        dim: an embedding is the first `dim` dimensions of the state, cut before it is normalized; 0
            is all of them.
        query_length, passage_length: tokens, including prompts and special tokens. A reranker's
            input has their sum as its limit, and the passage is truncated.
        pair: how a reranker reads two texts: "joined" by a space into one (RankLLaMA), or as the
            tokenizer's "pair" (encoders, and the released checkpoints).
        scoring: a reranker's score: a linear "head" on one state (RankLLaMA), the query's
            "likelihood" after the passage by a language model, or the logit of a "token" minus that
            of another at the last position (Qwen3-Reranker, arXiv 2506.05176, section 2).
        bidirectional: a decoder runs with bidirectional attention (`backbone.bidirectional`).
        slots: number of special tokens that `{self}` and `{next}` stand for.
        prefix, suffix: of a reranker that reads one text: a chat template around the pair. Each is
            tokenized alone, and never truncated.
        instruction: the text that `{instruction}` stands for, unless the collection or the query
            has its own.
        instructions: the instructions of collections, by name. Upper case and punctuation of a name
            do not count.
        positive, negative: with scoring="token", the texts of the two tokens after the suffix.

    Raises:
        InputError: With every setting that cannot work.
    """

    kind: str = "retriever"
    query_template: str = "query: {text}"
    passage_template: str = "passage: {title} {text}"
    append_eos: bool = True
    pooling: str = "last"
    normalize: bool = True
    dim: int = 0
    query_length: int = 32
    passage_length: int = 196
    pair: str = "joined"
    scoring: str = "head"
    bidirectional: bool = False
    slots: int = 0
    prefix: str = ""
    suffix: str = ""
    instruction: str = ""
    instructions: Mapping[str, str] = field(default_factory=dict)
    positive: str = ""
    negative: str = ""

    def __post_init__(self) -> None:
        found = [(name, text) for wrong, name, text in self._checks() if wrong]
        if found:
            lines = (f"encoding.{name} is {getattr(self, name)!r}; {text}" for name, text in found)
            raise InputError("invalid-encoding", "; ".join(lines))

    @property
    def has_custom_pooling(self) -> bool:
        """Whether pooling is a user's own class, which is code to import."""
        return self.pooling not in POOLINGS

    def template(self, side: str, instruction: str | None = None) -> str:
        """The template of a side, "query" or "passage", with the instruction in its place.

        >>> Encoding(query_template="{instruction}: {text}", instruction="find").template("query")
        'find: {text}'
        """
        own: str = getattr(self, f"{side}_template")
        given = self.instruction if instruction is None else instruction
        text = escaped(given)
        return _FIELDS.sub(lambda found: text if found[0] == INSTRUCTION else found[0], own)

    @property
    def uses_instruction(self) -> bool:
        """Whether a template has `{instruction}`."""
        return has_instruction(self.query_template) or has_instruction(self.passage_template)

    def instruction_of(self, collection: str) -> str | None:
        """The instruction of a collection; None if there is none for it.

        >>> encoding = Encoding(
        ...     query_template="{instruction}: {text}", instruction="find",
        ...     instructions={"scifact": "verify"},
        ... )
        >>> encoding.instruction_of("SciFact"), encoding.instruction_of("squad")
        ('verify', None)
        """
        known = {_plain(name): text for name, text in self.instructions.items()}
        return known.get(_plain(collection))

    def instructed(self, collection: str) -> Encoding:
        """The encoding with the instruction of a collection in place of the default, if any."""
        own = self.instruction_of(collection)
        return self if own is None else replace(self, instruction=own)

    def settings(self) -> dict[str, Any]:
        """All settings, without `dim`, instructions and templates if the model lacks them."""
        unset = ("dim", *CHAT)
        return {name: value for name, value in asdict(self).items() if value or name not in unset}

    def _checks(self) -> Iterator[tuple[bool, str, str]]:
        """(whether it is wrong, setting, what it must be) of every constraint."""
        for name, allowed in CHOICES.items():
            text = f"it must be one of {', '.join(allowed)}"
            yield getattr(self, name) not in allowed, name, text
        for name in ("query_length", "passage_length"):
            wrong = not 4 <= getattr(self, name) <= LONGEST
            yield wrong, name, f"it must be at least 4 and at most {LONGEST}"
        dotted = "." in self.pooling and self.pooling.replace(".", "").isidentifier()
        text = f"it must be one of {', '.join(POOLINGS)}, or the path of a class"
        yield self.has_custom_pooling and not dotted, "pooling", text
        yield self.dim < 0, "dim", "it must be 0 (all dimensions) or more"
        if self.kind == "reranker":
            yield self.dim > 0, "dim", "only a retriever has embeddings; set it to 0"
            text = "it must be last (a decoder) or cls (an encoder, stage=reranker_encoder)"
            yield self.pooling in ("mean", "slots"), "pooling", text
        yield from self._chat_checks()
        problems = [_template_problem(self.query_template, ("text",))]
        problems.append(_template_problem(self.passage_template, ("text", "title")))
        yield bool(problems[0]), "query_template", problems[0]
        yield bool(problems[1]), "passage_template", problems[1]
        if not any(problems):
            yield from self._slot_checks()
        if self.scoring != "head":
            text = "only a reranker scores by a language model; leave it head"
            yield self.kind != "reranker", "scoring", text
            text = "a language model reads one text; leave it joined"
            yield self.pair != "joined", "pair", text
            text = "an EOS would follow the last token that counts; set it to false"
            yield self.append_eos, "append_eos", text
            text = "a language model is causal; set backbone.bidirectional=false"
            yield self.bidirectional, "bidirectional", text
        if self.scoring == "likelihood":
            text = "for a likelihood it must end with {text}"
            yield not self.query_template.endswith("{text}"), "query_template", text

    def _chat_checks(self) -> Iterator[tuple[bool, str, str]]:
        framed = self.kind == "reranker" and self.pair == "joined" and self.scoring != "likelihood"
        for name in ("prefix", "suffix"):
            text = "only a reranker that reads one text (encoding.pair=joined) has it"
            yield bool(getattr(self, name)) and not framed, name, text
            text = "it has \\n as two characters; give line breaks, in bash as $'\"...\\n...\"'"
            yield r"\n" in getattr(self, name), name, text
        used = self.uses_instruction
        yield used and not self.instruction, "instruction", "a template has {instruction}; set it"
        for name in ("instruction", "instructions"):
            text = "no template has {instruction}; add it to one, or leave this empty"
            yield bool(getattr(self, name)) and not used, name, text
        text = "it must have a text for each name of a collection"
        own = self.instructions.items()
        valid = all(isinstance(one, str) and one and _plain(name) for name, one in own)
        yield not valid, "instructions", text
        if self.scoring == "token":
            yield self.pooling != "last", "pooling", "the last position is scored; set it to last"
            yield not self.positive, "positive", "a score compares two tokens; set it, such as yes"
            text = "a score compares two tokens; set it to another than encoding.positive"
            yield self.negative in ("", self.positive), "negative", text

    def _slot_checks(self) -> Iterator[tuple[bool, str, str]]:
        slotted = [template_parts(t)[2] for t in (self.query_template, self.passage_template)]
        if not 0 <= self.slots < max(self.query_length, self.passage_length):
            yield True, "slots", "it must be 0 or more, and less than the lengths, which include it"
        elif bool(self.slots) != any(slotted):
            text = "it is the number of tokens of {self} or {next} at the end of a template"
            yield True, "slots", text
        elif self.slots:
            text = "both templates must end with {self} or {next}"
            yield self.pooling == "slots" and not all(slotted), "pooling", text
            yield self.append_eos, "append_eos", "slots come last; set it to false"


def escaped(text: str) -> str:
    """A text as part of a template, in which braces are fields."""
    return text.replace("{", "{{").replace("}", "}}")


def has_instruction(template: str) -> bool:
    """Whether a template has `{instruction}`; `{{instruction}}` is text."""
    return INSTRUCTION in _FIELDS.findall(template)


def _plain(name: str) -> str:
    """A collection's name without what data sources and benchmarks write differently."""
    return "".join(filter(str.isalnum, name.casefold()))


def _template_problem(template: str, allowed: tuple[str, ...]) -> str:
    """What is wrong with a template; empty if nothing is."""
    try:
        template.encode()  # half of a surrogate pair cannot be tokenized
        parsed = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        return f"it is not a template: {error}"
    used = [field for _, field, _, _ in parsed]
    slots = [field for field in used if field in SLOTS]
    if "text" not in used:
        return "it lacks {text}"
    if len(slots) > 1 or (slots and not template.endswith(f"{{{slots[0]}}}")):
        return "it may have one of {self} and {next}, last"
    allowed = (*allowed, "instruction")
    if unknown := [field for field in used if field not in {*allowed, *slots}]:
        known = " and ".join(f"{{{field}}}" for field in sorted(allowed))
        return f"{{{unknown[0]}}} is unknown; use {known}, and {{{{ and }}}} for braces"
    if any(form or conversion for _, _, form, conversion in parsed):
        return "it has a ':' or '!' in a field; write {text} alone"
    return ""


def template_parts(template: str) -> tuple[str, str, str]:
    """A template's body up to its last field, the text after it, and the slots at its end.

    >>> template_parts("{title} {text}, in eight words: {self}")
    ('{title} {text}', ', in eight words: ', 'self')
    """
    slots = next((name for name in SLOTS if template.endswith(f"{{{name}}}")), "")
    rest = template.removesuffix(f"{{{slots}}}") if slots else template
    fields = (found.end() for found in _FIELDS.finditer(rest) if found[0] not in ("{{", "}}"))
    end = max(fields, default=0)
    return rest[:end], rest[end:].replace("{{", "{").replace("}}", "}"), slots


def slot_tokens(encoding: Encoding, slots: str) -> list[str]:
    """The special tokens that `{self}` or `{next}` stands for, named as LLaRA's are.

    >>> slot_tokens(Encoding(slots=2, append_eos=False, query_template="{text} {next}"), "next")
    ['<s3>', '<s4>']
    """
    first = SLOTS.index(slots) * encoding.slots + 1
    return [f"<s{number}>" for number in range(first, first + encoding.slots)]


def write_encoding(folder: Path, encoding: Encoding, facts: dict[str, Any]) -> None:
    """Write `caravan.json`: the encoding, and JSON facts of the model.

    Args:
        facts: `weights` ("full" or "adapter"), and facts of training such as the base model.
    """
    record = {"format": FORMAT, **encoding.settings(), "facts": facts}
    (folder / FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_encoding(folder: Path) -> tuple[Encoding, dict[str, Any]]:
    """Read the encoding and the facts of a model folder.

    Raises:
        InputError: If the folder or its `caravan.json` is missing, or the file is invalid.
    """
    path = folder / FILE
    if not folder.is_dir():
        text = f"{folder}: no such model folder{adoption(str(folder))}"
        raise InputError("folder-not-found", text)
    if not path.is_file():
        text = f"{folder} has no {FILE}{adoption(str(folder))}"
        if (folder / "model" / FILE).is_file():
            text = f"{folder} is a run, not a model folder; set {folder / 'model'}"
        raise InputError("not-a-model-folder", text)
    with reading(path, "not an encoding"):
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
    if record.pop("format", None) != FORMAT:
        raise InputError("unknown-format", f"{path}: its format is not {FORMAT}")
    facts = record.pop("facts", None)
    if not isinstance(facts, dict) or facts.get("weights") not in ("full", "adapter"):
        text = f"{path}: 'facts' lacks 'weights' (full or adapter); save the model again"
        raise InputError("invalid-encoding", text)
    record.pop("temperature", None)  # older folders have it here; it is the loss's
    kinds: dict[str, type] = {name: type(value) for name, value in asdict(Encoding()).items()}
    problems = [f"unknown {reprlib.repr(name)}" for name in sorted(record.keys() - kinds.keys())]
    problems += [f"missing {name!r}" for name in sorted(kinds.keys() - record.keys() - LATER)]
    texts: dict[str, type] = dict.fromkeys(("name", "base_model", "collection"), str)
    stated = record | {name: facts[name] for name in texts if facts.get(name) is not None}
    problems += [
        f"{name!r} is {reprlib.repr(stated[name])}, not of type {kind.__name__}"
        for name, kind in (kinds | texts).items()
        if type(stated.get(name, kind())) is not kind
    ]
    if problems:
        raise InputError("invalid-encoding", f"{path}: {', '.join(problems)}")
    try:
        return Encoding(**record), facts
    except InputError as error:
        raise InputError(error.code, f"{path}: {error}") from None


def adoption(name: str) -> str:
    """The command that makes a model folder of a transformers folder or hub id, for a message.

    >>> "backbone.name=BAAI/bge-m3 trainer.max_steps=0" in adoption("BAAI/bge-m3")
    True
    >>> adoption("./no/folder")
    ''
    """
    if not Path(name).is_dir() and not re.fullmatch(r"(?!runs/)\w[\w.-]*/[\w.-]+", name):
        return ""
    return (
        f"; to adopt a Hugging Face model run: python train.py backbone=hf backbone.name={name}"
        " trainer.max_steps=0 (and stage=reranker for one that scores)"
    )
