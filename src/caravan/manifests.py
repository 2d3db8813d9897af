"""Manifests: a product is reused only if it was made from the same inputs.

Every product (a file or a folder) has a `<name>.manifest.json` beside it with the digests, settings
and versions that it was made from, written last. Without a manifest, or if a single value differs,
the product is made again. A manifest has its own digest, so a damaged or edited one is ignored.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import xxhash

from caravan.errors import InputError
from caravan.files import LOCK, filling_folder, locked, replacing

LIBRARIES = ("torch", "transformers", "tokenizers")
"""Libraries whose version can change embeddings, scores and weights."""
NOT_INSTALLED = "not installed"

log = logging.getLogger(__name__)


def path_of(product: Path) -> Path:
    return product.with_name(f"{product.name}.manifest.json")


def read(product: Path) -> dict[str, Any] | None:
    """The inputs and facts in a product's manifest; None if it is missing or damaged."""
    try:
        manifest = json.loads(path_of(product).read_text("utf-8"))
        inputs, facts = manifest["inputs"], manifest["facts"]
        if manifest["digest"] != digest([inputs, facts]):
            return None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return {"inputs": inputs, "facts": facts}


def facts(product: Path) -> dict[str, Any]:
    """The facts in a product's manifest; empty if it is missing or damaged."""
    return dict((read(product) or {}).get("facts", {}))


def matches(product: Path, inputs: dict[str, Any]) -> bool:
    """Whether the product is there and was made from just these inputs."""
    manifest = read(product)
    plain = json.loads(json.dumps(inputs))
    return product.exists() and manifest is not None and manifest["inputs"] == plain


def differences(product: Path, inputs: dict[str, Any]) -> list[str]:
    """The values that differ between the manifest's inputs and these, as `key: old -> new`."""
    old = _flat((read(product) or {}).get("inputs", {}))
    new = _flat(json.loads(json.dumps(inputs)))
    pairs = [(key, old.get(key, "unset"), new.get(key, "unset")) for key in sorted({*old, *new})]
    return [f"{key}: {before} -> {now}" for key, before, now in pairs if before != now]


def write(product: Path, inputs: dict[str, Any], facts: dict[str, Any] | None = None) -> None:
    """Record that the product is finished, with its inputs and facts about how it was made."""
    plain = json.loads(json.dumps([inputs, facts or {}]))
    record = {"inputs": plain[0], "facts": plain[1], "digest": digest(plain)}
    write_json(path_of(product), record)


def ensure(
    folder: Path,
    inputs: dict[str, Any],
    build: Callable[[Path], object],
    resumes: bool = False,
) -> Path:
    """Return `folder` with the files that `build` makes from these inputs; build them if needed.

    One process builds while others wait. An intact folder is used without a lock, so it may be
    read-only. Files in it that `build` does not write are left alone.

    Args:
        build: writes the files into the empty folder that it is given.
        resumes: give `build` the folder of an interrupted build instead, with what that has
            written; the name of `folder` then has to tell its inputs apart.
    """

    def is_there() -> bool:
        return matches(folder, inputs) and changed(folder) is None

    if is_there():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}{LOCK}")):
        if is_there():
            return folder
        if folder.exists():
            wrong = changed(folder) or path_of(folder)
            log.warning("%s is missing or damaged; %s is built again", wrong, folder)
        with filling_folder(folder, resumes) as scratch:
            build(scratch)
            names = [path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file()]
        files = {name.as_posix(): content(folder / name) for name in sorted(names)}
        write(folder, inputs, {"files": files})
    return folder


def changed(folder: Path) -> Path | None:
    """The first missing or changed file of an `ensure` folder, or its manifest; None if intact."""
    if (manifest := read(folder)) is None:
        return path_of(folder)
    written = manifest["facts"].get("files")
    if not isinstance(written, dict):  # of another version
        return path_of(folder)
    files = {folder / name: record for name, record in written.items()}
    return next((file for file, record in files.items() if not is_as_written(file, record)), None)


def remove(product: Path) -> None:
    """Remove the manifest before the product is built again."""
    path_of(product).unlink(missing_ok=True)


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str]:
    """The versions of Caravan and of libraries that it computes with; imports none of them."""
    # import-linter would count `import caravan` as an import of torch; that one is lazy.
    found = {"caravan": sys.modules["caravan"].__version__}
    for name in libraries:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = NOT_INSTALLED
    return found


def digest(inputs: Any) -> str:
    """xxh3 (128 bits, hex) of inputs: a name for what is made from them."""
    return xxhash.xxh3_128(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def content_digest(path: Path, size: int | None = None) -> str:
    """xxh3 (128 bits, hex) of a file's bytes, read in blocks; of the first `size` if given."""
    hasher = xxhash.xxh3_128()
    left = path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while block := file.read(min(left, 1 << 22)):
            hasher.update(block)
            left -= len(block)
    return hasher.hexdigest()


def content(path: Path) -> dict[str, Any]:
    """A file's digest, and the size and times by which `is_as_written` recognizes it unread."""
    state = _state(path)  # before the digest: a change meanwhile is seen at the next read
    return {"xxh3": content_digest(path), "state": state}


def is_as_written(path: Path, record: Any) -> bool:
    """Whether a file still has the content that `content` recorded.

    The file is read, once per process, only if its size or times differ (copied or touched).
    """
    if not isinstance(record, dict) or not path.is_file():
        return False
    state = _state(path)
    return record.get("state") == state or record.get("xxh3") == _digest_of(path, *state)


def _state(path: Path) -> list[int]:
    """Size, mtime and ctime; a program can set mtime back, but not ctime."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns]


@lru_cache(maxsize=256)
def _digest_of(path: Path, *state: int) -> str:
    return content_digest(path)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that Caravan wrote.

    Raises:
        InputError: it holds anything else.
    """
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    except (ValueError, RecursionError) as error:
        raise InputError(
            "damaged-file",
            f"{path} is damaged ({error}); delete it, and run the command that wrote it again",
        ) from None
    return found


def write_json(path: Path, data: Any) -> None:
    """Write JSON, whole or not at all."""
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
