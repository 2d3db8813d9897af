"""Manifests: a stage is skipped only when what it would read is what it has read.

Beside every product (a file or a folder) lies `<name>.manifest.json` with the digests and settings
that it was made from, written last. No manifest, or one that differs in a single value, means that
the product is made again; a folder that merely exists proves nothing.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

from caravan.atomic import replacing

LIBRARIES = ("torch", "transformers", "tokenizers")
"""Libraries whose version can change embeddings, scores and weights."""


def path_of(product: Path) -> Path:
    return product.with_name(f"{product.name}.manifest.json")


def read(product: Path) -> dict[str, Any] | None:
    """The manifest of a product, or None if it has none that can be read."""
    try:
        manifest = json.loads(path_of(product).read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def matches(product: Path, inputs: dict[str, Any]) -> bool:
    """Whether the product is there and was made from just these inputs."""
    manifest = read(product)
    plain = json.loads(json.dumps(inputs))
    return product.exists() and manifest is not None and manifest.get("inputs") == plain


def differences(product: Path, inputs: dict[str, Any]) -> list[str]:
    """What differs between the manifest's inputs and these, as `key: old -> new`."""
    before = (read(product) or {}).get("inputs", {})
    now = json.loads(json.dumps(inputs))
    return [
        f"{key}: {old.get(key, 'unset')} -> {new.get(key, 'unset')}"
        for old, new in [(_flat(before), _flat(now))]
        for key in sorted(old.keys() | new.keys())
        if old.get(key, "unset") != new.get(key, "unset")
    ]


def write(product: Path, inputs: dict[str, Any], facts: dict[str, Any] | None = None) -> None:
    """Record that the product is finished, with what it was made from and facts of its making."""
    write_json(path_of(product), {"inputs": inputs, "facts": facts or {}})


def remove(product: Path) -> None:
    """Take the record away before the product is made again."""
    path_of(product).unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """The versions of Caravan and of the libraries that compute with it; imports none of them."""
    # An import of the package would, to import-linter, be one of torch, which it imports lazily.
    found = {"caravan": sys.modules["caravan"].__version__}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def digest(inputs: Any) -> str:
    """xxh3 (128 bits, hex) of inputs: a name for what is made from them."""
    import xxhash

    return xxhash.xxh3_128(json.dumps(inputs, sort_keys=True).encode()).hexdigest()


def content_digest(path: Path) -> str:
    """xxh3 (128 bits, hex) of a file's bytes, read in blocks."""
    import xxhash

    hasher = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


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
