"""One export: refused before it begins, or written and checked beside its place, then renamed.

A format is a module with `write(folder, scratch)`, which loads the model folder, fills the scratch
folder and compares what it has written with the model. Whatever is raised on the way leaves nothing
behind. Nothing heavy is imported before there is something to export.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.files import writing
from caravan.models.remote_code import FACT, SETTING

FORMATS = {
    "sentence-transformers": "SentenceTransformer(...) or CrossEncoder(...), prompts included",
    "merged": "whole weights for transformers' Auto classes",
    "adapter": "the LoRA adapter, for PEFT on its base",
}


def export(folder: Path, form: str, out: Path) -> None:
    """Write a model folder in another form, whole or not at all.

    Args:
        folder: the model folder.
        form: one of `FORMATS`.
        out: the new folder; it must not be there, or be empty.

    Raises:
        InputError: the folder does not load or has code of its own, the form cannot express what it
            does, or `out` is taken.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} is there already; give a folder that is new or empty")
    if read_encoding(folder)[1].get(FACT):
        raise InputError(
            f"{folder} has code of its own, of which nothing says that it reads and saves as the"
            " models of transformers do, so it is not exported; use the model folder itself, with"
            f" {SETTING}=true"
        )
    write = _writer(form)
    # Beside the parents that are yet to be made: what fails leaves none of them.
    place = next(parent for parent in out.absolute().parents if parent.is_dir())
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=place))
    try:
        with writing(out):
            write(folder, scratch)
        scratch.chmod(0o755)
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.exists():
            out.rmdir()
        os.replace(scratch, out)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _writer(form: str) -> Callable[[Path, Path], None]:
    from caravan.export import adapter, sentence_transformers, transformers

    return {
        "sentence-transformers": sentence_transformers.write,
        "merged": transformers.write,
        "adapter": adapter.write,
    }[form]
