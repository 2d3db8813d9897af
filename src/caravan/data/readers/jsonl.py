"""Objects, a line each, as corpora, queries and training rows come: what is wrong has its line.

for number, record in records(Path("corpus.jsonl"), ids=("_id",), texts=("text",)): ...
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from caravan.data.readers.lines import lines, text_of
from caravan.data.texts import Record
from caravan.errors import InputError

IDS = ("docid", "_id", "id")
TEXTS = ("text", "contents")
"""What Tevatron, BEIR and Pyserini call the id and the text of a passage."""


def objects(file: Path, remedy: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line.

    Args:
        remedy: ends a message: what a line should be.
    """
    for number, line in lines(file):
        yield number, object_of(f"{file}:{number}", text_of(file, number, line), remedy)


def object_of(place: str, line: str, remedy: str) -> dict[str, Any]:
    """The object on a line of JSON."""
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        told = f"not JSON ({error.msg}, column {error.colno})"
        raise InputError(f"{place}: {told}: {remedy}") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond all measure
        raise InputError(f"{place}: not JSON ({error}): {remedy}") from None
    if not isinstance(found, dict):
        raise InputError(f"{place}: JSON, but not an object: {remedy}")
    return found


def records(
    file: Path, ids: Sequence[str] = IDS, texts: Sequence[str] = TEXTS
) -> Iterator[tuple[int, Record]]:
    """(line number, (id, title, text)) of each line; the title may be missing or null.

    Args:
        ids, texts: the keys of id and text, the first that a line has.
    """
    remedy = f'every line is one object such as {{"{ids[0]}": "7", "title": "...", "text": "..."}}'
    for number, fields in objects(file, remedy):
        yield number, record_of(f"{file}:{number}", fields, remedy, ids, texts)


def record_of(
    place: str,
    fields: dict[str, Any],
    remedy: str,
    ids: Sequence[str] = IDS,
    texts: Sequence[str] = TEXTS,
) -> Record:
    """Id, title and text of an object."""
    of_id = next((key for key in ids if key in fields), None)
    of_text = next((key for key in texts if key in fields), None)
    if of_id is None or of_text is None:
        missing = ids[0] if of_id is None else texts[0]
        raise InputError(f"{place}: no {missing}: {remedy}")
    name = id_of(fields[of_id])
    title = "" if fields.get("title") is None else fields["title"]
    for key, value in ((of_id, name), (of_text, fields[of_text]), ("title", title)):
        if not isinstance(value, str):
            raise InputError(f"{place}: {key} is not a string: {remedy}")
    return str(name), title, fields[of_text]


def id_of(value: Any) -> Any:
    """An id that may be written as a number; anything else is given back as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value
