"""A model folder as a SentenceTransformer or a CrossEncoder, built and saved by that library.

Prompts become sentence-transformers' prompts. Tokens after a text (EOS, the end of a prompt, slots)
are added by the tokenizer's post-processor, and truncation leaves room for them. Where they differ
between queries and passages, a Router has a Transformer for each side. The mean over slots is a
mean over tokens of which only the slots have a weight (WordWeights). Shorter embeddings are cut by
a linear layer (Dense) before they are normalized, because `truncate_dim` cuts them afterwards. For
a reranker's pairs see `caravan.export.prompts`. Encodings that need more are refused.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path
from typing import Any

import torch

from caravan.encoding import SLOTS, Encoding, read_encoding, slot_tokens
from caravan.errors import InputError
from caravan.export import model_card, verify
from caravan.export.prompts import TASKS, Pairing, framed, retriever_prompts
from caravan.models import folder as model_folder
from caravan.models.crossencoder import TokenScorer, head_of
from caravan.retrieval.inference import Inference

POOLINGS = {"last": "lasttoken", "mean": "mean", "cls": "cls", "slots": "mean"}
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}


def export(folder: Path, out: Path, dim: int | None = None) -> None:
    """Export a retriever as a SentenceTransformer, or a reranker as a CrossEncoder.

    Args:
        folder: the model folder.
        out: the new folder; it must not exist, or be empty.
        dim: the first dimensions of an embedding that are kept; None is as in the model folder.

    Raises:
        InputError: If sentence-transformers is not installed or cannot express the encoding, the
            folder cannot be loaded or needs remote code, the exported model computes other numbers,
            or `out` is not empty.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise InputError(
            "missing-package",
            "sentence-transformers is not installed; run: pip install 'sentence-transformers>=6.2'",
        )
    with verify.new_folder(folder, out) as scratch:
        kind = read_encoding(folder)[0].kind
        write = _write_retriever if kind == "retriever" else _write_reranker
        encoding, variables = write(folder, scratch, dim)
        variables |= {"exported": True, "sentence_transformers": True}
        library = "sentence-transformers"
        metadata = {"library_name": library, "tags": ["caravan", library, kind]}
        model_card.fill(scratch, folder, encoding, variables, metadata)


def _write_retriever(folder: Path, out: Path, dim: int | None) -> tuple[Encoding, dict[str, Any]]:
    """Write and compare a SentenceTransformer; returns its encoding and variables of the card."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as library

    reference = Inference(folder, precision="float32", overrides={"dim": dim})
    encoding, templates = reference.encoding, reference.templates
    prompts = retriever_prompts(encoding)
    texts = {}
    for side, encode in (("query", templates.queries), ("passage", templates.passages)):
        probes = verify.probes(getattr(encoding, f"{side}_length"))
        if side == "query":
            probes = [("", text) for _, text in probes]
        texts[side] = [text for text in probes if encode([text])[0]]
    expected = {
        name: reference.embed(texts[one.side], one.side, one.instruction)
        for name, one in prompts.items()
    }
    del reference  # there may not be enough memory for two
    model = model_folder.load(folder)[0]
    modules = _modules_after(model.backbone.config.get_text_config(), templates.tokenizer, encoding)
    routed = templates.tails["query"] != templates.tails["passage"]
    transformers = {}
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        verify.save_transformer(model.backbone, Path(scratch))
        del model
        for task in TASKS if routed else ["document"]:
            side = TASKS[task]
            length, tail = getattr(encoding, f"{side}_length"), templates.tails[side]
            framed(templates.tokenizer, length, templates.before, tail).save_pretrained(scratch)
            transformers[task] = library.Transformer(
                scratch,
                modality_config={"text": FORWARD},
                module_output_name="token_embeddings",
                query_length=encoding.query_length,
                document_length=encoding.passage_length,
            )
    first = transformers["document"]
    if routed:
        first.model = transformers["query"].model
        first = library.Router({task: [one] for task, one in transformers.items()}, None, False)
    exported = SentenceTransformer(
        modules=[first, *modules],
        prompts={name: prompt.before for name, prompt in prompts.items()},
        # A text without a task is read as a passage; a Router needs the task.
        default_prompt_name="document" if prompts["document"].before and not routed else None,
        similarity_fn_name="cosine" if encoding.normalize else "dot",
        device="cpu",
    )
    exported.save_pretrained(str(out), create_model_card=False)
    del exported, first, transformers
    saved = SentenceTransformer(str(out), device="cpu", local_files_only=True)
    for name, prompt in prompts.items():
        encode_side = saved.encode_query if prompt.side == "query" else saved.encode_document
        given = [prompt.given(*text) for text in texts[prompt.side]]
        verify.compare(folder, expected[name], encode_side(given, prompt_name=name))
    named = [name for name, one in prompts.items() if one.side == "query" and one.instruction]
    return encoding, {"routed": routed, "named": named, "titled": prompts["document"].titled}


def _modules_after(config: Any, tokenizer: Any, encoding: Encoding) -> list[Any]:
    """The modules after the Transformer: WordWeights for slots, Pooling, Dense, Normalize."""
    from sentence_transformers.sentence_transformer import modules as library

    size = config.hidden_size
    modules = [library.Pooling(size, POOLINGS[encoding.pooling])]
    if encoding.dim:
        first = torch.eye(encoding.dim, size)
        none = torch.nn.Identity()
        modules.append(library.Dense(size, encoding.dim, False, none, init_weight=first))
    if encoding.pooling == "slots":
        slots = [token for name in SLOTS for token in slot_tokens(encoding, name)]
        ids = dict(zip(tokenizer.convert_tokens_to_ids(slots), slots, strict=True))
        vocabulary = [ids.get(row, "") for row in range(max(config.vocab_size, len(tokenizer)))]
        modules.insert(0, library.WordWeights(vocabulary, dict.fromkeys(slots, 1.0), 0))
    if encoding.normalize:
        modules.append(library.Normalize())
    return modules


def _write_reranker(folder: Path, out: Path, dim: int | None) -> tuple[Encoding, dict[str, Any]]:
    """Write and compare a CrossEncoder; returns its encoding and variables of the card."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder.modules import LogitScore
    from sentence_transformers.sentence_transformer import modules as library

    reference = Inference(folder, precision="float32", overrides={"dim": dim})
    encoding, pairing = reference.encoding, Pairing(reference.templates, folder)
    probes = pairing.probes()
    queries, passages = [("", query) for query, _ in probes], [passage for _, passage in probes]
    expected = {
        name: reference.score_pairs(queries, passages, instruction)
        for name, instruction in [(None, None), *encoding.instructions.items()]
    }
    del reference  # there may not be enough memory for two
    model = model_folder.load(folder)[0]
    scorer, head = model.transformer, head_of(model.transformer)
    modules: list[Any] = []
    text = {"method": "forward", "method_output_name": "logits"}
    task, output = "sequence-classification", "scores"
    if isinstance(model, TokenScorer):
        modules = [LogitScore(*model.tokens)]
        task, output = "text-generation", "causal_logits"
    elif head is not None and head[0] == "score":
        # The head reads a token's state, found by the attention mask; transformers' own code looks
        # for the padding's id, which can be the EOS. Encoders released with a head keep that.
        linear, text = head[1], FORWARD
        task, output = "feature-extraction", "token_embeddings"
        size, none = linear.in_features, torch.nn.Identity()
        pooling = library.Pooling(size, POOLINGS[encoding.pooling])
        weight, name = linear.weight.detach(), "scores"
        dense = library.Dense(size, 1, False, none, init_weight=weight, module_output_name=name)
        modules = [pooling, dense]
        scorer = getattr(scorer, scorer.base_model_prefix)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        verify.save_transformer(scorer, Path(scratch))
        del model, scorer
        pairing.tokenizer().save_pretrained(scratch)
        message = {"message": {**text, "format": "flat"}} if pairing.chat else {}
        first = library.Transformer(
            scratch,
            transformer_task=task,
            processing_kwargs=pairing.settings(),
            modality_config={"text": text, **message},
            module_output_name=output,
        )
    exported = CrossEncoder(
        modules=[first, *modules],
        prompts=pairing.prompts or None,
        default_prompt_name="query" if pairing.prompts and not pairing.chat else None,
        activation_fn=torch.nn.Identity(),
        device="cpu",
    )
    exported.save_pretrained(str(out), create_model_card=False)
    del exported, first, modules
    saved = CrossEncoder(str(out), device="cpu", local_files_only=True)
    given = [(query, pairing.passage.given(*passage)) for query, passage in probes]
    for prompt, scores in expected.items():
        verify.compare(folder, scores, saved.predict(given, prompt_name=prompt))
    return encoding, {
        "chat": pairing.chat,
        "named": list(encoding.instructions),
        "tokens": pairing.templates,
        "longest": pairing.longest,
        "titled": pairing.passage.titled,
    }
