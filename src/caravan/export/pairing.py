"""How a CrossEncoder reads a pair: as the tokenizer's pair, or as one text by a chat template.

sentence-transformers puts a prompt before the first text of a pair and nothing before the second,
and tokenises them apart. A decoder's `query: ... document: ...`, one text or a pair with words of
its own, is written by a chat template, special tokens and all; what a cut takes from its end is put
back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from caravan.data.tokenization import LEAST, PairTemplates, Template
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.export import tokens
from caravan.export.card_wording import TEXT, Wording, quoted, wording

QUERIES = ("camels", "Which animals cross the desert?", "naïve 北 🐪", "  spaces ", "")
_FILLERS = (("0", "0"), ("1 2 3 4", "1 2 3 4"))
"""The pairs by which sentence-transformers finds out what a chat template ends with."""


class Pairing:
    """A encoding's pairs, as both libraries read them.

    Args:
        folder: of the model, for messages.

    Raises:
        InputError: a template is more than sentence-transformers can express.

    Attributes:
        chat: whether a chat template writes the pair; else the tokenizer has it as one.
        prompt: before a query, where the tokenizer has the pair.
        passage: what stands before a passage, and how it has a title.
        longest: tokens of a query, with its prompt, from which on the two cut differently.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding, folder: str) -> None:
        self.templates = PairTemplates(tokenizer, encoding)
        self.encoding = encoding
        self.folder = folder
        self.length = self.templates.length
        self.longest = self.templates.room - LEAST
        self.passage = _passage(encoding)
        worded = self.passage.prompt or Template(encoding.query_template).suffix
        # A chat template gives no token types.
        self.chat = encoding.pair == "joined" or (bool(worded) and not self.templates.typed)
        if worded and not self.chat:
            raise InputError(
                f"{folder} reads pairs with token types and with words of its own between them"
                f" ({worded!r}), where sentence-transformers has a prompt before the first text"
                " alone; export it as merged"
            )
        self.prompt = ""
        if not self.chat:
            self.prompt = wording("query_template", encoding.query_template).prompt

    def settings(self) -> dict[str, Any]:
        """How sentence-transformers calls the tokenizer."""
        cut = {"truncation": True if self.chat else "only_second", "max_length": self.length}
        if not self.chat:
            return {"text": cut}
        return {"text": cut, "chat_template": {"restore_suffix": bool(self.templates.after)}}

    def probes(self) -> list[tuple[str, tuple[str, str]]]:
        """Queries, and passages as (title, text), whose ids are compared."""
        known = self.templates.tokenizer(list(QUERIES), add_special_tokens=False)["input_ids"]
        prompt = self.templates.tokenizer(self.encoding.query_template, add_special_tokens=False)[
            "input_ids"
        ]
        queries = [
            query
            for query, ids in zip(QUERIES, known, strict=True)
            if len(ids) + len(prompt) < self.longest or not query
        ]
        texts = tokens.probes(self.length)
        few = (*tokens.SHORT, max(texts, key=lambda text: len(text[1])))
        return [
            *((queries[0], text) for text in texts),
            *((query, text) for query in queries[1:] for text in few),
        ]

    def wanted(self, pairs: Sequence[tuple[str, tuple[str, str]]]) -> list[Any]:
        """The model's own ids of pairs, and where the second text begins."""
        return self.templates.pairs(
            [("", query) for query, _ in pairs], [passage for _, passage in pairs]
        )

    def read(
        self, tokenizer: Any, pairs: Sequence[tuple[str, tuple[str, str]]]
    ) -> dict[str, list[list[int]]]:
        """Ids that sentence-transformers has from the exported tokenizer, and token types."""
        given = [(query, self.passage.given(*passage)) for query, passage in pairs]
        if self.chat:
            ids = [self._rendered(tokenizer, pair, cut=True) for pair in given]
            if self.templates.after:
                _restore(ids, self.length, *(self._rendered(tokenizer, pair) for pair in _FILLERS))
            return {"input_ids": ids}
        cut = self.settings()["text"]
        texts = [[self.prompt + query, passage] for query, passage in given]
        encoded = tokenizer(texts, return_attention_mask=False, verbose=False, **cut)
        return {key: encoded[key] for key in encoded}

    def _rendered(self, tokenizer: Any, pair: tuple[str, str], cut: bool = False) -> list[int]:
        roles = zip(("query", "document"), pair, strict=True)
        ids: list[int] = tokenizer.apply_chat_template(
            [{"role": role, "content": text} for role, text in roles],
            truncation=cut,
            max_length=self.length if cut else None,
            tokenizer_kwargs={"verbose": False},
        )["input_ids"]
        return ids

    def tokenizer(self) -> Any:
        """The tokenizer to export, whose ids of the probes are the model's."""
        own = self.templates
        framed = tokens.framed(own.tokenizer, self.length, own.before, own.after, own.between)
        pairs = self.probes()
        ids = [pair.ids for pair in self.wanted(pairs)]
        if self.chat:
            # Some tokenizers begin a word at a text's beginning, and none after a special token.
            for gap in ("", " "):
                framed.chat_template = self._chat_template(framed, gap)
                if self.read(framed, pairs)["input_ids"] == ids:
                    break
        return framed

    def check(self, tokenizer: Any) -> None:
        """Compare an exported tokenizer's ids.

        Raises:
            InputError: it would read a pair differently.
        """
        pairs = self.probes()
        wanted = [pair.ids for pair in self.wanted(pairs)]
        found = self.read(tokenizer, pairs)["input_ids"]
        tokens.refuse_other_tokens(self.folder, pairs, wanted, found)

    def _chat_template(self, tokenizer: Any, gap: str) -> str:
        """Jinja for what `PairTemplates` reads, with its special tokens.

        Args:
            gap: after a special token.
        """

        def special(ids: list[int]) -> str:
            return "".join(tokenizer.convert_ids_to_tokens(ids))

        own, query = self.templates, Template(self.encoding.query_template)
        before = special(own.before) + gap * bool(own.before)
        between = special(own.between) + gap * bool(own.between)
        if self.encoding.pair == "joined":
            between = " "
        opening, *rest = (query.render("", TEXT) + query.suffix).split(TEXT)
        parts = [quoted(before + opening)]
        for literal in rest:
            parts += ["messages[0].content", quoted(literal)]
        parts += [quoted(between + self.passage.prompt), "messages[1].content"]
        parts += [quoted(special(own.after))]
        roles = "messages|map(attribute='role')|list != ['query', 'document']"
        refused = "raise_exception('give pairs of a query and a passage')"
        return f"{{% if {roles} %}}{{{{ {refused} }}}}{{% endif %}}{{{{ {' ~ '.join(parts)} }}}}"


def _passage(encoding: Encoding) -> Wording:
    found = wording("passage_template", encoding.passage_template)
    if found.titled and found.titled_prompt != found.prompt:
        raise InputError(
            f"encoding.passage_template {encoding.passage_template!r} begins"
            " differently with a title and without, and sentence-transformers cannot tell which"
            " passages have one; export it as merged"
        )
    return found


def _restore(rows: list[list[int]], length: int, first: list[int], second: list[int]) -> None:
    """Put back at the ends of cut texts what two short ones have in common at theirs."""
    common = 0
    while first[-common - 1 :] == second[-common - 1 :] and common < len(first):
        common += 1
    for row in rows:
        if common and len(row) >= length:
            row[-common:] = first[-common:]
