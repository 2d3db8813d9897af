"""Tiny model folders of every kind that is exported, and the code of their cards."""

from __future__ import annotations

import copy
import itertools
import re
import string
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.small import language_model_of, saved_base, shaken
from tests.tiny import WORDS, tiny_backbone

from caravan.data.batch import pack
from caravan.data.pairs import PairTemplates, answer_ids
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding, read_encoding
from caravan.models import folder
from caravan.models.adapters import LoRA
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder
from caravan.models.crossencoder import CrossEncoder, QueryLikelihood, TokenScorer
from caravan.models.llara import Layout, SlotEncoder
from caravan.models.loading import add_slots, fit_vocabulary
from caravan.models.tiny_llama import train_bpe

TEXTS = [
    "camels",
    "",
    "A caravan crosses the desert at night, from well to well. " * 8,
    "  spaces  around ",
    "Größe 北京 🐪\nthe second line",
    "What is a dune?",
]
TITLED = [
    *(("", text) for text in TEXTS),
    ("Salt", "is gold"),
    ("Rope", "tent " * 60),
    ("Wind", ""),
]
PAIRS = list(itertools.product(["camels", "", "What is a dune?"], TITLED))

PLAIN = {"query_template": "{text}", "passage_template": "{title} {text}", "append_eos": False}
PAIR = {"kind": "reranker", "pair": "pair", **PLAIN}
OWN_HEAD = {"on": "encoder", **PAIR, "pooling": "cls"}
JOINED = {"kind": "reranker", "passage_template": "document: {title} {text}"}
CASES: dict[str, dict[str, Any]] = {
    "retriever": {},
    "dot": {"append_eos": False, "pooling": "mean", "normalize": False},
    "without prompts": {**PLAIN, "append_eos": True},
    "mean of an encoder": {"on": "encoder", **PLAIN, "pooling": "mean"},
    "[CLS] of an encoder": {"on": "encoder", **PLAIN, "pooling": "cls"},
    "LLaRA": {
        "query_template": "{text} The next sentence:",
        "passage_template": "{title} {text} The original sentence:",
    },
    "slots": {
        "query_template": '"{text}", what follows: {next}',
        "passage_template": '"{title} {text}", in short: {self}',
        "append_eos": False,
        "pooling": "slots",
        "slots": 3,
    },
    "title after text": {"passage_template": "{text} ({title})"},
    "text twice": {"passage_template": "{text} {text}"},
    "reranker": JOINED,
    "padding is EOS": {"pad": "</s>", **JOINED},
    "no padding": {"pad": None, **JOINED},
    "no EOS": {**JOINED, "append_eos": False},
    "title with words": {**JOINED, "passage_template": "title: {title} text: {text}"},
    "pair": {**PAIR, "append_eos": True, "query_template": "q: {text}"},
    "RankLLaMA": {"tokens": "llama2", **JOINED, "pair": "pair", "append_eos": False},
    "released encoder": {**OWN_HEAD, "released": True},
    "encoder": OWN_HEAD,  # its head is a linear layer on [CLS]
    "encoder, joined": {"on": "encoder", **JOINED, "append_eos": False, "pooling": "cls"},
    "likelihood": {
        **PLAIN,
        "kind": "reranker",
        "scoring": "likelihood",
        "query_template": "ask: {text}",
    },
    "token": {
        "kind": "reranker",
        "scoring": "token",
        "append_eos": False,
        "prefix": "<s>judge:\n",
        "query_template": "{instruction} ask: {text}\ndocument:",
        "passage_template": "{title} {text}",
        "suffix": "</s>\nanswer:",
        "instruction": 'the {salt} "route"',
        "positive": " salt",
        "negative": " silk",
        "passage_length": 60,
    },
}
CASES["untied token"] = {"on": "qwen3", **CASES["token"]}
CASES |= {f"{name}, adapter": {"lora": True, **case} for name, case in CASES.items()}


def cases(*quick: str, slow: tuple[str, ...] = ()) -> list[Any]:
    """Names of `CASES`, as parameters of a test; `make test-all` runs the slow ones too."""
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


def encoding(**settings: Any) -> Encoding:
    return Encoding(**{"query_length": 30, "passage_length": 44, **settings})


@cache
def tokenizer(kind: str, side: str = "right", pad: str | None = "<pad>") -> Any:
    """A byte-level BPE ("decoder") or a WordPiece ("encoder")."""
    from transformers import BertTokenizer, PreTrainedTokenizerFast

    if kind == "encoder":
        letters = [chr(code) for code in range(33, 127)]
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters]
        words += [f"##{letter}" for letter in letters]
        vocab = {word: row for row, word in enumerate(words)}
        return BertTokenizer(vocab=vocab, padding_side=side)
    bpe = train_bpe(iter([" ".join(WORDS), "query: passage: document: Title"] * 20), 400)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=pad,
        bos_token="<s>",
        eos_token="</s>",
        padding_side=side,
    )


def tokenizers() -> dict[str, Any]:
    """Tokenizers of several architectures, each with a vocabulary of letters."""
    import transformers
    from tokenizers.pre_tokenizers import ByteLevel

    letters = ["\u2581", *(c for c in string.printable if c.isprintable() and c != " ")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    special = ["<pad>", "<bos>", "<eos>", "<mask>"]
    spm = {piece: row for row, piece in enumerate([*pieces, "\u2581a", *special])}
    merges = [("\u2581", "a")]
    level = [*sorted(ByteLevel.alphabet()), "<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    level = {piece: row for row, piece in enumerate([*level, "<|endoftext|>"])}
    unigram = [(piece, -1.0) for piece in ("<s>", "<pad>", "</s>", "<unk>", *letters, "<mask>")]
    return {
        "llama": transformers.LlamaTokenizer(spm, merges, add_bos_token=True),
        "llama2": transformers.LlamaTokenizer(spm, merges, legacy=True, add_bos_token=True),
        "gemma": transformers.GemmaTokenizer(spm, merges),
        "gpt2": transformers.GPT2Tokenizer(level, []),
        "qwen": transformers.Qwen2Tokenizer(level, []),
        "roberta": transformers.RobertaTokenizer(level, []),
        "xlm_roberta": transformers.XLMRobertaTokenizer(unigram),
        "bert": tokenizer("encoder", "left"),
    }


def bert(scores: bool, positions: int = 80) -> Any:
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    config = BertConfig(
        vocab_size=len(tokenizer("encoder")),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=positions,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return BertForSequenceClassification(config) if scores else BertModel(config, False)


def make(path: Path, case: str = "retriever", **changes: Any) -> Path:
    """Save a model folder of a random model.

    Args:
        case: one of `CASES`.
        changes: of its settings: `on` a "decoder", an "encoder" or (scoring="token") another
            architecture; `lora`, as an adapter on a base outside of the folder of `path`;
            `released`, with the head of its architecture; `pad`; `tokens`, one of `tokenizers`
            in place of the usual one; and those of the encoding.
    """
    usual = {"on": "decoder", "lora": False, "released": False, "pad": "<pad>", "tokens": None}
    settings = {**usual, **CASES[case], **changes}
    on, lora, released, pad, tokens = (settings.pop(name) for name in usual)
    torch.manual_seed(0)
    own = encoding(**settings)
    kind = "encoder" if on == "encoder" else "decoder"
    side = "left" if own.kind == "retriever" and on == "decoder" else "right"
    given = tokenizers()[tokens] if tokens else copy.deepcopy(tokenizer(kind, side, pad))
    rows = add_slots(given, own)
    part = "model" if own.kind == "retriever" else "scorer"
    if own.scoring != "head":
        part = "language_model"
    backbone: Any = tiny_backbone()
    base = None
    if on == "encoder":
        base = bert(released)
    elif on != "decoder":  # this architecture has another output layer
        base = language_model_of(on, vocab_size=len(given), tie_word_embeddings=False)
    elif lora:
        base = getattr(backbone, part.replace("scorer", "model"))(given)
    if base is not None:
        to = path.parent.with_name(f"{path.parent.name}-base")
        backbone = Pretrained(str(saved_base(given, to, base)))
    network = fit_vocabulary(getattr(backbone, part)(given), given)
    if lora:
        network = shaken(LoRA(rank=2, alpha=4).apply(network, rows))
    if own.kind == "retriever":
        network = BiEncoder(network, own)
    elif own.scoring == "likelihood":
        network = QueryLikelihood(network, own)
    elif own.scoring == "token":
        network = TokenScorer(network, own, answer_ids(given, own))
    else:
        network = CrossEncoder(network, own)
    folder.save(path, network, given, own, {"name": "tiny"})
    return path


def make_adapted(path: Path) -> Path:
    """Save a model folder of LLaRA's adaptation, with its output layer."""
    own, given = encoding(**CASES["LLaRA"]), tokenizer("decoder")
    backbone = tiny_backbone().language_model(given)
    model = SlotEncoder(backbone, backbone.base_model, own, Layout(1, (4, 4), 1))
    folder.save(path, model, given, own, {})
    assert read_encoding(path)[1]["language_model"]
    return path


@torch.no_grad()
def embeddings(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The model folder's embeddings of `TEXTS` as queries and of `TITLED` as passages."""
    model, tokens, own, _ = folder.load(path)
    templates = Templates(tokens, own)
    queries = templates.queries([("", text) for text in TEXTS])
    passages = templates.passages(TITLED)
    return model.embed(pack(queries, 200)), model.embed(pack(passages, 200))


@torch.no_grad()
def scores(path: Path, pairs: list[tuple[str, tuple[str, str]]]) -> torch.Tensor:
    """The model folder's scores of queries, each with the title and text of a passage."""
    model, tokens, own, _ = folder.load(path)
    templates = PairTemplates(tokens, own)
    read = templates.pairs([("", query) for query, _ in pairs], [passage for _, passage in pairs])
    seconds = [pair.second for pair in read] if templates.typed else None
    found: torch.Tensor = model.score(pack([pair.ids for pair in read], 200, seconds=seconds))
    return found


def run_card(out: Path, heading: str = "") -> dict[str, Any]:
    """Run the first code of a card below a heading that starts so; returns its variables."""
    text = (out / "README.md").read_text("utf-8")
    code = re.search(rf"^## {heading}.*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace("path/to/this/folder", str(out)), names)
    return names


def assert_close(found: Any, expected: torch.Tensor) -> None:
    """Assert that numbers are equal up to rounding, and that the expected ones are not constant."""
    found = torch.stack(list(found)) if isinstance(found, list) else torch.as_tensor(found)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    assert float(expected.std(dim=0).max()) > 1e-3


def assert_card_computes(path: Path, out: Path) -> None:
    """Compare the card's code for transformers or PEFT in `out` with the model folder `path`."""
    names = run_card(out, "Use it in (?:transformers|PEFT)")
    if read_encoding(path)[0].kind == "retriever":
        queries, passages = embeddings(path)
        assert_close([names["embed_query"](text) for text in TEXTS], queries)
        assert_close([names["embed_passage"](text, title) for title, text in TITLED], passages)
        return
    found = [names["score"](query, text, title) for query, (title, text) in PAIRS]
    assert_close(torch.tensor(found), scores(path, PAIRS))
