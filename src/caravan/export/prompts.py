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
from caravan.data.tokenization import Template
from caravan.encoding import Encoding, has_instruction
from caravan.errors import InputError
from caravan.export import verify
from caravan.export.model_card import TEXT, TITLE, fields, quoted

INSTRUCTION = "\3"
"""Stands for the instruction in a rendered template, as `TEXT` for the text."""
QUERIES = ("camels", verify.QUERY, "naïve 北 🐪", "  spaces ", "")
SPARE = 8
"""Tokens that a query's suffix and special tokens may take in addition."""


def not_expressible(problem: str) -> InputError:
    return InputError("not-expressible", f"{problem}; export it to transformers instead")


class Prompt(NamedTuple):
    """A template as a prompt and a text. A passage's title is part of the text.

    Attributes:
        before: the prompt.
        titled: a title and a text as one text, for str.format; "" without titles.
    """

    before: str
    titled: str = ""

    @classmethod
    def of(cls, name: str, template: str) -> Prompt:
        """Split a template, up to what it has after its text.

        Args:
            name: of the setting, for the message.

        Raises:
            InputError: If more than a prompt is before a text, or a title changes the prompt.

        >>> Prompt.of("passage_template", "passage: {title} {text}")
        Prompt(before='passage: ', titled='{title} {text}')
        """
        parts = Template(template)
        before, _, rest = parts.render("", TEXT).partition(TEXT)
        whole = parts.render(TITLE, TEXT)
        titled = TITLE in whole
        if rest or (titled and not whole.startswith((before + TITLE, before + TEXT))):
            raise not_expressible(
                f"encoding.{name} {template!r} repeats the text, has a title after it, or starts"
                " differently with a title, where sentence-transformers has one prompt before a"
                " text and no more"
            )
        return cls(before, fields(whole[len(before) :]) if titled else "")

    def given(self, title: str, text: str) -> str:
        """The text that a user passes."""
        return self.titled.format(title=title, text=text) if title and self.titled else text

    def card(self) -> dict[str, str]:
        """Variables of the card: how a title is given."""
        return {"titled": f"f{quoted(self.titled)}" if self.titled else ""}


def of_collections(encoding: Encoding) -> dict[str, dict[str, str]]:
    """A retriever's prompts with the instructions of collections: {task: {name: prompt}}.

    They are named for the collection and the task, as MTEB finds them: `scifact-query`.

    Raises:
        InputError: If the tokens after a text depend on the instruction.
    """
    found: dict[str, dict[str, str]] = {"query": {}, "document": {}}
    for task, side in (("query", "query"), ("document", "passage")):
        setting = f"{side}_template"
        if not has_instruction(getattr(encoding, setting)):
            continue
        for name in encoding.instructions:
            template = encoding.instructed(name).template(side)
            if Template(template).suffix != Template(encoding.template(side)).suffix:
                raise not_expressible(
                    f"encoding.{setting} has {{instruction}} after {{text}}, and collections have"
                    " their own instructions, where sentence-transformers has prompts before a text"
                )
            found[task][f"{name}-{task}"] = Prompt.of(setting, template).before
    return found


class Pairing:
    """A reranker's pairs as a CrossEncoder reads them.

    Args:
        folder: the model folder, for messages.

    Raises:
        InputError: If a template needs more than sentence-transformers can express.

    Attributes:
        chat: whether a chat template writes the pair.
        prompt: before the query, if the pair is the tokenizer's own.
        passage: the prompt of a passage.
        longest: tokens of a query, with its prompt, above which the two truncate differently.
    """

    def __init__(self, templates: PairTemplates, folder: Path) -> None:
        encoding = templates.encoding
        self.templates = templates
        self.encoding = encoding
        if encoding.scoring == "likelihood":
            raise not_expressible(
                f"{folder} scores by a likelihood, which sentence-transformers does not compute"
            )
        self.longest = self.templates.room - MIN_PASSAGE
        self.passage = Prompt.of("passage_template", encoding.template("passage"))
        between = self.passage.before or Template(encoding.template("query")).suffix
        # A chat template gives no token types.
        self.chat = encoding.pair == "joined" or (bool(between) and not self.templates.typed)
        if between and not self.chat:
            raise not_expressible(
                f"{folder} reads pairs with token types and with {between!r} between the texts,"
                " where sentence-transformers has only a prompt before the first text"
            )
        self.prompt = ""
        if not self.chat:
            self.prompt = Prompt.of("query_template", encoding.template("query")).before
        if encoding.instructions and has_instruction(encoding.passage_template):
            raise not_expressible(
                f"{folder} has instructions of collections before its passages, where"
                " sentence-transformers has a prompt before the first text only"
            )

    def prompts(self) -> dict[str, str]:
        """The prompts of a CrossEncoder: "query" if it has one, and those of collections."""
        found = {"query": self.prompt} if self.prompt else {}
        for name in self.encoding.instructions:
            own = self.encoding.instructed(name)
            prompt = Prompt.of("query_template", own.template("query")).before
            found[name] = own.instruction if self.chat else prompt
        return found

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
        tokenizer = self.templates.tokenizer
        rendered = [template.render("", query) for query in QUERIES]
        known = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        lengths = [len(ids) + SPARE for ids in known]
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
            result.chat_template = self._chat_template(result, gap)
            found = result.apply_chat_template(messages, tokenize=True, return_dict=True)
            if found["input_ids"] == own.pairs([("", query)], [passage])[0].ids:
                break
        return result

    def _chat_template(self, tokenizer: Any, gap: str) -> str:
        """A Jinja template that writes what `PairTemplates` reads, with special tokens.

        Args:
            gap: after a special token.
        """

        def special(ids: list[int]) -> str:
            return "".join(tokenizer.convert_ids_to_tokens(ids))

        own, query = self.templates, Template(self.encoding.template("query", INSTRUCTION))
        before = special(own.opening) + (gap if own.opening else "") + self.encoding.prefix
        between = special(own.between) + (gap if own.between else "")
        if self.encoding.pair == "joined":
            between = " "
        rendered = before + query.render("", TEXT) + query.suffix + between + self.passage.before
        fields = {TEXT: "pair[0].content", INSTRUCTION: "instruction"}
        pieces = re.split(f"([{TEXT}{INSTRUCTION}])", rendered)
        parts = [fields.get(piece) or quoted(piece) for piece in pieces]
        parts += ["pair[1].content", quoted(self.encoding.suffix + special(own.closing))]
        # sentence-transformers has the prompt of a call in a message of the system.
        prompt = "messages|selectattr('role', 'eq', 'system')|map(attribute='content')|list"
        pair = "messages|rejectattr('role', 'eq', 'system')|list"
        settings = f"{{% set pair = {pair if self.encoding.instruction else 'messages'} %}}"
        if self.encoding.instruction:
            default = quoted(self.encoding.instruction)
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
            f"{tokenizer.name_or_path or 'the tokenizer'} is not of the tokenizers library, which"
            " can add prompts, or has no special token to pad with"
        )
    frame = {"before": list(before), "between": list(between), "after": list(after)}

    def put(name: str, kind: int) -> list[str]:
        return [f"{name}:{kind}"] if frame[name] else []

    # The generic class takes the post-processor from its file; those of some models make their own.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = TemplateProcessing(
        single=[*put("before", 0), "$A:0", *put("after", 0)],
        pair=[*put("before", 0), "$A:0", *put("between", 0), "$B:1", *put("after", 1)],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            for name, ids in frame.items()
            if ids
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
