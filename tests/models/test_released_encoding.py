"""Models of sentence-transformers, adopted by one command: that library's own scores, or a refusal.

sentence-transformers is the judge of scores; folders of older versions are written by hand.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import ROOT, adopt
from tests.export import folders
from tests.export.folders import PAIRS, PLAIN, TEXTS, TITLED, assert_close, make
from tests.models.small import model_of, saved_base
from tests.refusals import refused

from caravan.cli.compose import compose
from caravan.cli.inherited import completed
from caravan.encoding import Encoding, read_encoding
from caravan.export.prompts import framed
from caravan.export.sentence_transformers import export
from caravan.models.loading import load_tokenizer
from caravan.models.released import check_released, released_encoding

INSTRUCT = "Instruct: Given a query, {find} passages\nQuery:"
E5_MISTRAL = "Instruct: Find the well\nQuery: "
GIVEN = [f"{title} {text}" if title else text for title, text in TITLED]
TRANSFORMER, ENCODING = "sentence_bert_config.json", "config_sentence_transformers.json"
LONGEST = 110
CASES: dict[str, dict[str, Any]] = {
    "bert": {
        "modes": "mean",
        "prompts": {"query": "find {it}: ", "document": "passage: "},
        "similarity_fn_name": "cosine",
    },
    "distilbert": {"modes": "cls", "similarity_fn_name": "dot"},
    "electra": {
        "modes": "mean",
        "normalize": True,
        "similarity_fn_name": "cosine",
        "truncate_dim": 24,
    },
    "qwen3": {"modes": "lasttoken", "prompts": {"query": INSTRUCT}, "normalize": True},
    "mistral": {
        "modes": "lasttoken",
        "prompts": {"web_search_query": E5_MISTRAL, "sts_query": "Instruct: Compare\nQuery: "},
        "normalize": True,
    },
}


def _tokenizer(kind: str) -> Any:
    """Of encoders a WordPiece; of decoders a BPE that pads left and appends an end token."""
    if kind in ("bert", "distilbert", "electra"):
        return folders.tokenizer("encoder")
    plain = folders.tokenizer("decoder")
    end = plain.pad_token_id if kind == "qwen3" else plain.eos_token_id
    before = [] if kind == "qwen3" else [plain.bos_token_id]
    result = framed(plain, LONGEST, before, [end])
    result.padding_side = "left"
    return result


def _saved(to: Path, kind: str, modes: str, normalize: bool = False, **settings: Any) -> Any:
    """A SentenceTransformer of random weights, saved by sentence-transformers."""
    library = pytest.importorskip("sentence_transformers")
    modules = library.sentence_transformer.modules
    tokenizer = _tokenizer(kind)
    plain = model_of(kind, noise=0.1, vocab_size=len(tokenizer), max_position_embeddings=128)
    saved_base(tokenizer, to / "plain", plain)
    parts = [modules.Transformer(str(to / "plain"), max_seq_length=LONGEST)]
    parts += [modules.Pooling(32, modes), *([modules.Normalize()] if normalize else [])]
    model = library.SentenceTransformer(modules=parts, device="cpu", **settings)
    model.save_pretrained(str(to / "released"), create_model_card=False)
    return library.SentenceTransformer(str(to / "released"), device="cpu")


@pytest.mark.parametrize("kind", CASES)
def test_an_adopted_bi_encoder_scores_as_sentence_transformers_does(
    kind: str, tmp_path: Path
) -> None:
    model = _saved(tmp_path, kind, **CASES[kind])
    overrides, asked = [], {}
    if kind == "mistral":
        with refused("config-mistakes", "encoding.query_template", "web_search_query"):
            adopt(tmp_path / "released", tmp_path / "refused")
        template = "Instruct: {instruction}\nQuery: {text}"
        overrides = [
            f"encoding.query_template='{template}'",
            "encoding.instruction='Find the well'",
        ]
        asked = {"prompt": E5_MISTRAL}
    adopted = adopt(tmp_path / "released", tmp_path / "run", *overrides)
    queries, passages = folders.embeddings(adopted)
    for batch_size in (1, 4):
        encoded = model.encode_query(TEXTS, batch_size=batch_size, **asked)
        scores = model.similarity(encoded, model.encode_document(GIVEN, batch_size=batch_size))
        assert_close(queries @ passages.T, scores)
    encoding, _ = read_encoding(adopted)
    assert encoding.query_length == encoding.passage_length == LONGEST
    assert not encoding.append_eos
    if kind == "qwen3":
        given = ["backbone=hf", f"backbone.name={tmp_path / 'released'}"]
        cfg, _ = completed(
            compose(ROOT / "conf", "train", [*given, "encoding.query_template='{text}'"])
        )
        assert cfg.encoding.instruction == ""
        assert encoding.query_template == "Instruct: {instruction}\nQuery:{text}"
        assert encoding.instruction in INSTRUCT


def test_an_export_adopted_again_has_the_same_encoding(tmp_path: Path) -> None:
    settings = {**PLAIN, "pooling": "mean", "query_template": "q: {text}"}
    path = make(tmp_path / "model", on="encoder", **settings)
    export(path, tmp_path / "out")
    adopted = adopt(tmp_path / "out", tmp_path / "run")
    assert read_encoding(adopted)[0] == read_encoding(path)[0]
    for found, expected in zip(folders.embeddings(adopted), folders.embeddings(path), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("layout", ["modules.json", "transformers"])
def test_an_adopted_cross_encoder_scores_as_sentence_transformers_does(
    layout: str, tmp_path: Path
) -> None:
    library = pytest.importorskip("sentence_transformers")
    torch.manual_seed(0)
    released = tmp_path / "released"
    tokenizer = folders.tokenizer("encoder")
    tokenizer.model_max_length = 40
    saved_base(tokenizer, released, folders.bert(scores=True))
    model = library.CrossEncoder(str(released), device="cpu")
    if layout == "modules.json":
        released = tmp_path / "saved"
        model.save_pretrained(str(released), create_model_card=False)
        assert (released / "modules.json").is_file()
    adopted = adopt(released, tmp_path / "run", "stage=reranker_encoder")
    given = [(query, f"{title} {text}" if title else text) for query, (title, text) in PAIRS]
    for batch_size in (1, 4):
        raw = model.predict(given, batch_size=batch_size, activation_fn=torch.nn.Identity())
        assert_close(folders.scores(adopted, PAIRS), torch.as_tensor(raw))
    assert read_encoding(adopted)[0].passage_length == 30


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """The files of a bi-encoder as older versions wrote them, without weights."""
    _write(tmp_path, "modules.json", _modules("Transformer", "Pooling", "Normalize"))
    flags = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in ("cls_token", "mean_tokens")}
    _write(tmp_path, "1_Pooling/config.json", {"word_embedding_dimension": 32, **flags})
    _write(tmp_path, TRANSFORMER, {"max_seq_length": 50, "do_lower_case": False})
    _write(tmp_path, "config.json", {"hidden_size": 32, "max_position_embeddings": 60})
    _write(tmp_path, "tokenizer_config.json", {"model_max_length": 10**30})
    return tmp_path


def _modules(*kinds: str) -> list[dict[str, Any]]:
    paths = [f"{i}_{kind}" if i else "" for i, kind in enumerate(kinds)]
    types = [f"sentence_transformers.models.{kind}" for kind in kinds]
    return [{"path": path, "type": kind} for path, kind in zip(paths, types, strict=True)]


def _write(folder: Path, name: str, content: Any) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def test_the_files_of_older_versions_are_read(released: Path) -> None:
    expected: dict[str, Any] = {"pooling": "mean", "normalize": True, **PLAIN}
    expected |= {"query_length": 50, "passage_length": 50, "dim": 0}
    assert released_encoding(str(released)) == (expected, {})
    lengths = {"query_length": 20, "document_length": 40}
    called = {"processing_kwargs": {"text": {"max_length": 30}}}  # it wins
    for config, both in ((lengths, (20, 40)), (lengths | called, (30, 30)), ({}, (60, 60))):
        _write(released, TRANSFORMER, config)
        found = released_encoding(str(released)).settings
        assert (found["query_length"], found["passage_length"]) == both
    _write(released, TRANSFORMER, {"do_lower_case": True, "model_args": {"torch_dtype": "auto"}})
    _write(released, "tokenizer_config.json", {"do_lower_case": True})
    assert not released_encoding(str(released)).problems
    (released / "modules.json").unlink()
    assert released_encoding(str(released)) == ({}, {})


@pytest.mark.parametrize(
    ("file", "content", "setting", "place"),
    [
        ("modules.json", _modules("Transformer", "Pooling", "Dense"), "pooling", "Dense"),
        ("modules.json", [{"path": "", "type": "own.Transformer"}], "pooling", "own.Transformer"),
        ("modules.json", _modules("Transformer", "Pooling"), "normalize", "no similarity"),
        ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "pooling", "weightedmean"),
        ("1_Pooling/config.json", {"pooling_mode": ["cls", "max"]}, "pooling", "'cls', 'max'"),
        ("1_Pooling/config.json", 5, "pooling", "cannot be read"),
        ("1_Pooling/config.json", {}, "pooling", "lacks the config"),
        (ENCODING, {"similarity_fn_name": "manhattan"}, "normalize", "manhattan"),
        (TRANSFORMER, {"do_lower_case": True}, "pooling", "do_lower_case"),
        (TRANSFORMER, {"query_expansion": {"n": 1}}, "pooling", "query_expansion.n=1"),
        (TRANSFORMER, {"config_args": {"n": 1}}, "pooling", "config_args.n=1"),
        (TRANSFORMER, {"tokenizer_name_or_path": "other"}, "pooling", "tokenizer_name_or_path"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "pooling", "on the left"),
        (
            ENCODING,
            {"truncate_dim": 8, "similarity_fn_name": "dot"},
            "normalize",
            "truncate_dim",
        ),
        (
            ENCODING,
            {"prompts": {"query": "q: ", "passage": "p: "}},
            "passage_template",
            "passage: 'p: '",
        ),
    ],
)
def test_what_cannot_be_read_exactly_is_named(
    file: str, content: Any, setting: str, place: str, released: Path
) -> None:
    _write(released, file, content)
    problems = released_encoding(str(released)).problems
    assert place in problems[setting]


def test_a_setting_of_the_command_wins_and_the_conflict_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _saved(tmp_path, "bert", "mean", normalize=True)
    path = tmp_path / "released"
    _write(path, "1_Pooling/config.json", {"pooling_mode": "max"})
    with refused("config-mistakes", "encoding.pooling", "max"):
        adopt(path, tmp_path / "refused")
    _write(path, "1_Pooling/config.json", {"pooling_mode": "mean"})
    with caplog.at_level(logging.INFO):
        adopted = adopt(path, tmp_path / "run", "encoding.pooling=cls")
    assert read_encoding(adopted)[0].pooling == "cls"
    assert "pooling='cls', there 'mean'" in caplog.text
    taken = next(text for text in caplog.messages if text.startswith("encoding from the files"))
    for part in ("normalize=True", "dim=0", "query_template='{text}'"):
        assert part in taken
    assert f"query_length={LONGEST}" in taken
    assert "pooling" not in taken


LOGITS = {"method": "forward", "method_output_name": "logits"}
SCORED = {"transformer_task": "sequence-classification", "modality_config": {"text": LOGITS}}
CHAT = (
    "{% for m in messages %}{% if loop.last %}[SEP]{% endif %}{{ m['content'] }}"
    "{% if m['role'] == 'document' %}?{% endif %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("file", "content", "code", "change"),
    [
        ("config.json", {"sentence_transformers": {"activation_fn": "torch.nn.GELU"}}, "", {}),
        (ENCODING, {"activation_fn": "own.Softplus"}, "", {}),
        ("modules.json", _modules("Transformer", "Pooling", "Dense"), "", {}),
        (TRANSFORMER, {"do_lower_case": True}, "", {}),
        (TRANSFORMER, {"config_kwargs": {"n": 1}}, "", {}),
        (TRANSFORMER, {"transformer_task": "fill-mask"}, "", {}),
        (TRANSFORMER, {"processing_kwargs": {"text": {"add_special_tokens": False}}}, "", {}),
        ("tokenizer_config.json", {"truncation_side": "left"}, "", {}),
        (TRANSFORMER, {}, "other-pair", {"pair": "joined"}),
        (TRANSFORMER, {}, "other-pair", {"query_template": "ask: {text}"}),
        (
            TRANSFORMER,
            {"modality_config": dict.fromkeys(("text", "message"), LOGITS)},
            "other-chat-template",
            {},
        ),
        (
            ENCODING,
            {"prompts": {"query": "ask: "}, "default_prompt_name": "query"},
            "other-prompt",
            {},
        ),
    ],
)
def test_a_cross_encoder_that_would_score_otherwise_is_refused(
    file: str, content: Any, code: str, change: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = copy.deepcopy(folders.tokenizer("encoder"))
    tokenizer.chat_template = CHAT
    encoding = Encoding(kind="reranker", pair="pair", pooling="cls", **PLAIN)
    _write(tmp_path, "config.json", {"sbert_ce_default_activation_function": "torch.nn.Sigmoid"})
    check_released(str(tmp_path), None, tokenizer, encoding)
    if code != "other-prompt":  # compared if the files name no modules
        _write(tmp_path, "modules.json", _modules("Transformer"))
        _write(tmp_path, TRANSFORMER, SCORED)
        check_released(str(tmp_path), None, tokenizer, encoding)
    if file == TRANSFORMER:
        content = {**SCORED, **content}
    _write(tmp_path, file, content)
    with refused(code or "not-readable", str(tmp_path)):
        check_released(str(tmp_path), None, tokenizer, replace(encoding, **change))


def test_a_reranker_by_tokens_has_the_tokens_and_the_template_of_its_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make(tmp_path / "model", **folders.CASES["token"])
    export(path, tmp_path / "out")
    name, encoding = str(tmp_path / "out"), read_encoding(path)[0]
    tokenizer = load_tokenizer(name)
    check_released(name, None, tokenizer, encoding)
    assert "truncate" not in caplog.text
    longer = replace(encoding, passage_length=encoding.passage_length + 1)
    check_released(name, None, tokenizer, longer)
    assert f"the files of {name} truncate a pair at" in caplog.text
    for change, code in (
        ({"negative": " tent"}, "other-tokens"),
        ({"instruction": "the silk route"}, "other-chat-template"),
    ):
        with refused(code, name, "encoding."):
            check_released(name, None, tokenizer, replace(encoding, **change))
