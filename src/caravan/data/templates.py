"""Text to token ids: prompt, truncate, then EOS, in this order for every stage.

RepLLaMA reads its embedding at the EOS (arXiv 2310.08319, section 2.1), so an EOS that truncation
cuts off is a wrong embedding without an error. Here the text gives way, never what the template
puts after it, nor a special token. BOS, [CLS] and [SEP] come as the tokenizer itself adds them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from caravan.contract import Contract
from caravan.errors import InputError


class Template:
    """One template of the contract, split into what may be truncated and what may not."""

    def __init__(self, template: str) -> None:
        end = template.rfind("}") + 1
        self.body, self.suffix = template[:end], template[end:]
        self.untitled = re.sub(r"\{title\}\s?", "", self.body)

    def render(self, title: str, text: str) -> str:
        """The text before the suffix; an empty title leaves no double space.

        >>> Template("passage: {title} {text}").render("", "Ships of the desert.")
        'passage: Ships of the desert.'
        """
        return (self.body if title else self.untitled).format(title=title, text=text)


class Templates:
    """Turns queries and passages into token ids as the contract says.

    Args:
        tokenizer: a fast tokenizer of transformers.
        contract: templates, lengths and EOS.

    Raises:
        InputError: the contract wants an EOS that the tokenizer lacks, or a length leaves no room.
    """

    def __init__(self, tokenizer: Any, contract: Contract) -> None:
        self.tokenizer = tokenizer
        self.contract = contract
        self.before, self.after = special_tokens(tokenizer)
        eos = tokenizer.eos_token_id
        if contract.append_eos and eos is None:
            raise InputError(
                f"contract.append_eos is set, but {tokenizer.name_or_path or 'the tokenizer'} has"
                " no EOS token; set contract.append_eos=false"
            )
        if contract.append_eos and self.after[-1:] != [eos]:
            self.after = [*self.after, eos]
        self._query = Template(contract.query_template)
        self._passage = Template(contract.passage_template)

    @property
    def pad_id(self) -> int:
        """Fills padding. Any id does, since the mask decides what is real."""
        return int(self.tokenizer.pad_token_id or 0)

    def queries(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of queries, given as (title, text); a query's title is ignored."""
        rendered = [self._query.render("", text) for _, text in texts]
        return self._encode(rendered, self._query.suffix, self.contract.query_length, "query")

    def passages(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Token ids of passages, given as (title, text)."""
        rendered = [self._passage.render(title, text) for title, text in texts]
        return self._encode(rendered, self._passage.suffix, self.contract.passage_length, "passage")

    def _encode(self, texts: list[str], suffix: str, length: int, side: str) -> list[list[int]]:
        if not texts:
            return []
        tail = [*(self._ids([suffix])[0] if suffix else []), *self.after]
        room = length - len(self.before) - len(tail)
        if room < 1:
            raise InputError(
                f"contract.{side}_length={length} leaves no room for text: the prompt's end and the"
                f" special tokens take {length - room} tokens; raise it"
            )
        return [[*self.before, *ids[:room], *tail] for ids in self._ids(texts)]

    def _ids(self, texts: list[str]) -> list[list[int]]:
        encoded: list[list[int]] = self.tokenizer(
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
