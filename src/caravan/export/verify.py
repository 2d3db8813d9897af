"""A transformer's weights, written so that transformers' Auto classes find them all.

BERT and its kin have a pooler, a head of their pre-training that plays no part in embeddings, and a
model folder does without. Plain transformers would fill it with random numbers and warn at every
load, so an export has one of zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from caravan.errors import InputError

CLOSE = 1e-4
"""How far numbers of float32 may be from the model folder's, where these are about 1 in size."""


def save_transformer(model: Any, out: Path) -> None:
    """Save a transformer, with a pooler of zeros where its architecture has one."""
    with torch.device("meta"):
        pooler = getattr(type(model)(model.config), "pooler", None)
    if pooler is not None and getattr(model, "pooler", None) is None:
        model.pooler = pooler.to_empty(device="cpu")
        for weight in model.pooler.parameters():
            torch.nn.init.zeros_(weight)
    with quiet():
        model.save_pretrained(out)


def load_plain(auto: Any, folder: Path) -> Any:
    """Load a folder as a user of transformers does, with every weight in its place.

    Raises:
        InputError: a weight is missing or left over.
    """
    with quiet():
        model, report = auto.from_pretrained(
            folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
        )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = [str(key) for kind in kinds for key in report.get(kind, ())]
    if wrong:
        raise InputError(
            f"{type(model).__name__} does not load in plain transformers as it was saved"
            f" ({', '.join(sorted(wrong))[:300]}), so nothing is written; use the model folder"
        )
    return model.eval()


@contextmanager
def quiet() -> Iterator[None]:
    """No bars and no reports of transformers."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def refuse_other_numbers(place: str, what: str, wanted: torch.Tensor, found: torch.Tensor) -> None:
    """Compare embeddings or scores.

    Raises:
        InputError: they are not the same up to rounding.
    """
    apart = float((wanted - found).abs().max())
    if not apart <= CLOSE * max(float(wanted.abs().max()), 1.0):
        raise InputError(
            f"{place}: the exported model's {what} differ from the model folder's by {apart:.2g},"
            " so nothing is written; use the model folder itself"
        )
