"""Whether the Hugging Face hub can be asked for a name, found out in one request.

transformers and datasets try for one to two minutes, file by file, where it cannot be reached.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

from caravan.errors import InputError, first_line

PATIENCE = 10  # seconds

# What of a repository lies in the cache of any that was loaded before.
ALWAYS_THERE = ("config.json", "adapter_config.json", "tokenizer_config.json")


@cache
def refuse_unreachable(
    name: str, revision: str | None = None, kind: Literal["model", "dataset"] = "model"
) -> None:
    """Nothing, if a folder of this name is here, or the hub answers, or was answered from before.

    What the hub answers, or that it is not to be asked (HF_HUB_OFFLINE), is told by whoever loads.

    Raises:
        InputError: there is no such folder, and the hub cannot be asked.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if Path(name).exists():
        return
    if name.startswith(("/", "./", "../", "~")):
        raise InputError(f"{name}: there is no such folder; give one that is here, or a hub id")
    cached = (try_to_load_from_cache(name, file, revision=revision) for file in ALWAYS_THERE)
    try:
        if kind == "model" and any(isinstance(path, str) for path in cached):
            return
        HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=PATIENCE)
    except (OSError, ValueError):
        return
    except Exception as error:  # noqa: BLE001 - of httpx or of httpx2, by the hub's version
        raise InputError(
            f"there is no folder {name}, and the Hugging Face hub cannot be asked for a {kind} of"
            f" that name ({first_line(error)}); give a folder that is here"
        ) from None
