"""A model folder for transformers' Auto classes.

The exported folder stays a model folder: it keeps `caravan.json`, and Caravan opens it with the
same classes. Its README.md has code that applies prompts, EOS and lengths, which transformers does
not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from caravan.data.pairs import PairTemplates, chat_facts
from caravan.encoding import Encoding, write_encoding
from caravan.errors import InputError
from caravan.export import model_card, verify
from caravan.models import folder as model_folder
from caravan.models.crossencoder import CrossEncoder, Headed, TokenScorer
from caravan.models.loading import load_language_model


def export(folder: Path, out: Path, dim: int | None = None, classifier: bool = False) -> None:
    """Export full weights for transformers; an adapter is merged.

    Args:
        folder: the model folder.
        out: the new folder; it must not exist, or be empty.
        dim: the first dimensions of an embedding that are kept; None is as in the model folder.
        classifier: export a reranker that is scored by two tokens as a model for sequence
            classification, whose head is the difference of the two rows of the output layer.

    Raises:
        InputError: If the folder cannot be loaded or needs remote code, its head has no class in
            transformers, the exported model computes other numbers, or `out` is not empty.
    """
    with verify.new_folder(folder, out) as scratch:
        model, tokenizer, encoding, facts = model_folder.load(folder)
        if dim is not None:
            encoding = replace(encoding, dim=dim)
        if classifier:
            model, encoding = _classifier(folder, model, encoding)
        if isinstance(model.transformer, Headed):
            raise InputError(
                "head-not-in-transformers",
                f"{folder} scores with a linear layer on a token of an encoder, and transformers"
                " has no class with such a head; export it to sentence-transformers instead",
            )
        weights = model.transformer
        del model
        if encoding.kind == "retriever" and "language_model" in facts:
            del weights  # the backbone of an embedding model, without the output layer
            weights = load_language_model(str(folder))
        name = model_card.auto_class(encoding, facts)
        if name == "AutoModelForSequenceClassification":
            weights.config.get_text_config().pad_token_id = _set_padding(tokenizer, encoding)
        verify.save_transformer(weights, scratch)
        del weights  # there may not be enough memory for two
        tokenizer.save_pretrained(scratch)
        facts = {**facts, **chat_facts(tokenizer, encoding), "weights": "full"}
        write_encoding(scratch, encoding, facts)
        verify.compare(folder, verify.outputs(folder, dim), verify.outputs(scratch))
        variables = {"transformers": True, "auto_class": name, "padding": "saved"}
        variables |= {"exported": True, **model_card.usage(tokenizer, encoding)}
        metadata = {"library_name": "transformers", "tags": ["caravan", encoding.kind]}
        model_card.fill(scratch, folder, encoding, variables, metadata)


def _classifier(folder: Path, model: Any, encoding: Encoding) -> tuple[Any, Encoding]:
    """A reranker that is scored by two tokens, as one with a head that computes the same."""
    if not isinstance(model, TokenScorer):
        raise InputError(
            "not-token-scored",
            f"{folder} is not a reranker with encoding.scoring=token; leave --classifier out",
        )
    scored = replace(encoding, scoring="head")
    return CrossEncoder(model.as_classifier(), scored), scored


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
