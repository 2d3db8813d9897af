"""Exports to sentence-transformers: the same tokens, embeddings and scores, or a refusal."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export import folders
from tests.export.folders import (
    PAIRS,
    TEXTS,
    TITLED,
    assert_card_computes,
    assert_close,
    cases,
    make,
    run_card,
)
from tests.refusals import refused

from caravan.data.tokenization import Templates
from caravan.encoding import read_encoding, write_encoding
from caravan.export import prompts, verify
from caravan.export import sentence_transformers as exporter
from caravan.export.sentence_transformers import export


def exported(path: Path) -> Any:
    """The model that the card of an exported model folder loads."""
    export(path, path.with_name("out"))
    return run_card(path.with_name("out"))["model"]


def change_encoding(path: Path, **settings: Any) -> None:
    own, facts = read_encoding(path)
    facts.pop("chat_ids", None)
    write_encoding(path, replace(own, **settings), facts)


@pytest.mark.parametrize(
    "case",
    cases(
        *("dot", "slots, adapter", "mean of an encoder"),
        slow=("without prompts", "[CLS] of an encoder"),
    ),
)
def test_embeddings_of_queries_and_passages_are_the_model_folders(
    case: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "model", case)
    model = exported(path)
    queries, passages = folders.embeddings(path)
    assert_close(model.encode_query(TEXTS, batch_size=4), queries)
    given = [f"{title} {text}" if title else text for title, text in TITLED]
    assert_close(model.encode_document(given, batch_size=4), passages)


@pytest.mark.parametrize("exporter", ["sentence_transformers", "transformers"])
def test_an_export_can_have_shorter_embeddings(exporter: str, tmp_path: Path) -> None:
    path, out = make(tmp_path / "model", "retriever, adapter"), tmp_path / "out"
    importlib.import_module(f"caravan.export.{exporter}").export(path, out, dim=8)
    _, whole = folders.embeddings(path)
    expected = torch.nn.functional.normalize(whole[:, :8], dim=-1)[: len(TEXTS)]
    if exporter == "transformers":
        assert_card_computes(out, out)
        assert_close(folders.embeddings(out)[1][: len(TEXTS)], expected)
    else:
        model = run_card(out)["model"]
        assert_close(model.encode_document(TEXTS), expected)
        assert model.get_embedding_dimension() == 8
    assert "| dim | `8` |" in (out / "README.md").read_text()


def test_a_text_without_a_task_is_a_passage_or_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "plain" / "model")
    model = exported(path)
    assert_close(model.encode(TEXTS), folders.embeddings(path)[1][: len(TEXTS)])
    with pytest.raises(ValueError, match="Consider specifying the `task`"):
        exported(make(tmp_path / "routed" / "model", "LLaRA")).encode(TEXTS)


def test_both_sides_of_a_router_can_share_their_weights_in_memory(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "slots")
    model = exported(path)
    before = sum(p.numel() for p in model.parameters())
    line = (tmp_path / "out" / "README.md").read_text().split("copy in memory:\n`")[1].split("`")[0]
    exec(line, {"model": model})
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    assert_close(model.encode_query(TEXTS), folders.embeddings(path)[0])
    assert_close(model.encode_document(TEXTS), folders.embeddings(path)[1][: len(TEXTS)])


@pytest.mark.parametrize(
    "case",
    cases(
        *("reranker", "reranker, adapter", "pair", "RankLLaMA", "released encoder"),
        *("token, adapter", "untied token"),
        slow=(
            *("padding is EOS", "no padding", "no EOS"),
            *("encoder", "encoder, adapter", "encoder, joined"),
        ),
    ),
)
def test_scores_of_pairs_are_the_model_folders(case: str, tmp_path: Path) -> None:
    path = make(tmp_path / "model", case)
    model = exported(path)
    expected = folders.scores(path, PAIRS)
    given = [(query, f"{title} {text}" if title else text) for query, (title, text) in PAIRS]
    assert_close(model.predict(given, batch_size=4), expected)
    ranked = model.rank(given[0][0], [passage for _, passage in given[: len(TITLED)]])
    order = expected[: len(TITLED)].argsort(descending=True)
    assert [row["corpus_id"] for row in ranked] == order.tolist()


def test_the_prompt_of_a_call_replaces_the_instruction(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "token")
    model = exported(path)
    given = [(query, passage) for query, (title, passage) in PAIRS if not title]
    found = model.predict(given, prompt="find {it}")
    change_encoding(path, instruction="find {it}")
    assert_close(found, folders.scores(path, [(query, ("", text)) for query, text in given]))


@pytest.mark.parametrize("case", ["retriever", "token", "pair"])
def test_each_collection_has_a_prompt(case: str, tmp_path: Path) -> None:
    instructions = {None: "camel", "scifact": "the {salt} route", "squad": "gold"}
    path = make(
        tmp_path / "model",
        case,
        query_template="{instruction} ask: {text}",
        instruction="camel",
        instructions={name: text for name, text in instructions.items() if name},
    )
    model = exported(path)
    pairs = [(query, text) for query, text in PAIRS if not text[0]]
    for name, text in instructions.items():
        change_encoding(path, instruction=text, instructions={})
        if case == "retriever":
            found = model.encode_query(TEXTS[:3], prompt_name=name and f"{name}-query")
            assert_close(found, folders.embeddings(path)[0][:3])
        else:
            found = model.predict([(query, text) for query, (_, text) in pairs], prompt_name=name)
            assert_close(found, folders.scores(path, pairs))


def test_a_query_that_leaves_its_passage_no_room_is_an_error(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "encoder")
    model = exported(path)
    fits = 30 + 44 - 3 - 16
    assert f"queries of up to {fits} tokens" in (tmp_path / "out" / "README.md").read_text()
    long, short = ("camel " * fits, "dune " * 90), ("tent", "well")
    expected = folders.scores(path, [(query, ("", passage)) for query, passage in (long, short)])
    assert_close(model.predict([long, short]), expected)
    with pytest.raises(Exception, match="Truncation error"):
        model.predict([("camel " * 90, "dune")])


@pytest.mark.parametrize("name", folders.tokenizers())
def test_tokenizers_of_many_architectures_read_the_same_when_exported(
    name: str, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = folders.tokenizers()[name]
    eos = tokenizer.eos_token is not None
    own = folders.encoding(append_eos=eos, query_template="{text} so:")
    templates, length = Templates(tokenizer, own), own.query_length
    framed = prompts.framed(tokenizer, length, templates.before, templates.tails["query"])
    framed.save_pretrained(tmp_path)
    texts = verify.probes(length)
    read = AutoTokenizer.from_pretrained(tmp_path)([text for _, text in texts], truncation=True)
    assert read["input_ids"] == templates.queries(texts)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["reranker", "pair"])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "qwen", "roberta", "xlm_roberta"])
def test_pairs_of_many_tokenizers_are_read_the_same(name: str, case: str, tmp_path: Path) -> None:
    eos = folders.tokenizers()[name].eos_token is not None
    path = make(tmp_path / "model", case, tokens=name, append_eos=eos)
    export(path, tmp_path / "out")  # compares the scores
    assert (tmp_path / "out" / "modules.json").is_file()


@pytest.mark.parametrize(
    ("case", "changes", "place"),
    [
        ("title after text", {}, "passage_template"),
        ("text twice", {}, "passage_template"),
        ("title with words", {}, "passage_template"),
        ("encoder", {"query_template": "{text}?"}, "'?'"),
        ("encoder", {"passage_template": "document: {text}"}, "'document: '"),
        ("likelihood", {}, "likelihood"),
    ],
)
def test_an_encoding_that_the_library_cannot_express_is_refused_and_nothing_is_left(
    case: str, changes: dict[str, Any], place: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "model", case, **changes)
    with refused("not-expressible", place, "export it to transformers"):
        export(path, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("case", ["retriever", "reranker"])
def test_a_tokenizer_that_reads_otherwise_is_refused_and_nothing_is_left(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, framed = make(tmp_path / "model", case), prompts.framed

    def without_end(tokenizer: Any, length: int, before: Any, after: Any, between: Any = ()) -> Any:
        return framed(tokenizer, length, before, [], between)

    for module in (prompts, exporter):
        monkeypatch.setattr(module, "framed", without_end)
    plain = "{{ messages[0].content ~ messages[1].content }}"
    monkeypatch.setattr(exporter.Pairing, "_chat_template", lambda *_: plain)
    with refused("export-differs", str(path)):
        export(path, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_without_the_library_the_error_names_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("missing-package", "pip install"):
        export(tmp_path / "model", tmp_path / "out")


def test_an_adapted_language_model_is_exported_without_its_output_layer(tmp_path: Path) -> None:
    path = folders.make_adapted(tmp_path / "model")
    assert_close(exported(path).encode_query(TEXTS), folders.embeddings(path)[0])
