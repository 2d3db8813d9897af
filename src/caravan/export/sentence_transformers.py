"""A model folder as a SentenceTransformer or a CrossEncoder, built and saved by that library.

Prompts become sentence-transformers' prompts. Tokens after a text (EOS, the end of a prompt, slots)
are added by the tokenizer's post-processor, and truncation leaves room for them. Where they differ
between queries and passages, a Router has a Transformer for each side. The mean over slots is a
mean over tokens of which only the slots have a weight (WordWeights). A reranker's pair is the
tokenizer's own, or one text written by a chat template. Templates that need more are refused.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from caravan.data.batch import pack
from caravan.data.pairs import LEAST, PairTemplates
from caravan.data.tokenization import Template, Templates
from caravan.encoding import SLOTS, Encoding, read_encoding, slot_tokens
from caravan.errors import InputError
from caravan.export import model_card, verify
from caravan.export.model_card import TEXT, TITLE, fields, quoted
from caravan.models import folder as model_folder
from caravan.models.crossencoder import head_of

POOLINGS = {"last": "lasttoken", "mean": "mean", "cls": "cls", "slots": "mean"}
QUERIES = ("camels", verify.QUERY, "naïve 北 🐪", "  spaces ", "")
SCORED = 16
"""Pairs whose scores are compared."""
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
REMEDY = "export it to transformers instead"


def export(folder: Path, out: Path) -> None:
    """Export a retriever as a SentenceTransformer, or a reranker as a CrossEncoder.

    Args:
        folder: the model folder.
        out: the new folder; it must not exist, or be empty.

    Raises:
        InputError: If sentence-transformers is not installed or cannot express the encoding, the
            folder cannot be loaded or needs remote code, the exported model reads a text
            differently or computes other numbers, or `out` is not empty.
    """
    if importlib.util.find_spec("sentence_transformers") is None:
        raise InputError(
            "missing-package",
            "sentence-transformers is not installed; run: pip install 'sentence-transformers>=6.2'",
        )
    with verify.new_folder(folder, out) as scratch:
        kind = read_encoding(folder)[0].kind
        write = _write_retriever if kind == "retriever" else _write_reranker
        variables = {"exported": True, "sentence_transformers": True, **write(folder, scratch)}
        tags = ["sentence-transformers", kind]
        model_card.write_export(folder, scratch, tags[0], tags, variables)


def _write_retriever(folder: Path, out: Path) -> dict[str, Any]:
    """Write and compare a SentenceTransformer; returns variables of the card."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import modules as library

    model, tokenizer, encoding, _ = model_folder.load(folder, kind="retriever")
    templates = Templates(tokenizer, encoding)
    sides = {
        "query": Side(
            Prompt.of("query_template", encoding.query_template),
            encoding.query_length,
            templates.tails["query"],
            templates.queries,
        ),
        "document": Side(
            Prompt.of("passage_template", encoding.passage_template),
            encoding.passage_length,
            templates.tails["passage"],
            templates.passages,
        ),
    }
    with torch.no_grad():
        expected = {
            task: model.embed(pack(side.encode(side.texts()), 4096)) for task, side in sides.items()
        }
    config = model.backbone.config.get_text_config()
    modules = [library.Pooling(config.hidden_size, POOLINGS[encoding.pooling])]
    if encoding.pooling == "slots":
        slots = [token for name in SLOTS for token in slot_tokens(encoding, name)]
        ids = dict(zip(tokenizer.convert_tokens_to_ids(slots), slots, strict=True))
        rows = range(max(config.vocab_size, len(tokenizer)))
        weights = library.WordWeights(
            [ids.get(row, "") for row in rows], dict.fromkeys(slots, 1.0), 0
        )
        modules.insert(0, weights)
    if encoding.normalize:
        modules.append(library.Normalize())
    routed = sides["query"].after != sides["document"].after
    transformers = {}
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        verify.save_transformer(model.backbone, Path(scratch))
        del model  # there may not be enough memory for two
        for task in sides if routed else ["document"]:
            side = sides[task]
            framed(tokenizer, side.length, templates.before, side.after).save_pretrained(scratch)
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
        routes = {task: [transformer] for task, transformer in transformers.items()}
        first = library.Router(routes, allow_empty_key=False)
    prompts = {task: side.prompt.before for task, side in sides.items()}
    exported = SentenceTransformer(
        modules=[first, *modules],
        prompts=prompts,
        # A text without a task is read as a passage; a Router needs the task.
        default_prompt_name="document" if prompts["document"] and not routed else None,
        similarity_fn_name="cosine" if encoding.normalize else "dot",
        device="cpu",
    )
    exported.save_pretrained(str(out), create_model_card=False)
    for file in out.glob("query_*/*.safetensors"):  # equal on both sides: one file with two names
        with suppress(OSError):
            os.link(file, out / file.name)
            os.replace(out / file.name, next(out.glob("document_*")) / file.name)
    del exported, first, transformers
    saved = SentenceTransformer(str(out), device="cpu", local_files_only=True)
    for task, side in sides.items():
        probes = verify.probes(side.length)
        found = _ids(
            saved,
            [side.prompt.prompt_of(text[0]) + side.prompt.given(*text) for text in probes],
            task=task,
        )
        verify.compare_ids(f"{folder} ({task})", probes, side.encode(probes), found)
        given = [side.prompt.given(*text) for text in side.texts()]
        encode = saved.encode_query if task == "query" else saved.encode_document
        outputs = encode(given, convert_to_tensor=True)
        verify.compare_outputs(str(folder), expected[task], outputs)
    return {"routed": routed, **sides["document"].prompt.card()}


class Side(NamedTuple):
    """Queries or passages: their prompt, length, the ids after a text, and the model's own ids."""

    prompt: Prompt
    length: int
    after: list[int]
    encode: Callable[[Sequence[tuple[str, str]]], list[list[int]]]

    def texts(self) -> list[tuple[str, str]]:
        """Texts whose embeddings are compared: those that have a token and the usual prompt."""
        return [
            text
            for text in verify.TEXTS
            if self.encode([text])[0] and self.prompt.prompt_of(text[0]) == self.prompt.before
        ]


def _write_reranker(folder: Path, out: Path) -> dict[str, Any]:
    """Write and compare a CrossEncoder; returns variables of the card."""
    from sentence_transformers import CrossEncoder
    from sentence_transformers.sentence_transformer import modules as library

    model, tokenizer, encoding, _ = model_folder.load(folder, kind="reranker")
    if encoding.scoring == "likelihood":
        raise InputError(
            "not-expressible",
            f"{folder} scores by the query's likelihood, which no module of sentence-transformers"
            f" computes; {REMEDY}",
        )
    pairing = Pairing(tokenizer, encoding, folder)
    probes = pairing.probes()
    pairs = pairing.read(probes)
    expected = verify.scores(model, pairs[-SCORED:], tokenizer, encoding)
    scorer = model.transformer
    head = head_of(scorer)
    modules = []
    text = {"method": "forward", "method_output_name": "logits"}
    if head is not None and head[0] == "score":
        linear = head[1]
        # The head reads a token's state, found by the attention mask; transformers' own code looks
        # for the padding's id, which can be the EOS. Encoders released with a head keep that.
        text = FORWARD
        modules = [
            library.Pooling(linear.in_features, POOLINGS[encoding.pooling]),
            library.Dense(
                linear.in_features,
                1,
                bias=linear.bias is not None,
                activation_function=torch.nn.Identity(),
                init_weight=linear.weight.detach(),
                init_bias=None if linear.bias is None else linear.bias.detach(),
                module_output_name="scores",
            ),
        ]
        scorer = getattr(scorer, scorer.base_model_prefix)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        verify.save_transformer(scorer, Path(scratch))
        del model, scorer  # there may not be enough memory for two
        pairing.tokenizer().save_pretrained(scratch)
        message = {"message": {**text, "format": "flat"}} if pairing.chat else {}
        first = library.Transformer(
            scratch,
            transformer_task="feature-extraction" if modules else "sequence-classification",
            processing_kwargs=pairing.settings(),
            modality_config={"text": text, **message},
            module_output_name="token_embeddings" if modules else "scores",
        )
    exported = CrossEncoder(
        modules=[first, *modules],
        prompts={"query": pairing.prompt} if pairing.prompt else None,
        default_prompt_name="query" if pairing.prompt else None,
        activation_fn=torch.nn.Identity(),
        device="cpu",
    )
    exported.save_pretrained(str(out), create_model_card=False)
    del exported, first, modules
    saved = CrossEncoder(str(out), device="cpu", local_files_only=True)
    given = [(query, pairing.passage.given(*passage)) for query, passage in probes]
    found = _ids(saved, given, prompt=pairing.prompt or None)
    verify.compare_ids(str(folder), probes, [pair.ids for pair in pairs], found)
    outputs = saved.predict(given[-SCORED:], convert_to_tensor=True)
    verify.compare_outputs(str(folder), expected, outputs)
    return {
        "chat": pairing.chat,
        "length": pairing.templates.length,
        "longest": pairing.longest,
        **pairing.passage.card(),
    }


def _ids(model: Any, texts: Sequence[Any], **how: Any) -> list[list[int]]:
    """Token ids as sentence-transformers reads texts or pairs, without padding."""
    read = model.preprocess(texts, **how)
    rows = zip(read["input_ids"], read["attention_mask"], strict=True)
    return [ids[mask.bool()].tolist() for ids, mask in rows]


class Pairing:
    """A reranker's pairs as sentence-transformers reads them.

    A CrossEncoder puts a prompt before the first text of a pair, none before the second, and
    tokenizes them apart. Whatever else there is (`query: ... document: ...` in one text, prompts
    of both texts) is written by a chat template, with special tokens.

    Args:
        folder: the model folder, for messages.

    Raises:
        InputError: If a template needs more than sentence-transformers can express.

    Attributes:
        chat: whether a chat template writes the pair.
        prompt: before the query, if the pair is the tokenizer's own.
        passage: the prompt of a passage.
        longest: tokens of a query, with its prompt, above which the two truncate differently.
    """

    def __init__(self, tokenizer: Any, encoding: Encoding, folder: Path) -> None:
        self.templates = PairTemplates(tokenizer, encoding)
        self.encoding = encoding
        self.longest = self.templates.room - LEAST
        self.passage = Prompt.of("passage_template", encoding.passage_template)
        if self.passage.titled and self.passage.titled_before != self.passage.before:
            raise InputError(
                "not-expressible",
                f"encoding.passage_template {encoding.passage_template!r} starts differently with a"
                " title and without, and sentence-transformers does not know which passages have"
                f" one; {REMEDY}",
            )
        between = self.passage.before or Template(encoding.query_template).suffix
        # A chat template gives no token types.
        self.chat = encoding.pair == "joined" or (bool(between) and not self.templates.typed)
        if between and not self.chat:
            raise InputError(
                "not-expressible",
                f"{folder} reads pairs with token types and with {between!r} between the texts,"
                f" where sentence-transformers has only a prompt before the first text; {REMEDY}",
            )
        query = "" if self.chat else Prompt.of("query_template", encoding.query_template).before
        self.prompt = query

    def settings(self) -> dict[str, Any]:
        """The `processing_kwargs` of a Transformer: how its tokenizer is called."""
        length = self.templates.length
        if not self.chat:
            return {"text": {"truncation": "only_second", "max_length": length}}
        restore = bool(self.templates.after)
        return {
            "text": {"truncation": True, "max_length": length},
            "chat_template": {"restore_suffix": restore},
        }

    def probes(self) -> list[tuple[str, tuple[str, str]]]:
        """Queries, and passages as (title, text), that fit whole or whose passage is truncated."""
        tokenizer, template = self.templates.tokenizer, Template(self.encoding.query_template)
        known = tokenizer(
            [template.render("", query) for query in QUERIES], add_special_tokens=False
        )
        queries = [
            query
            for query, ids in zip(QUERIES, known["input_ids"], strict=True)
            if len(ids) < self.longest - 8 or not query
        ]
        texts = verify.probes(self.templates.length)
        few = (*verify.TEXTS, max(texts, key=lambda text: len(text[1])))
        return [(queries[0], text) for text in texts] + [
            (query, text) for query in queries[1:] for text in few
        ]

    def read(self, pairs: Sequence[tuple[str, tuple[str, str]]]) -> list[Any]:
        """The model folder's token ids of pairs, and where the second text starts."""
        queries = [("", query) for query, _ in pairs]
        return self.templates.pairs(queries, [passage for _, passage in pairs])

    def tokenizer(self) -> Any:
        """The tokenizer to export."""
        own = self.templates
        result = framed(own.tokenizer, own.length, own.before, own.after, own.between)
        if not self.chat:
            return result
        query, passage = QUERIES[0], ("", "camels")
        messages = [
            {"role": "query", "content": query},
            {"role": "document", "content": self.passage.given(*passage)},
        ]
        # Some tokenizers mark a word at a text's start, and none after a special token.
        for gap in ("", " "):
            result.chat_template = self._chat_template(result, gap)
            found = result.apply_chat_template(messages, tokenize=True, return_dict=True)
            if found["input_ids"] == self.read([(query, passage)])[0].ids:
                break
        return result

    def _chat_template(self, tokenizer: Any, gap: str) -> str:
        """A Jinja template that writes what `PairTemplates` reads, with special tokens.

        Args:
            gap: after a special token.
        """

        def special(ids: list[int]) -> str:
            return "".join(tokenizer.convert_ids_to_tokens(ids))

        own, query = self.templates, Template(self.encoding.query_template)
        before = special(own.before) + (gap if own.before else "")
        between = special(own.between) + (gap if own.between else "")
        if self.encoding.pair == "joined":
            between = " "
        opening, *rest = (query.render("", TEXT) + query.suffix).split(TEXT)
        parts = [quoted(before + opening)]
        for literal in rest:
            parts += ["messages[0].content", quoted(literal)]
        parts += [quoted(between + self.passage.before), "messages[1].content"]
        parts += [quoted(special(own.after))]
        roles = "messages|map(attribute='role')|list != ['query', 'document']"
        error = "raise_exception('give pairs of a query and a passage')"
        return f"{{% if {roles} %}}{{{{ {error} }}}}{{% endif %}}{{{{ {' ~ '.join(parts)} }}}}"


class Prompt(NamedTuple):
    """A template as a prompt and a text. A passage's title is part of the text.

    What a template has after its text is added by the tokenizer (`framed`).

    Attributes:
        before: the prompt of a text without a title.
        titled: a title and a text as one text, for str.format; "" without titles.
        titled_before: the prompt of that one.
    """

    before: str
    titled: str = ""
    titled_before: str = ""

    @classmethod
    def of(cls, name: str, template: str) -> Prompt:
        """Split a template, up to what it has after its text.

        Args:
            name: of the setting, for the message.

        Raises:
            InputError: If more than a prompt is before a text.

        >>> Prompt.of("passage_template", "passage: {title} {text}")
        Prompt(before='passage: ', titled='{title} {text}', titled_before='passage: ')
        """
        parts = Template(template)
        before, _, rest = parts.render("", TEXT).partition(TEXT)
        if rest:
            raise InputError(
                "not-expressible",
                f"encoding.{name} {template!r} repeats the text or has a title after it, where"
                f" sentence-transformers has a prompt before the text and no more; {REMEDY}",
            )
        whole = parts.render(TITLE, TEXT)
        if TITLE not in whole:
            return cls(before)
        start = min(whole.index(TITLE), whole.index(TEXT))
        return cls(before, fields(whole[start:]), whole[:start])

    def prompt_of(self, title: str) -> str:
        """The prompt of a text with this title, which may be empty."""
        return self.titled_before if title and self.titled else self.before

    def given(self, title: str, text: str) -> str:
        """The text that a user passes."""
        return self.titled.format(title=title, text=text) if title and self.titled else text

    def card(self) -> dict[str, str]:
        """Variables of the card: how a title is given."""
        differs = self.titled and self.titled_before != self.before
        return {
            "titled": f"f{quoted(self.titled)}" if self.titled else "",
            "titled_prompt": f", prompt={quoted(self.titled_before)}" if differs else "",
        }


def framed(
    tokenizer: Any,
    length: int,
    before: Sequence[int],
    after: Sequence[int],
    between: Sequence[int] = (),
) -> Any:
    """A copy of a tokenizer that puts these ids around texts and pairs, and truncates to `length`.

    Raises:
        InputError: If it is not of the `tokenizers` library, or has no special token to pad with.
    """
    from tokenizers import Tokenizer
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    padding = verify.pad_token(tokenizer)
    if padding is None or not tokenizer.is_fast:
        raise InputError(
            "not-expressible",
            f"{tokenizer.name_or_path or 'the tokenizer'} is not of the tokenizers library, which"
            f" can add prompts, or has no special token to pad with; {REMEDY}",
        )
    frame = {"before": list(before), "between": list(between), "after": list(after)}

    def put(name: str, kind: int) -> list[str]:
        return [f"{name}:{kind}"] if frame[name] else []

    # The generic class takes the post-processor from its file; those of some models make their own.
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.post_processor = TemplateProcessing(
        single=[*put("before", 0), "$A:0", *put("after", 0)],
        pair=[*put("before", 0), "$A:0", *put("between", 0), "$B:1", *put("after", 1)],
        special_tokens=[
            {"id": name, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            for name, ids in frame.items()
            if ids
        ],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        model_input_names=tokenizer.model_input_names,
        padding_side="right",
        truncation_side="right",
        split_special_tokens=tokenizer.split_special_tokens,
        **{**tokenizer.special_tokens_map, "pad_token": padding},
    )
