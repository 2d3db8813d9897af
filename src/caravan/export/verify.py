"""What all exports share: a folder written whole or not at all, and the comparison with the model.

Token ids are compared over texts of many kinds (empty, spaces, other scripts, titles, those that
just fit and just do not), embeddings or scores over a few, in float32.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caravan.data.batch import pack
from caravan.data.pairs import PairTemplates
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding, read_encoding
from caravan.errors import InputError
from caravan.files import writing
from caravan.models.remote_code import FACT, SETTING

TOLERANCE = 1e-4
"""Largest difference of embeddings and scores in float32, relative to their size if above 1."""
QUERY = "Which animals cross the desert?"
TEXTS = (
    ("", "camels"),
    ("", "How long does a caravan take through the desert? 40 days (or more)."),
    ("Salt & gold", "Größe, naïve: 北京 🐪\n\tthe second line's end"),
    ("", "  spaces around, (brackets) and  two inside "),
    ("A title", ""),
    ("", ""),
)
"""Titles and texts that are compared whatever the lengths."""


def probes(length: int) -> list[tuple[str, str]]:
    """Titles and texts whose ids are compared, among them some around `length` tokens."""
    words = ("sand dunes " * length).split()
    fit = [" ".join(words[:number]) for number in range(max(length - 8, 1), length + 2)]
    return [*TEXTS, *(("", text) for text in fit), ("Dunes", " ".join(words)), ("", "a" * length)]


@torch.no_grad()
def outputs(model: Any, tokenizer: Any, encoding: Encoding) -> Tensor:
    """Embeddings [N, d] of `TEXTS` as queries and passages, or scores [N] of a query with them.

    Args:
        model: a BiEncoder or a CrossEncoder.
    """
    if encoding.kind == "retriever":
        templates = Templates(tokenizer, encoding)
        ids = templates.queries(TEXTS) + templates.passages(TEXTS)
        embeddings: Tensor = model.embed(pack([row for row in ids if row], 4096))
        return embeddings
    pairs = PairTemplates(tokenizer, encoding).pairs([("", QUERY)] * len(TEXTS), TEXTS)
    return scores(model, pairs, tokenizer, encoding)


@torch.no_grad()
def scores(model: Any, pairs: Sequence[Any], tokenizer: Any, encoding: Encoding) -> Tensor:
    """Scores [N] of pairs of `PairTemplates`."""
    typed = PairTemplates(tokenizer, encoding).typed
    seconds = [pair.second for pair in pairs] if typed else None
    found: Tensor = model.score(pack([pair.ids for pair in pairs], 4096, seconds=seconds))
    return found


@contextmanager
def new_folder(folder: Path, out: Path) -> Iterator[Path]:
    """A scratch folder that becomes `out` when the block ends without an error.

    Args:
        folder: the model folder to export.
        out: must not exist, or be empty.

    Raises:
        InputError: If `out` is not empty, or the model needs remote code.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(
            "folder-not-empty", f"{out} exists already; choose a folder that is new or empty"
        )
    if read_encoding(folder)[1].get(FACT):
        raise InputError(
            "remote-code",
            f"{folder} needs remote code, whose classes other libraries may read differently, so it"
            f" is not exported; use the model folder itself, with {SETTING}=true",
        )
    # Beside the first parent that exists, so that a failure leaves no empty parents.
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=place))
    try:
        with writing(out), quiet():
            yield scratch
        scratch.chmod(0o755)
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Turn off the progress bars and load reports of transformers."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def compare_ids(
    place: str, texts: Sequence[Any], expected: Sequence[list[int]], found: Sequence[list[int]]
) -> None:
    """Compare token ids text by text.

    Args:
        place: what is exported, for the message.

    Raises:
        InputError: If they differ; it names the first text that does.
    """
    for text, ours, theirs in zip(texts, expected, found, strict=True):
        if ours != theirs:
            raise InputError(
                "export-differs",
                f"{place}: the exported tokenizer reads {_short(repr(text))} as"
                f" {_short(str(theirs))} where the model reads {_short(str(ours))}, so nothing is"
                " written; export it to transformers instead",
            )


def compare_outputs(place: str, expected: Tensor, found: Tensor) -> None:
    """Compare embeddings or scores.

    Raises:
        InputError: If they differ by more than rounding.
    """
    difference = float((expected.cpu() - found.cpu()).abs().max())
    if not difference <= TOLERANCE * max(float(expected.abs().max()), 1.0):
        raise InputError(
            "export-differs",
            f"{place}: the outputs of the exported model differ from the model folder's by"
            f" {difference:.2g}, so nothing is written; use the model folder itself",
        )


def _short(text: str) -> str:
    return text if len(text) < 80 else f"{text[:77]}..."


def save_transformer(model: Any, out: Path) -> None:
    """Save a transformer so that plain transformers finds all its weights.

    BERT's pooler plays no part in embeddings, and a model folder does without it. transformers
    would initialize it at random and warn at every load, so it is saved as zeros.
    """
    with torch.device("meta"):
        pooler = getattr(type(model)(model.config), "pooler", None)
    if pooler is not None and getattr(model, "pooler", None) is None:
        model.pooler = pooler.to_empty(device="cpu")
        for weight in model.pooler.parameters():
            torch.nn.init.zeros_(weight)
    model.save_pretrained(out)


def pad_token(tokenizer: Any, last: Sequence[int] = ()) -> str | None:
    """The tokenizer's padding, or another special token that can be it; None if there is none.

    Args:
        last: the id that every text ends with, which cannot be the padding.
    """
    own = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token)
    added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    for token in (*own, *added):
        if token is not None and tokenizer.convert_tokens_to_ids(token) not in last:
            return str(token)
    return None
