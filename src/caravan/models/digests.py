"""What identifies a model folder: the digest of its files, and of an adapter's base.

Imports neither torch nor transformers, so that a plan can compare digests without loading either.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import xxhash

from caravan.encoding import FILE, read_encoding
from caravan.errors import InputError, reading
from caravan.manifests import content_digest, digest

_DETERMINING = (".safetensors", ".bin", ".json", ".model", ".txt", ".py")


def folder_digest(folder: Path) -> str:
    """A digest of what determines a model folder's output: encoding, weights, tokenizer, code.

    An adapter's base is included: by content if it is a folder, else by name and revision.
    """
    encoding, facts = read_encoding(folder)
    parts = [json.dumps(asdict(encoding), sort_keys=True), files_digest(folder)]
    if facts["weights"] == "adapter":
        base, revision = adapter_base(folder)
        parts += [files_digest(Path(base))] if Path(base).is_dir() else [base, revision or ""]
    return xxhash.xxh3_128("\0".join(parts).encode()).hexdigest()


def files_digest(folder: Path) -> str:
    """A digest of a folder's weights, configs, tokenizer files and code, without `caravan.json`."""
    hasher = xxhash.xxh3_128()
    for path in sorted(folder.glob("[!.]*")):
        if path.suffix in _DETERMINING and path.name != FILE and path.is_file():
            hasher.update(f"{path.name}\0{content_digest(path)}\0".encode())
    return hasher.hexdigest()


def adapter_base(folder: Path) -> tuple[str, str | None]:
    """The base model of an adapter folder, as (hub id or folder, revision).

    A relative path is looked up in the working directory, then in the parents of the adapter, so
    that the base is found from any working directory.

    Raises:
        InputError: If `adapter_config.json` is missing, invalid, or names no base model.
    """
    path = folder / "adapter_config.json"
    with reading(path, "not an adapter's config"):
        record = json.loads(path.read_text("utf-8"))
        base, revision = record.get("base_model_name_or_path"), record.get("revision")
        f"{base}{revision}".encode()  # half of a surrogate pair is part of no name
    if not isinstance(base, str) or not base or not isinstance(revision, str | None):
        raise InputError("no-base-model", f"{path} names no base model; save the model again")
    with reading(path, "its base cannot be looked up"):
        for parent in (Path(), *folder.resolve().parents):
            if (parent / base / "config.json").is_file():
                return str(parent / base), revision
    return base, revision


def weights_digest(base: str, revision: str | None = None) -> str | None:
    """A digest of the weights of a folder, or of a hub id's files in the cache.

    By content instead of the commit, which changes with a model's card.

    Returns:
        None if there are no weights.
    """
    from huggingface_hub import try_to_load_from_cache

    folder = Path(base)
    if not folder.is_dir():
        config = try_to_load_from_cache(base, "config.json", revision=revision)
        if not isinstance(config, str):
            return None
        folder = Path(config).parent
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    return digest([content_digest(path) for path in files]) if files else None
