"""A model folder for transformers' Auto classes, or its LoRA adapter for PEFT.

The exported folder stays a model folder: `caravan.json` comes along, and Caravan opens it by the
same classes. Its README.md has code that applies prompts, EOS and lengths, which transformers and
PEFT do not.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from caravan.data.tokenization import PairTemplates
from caravan.encoding import Encoding, read_encoding, write_encoding
from caravan.errors import InputError
from caravan.export import model_card, verify
from caravan.models import folder as model_folder
from caravan.models.crossencoder import Headed
from caravan.models.loading import load_language_model


def export(folder: Path, out: Path, adapter: bool = False) -> None:
    """Export full weights for transformers (an adapter is merged), or the adapter alone for PEFT.

    Args:
        folder: the model folder.
        out: the new folder; it must not exist, or be empty.
        adapter: write the adapter, which PEFT loads on its base.

    Raises:
        InputError: If the folder cannot be loaded or needs remote code, has no adapter to export,
            its head has no class in transformers, the exported model computes other numbers, or
            `out` is not empty.
    """
    if adapter and read_encoding(folder)[1]["weights"] != "adapter":
        raise InputError(
            "no-adapter", f"{folder} holds full weights and no adapter; leave out --adapter"
        )
    with verify.new_folder(folder, out) as scratch:
        model, tokenizer, encoding, facts = model_folder.load(folder)
        if isinstance(model.transformer, Headed):
            raise InputError(
                "head-not-in-transformers",
                f"{folder} scores with a linear layer on a token of an encoder, and transformers"
                " has no class with such a head; export it to sentence-transformers instead",
            )
        name = model_card.auto_class(encoding, facts)
        has_head = name == "AutoModelForSequenceClassification"
        padding = _set_padding(tokenizer, encoding) if has_head else None
        weights = model.transformer
        del model
        if adapter:
            for file in ("adapter_config.json", model_folder.ADAPTER):
                shutil.copyfile(folder / file, scratch / file)
        else:
            if encoding.kind == "retriever" and "language_model" in facts:
                del weights  # the backbone of an embedding model, without the output layer
                weights = load_language_model(str(folder))
            if has_head:
                weights.config.get_text_config().pad_token_id = padding
            verify.save_transformer(weights, scratch)
        del weights  # there may not be enough memory for two
        tokenizer.save_pretrained(scratch)
        write_encoding(scratch, encoding, facts if adapter else {**facts, "weights": "full"})
        if not adapter:
            _check_whole(scratch, name)
        verify.compare(folder, verify.outputs(folder), verify.outputs(scratch))
        variables = {
            "exported": True,
            "transformers": True,
            "auto_class": name,
            "adapter": adapter and model_card.base_arguments(folder),
            "padding": padding if adapter else "saved",
            **model_card.usage(tokenizer, encoding),
        }
        library = "peft" if adapter else "transformers"
        model_card.write_export(folder, scratch, library, [encoding.kind], variables)


def _set_padding(tokenizer: Any, encoding: Encoding) -> int | None:
    """Choose a padding that no pair ends with, and return its id; None if there is none.

    A decoder's head in transformers reads the last token that is not padding, by its id. If the EOS
    is the padding as well, that would be the token before the EOS. Without padding, transformers
    refuses to score batches.
    """
    token = verify.pad_token(tokenizer, PairTemplates(tokenizer, encoding).after[-1:])
    if token is None:
        return None
    tokenizer.pad_token = token
    return int(tokenizer.pad_token_id)


def _check_whole(folder: Path, name: str) -> None:
    """Load a folder as a user of transformers does, and check that every weight has its place."""
    model, report = getattr(transformers, name).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = sorted(str(key) for kind in kinds for key in report.get(kind, ()))
    if wrong:
        raise InputError(
            "export-differs",
            f"{type(model).__name__} does not load in plain transformers as it was saved"
            f" ({', '.join(wrong)[:300]}), so nothing is written; use the model folder",
        )
