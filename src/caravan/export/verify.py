"""What all exports share: a folder written whole or not at all, and the comparison with the model.

Both sides embed or score the same texts in float32: short and empty ones, other scripts, titles,
and lengths around the limit. Other tokens would give other numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils.logging import disable_progress_bar

from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.files import scratch_folder
from caravan.models.loading import quiet
from caravan.models.remote_code import FACT, SETTING
from caravan.retrieval.inference import Inference

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
    """Titles and texts to compare, among them some around `length` tokens."""
    words = ("sand dunes " * length).split()
    fit = [" ".join(words[:number]) for number in range(max(length - 8, 1), length + 2)]
    return [*TEXTS, *(("", text) for text in fit), ("Dunes", " ".join(words)), ("", "a" * length)]


def outputs(folder: Path, dim: int | None = None) -> np.ndarray:
    """Embeddings [N, d] of `TEXTS` as queries and passages, or scores [N] of a query with them."""
    model = Inference(folder, precision="float32", overrides={"dim": dim})
    if model.encoding.kind == "reranker":
        return model.score_pairs([("", QUERY)] * len(TEXTS), TEXTS)
    texts = [text for text in TEXTS if model.templates.queries([("", text[1])])[0]]
    queries = model.embed([("", text) for _, text in texts], "query")
    return np.concatenate([queries, model.embed(texts, "passage")])


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
    disable_progress_bar()
    with scratch_folder(out) as scratch, quiet():
        yield scratch
        if out.exists():
            out.rmdir()
        os.replace(scratch, out)


def compare(folder: Path, expected: np.ndarray, found: np.ndarray) -> None:
    """Compare embeddings or scores of the model folder and of its export.

    Raises:
        InputError: If they differ by more than rounding.
    """
    difference = float(np.abs(expected - found).max())
    if not difference <= TOLERANCE * max(float(np.abs(expected).max()), 1.0):
        raise InputError(
            "export-differs",
            f"{folder}: the outputs of the exported model differ from the model folder's by"
            f" {difference:.2g}, so nothing is written; export it for another library, or use the"
            " model folder itself",
        )


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
