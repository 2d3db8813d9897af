"""Remote code: Python that comes with a model, run only where the command allows it.

    python train.py backbone=hf backbone.name=<hub id> backbone.trust_remote_code=true ...
    python evaluate.py retriever=runs/mine/model trust_remote_code=true ...

`caravan.json` records that a model was trained with remote code (`auto_map` in its config.json) or
a custom pooling, but only the command can allow it to run. transformers always gets an explicit
`trust_remote_code`: otherwise it would prompt on standard input.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caravan.encoding import Encoding
from caravan.errors import InputError

SETTING = "trust_remote_code"
FACT = "own_code"
"""In a folder's facts: whether its model, tokenizer or pooling needs code beside transformers'."""
_HOME = "transformers_modules"  # the package that transformers imports remote code into


class RemoteCodeError(InputError):
    """A model needs remote code, and the command does not allow it."""

    def __init__(self, name: str | Path) -> None:
        super().__init__(
            "remote-code",
            f"{name} needs remote code; review that code, then set {SETTING}=true (training:"
            f" backbone.{SETTING}=true)",
        )


def is_allowed(folder: Path, encoding: Encoding, facts: dict[str, Any], requested: bool) -> bool:
    """Whether remote code may run to load a model folder: requested, and needed.

    A model that was trained with transformers' own classes is loaded with them, even if its base
    has remote code.

    Raises:
        RemoteCodeError: If it is needed, and was not requested.
    """
    needed = encoding.has_custom_pooling or facts.get(FACT)  # older folders do not record it
    if needed and not requested:
        raise RemoteCodeError(folder)
    return requested and needed is not False


def is_remote_code(part: Any) -> bool:
    """Whether a module, config or tokenizer is an instance of a class that came with the model.

    Base classes count, since FSDP subclasses the classes that it shards.
    """
    return any(base.__module__.partition(".")[0] == _HOME for base in type(part).__mro__)
