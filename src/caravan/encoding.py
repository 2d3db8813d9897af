"""What a model folder promises: prompts, EOS, pooling, normalisation, lengths.

Encode settings that differ from the training settings are the mistake that costs users of other
toolkits their results (a forgotten prefix: 39.7 instead of 41.2 MRR@10). So the settings travel
with the weights, as `caravan.json`; training reads them from the config, everything after training
from the folder. Plain data, read by `data` (text to ids) and `models` (ids to vectors) alike.
Defaults are RepLLaMA's (arXiv 2310.08319, section 2).
"""

from __future__ import annotations

import json
import reprlib
import string
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from caravan.errors import InputError, reading
from caravan.manifests import content_digest

FILE = "caravan.json"
FORMAT = 1
LATER = {"bidirectional", "scoring", "slots"}
"""Settings that older folders do not name; those were made with what is the default here."""
KINDS = ("retriever", "reranker")
POOLINGS = ("last", "mean", "cls", "slots")
PAIRS = ("joined", "pair")
SCORINGS = ("head", "likelihood")
SLOTS = ("self", "next")
"""Fields of a template that stand for the slots of LLaRA's two tasks (arXiv 2312.15503)."""
LONGEST = 1 << 20
"""Tokens; no model reads longer texts."""
_READ = (".safetensors", ".bin", ".json", ".model", ".txt", ".py")


@dataclass(frozen=True)
class Encoding:
    """The settings that a model was trained with and must be used with.

    Attributes:
        kind: what the model computes; a "retriever" embeds queries and passages, a "reranker"
            scores a query and a passage that it reads together.
        query_template, passage_template: the text that is tokenised. `{text}` is the query or the
            passage, `{title}` the passage's title; an empty title takes the space after it along.
            What follows them is never truncated. A template may end with `{self}` or `{next}`,
            which are the slots of LLaRA's two tasks (see `slots`).
        append_eos: put the tokenizer's EOS after the (truncated) text.
        pooling: which state becomes the embedding, or is scored: "last" real token, "mean" of the
            real tokens or of the "slots" at the end (neither to be scored), or "cls", the first
            token.
        normalize: scale embeddings to unit length.
        query_length, passage_length: tokens, with prompts and special tokens counted in. Of a
            reranker their sum is the length of the whole input, and the passage gives way.
        pair: how a reranker's two texts become one: "joined" by a space into one string (the
            paper), or a "pair" as the tokenizer has it (encoders, and the released checkpoints).
        scoring: what a reranker's score is: a linear "head" over one state (the paper), or the
            query's "likelihood" after the passage, of a language model with no head of its own.
        bidirectional: a decoder, made to look to the left, sees each whole text
            (`backbone.bidirectional`); encoders do so without being told.
        slots: how many tokens `{self}` and `{next}` stand for each: special tokens of their own,
            whose states a language model was adapted to write embeddings into.
    """

    kind: str = "retriever"
    query_template: str = "query: {text}"
    passage_template: str = "passage: {title} {text}"
    append_eos: bool = True
    pooling: str = "last"
    normalize: bool = True
    query_length: int = 32
    passage_length: int = 196
    pair: str = "joined"
    scoring: str = "head"
    bidirectional: bool = False
    slots: int = 0

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise InputError("; ".join(problems))

    def problems(self) -> list[str]:
        """Every setting that cannot work, one sentence each; empty when all is well."""
        found = []
        if self.kind not in KINDS:
            found.append(f"encoding.kind is {self.kind!r}; it must be one of {', '.join(KINDS)}")
        if self.pooling not in POOLINGS:
            found.append(
                f"encoding.pooling is {self.pooling!r}; it must be one of {', '.join(POOLINGS)}"
            )
        elif self.kind == "reranker" and self.pooling in ("mean", "slots"):
            found.append(
                f"encoding.pooling is {self.pooling!r}; a reranker reads the last token of a"
                " decoder (stage=reranker) or cls of an encoder (stage=reranker_encoder)"
            )
        if self.pair not in PAIRS:
            found.append(f"encoding.pair is {self.pair!r}; it must be one of {', '.join(PAIRS)}")
        if self.scoring not in SCORINGS:
            allowed_ = ", ".join(SCORINGS)
            found.append(f"encoding.scoring is {self.scoring!r}; it must be one of {allowed_}")
        elif self.scoring == "likelihood" and self.kind != "reranker":
            found.append(
                "encoding.scoring is 'likelihood'; only a reranker scores so: leave it head"
            )
        elif self.scoring == "likelihood":
            found += self._likelihood_problems()
        for name in ("query_length", "passage_length"):
            length = getattr(self, name)
            if length < 4:
                found.append(f"encoding.{name} is {length}; it must be at least 4")
            elif length > LONGEST:
                found.append(f"encoding.{name} is {length}; it must be at most {LONGEST}")
        for name, allowed in (
            ("query_template", {"text"}),
            ("passage_template", {"title", "text"}),
        ):
            found += _template_problems(name, getattr(self, name), allowed)
        return found or self._slot_problems()

    def _slot_problems(self) -> list[str]:
        templates = ("query_template", "passage_template")
        slotted = [bool(template_parts(getattr(self, name))[2]) for name in templates]
        if not 0 <= self.slots < max(self.query_length, self.passage_length):
            return [
                f"encoding.slots is {self.slots}; it must be 0 or more, and less than the lengths,"
                " which count them in"
            ]
        if not self.slots and any(slotted):
            return ["encoding.slots is 0, but a template has {self} or {next}; set it to 1 or more"]
        if self.slots and not any(slotted):
            return [
                f"encoding.slots is {self.slots}, but no template ends with {{self}} or {{next}}"
            ]
        if self.pooling == "slots" and not all(slotted):
            return ["encoding.pooling is 'slots'; both templates must end with {self} or {next}"]
        if self.slots and self.append_eos:
            return ["encoding.append_eos is set, but slots come last; set it to false"]
        return []

    def _likelihood_problems(self) -> list[str]:
        found = []
        if self.pair != "joined":
            found.append(
                f"encoding.pair is {self.pair!r}; a likelihood reads the passage, then the query:"
                " leave it joined"
            )
        if self.append_eos:
            found.append(
                "encoding.append_eos is set; an EOS is no word of a query: set it to false"
            )
        if self.bidirectional:
            found.append(
                "encoding.bidirectional is set, but a likelihood is of tokens that are not seen"
                " yet: set backbone.bidirectional=false"
            )
        if not self.query_template.endswith("{text}"):
            found.append(
                f"encoding.query_template is {self.query_template!r}; what is scored by its"
                " likelihood must end with {text}"
            )
        return found


def _template_problems(name: str, template: str, allowed: set[str]) -> list[str]:
    try:
        template.encode()  # half of a surrogate pair is no text for a tokenizer
        parsed = [part for part in string.Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        return [f"encoding.{name} is {template!r}, which is not a template: {error}"]
    used = {field for _, field, _, _ in parsed}
    if "text" not in used:
        return [f"encoding.{name} is {template!r}, which lacks {{text}}"]
    if slots := used & set(SLOTS):
        once = sum(field in SLOTS for _, field, _, _ in parsed) == 1
        if not once or not template.endswith(tuple(f"{{{name}}}" for name in slots)):
            return [
                f"encoding.{name} is {template!r}; it may have one of {{self}} and {{next}}, last"
            ]
        used -= slots
    if used - allowed:
        fields_ = ", ".join(f"{{{field}}}" for field in sorted(allowed))
        return [f"encoding.{name} is {template!r}; it may use {fields_} only"]
    if any(form or conversion for _, _, form, conversion in parsed):
        return [
            f"encoding.{name} is {template!r}, with a ':' or '!' in a field; write {{text}} alone"
        ]
    return []


def template_parts(template: str) -> tuple[str, str, str]:
    """A template's body up to its last text, what follows that, and the slots at its end.

    >>> template_parts("{title} {text}, in eight words: {self}")
    ('{title} {text}', ', in eight words: ', 'self')
    """
    slots = next((name for name in SLOTS if template.endswith(f"{{{name}}}")), "")
    rest = template.removesuffix(f"{{{slots}}}") if slots else template
    end = rest.rfind("}") + 1
    return rest[:end], rest[end:], slots


def slot_tokens(encoding: Encoding, slots: str) -> list[str]:
    """The special tokens that `{self}` or `{next}` stands for, named as LLaRA's are.

    >>> slot_tokens(Encoding(slots=2, append_eos=False, query_template="{text} {next}"), "next")
    ['<s3>', '<s4>']
    """
    first = SLOTS.index(slots) * encoding.slots + 1
    return [f"<s{number}>" for number in range(first, first + encoding.slots)]


def write_encoding(folder: Path, encoding: Encoding, facts: dict[str, Any]) -> None:
    """Write `caravan.json` into `folder`: the encoding and the facts of its training.

    Args:
        facts: JSON data about the model (base model, how the weights are stored, training run);
            `weights`, "full" or "adapter", must be among them.
    """
    record = {"format": FORMAT, **asdict(encoding), "facts": facts}
    (folder / FILE).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_encoding(folder: Path) -> tuple[Encoding, dict[str, Any]]:
    """Read the encoding and the facts of a model folder.

    Raises:
        InputError: there is no folder, no `caravan.json`, or one that cannot be right.
    """
    path = folder / FILE
    if not folder.is_dir():
        raise InputError(f"{folder}: no such model folder{adoption(str(folder))}")
    if (folder / "model" / FILE).is_file() and not path.is_file():
        raise InputError(f"{folder} is a run and no model folder; give {folder / 'model'}")
    if not path.is_file():
        raise InputError(
            f"{folder} has no {FILE}, so nothing says how its model reads; to adopt a Hugging Face"
            f" model run: python train.py backbone=hf backbone.name={folder} trainer.max_steps=0"
            " (and stage=reranker for one that scores)"
        )
    with reading(path, "not a encoding"):
        record = json.loads(path.read_text("utf-8"))
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
    if record.pop("format", None) != FORMAT:
        raise InputError(f"{path}: its format is not {FORMAT}; this version of Caravan reads that")
    facts = record.pop("facts", None)
    if not isinstance(facts, dict) or facts.get("weights") not in ("full", "adapter"):
        raise InputError(f"{path}: 'facts' lacks 'weights' (full or adapter); save the model again")
    for name in ("name", "base_model", "collection"):
        if not isinstance(facts.get(name), str | None):
            shown = reprlib.repr(facts[name])
            raise InputError(f"{path}: {name!r} of 'facts' is {shown}; it must be a text")
    record.pop("temperature", None)  # older folders have it here; it is the loss's
    known = {field.name: type(field.default) for field in fields(Encoding)}
    unknown = sorted(record.keys() - known.keys())
    missing = sorted(known.keys() - record.keys() - LATER)
    if unknown or missing:
        wrong = [f"unknown {reprlib.repr(name)}" for name in unknown] + [
            f"missing {m!r}" for m in missing
        ]
        raise InputError(f"{path}: {', '.join(wrong)}; save the model again")
    for name in record:
        kind, value = known[name], record[name]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            record[name] = float(value)
        elif type(value) is not kind:
            shown = reprlib.repr(value)
            raise InputError(f"{path}: {name!r} is {shown}; it must be of type {kind.__name__}")
    try:
        return Encoding(**record), facts
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def folder_digest(folder: Path) -> str:
    """A digest of what determines the output of a model folder: encoding, weights, tokenizer.

    An adapter's output is its base's too, so the base counts: by content if it is a folder, else
    by name and revision.
    """
    import xxhash

    encoding, facts = read_encoding(folder)
    parts = [json.dumps(asdict(encoding), sort_keys=True), files_digest(folder)]
    if facts["weights"] == "adapter":
        base, revision = adapter_base(folder)
        parts += [files_digest(Path(base))] if Path(base).is_dir() else [base, revision or ""]
    return xxhash.xxh3_128("\0".join(parts).encode()).hexdigest()


def files_digest(folder: Path) -> str:
    """A digest of names and contents of a folder's weights, configs, tokenizer files and code.

    What a model computes, whatever its card says; `caravan.json` is left out.
    """
    import xxhash

    hasher = xxhash.xxh3_128()
    for path in sorted(folder.iterdir()):
        hidden = path.name.startswith(".")
        if path.suffix in _READ and path.name != FILE and path.is_file() and not hidden:
            hasher.update(f"{path.name}\0{content_digest(path)}\0".encode())
    return hasher.hexdigest()


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """The base model of an adapter folder, (hub id or folder, revision), as PEFT notes it.

    A relative path is looked up in the working directory and then in the folders above the adapter,
    so that it is found from any working directory.

    Raises:
        InputError: `adapter_config.json` is missing or broken, or names no base model.
    """
    path = folder / "adapter_config.json"
    with reading(path, "no adapter's config"):
        record = json.loads(path.read_text("utf-8"))
        base, revision = record.get("base_model_name_or_path"), record.get("revision")
        f"{base}{revision}".encode()  # half of a surrogate pair is part of no name
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise InputError(f"{path} names no base model; save the model again")
    with reading(path, "its base cannot be looked up"):
        for above in (Path(), *folder.resolve().parents):
            if (above / base / "config.json").is_file():
                return str(above / base), revision
    return base, revision


def adoption(name: str, stage: str = "") -> str:
    """How a hub id becomes a model folder, as the end of a message; empty for a path.

    >>> "backbone.name=BAAI/bge-m3 trainer.max_steps=0 name=bge-m3" in adoption("BAAI/bge-m3")
    True
    >>> adoption("./runs/mine")
    ''
    """
    parts = name.split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~", "runs"):
        return ""
    return (
        f"; to adopt a model of the hub run: python train.py{stage} backbone=hf"
        f" backbone.name={name} trainer.max_steps=0 name={parts[1]} (with its prompts and pooling"
        f" as encoding.*), then give runs/{parts[1]}/model"
    )
