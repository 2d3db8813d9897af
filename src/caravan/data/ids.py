"""Which characters an id of a query or passage may have: those that every file format keeps.

Runs and qrels are lines of columns. ASCII white space ends a column for trec_eval (C's `isspace`),
and control characters end a line for some tools: `str.splitlines` breaks at U+0085, U+2028, U+2029
and U+001C to U+001E. Other white space, such as U+00A0 and U+3000, is part of an id in TREC's
formats. Python tools that split columns by `str.split()` cannot read such ids, hence the warning.
"""

from __future__ import annotations

import re

from caravan.errors import InputError

ASCII_SPACE = " \t\n\r\v\f"
"""What divides columns in TREC's files."""

REFUSED = r"\x00-\x20\x7f-\x9f\x{2028}\x{2029}"
"""A character class of RE2 (for pyarrow): ASCII white space, control characters, U+2028, U+2029."""

_REFUSED = re.compile("[\x00-\x20\x7f-\x9f\u2028\u2029]")
_OTHER_SPACE = re.compile("[\xa0\u1680\u2000-\u200a\u202f\u205f\u3000]")


def check_id(name: str, place: str) -> None:
    """Refuse an id that a run file cannot hold.

    Args:
        place: such as `corpus.jsonl:12`, for the message.

    Raises:
        InputError: the id is empty, or has ASCII white space, a control character or a line break.
    """
    if is_id(name):
        return
    raise InputError(
        f"{place}: the id {name!r} is empty or has white space or a control character, which a "
        "TREC file cannot hold: rename it"
    )


def is_id(name: str) -> bool:
    """Whether `check_id` accepts the id.

    >>> is_id("p7"), is_id("p 7"), is_id("p\\x857"), is_id("")
    (True, False, False, False)
    """
    return bool(name) and _REFUSED.search(name) is None


def has_other_space(name: str) -> bool:
    """Whether an id has white space that is none of ASCII's, such as U+00A0.

    >>> has_other_space("p7"), has_other_space("p\\u00a07")
    (False, True)
    """
    return not name.isascii() and _OTHER_SPACE.search(name) is not None
