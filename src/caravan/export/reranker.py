"""A reranker as a CrossEncoder: the same scores from predict and rank.

The head reads one token's state, which is found by the attention mask: Transformer, Pooling, Dense.
(Plain transformers looks for padding by its id, which an EOS may share.) An encoder that was
released with a head of its own keeps it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from caravan.data.batch import pack
from caravan.encoding import Encoding
from caravan.errors import InputError
from caravan.export import card_page, sentence_transformers, verify
from caravan.export.card_wording import quoted
from caravan.export.pairing import Pairing
from caravan.models import folder as model_folder
from caravan.models.pooling import pooling_of

SCORED = 16
"""Pairs whose scores are compared."""
IDENTITY = "torch.nn.modules.linear.Identity"


def write(folder: Path, out: Path) -> None:
    """Write a reranker's folder and check it.

    Raises:
        InputError: it scores by likelihood, a template is more than sentence-transformers can
            express, or the exported model would read or score a pair differently.
    """
    model, tokenizer, encoding, facts = model_folder.load(folder, kind="reranker")
    if encoding.scoring == "likelihood":
        raise InputError(
            f"{folder} scores by the query's likelihood, which no module of sentence-transformers"
            " computes; export it as merged"
        )
    pairing = Pairing(tokenizer, encoding, str(folder))
    some = pairing.probes()[-SCORED:]
    with torch.no_grad():
        pairs = pairing.wanted(some)
        seconds = [pair.second for pair in pairs] if pairing.templates.typed else None
        wanted = model.score(pack([pair.ids for pair in pairs], 4096, seconds=seconds))
    scorer = model.plain
    # As in `CrossEncoder`: what has no such layer is scored by its own forward.
    head: nn.Linear | None = getattr(scorer, "score", None)
    trunk = scorer if head is None else getattr(scorer, scorer.base_model_prefix)
    verify.save_transformer(trunk, out)
    pairing.tokenizer().save_pretrained(out)
    sentence_transformers.write_feeding(
        out,
        "scores" if head is None else "token_embeddings",
        {"processing_kwargs": pairing.settings()},
        chat=pairing.chat,
    )
    prompts = {"query": pairing.prompt} if pairing.prompt else {}
    settings = {
        "prompts": prompts,
        "default_prompt_name": "query" if prompts else None,
        "activation_fn": IDENTITY,
    }
    modules = [] if head is None else _modules(head, encoding)
    sentence_transformers.write_modules(out, "CrossEncoder", settings, "Transformer", modules)
    del model, scorer, trunk  # there may not be room for two
    found = _scores(out, pairing, some, head, encoding)
    verify.refuse_other_numbers(str(folder), "scores", wanted, found)
    (out / "README.md").write_text(_readme(folder, encoding, facts, pairing), "utf-8")


def _modules(head: nn.Linear, encoding: Encoding) -> list[sentence_transformers.Module]:
    dense = {
        "in_features": head.in_features,
        "out_features": 1,
        "bias": head.bias is not None,
        "activation_function": IDENTITY,
        "module_input_name": "sentence_embedding",
        "module_output_name": "scores",
    }
    named = {f"linear.{name}": weight.detach() for name, weight in head.named_parameters()}
    return [
        sentence_transformers.pooling(head.in_features, encoding.pooling),
        sentence_transformers.Module("Dense", dense, named),
    ]


def _scores(
    out: Path, pairing: Pairing, some: Any, head: nn.Linear | None, encoding: Encoding
) -> Tensor:
    """Scores of the exported files by plain transformers, once their ids are as they should be."""
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=False)
    pairing.check(tokenizer)
    auto = AutoModelForSequenceClassification if head is None else AutoModel
    model = verify.load_plain(auto, out)
    given = tokenizer.pad(pairing.read(tokenizer, some), return_tensors="pt")
    with torch.no_grad():
        if head is None:
            own: Tensor = model(**given).logits[:, 0]
            return own
        states = model(**given).last_hidden_state
        found: Tensor = head(pooling_of(encoding)(states, given["attention_mask"]))[:, 0]
        return found


def _readme(folder: Path, encoding: Encoding, facts: dict[str, Any], pairing: Pairing) -> str:
    example = f"""from sentence_transformers import CrossEncoder

model = CrossEncoder("{card_page.HERE}")
query, passage = "Which animals cross the desert?", "Camels cross it, by night."
scores = model.predict([(query, passage)])
"""
    titled = pairing.passage.titled
    if titled:
        example += f"""
title, text = "Camels", "They cross it by night."  # a title is part of the text
ranked = model.rank(query, [passage, f{quoted(titled)}])
"""
    how = (
        "A chat template joins query and passage with their prompts"
        if pairing.chat
        else "Query and passage are the tokenizer's pair"
    )
    longer = (
        "of longer queries the passage gets less than the model folder gives it"
        if pairing.chat
        else "of queries that are a little longer the model folder cuts the end instead, and much"
        " longer ones are an error"
    )
    return card_page.exported(
        folder,
        facts,
        library="sentence-transformers",
        pipeline="text-ranking",
        tags=["sentence-transformers", "cross-encoder", "reranker"],
        about="scores a query and a passage that it reads together",
        example=example,
        rows={
            "query": f"`{encoding.query_template}`",
            "passage": f"`{encoding.passage_template}`",
            "score": f"a linear head on the {encoding.pooling} token, as it comes",
        },
        notes=[
            f"{how}; the whole is at most {pairing.length} tokens, and the passage is cut. Scores"
            f" are the model folder's for queries of up to {pairing.longest} tokens, prompts"
            f" counted in; {longer}."
        ],
    )
