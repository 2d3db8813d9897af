"""A template of the encoding as a prompt and a text, which is all that other libraries have.

A prompt stands before the text that is given. Of a passage, the title is part of that text: with
`passage: {title} {text}` the prompt is `passage: `, and `Title Text` or `Text` is given. What a
template puts after its text goes through the tokenizer (`caravan.export.tokens`).
"""

from __future__ import annotations

import json
from typing import NamedTuple

from caravan.data.tokenization import Template
from caravan.errors import InputError

TITLE, TEXT = "\1", "\2"  # where title and text stand in a rendered template


class Wording(NamedTuple):
    """What stands before a text, and how a title becomes part of it."""

    prompt: str
    titled: str = ""  # a title and a text as one text, as str.format takes it; "" without titles
    titled_prompt: str = ""  # stands before that one

    def whole(self, title: str, text: str) -> str:
        """Prompt and text, as the model reads them.

        >>> wording("passage_template", "{title}: {text}").whole("Camels", "They drink.")
        'Camels: They drink.'
        """
        if title and self.titled:
            return self.titled_prompt + self.given(title, text)
        return self.prompt + text

    def given(self, title: str, text: str) -> str:
        """What the user gives."""
        return self.titled.format(title=title, text=text) if title and self.titled else text


def wording(name: str, template: str) -> Wording:
    """Divide a template, up to what it puts after its text.

    Args:
        name: of the setting, for the message.

    Raises:
        InputError: more than a prompt stands around a text.

    >>> wording("passage_template", "passage: {title} {text}")
    Wording(prompt='passage: ', titled='{title} {text}', titled_prompt='passage: ')
    """
    parts = Template(template)
    prompt, _, rest = parts.render("", TEXT).partition(TEXT)
    if rest:
        raise InputError(
            f"encoding.{name} {template!r} repeats the text or has a title after it, where"
            " sentence-transformers has a prompt before the text and no more; export it as merged"
        )
    whole = parts.render(TITLE, TEXT)
    if TITLE not in whole:
        return Wording(prompt)
    begin = min(whole.index(TITLE), whole.index(TEXT))
    return Wording(prompt, fields(whole[begin:]), whole[:begin])


def fields(rendered: str, text: str = "text") -> str:
    """A rendered template with `{title}` and `{text}`, as str.format and f-strings take it.

    Args:
        text: the name of the text's field.
    """
    escaped = rendered.replace("{", "{{").replace("}", "}}")
    return escaped.replace(TITLE, "{title}").replace(TEXT, f"{{{text}}}")


def quoted(text: str) -> str:
    """A text as Python and Jinja write it."""
    return json.dumps(text, ensure_ascii=False)
