"""Check in one request whether the Hugging Face Hub can be reached.

transformers and datasets retry for one to two minutes, file by file, if it cannot.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from caravan.errors import InputError, first_line

TIMEOUT_S = 10
CACHED_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")
"""At least one of them is cached if a model was loaded before."""
Kind = Literal["model", "dataset"]


@cache
def refuse_unreachable(name: str, revision: str | None = None, kind: Kind = "model") -> None:
    """Return if `name` is a local folder, is cached, or the Hub answers.

    Errors in the Hub's answer, and HF_HUB_OFFLINE, are left to the caller that loads `name`.

    Raises:
        InputError: If there is no such folder and the Hub cannot be reached.
    """
    if not Path(name).exists() and name.startswith(("/", "./", "../", "~")):
        raise InputError(
            "folder-not-found", f"{name}: no such folder; give an existing folder or a Hub id"
        )
    error = _problem(name, revision, kind)
    if error is not None and not isinstance(error, OSError | ValueError):
        raise InputError(
            "hub-unreachable",
            f"there is no folder {name}, and the Hugging Face Hub cannot be reached to look for a"
            f" {kind} of that name ({first_line(error)}); give an existing folder",
        )


@cache
def is_available(name: str, revision: str | None = None) -> bool:
    """Whether a model is a local folder, is cached, or is on a Hub that answers."""
    return _problem(name, revision, "model") is None


def _problem(name: str, revision: str | None, kind: Kind) -> Exception | None:
    """Why a name is neither a folder, nor cached, nor on the Hub; None if it is one of them."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if Path(name).exists():
        return None
    try:
        cached = (try_to_load_from_cache(name, file, revision=revision) for file in CACHED_FILES)
        if kind == "model" and any(isinstance(path, str) for path in cached):
            return None
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=TIMEOUT_S)
    except Exception as error:  # noqa: BLE001 - of httpx or of httpx2, by the hub's version
        return error
    return None
