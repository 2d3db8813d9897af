"""A retriever as a SentenceTransformer: the same embeddings from encode_query and encode_document.

Prompts are sentence-transformers' prompts; what follows a text (EOS, LLaRA's prompts and slots) is
added by the tokenizer, after truncation; each side has its own length. The mean over slots is the
mean over all tokens where the slots alone have a weight (WordWeights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from caravan.data.batch import pack
from caravan.data.tokenization import Templates
from caravan.encoding import SLOTS, Encoding, slot_tokens
from caravan.export import card_page, sentence_transformers, tokens, verify
from caravan.export.card_wording import Wording, quoted, wording
from caravan.models import folder as model_folder
from caravan.models.pooling import pooling_of


@dataclass(frozen=True)
class Side:
    """Queries or passages, as both libraries read them."""

    task: str  # sentence-transformers' word for it
    path: str  # of its transformer, in the exported folder
    wording: Wording
    length: int
    before: list[int]
    after: list[int]
    encode: Callable[[Sequence[tuple[str, str]]], list[list[int]]]

    def tokenized(self, tokenizer: Any, texts: Sequence[tuple[str, str]]) -> list[list[int]]:
        """Ids as sentence-transformers has them tokenised."""
        whole = [self.wording.whole(title, text) for title, text in texts]
        ids: list[list[int]] = tokenizer(
            whole, truncation=True, max_length=self.length, verbose=False
        )["input_ids"]
        return ids


def write(folder: Path, out: Path) -> None:
    """Write a retriever's folder and check it.

    Raises:
        InputError: a template is more than a prompt before a text and what follows it, or the
            exported model would read or embed a text differently.
    """
    model, tokenizer, encoding, facts = model_folder.load(folder, kind="retriever")
    sides = _sides(Templates(tokenizer, encoding), encoding)
    texts = [[text for text in tokens.SHORT if side.encode([text])[0]] for side in sides]
    with torch.no_grad():
        wanted = [
            model.embed(pack(side.encode(some), 4096))
            for side, some in zip(sides, texts, strict=True)
        ]
    _write_transformers(model.backbone, tokenizer, sides, out)
    routed = {side.task: out / side.path for side in sides if side.path}
    prompts = {side.task: side.wording.prompt for side in sides}
    settings = {
        "prompts": prompts,
        # Without a task a text is read as a passage; a Router asks for the task.
        "default_prompt_name": "document" if prompts["document"] and not routed else None,
        "similarity_fn_name": "cosine" if encoding.normalize else "dot",
    }
    sentence_transformers.write_modules(
        out,
        "SentenceTransformer",
        settings,
        "Router" if routed else "Transformer",
        _modules(model.backbone, tokenizer, encoding),
    )
    if routed:
        sentence_transformers.write_router(out, routed)
    del model  # there may not be room for two
    _check(folder, out, sides, encoding, texts, wanted)
    (out / "README.md").write_text(_readme(folder, encoding, facts, sides), "utf-8")


def _sides(templates: Templates, encoding: Encoding) -> list[Side]:
    tails = templates.tails
    routed = tails["query"] != tails["passage"]
    return [
        Side(
            task=task,
            path=task if routed else "",
            wording=wording(f"{name}_template", getattr(encoding, f"{name}_template")),
            length=getattr(encoding, f"{name}_length"),
            before=templates.before,
            after=tails[name],
            encode=encode,
        )
        for task, name, encode in (
            ("query", "query", templates.queries),
            ("document", "passage", templates.passages),
        )
    ]


def _write_transformers(backbone: Any, tokenizer: Any, sides: list[Side], out: Path) -> None:
    lengths = {f"{side.task}_length": side.length for side in sides}
    verify.save_transformer(backbone, out / sides[0].path)
    files = list((out / sides[0].path).iterdir())
    for side in {side.path: side for side in sides}.values():  # of one folder, the passages
        here = out / side.path
        here.mkdir(exist_ok=True)
        if here != files[0].parent:
            for file in files:
                sentence_transformers.link(file, here / file.name)
        framed = tokens.framed(tokenizer, side.length, side.before, side.after)
        framed.save_pretrained(here)
        sentence_transformers.write_feeding(here, "token_embeddings", lengths)


def _modules(
    backbone: Any, tokenizer: Any, encoding: Encoding
) -> list[sentence_transformers.Module]:
    config = backbone.config.get_text_config()
    modules = [sentence_transformers.pooling(config.hidden_size, encoding.pooling)]
    if encoding.pooling == "slots":
        slots = [token for name in SLOTS for token in slot_tokens(encoding, name)]
        names = {row: token for token, row in tokenizer.get_vocab().items()}
        rows = range(max(config.vocab_size, max(names) + 1))
        shares = torch.tensor([[float(names.get(row) in slots)] for row in rows])
        weighted = {
            "vocab": [names.get(row, "") for row in rows],
            "word_weights": dict.fromkeys(slots, 1.0),
            "unknown_word_weight": 0.0,
        }
        modules.insert(
            0, sentence_transformers.Module("WordWeights", weighted, {"emb_layer.weight": shares})
        )
    if encoding.normalize:
        modules.append(
            sentence_transformers.Module("Normalize", {"module_input_name": "sentence_embedding"})
        )
    return modules


def _check(
    folder: Path,
    out: Path,
    sides: list[Side],
    encoding: Encoding,
    texts: list[list[tuple[str, str]]],
    wanted: list[Tensor],
) -> None:
    """Compare what plain transformers makes of the exported files with the model folder."""
    from transformers import AutoModel, AutoTokenizer

    model, place = None, None
    for side, some, rows in zip(sides, texts, wanted, strict=True):
        tokenizer = AutoTokenizer.from_pretrained(out / side.path, trust_remote_code=False)
        probes = tokens.probes(side.length)
        ours, theirs = side.encode(probes), side.tokenized(tokenizer, probes)
        tokens.refuse_other_tokens(f"{folder} ({side.task})", probes, ours, theirs)
        if place != side.path:
            model = None  # there may not be room for two
            model, place = verify.load_plain(AutoModel, out / side.path), side.path
        ids = {"input_ids": side.tokenized(tokenizer, some)}
        found = _embedded(model, tokenizer.pad(ids, return_tensors="pt"), encoding)
        verify.refuse_other_numbers(str(folder), "embeddings", rows, found)


@torch.no_grad()
def _embedded(model: Any, given: Any, encoding: Encoding) -> Tensor:
    states = model(**given).last_hidden_state
    found = pooling_of(encoding)(states, given["attention_mask"])
    return torch.nn.functional.normalize(found, dim=-1) if encoding.normalize else found


def _readme(folder: Path, encoding: Encoding, facts: dict[str, Any], sides: list[Side]) -> str:
    query, passage = sides
    titled, alone = passage.wording.titled, ""
    if passage.wording.titled_prompt != passage.wording.prompt:
        alone = f", prompt={quoted(passage.wording.titled_prompt)}"
    example = f"""from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{card_page.HERE}")
queries = model.encode_query(["Which animals cross the desert?"])
passages = model.encode_document(["Camels cross it, by night."])
"""
    if titled:
        example += f"""
title, text = "Camels", "They cross it by night."  # a title is part of the text
titled = model.encode_document([f{quoted(titled)}]{alone})
"""
    example += "\nprint(model.similarity(queries, passages))\n"
    notes = [
        f"`encode_query` reads at most {query.length} tokens, `encode_document` {passage.length},"
        " prompts and special tokens counted in; what is longer is cut, never what follows a text."
    ]
    if query.path:
        notes.append(
            "What follows a query and what follows a passage differ, so each has a transformer with"
            " a tokenizer of its own, and `encode` without a task is refused. Their weights are the"
            " same; to have them in memory once:"
            ' `model[0].sub_modules["document"][0].model ='
            ' model[0].sub_modules["query"][0].model`.'
        )
    else:
        notes.append(
            "`encode`, which is told no task, reads a text as a passage; with"
            " `prompt_name=\"query\"` it has a query's prompt, and a passage's length."
        )
    if encoding.pooling == "slots":
        notes.append(
            "An embedding is the mean over the slots, tokens that the tokenizer adds; a text must"
            f" not have them itself (`{slot_tokens(encoding, SLOTS[0])[0]}`, ...)."
        )
    return card_page.exported(
        folder,
        facts,
        library="sentence-transformers",
        pipeline="sentence-similarity",
        tags=["sentence-transformers", "sentence-similarity", "feature-extraction"],
        about="embeds queries and passages",
        example=example,
        rows={
            "query": f"`{encoding.query_template}`, {encoding.query_length} tokens",
            "passage": f"`{encoding.passage_template}`, {encoding.passage_length} tokens",
            "embedding": f"{encoding.pooling} pooling"
            + (", unit length" if encoding.normalize else ""),
        },
        notes=notes,
    )
