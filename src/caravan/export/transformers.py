"""Whole weights for transformers' Auto classes, an adapter merged into its base.

The folder stays a model folder (`caravan.json` comes along), so that Caravan can go on with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from caravan.data.tokenization import PairTemplates
from caravan.encoding import Encoding, write_encoding
from caravan.export import card_page, card_recipes, plain, tokens, verify
from caravan.export.model_card import auto_class
from caravan.models import folder as model_folder
from caravan.models.loading import load_language_model


def write(folder: Path, out: Path) -> None:
    """Write the weights and check them.

    Raises:
        InputError: the reranker's head is none that transformers has, or the exported folder does
            not load whole, or computes other numbers.
    """
    model, tokenizer, encoding, facts = model_folder.load(folder)
    plain.refuse_foreign_head(folder, model)
    sample = plain.Sample.of(model, tokenizer, encoding)
    name = auto_class(encoding, facts)
    transformer = model.backbone if encoding.kind == "retriever" else model.plain
    if encoding.kind == "retriever" and name == "AutoModelForCausalLM":
        del model, transformer  # there may not be room for two
        transformer = load_language_model(str(folder))
    if hasattr(transformer, "score"):
        set_padding(transformer.config, tokenizer, encoding)
    verify.save_transformer(transformer, out)
    model = transformer = None
    tokenizer.save_pretrained(out)
    write_encoding(out, encoding, {**facts, "weights": "full"})
    loaded = verify.load_plain(getattr(transformers, name), out)
    trunk = loaded.base_model if encoding.kind == "retriever" else loaded
    what = "embeddings" if encoding.kind == "retriever" else "scores"
    verify.refuse_other_numbers(str(folder), what, sample.wanted, sample.by(trunk))
    loads = f"""import torch
from transformers import {name}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{card_page.HERE}")
model = {name}.from_pretrained("{card_page.HERE}").eval()
"""
    if trunk is not loaded:
        loads += "model = model.base_model  # embeddings are made without the output layer\n"
    text = card_page.exported_plain(
        folder, facts, encoding, "transformers", loads + card_recipes.recipe(tokenizer, encoding)
    )
    (out / "README.md").write_text(text, "utf-8")


def set_padding(config: Any, tokenizer: Any, encoding: Encoding) -> None:
    """Pad with a token that no pair ends with; without one, transformers refuses to pad.

    It has a decoder's head read the last token that is not padding, by its id: where the EOS is the
    padding too, as for many a decoder, that would be the token before the EOS.
    """
    padding = tokens.pad_token(tokenizer, PairTemplates(tokenizer, encoding).after[-1:])
    if padding is not None:
        tokenizer.pad_token = padding
    known = None if padding is None else tokenizer.pad_token_id
    config.get_text_config().pad_token_id = known
