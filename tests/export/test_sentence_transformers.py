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
    JOINED,
    LIKELIHOOD,
    LLARA,
    ODD,
    OWN_HEAD,
    PAIR,
    PAIRS,
    PLAIN,
    SLOTS,
    TEXTS,
    TITLED,
    TOKEN,
    assert_card_computes,
    assert_close,
    make,
    run_card,
)
from tests.refusals import refused

from caravan.data.tokenization import Templates
from caravan.encoding import read_encoding, write_encoding
from caravan.export import prompts, verify
from caravan.export import sentence_transformers as exporter
from caravan.export.sentence_transformers import export

slow = pytest.mark.slow


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="decoder", marks=slow),
        pytest.param({"append_eos": False, "pooling": "mean", "normalize": False}, id="dot"),
        pytest.param({"lora": True, "dim": 8}, id="adapter, shorter"),
        pytest.param({**PLAIN, "append_eos": True}, id="without prompts", marks=slow),
        pytest.param(LLARA, id="LLaRA", marks=slow),
        pytest.param({"lora": True, **SLOTS}, id="slots of an adapter"),
        pytest.param({"on": "encoder", **PLAIN, "pooling": "mean"}, id="encoder, mean"),
        pytest.param({"on": "encoder", **PLAIN, "pooling": "cls"}, id="encoder, cls", marks=slow),
    ],
)
def test_embeddings_of_queries_and_passages_are_the_model_folders(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = make(tmp_path / "model", **settings)
    export(path, tmp_path / "out")
    model = run_card(tmp_path / "out")["model"]
    queries, passages = folders.embeddings(path)
    assert_close(model.encode_query(TEXTS, batch_size=4), queries)
    given = [f"{title} {text}" if title else text for title, text in TITLED]
    assert_close(model.encode_document(given, batch_size=4), passages)


@pytest.mark.parametrize("exporter", ["sentence_transformers", "transformers"])
def test_an_export_can_have_shorter_embeddings(exporter: str, tmp_path: Path) -> None:
    path, out = make(tmp_path / "model"), tmp_path / "out"
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
    path = make(tmp_path / "plain")
    export(path, tmp_path / "out")
    model = run_card(tmp_path / "out")["model"]
    assert_close(model.encode(TEXTS), folders.embeddings(path)[1][: len(TEXTS)])
    export(make(tmp_path / "llara", **LLARA), tmp_path / "routed")
    with pytest.raises(ValueError, match="Consider specifying the `task`"):
        run_card(tmp_path / "routed")["model"].encode(TEXTS)


def test_both_sides_of_a_router_can_share_their_weights_in_memory(tmp_path: Path) -> None:
    path, out = make(tmp_path / "model", **SLOTS), tmp_path / "out"
    export(path, out)
    model = run_card(out)["model"]
    before = sum(p.numel() for p in model.parameters())
    line = (out / "README.md").read_text().split("copy in memory:\n`")[1].split("`")[0]
    exec(line, {"model": model})
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    assert_close(model.encode_query(TEXTS), folders.embeddings(path)[0])
    assert_close(model.encode_document(TEXTS), folders.embeddings(path)[1][: len(TEXTS)])


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(JOINED, id="decoder"),
        pytest.param({"lora": True, **JOINED}, id="adapter"),
        pytest.param({"pad": "</s>", **JOINED}, id="padding is EOS", marks=slow),
        pytest.param({"pad": None, **JOINED}, id="no padding", marks=slow),
        pytest.param({**JOINED, "append_eos": False}, id="no EOS", marks=slow),
        pytest.param({**PAIR, "append_eos": True, "query_template": "q: {text}"}, id="pair"),
        pytest.param(
            {"tokens": "llama2", **JOINED, "pair": "pair", "append_eos": False}, id="RankLLaMA"
        ),
        pytest.param(
            {"on": "encoder", "released": True, **PAIR, "pooling": "cls"}, id="released encoder"
        ),
        *(pytest.param(one, id=f"encoder {i}", marks=slow) for i, one in enumerate(OWN_HEAD)),
        pytest.param({"lora": True, **TOKEN}, id="token, adapter"),
        pytest.param({"on": "qwen3", **TOKEN}, id="token, untied"),
    ],
)
def test_scores_of_pairs_are_the_model_folders(settings: dict[str, Any], tmp_path: Path) -> None:
    path = make(tmp_path / "model", **settings)
    export(path, tmp_path / "out")
    model = run_card(tmp_path / "out")["model"]
    expected = folders.scores(path, PAIRS)
    given = [(query, f"{title} {text}" if title else text) for query, (title, text) in PAIRS]
    assert_close(model.predict(given, batch_size=4), expected)
    ranked = model.rank(given[0][0], [passage for _, passage in given[: len(TITLED)]])
    order = expected[: len(TITLED)].argsort(descending=True)
    assert [row["corpus_id"] for row in ranked] == order.tolist()


def test_the_prompt_of_a_call_replaces_the_instruction(tmp_path: Path) -> None:
    path = make(tmp_path / "model", **TOKEN)
    export(path, tmp_path / "out")
    model = run_card(tmp_path / "out")["model"]
    given = [(query, passage) for query, (title, passage) in PAIRS if not title]
    found = model.predict(given, prompt="find {it}")
    own, facts = read_encoding(path)
    facts.pop("chat_ids")
    write_encoding(path, replace(own, instruction="find {it}"), facts)
    assert_close(found, folders.scores(path, [(query, ("", text)) for query, text in given]))


INSTRUCTED = {
    "query_template": "{instruction} ask: {text}",
    "instruction": "camel",
    "instructions": {"scifact": "the {salt} route", "squad": "gold"},
}


@pytest.mark.parametrize(
    "settings",
    [INSTRUCTED, {**TOKEN, **INSTRUCTED}, {**PAIR, **INSTRUCTED}],
    ids=["retriever", "token", "pair"],
)
def test_each_collection_has_a_prompt(settings: dict[str, Any], tmp_path: Path) -> None:
    path = make(tmp_path / "model", **settings)
    export(path, tmp_path / "out")
    model = run_card(tmp_path / "out")["model"]
    own, facts = read_encoding(path)
    texts, pairs = TEXTS[:3], [(query, text) for query, text in PAIRS if not text[0]]
    for name in (None, "scifact", "squad"):
        text = "camel" if name is None else own.instructions[name]
        facts.pop("chat_ids", None)
        write_encoding(path, replace(own, instruction=text, instructions={}), facts)
        if own.kind == "retriever":
            prompt = None if name is None else f"{name}-query"
            found, expected = (
                model.encode_query(texts, prompt_name=prompt),
                folders.embeddings(path),
            )
            assert_close(found, expected[0][:3])
        else:
            found = model.predict([(query, text) for query, (_, text) in pairs], prompt_name=name)
            assert_close(found, folders.scores(path, pairs))


def test_a_query_that_leaves_its_passage_no_room_is_an_error(tmp_path: Path) -> None:
    path = make(tmp_path / "model", "encoder", **PAIR, pooling="cls")
    export(path, tmp_path / "out")
    model = run_card(tmp_path / "out")["model"]
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


@slow
@pytest.mark.parametrize("pair", ["joined", "pair"])
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "qwen", "roberta", "xlm_roberta"])
def test_pairs_of_many_tokenizers_are_read_the_same(name: str, pair: str, tmp_path: Path) -> None:
    eos = folders.tokenizers()[name].eos_token is not None
    settings = {**(JOINED if pair == "joined" else PAIR), "append_eos": eos}
    path = make(tmp_path / "model", tokens=name, **settings)
    export(path, tmp_path / "out")  # compares the ids
    assert (tmp_path / "out" / "modules.json").is_file()


@pytest.mark.parametrize(
    ("settings", "place"),
    [
        (ODD[0], "passage_template"),
        (ODD[1], "passage_template"),
        (ODD[2], "passage_template"),
        ({"on": "encoder", **PAIR, "pooling": "cls", "query_template": "{text}?"}, "'?'"),
        (
            {"on": "encoder", **PAIR, "pooling": "cls", "passage_template": "document: {text}"},
            "'document: '",
        ),
        (LIKELIHOOD, "likelihood"),
    ],
)
def test_an_encoding_that_the_library_cannot_express_is_refused_and_nothing_is_left(
    settings: dict[str, Any], place: str, tmp_path: Path
) -> None:
    path = make(tmp_path / "model", **settings)
    with refused("not-expressible", place, "export it to transformers"):
        export(path, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("settings", [{}, JOINED])
def test_a_tokenizer_that_reads_otherwise_is_refused_and_nothing_is_left(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, framed = make(tmp_path / "model", **settings), prompts.framed

    def without_end(tokenizer: Any, length: int, before: Any, after: Any, between: Any = ()) -> Any:
        return framed(tokenizer, length, before, [], between)

    for module in (prompts, exporter):
        monkeypatch.setattr(module, "framed", without_end)
    monkeypatch.setattr(
        exporter.Pairing,
        "_chat_template",
        lambda *_: "{{ messages[0].content ~ messages[1].content }}",
    )
    with refused("export-differs", str(path)):
        export(path, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_without_the_library_the_error_names_the_pip_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("missing-package", "pip install"):
        export(make(tmp_path / "model"), tmp_path / "out")


def test_an_adapted_language_model_is_exported_without_its_output_layer(tmp_path: Path) -> None:
    path = folders.make_adapted(tmp_path / "model")
    export(path, tmp_path / "out")
    found = run_card(tmp_path / "out")["model"].encode_query(TEXTS)
    assert_close(found, folders.embeddings(path)[0])
