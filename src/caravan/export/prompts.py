"""Prompts and tokenizers that make sentence-transformers read what a model folder reads.

A retriever's template is a prompt, the text, and ids that the tokenizer adds after it. A reranker's
pair is the tokenizer's own, or one text written by a chat template: sentence-transformers has a
prompt before the first text of a pair only, and tokenizes the two apart.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from caravan.data.pairs import MIN_PASSAGE, PairTemplates
from caravan.data.tokenization import Template, plain_ids
from caravan.encoding import Encoding, has_instruction
from caravan.errors import InputError
from caravan.export import verify
from caravan.export.model_card import TEXT, TITLE, f_string, quoted

TASKS = {"query": "query", "document": "passage"}
"""Tasks of sentence-transformers, and the sides of the encoding."""
INSTRUCTION = "\3"
"""Stands for the instruction in a rendered template, as `TEXT` for the text."""
QUERIES = ("camels", verify.QUERY, "naïve 北 🐪", "  spaces ", "")
SPARE = 8
"""Tokens that a query's suffix and special tokens may take in addition."""


def not_expressible(problem: str) -> InputError:
    return InputError(
        "not-expressible",
        f"{problem}, which sentence-transformers cannot express; export it to transformers instead",
    )


class Prompt(NamedTuple):
    """A template as a prompt and a text. A passage's title is part of the text.

    Attributes:
        side: "query" or "passage".
        instruction: that of a collection; None for the encoding's.
        before: the prompt.
    """

    side: str
    instruction: str | None
    before: str
    template: Template

    @classmethod
    def of(cls, encoding: Encoding, side: str, instruction: str | None = None) -> Prompt:
        """Split a template, up to what it has after its text.

        Raises:
            InputError: If more than a prompt is before a text, or a title changes the prompt.

        >>> Prompt.of(Encoding(passage_template="passage: {title} {text}"), "passage").before
        'passage: '
        """
        template = Template(encoding.template(side, instruction))
        before, _, rest = template.render("", TEXT).partition(TEXT)
        whole = template.render(TITLE, TEXT)
        if rest or (TITLE in whole and not whole.startswith((before + TITLE, before + TEXT))):
            raise not_expressible(
                f"encoding.{side}_template {encoding.template(side)!r} repeats the text, has a"
                " title after it, or starts differently with a title"
            )
        return cls(side, instruction, before, template)

    def given(self, title: str, text: str) -> str:
        """The text that a user passes."""
        return self.template.render(title, text)[len(self.before) :]

    @property
    def titled(self) -> str:
        """Code of a title and a text as one text, for the card; "" without titles."""
        given = self.given(TITLE, TEXT)
        return f_string(given) if TITLE in given else ""


def retriever_prompts(encoding: Encoding) -> dict[str, Prompt]:
    """A retriever's prompts by name: of the tasks, and those with instructions of collections.

    The latter are named for the collection and the task, as MTEB finds them: `scifact-query`.

    Raises:
        InputError: If the tokens after a text depend on the instruction.
    """
    found = {task: Prompt.of(encoding, side) for task, side in TASKS.items()}
    for task, default in list(found.items()):
        setting = f"{default.side}_template"
        if not has_instruction(getattr(encoding, setting)):
            continue
        for name, instruction in encoding.instructions.items():
            prompt = Prompt.of(encoding, default.side, instruction)
            if prompt.template.suffix != default.template.suffix:
                raise not_expressible(
                    f"encoding.{setting} has {{instruction}} after {{text}}, and collections have"
                    " their own instructions"
                )
            found[f"{name}-{task}"] = prompt
    return found


class Pairing:
    """A reranker's pairs as a CrossEncoder reads them.

    Args:
        folder: the model folder, for messages.

    Raises:
        InputError: If a template needs more than sentence-transformers can express.

    Attributes:
        chat: whether a chat template writes the pair.
        passage: the prompt of a passage.
        prompts: those of a CrossEncoder: "query" if it has one, and those of collections.
        longest: tokens of a query, with its prompt, above which the two truncate differently.
    """

    def __init__(self, templates: PairTemplates, folder: Path) -> None:
        encoding = templates.encoding
        self.templates, self.encoding = templates, encoding
        if encoding.scoring == "likelihood":
            raise not_expressible(f"{folder} scores by a likelihood")
        self.longest = templates.room - MIN_PASSAGE
        self.passage = Prompt.of(encoding, "passage")
        between = self.passage.before or Template(encoding.template("query")).suffix
        # A chat template gives no token types.
        self.chat = encoding.pair == "joined" or (bool(between) and not templates.typed)
        if between and not self.chat:
            raise not_expressible(
                f"{folder} reads pairs with token types and with {between!r} between the texts"
            )
        if encoding.instructions and has_instruction(encoding.passage_template):
            raise not_expressible(f"{folder} has instructions of collections before its passages")
        self.prompts = dict(encoding.instructions)
        if not self.chat:
            named = {"query": encoding.instruction, **encoding.instructions}
            befores = {name: Prompt.of(encoding, "query", named[name]).before for name in named}
            self.prompts = {name: before for name, before in befores.items() if before}

    def settings(self) -> dict[str, Any]:
        """The `processing_kwargs` of a Transformer: how its tokenizer is called."""
        cut = {"truncation": True if self.chat else "only_second"}
        settings: dict[str, Any] = {"text": {**cut, "max_length": self.templates.length}}
        if self.chat:
            settings["chat_template"] = {"restore_suffix": bool(self.templates.after)}
        return settings

    def probes(self) -> list[tuple[str, tuple[str, str]]]:
        """Queries with passages (title, text), of which only the passage is truncated, if any."""
        template = Template(self.encoding.template("query"))
        rendered = [template.render("", query) for query in QUERIES]
        lengths = [len(ids) + SPARE for ids in plain_ids(self.templates.tokenizer, rendered)]
        fit = [q for q, n in zip(QUERIES, lengths, strict=True) if n < self.longest or not q]
        texts = verify.probes(self.templates.length)
        few = (texts[0], max(texts, key=lambda text: len(text[1])))
        return [*((fit[0], text) for text in texts), *itertools.product(fit[1:], few)]

    def tokenizer(self) -> Any:
        """The tokenizer to export."""
        own = self.templates
        result = framed(own.tokenizer, own.length, own.before, own.after, own.between)
        if not self.chat:
            return result
        query, passage = QUERIES[0], ("", "camels")
        messages = [
            {"role": "query", "content": query},
            {"role": "document", "content": self.passage.given(*passage)},
        ]
        # Some tokenizers mark a word at a text's start, and none after a special token.
        for gap in ("", " "):
            result.chat_template = self._chat_template(gap)
            found = result.apply_chat_template(messages, tokenize=True, return_dict=True)
            if found["input_ids"] == own.pairs([("", query)], [passage])[0].ids:
                break
        return result

    def _chat_template(self, gap: str) -> str:
        """A Jinja template that writes what `PairTemplates` reads, with special tokens.

        Args:
            gap: after a special token.
        """
        own, encoding = self.templates, self.encoding

        def special(ids: list[int]) -> str:
            return "".join(own.tokenizer.convert_ids_to_tokens(ids))

        query = Template(encoding.template("query", INSTRUCTION))
        before = special(own.opening) + (gap if own.opening else "") + encoding.prefix
        between = special(own.between) + (gap if own.between else "")
        if encoding.pair == "joined":
            between = " "
        rendered = before + query.render("", TEXT) + query.suffix + between + self.passage.before
        fields = {TEXT: "pair[0].content", INSTRUCTION: "instruction"}
        pieces = re.split(f"([{TEXT}{INSTRUCTION}])", rendered)
        parts = [fields.get(piece) or quoted(piece) for piece in pieces]
        parts += ["pair[1].content", quoted(encoding.suffix + special(own.closing))]
        # sentence-transformers has the prompt of a call in a message of the system.
        prompt = "messages|selectattr('role', 'eq', 'system')|map(attribute='content')|list"
        pair = "messages|rejectattr('role', 'eq', 'system')|list"
        settings = f"{{% set pair = {pair if encoding.instruction else 'messages'} %}}"
        if encoding.instruction:
            default = quoted(encoding.instruction)
            settings += f"{{% set instruction = ({prompt} + [{default}])|first %}}"
        roles = "pair|map(attribute='role')|list != ['query', 'document']"
        error = "raise_exception('give pairs of a query and a passage')"
        check = f"{{% if {roles} %}}{{{{ {error} }}}}{{% endif %}}"
        return f"{settings}{check}{{{{ {' ~ '.join(parts)} }}}}"


def framed(
    tokenizer: Any,
    length: int,
    before: Sequence[int],
    after: Sequence[int],
    between: Sequence[int] = (),
) -> Any:
    """A copy of a tokenizer that puts these ids around texts and pairs, and truncates to `length`.

    Raises:
        InputError: If it is not of the `tokenizers` library, or has no special token to pad with.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    padding = verify.pad_token(tokenizer)
    if padding is None or not tokenizer.is_fast:
        raise not_expressible(
            f"{tokenizer.name_or_path or 'the tokenizer'} is not of the tokenizers library, or has"
            " no special token to pad with"
        )
    given = {"before": before, "between": between, "after": after}
    frame = {name: list(ids) for name, ids in given.items() if ids}
    head, gap, end = ([f"{name}:0"] if name in frame else [] for name in given)
    # The generic class takes the post-processor from its file; those of some models make their own.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = TemplateProcessing(
        single=[*head, "$A:0", *end],
        pair=[*head, "$A:0", *gap, "$B:1", *(["after:1"] if end else [])],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            for name, ids in frame.items()
        ],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        model_input_names=tokenizer.model_input_names,
        padding_side="right",
        truncation_side="right",
        split_special_tokens=tokenizer.split_special_tokens,
        **{**tokenizer.special_tokens_map, "pad_token": padding},
    )
