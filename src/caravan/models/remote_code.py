"""Code that comes with a model (`auto_map` in its config.json): run where it is asked for alone.

    python train.py backbone=hf backbone.name=<hub id> backbone.trust_remote_code=true ...
    python evaluate.py retriever=runs/mine/model trust_remote_code=true ...

A model folder can want its code, never switch it on: `caravan.json` says whether the model was
trained with code of its own, and only the command says that it may run. Left without an answer,
transformers would ask on standard input; so it always gets one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caravan.errors import InputError

SETTING = "trust_remote_code"
FACT = "own_code"
"""In a folder's facts: whether its model or tokenizer is of classes that transformers lacks."""
_HOME = "transformers_modules"  # the package that transformers imports such classes into


class OwnCodeError(InputError):
    """A model wants code of its own, and nothing in the command allows it."""

    def __init__(self, name: str | Path) -> None:
        super().__init__(
            f"{name} wants code of its own, which runs only where the command says so: read that"
            f" code, then set {SETTING}=true (of a training: backbone.{SETTING}=true)"
        )


def allowed(folder: Path, facts: dict[str, Any], asked: bool) -> bool:
    """Whether code may run to load a model folder: it was asked for, and the model wants it.

    A model that was trained as transformers computes it is loaded so, even if its base brings code.

    Raises:
        OwnCodeError: the model wants it, and it was not asked for.
    """
    wanted = facts.get(FACT)
    if wanted and not asked:
        raise OwnCodeError(folder)
    return asked and wanted is not False  # folders from before this was noted do not say


def is_own_code(part: Any) -> bool:
    """Whether a module, config or tokenizer is of a class that came with the model.

    Its bases count: FSDP makes a class of its own of each that it shards.
    """
    return any(base.__module__.partition(".")[0] == _HOME for base in type(part).__mro__)
