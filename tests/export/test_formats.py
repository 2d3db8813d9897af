"""Exported folders: the same numbers where they are loaded, or a refusal."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.export import exported
from tests.export.exported import (
    ALIKE,
    JOINED,
    LLARA,
    ODD,
    OWN_HEAD,
    PAIR,
    PAIRS,
    PLAIN,
    SLOTS,
    TEXTS,
    TITLED,
    close,
    close_by_card,
    run_card,
)

from caravan.data.tokenization import Templates
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.export import tokens
from caravan.export.pairing import Pairing
from caravan.export.write import export
from caravan.models import folder

RETRIEVERS: dict[str, dict[str, Any]] = {
    "decoder": {"on": "decoder"},
    "decoder, no EOS, no unit length": {
        "on": "decoder",
        "append_eos": False,
        "pooling": "mean",
        "normalize": False,
    },
    "decoder with an adapter": {"on": "decoder", "lora": True},
    "decoder without prompts": {"on": "decoder", **PLAIN, "append_eos": True},
    "LLaRA": {"on": "decoder", **LLARA},
    "LLaRA's slots": {"on": "decoder", **SLOTS},
    "LLaRA's slots with an adapter": {"on": "decoder", "lora": True, **SLOTS},
    "the same slots on both sides": {"on": "decoder", **ALIKE},
    "encoder, mean": {"on": "encoder", **PLAIN, "pooling": "mean"},
    "encoder, cls": {"on": "encoder", **PLAIN, "pooling": "cls", "query_template": "ask {text}"},
    "encoder with an adapter": {"on": "encoder", "lora": True, **PLAIN, "pooling": "mean"},
    "titles in words": {"on": "decoder", "passage_template": "about {title}: {text}"},
}
RELEASED = {**JOINED, "pair": "pair", "append_eos": False}
RERANKERS: dict[str, dict[str, Any]] = {
    "decoder": {"on": "decoder", **JOINED},
    "decoder with an adapter": {"on": "decoder", "lora": True, **JOINED},
    "decoder whose padding is its EOS": {"on": "decoder", "pad": "</s>", **JOINED},
    "decoder without padding": {"on": "decoder", "pad": None, **JOINED},
    "decoder, no EOS": {"on": "decoder", **JOINED, "append_eos": False},
    "decoder, a pair": {"on": "decoder", **PAIR, "append_eos": True, "query_template": "q: {text}"},
    "RankLLaMA as it was released": {"on": "decoder", "tokens": "llama2", **RELEASED},
    "encoder with its own head": {"on": "encoder", "released": True, **PAIR, "pooling": "cls"},
    **{f"encoder {i}": settings for i, settings in enumerate(OWN_HEAD)},
}
SCORING = {"kind": "reranker", "scoring": "likelihood", **PLAIN, "query_template": "query: {text}"}


QUICK = {
    *("decoder with an adapter", "LLaRA's slots", "encoder, mean", "titles in words"),
    *("decoder", "RankLLaMA as it was released", "encoder with its own head", "encoder 0"),
}


def _params(kinds: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in kinds]


@pytest.fixture(params=_params(RETRIEVERS))
def retriever(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return exported.retriever(tmp_path / "model", **RETRIEVERS[request.param])


@pytest.fixture(params=_params(RERANKERS))
def reranker(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return exported.reranker(tmp_path / "model", **RERANKERS[request.param])


# --- sentence-transformers --------------------------------------------------------------------


def test_sentence_transformers_embeds_queries_and_passages_as_the_model_folder_does(
    retriever: Path, tmp_path: Path
) -> None:
    export(retriever, "sentence-transformers", tmp_path / "out")
    names = run_card(tmp_path / "out")
    model, wording = names["model"], "about {title}: {text}"
    queries, passages = exported.embeddings(retriever)
    close(model.encode_query(TEXTS, batch_size=4), queries)
    if read_encoding(retriever)[0].passage_template == wording:  # the title has words of its own
        bare = [i for i, (title, _) in enumerate(TITLED) if not title]
        close(model.encode_document([TITLED[i][1] for i in bare]), passages[bare])
        titled = [i for i, (title, _) in enumerate(TITLED) if title]
        given = ["{}: {}".format(*TITLED[i]) for i in titled]
        close(model.encode_document(given, prompt="about "), passages[titled])
        return
    given = [f"{title} {text}" if title else text for title, text in TITLED]
    close(model.encode_document(given, batch_size=4), passages)


def test_a_text_without_a_task_is_a_passage_or_refused(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    path = exported.retriever(tmp_path / "plain", "decoder")
    export(path, "sentence-transformers", tmp_path / "out")
    model = SentenceTransformer(str(tmp_path / "out"))
    close(model.encode(TEXTS), exported.embeddings(path)[1][: len(TEXTS)])
    path = exported.retriever(tmp_path / "llara", "decoder", **LLARA)
    export(path, "sentence-transformers", tmp_path / "routed")
    routed = SentenceTransformer(str(tmp_path / "routed"))
    with pytest.raises(ValueError, match="Consider specifying the `task`"):
        routed.encode(TEXTS)


def test_both_sides_of_a_router_can_share_their_weights(tmp_path: Path) -> None:
    path = exported.retriever(tmp_path / "model", "decoder", **SLOTS)
    export(path, "sentence-transformers", tmp_path / "out")
    model = run_card(tmp_path / "out")["model"]
    card = (tmp_path / "out" / "README.md").read_text()
    before = sum(p.numel() for p in model.parameters())
    exec(card.split("to have them in memory once: `")[1].split("`")[0], {"model": model})
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    close(model.encode_query(TEXTS), exported.embeddings(path)[0])
    close(model.encode_document(TEXTS), exported.embeddings(path)[1][: len(TEXTS)])


def test_sentence_transformers_scores_pairs_as_the_model_folder_does(
    reranker: Path, tmp_path: Path
) -> None:
    export(reranker, "sentence-transformers", tmp_path / "out")
    model = run_card(tmp_path / "out")["model"]
    wanted = exported.scores(reranker, PAIRS)
    given = [(query, f"{title} {text}" if title else text) for query, (title, text) in PAIRS]
    close(model.predict(given, batch_size=4), wanted)
    ranked = model.rank(given[0][0], [passage for _, passage in given[: len(TITLED)]])
    order = wanted[: len(TITLED)].argsort(descending=True)
    assert [row["corpus_id"] for row in ranked] == order.tolist()


def test_a_query_that_leaves_its_passage_no_room_is_an_error_of_a_pair(tmp_path: Path) -> None:
    path = exported.reranker(tmp_path / "model", "encoder", **PAIR, pooling="cls")
    export(path, "sentence-transformers", tmp_path / "out")
    model = run_card(tmp_path / "out")["model"]
    fits = 30 + 44 - 3 - 16
    assert f"queries of up to {fits} tokens" in (tmp_path / "out" / "README.md").read_text()
    pairs = [("camel " * fits, ("", "dune " * 90))]
    close(
        model.predict([("camel " * fits, "dune " * 90), ("tent", "well")]),
        exported.scores(path, [*pairs, ("tent", ("", "well"))]),
    )
    with pytest.raises(Exception, match="Truncation error"):
        model.predict([("camel " * 90, "dune")])


@pytest.mark.parametrize("pair", ["joined", "pair"])
def test_tokenizers_of_many_kinds_read_the_same_when_exported(pair: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    for name, tokenizer in exported.tokenizers().items():
        eos = tokenizer.eos_token is not None
        own = exported.encoding(append_eos=eos, query_template="{text} so:")
        templates, length = Templates(tokenizer, own), own.query_length
        framed = tokens.framed(tokenizer, length, templates.before, templates.tails["query"])
        framed.save_pretrained(tmp_path / name)
        loaded = AutoTokenizer.from_pretrained(tmp_path / name)
        texts = tokens.probes(length)
        read = loaded([text for _, text in texts], truncation=True)["input_ids"]
        assert read == templates.queries(texts), name
        templated = {"joined": JOINED, "pair": PAIR}[pair]
        pairing = Pairing(tokenizer, exported.encoding(**{**templated, "append_eos": eos}), name)
        pairing.tokenizer().save_pretrained(tmp_path / f"{name}-pair")
        pairs = pairing.probes()
        read = pairing.read(AutoTokenizer.from_pretrained(tmp_path / f"{name}-pair"), pairs)
        assert read["input_ids"] == [pair.ids for pair in pairing.wanted(pairs)], name


# --- transformers and PEFT --------------------------------------------------------------------


def _auto(out: Path) -> tuple[Any, dict[str, Any]]:
    """The exported folder by the Auto class that its card names, and what loading it reported."""
    import transformers

    name = (out / "README.md").read_text().split("model = ")[1].split(".")[0]
    model, report = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    return model, {key: list(found) for key, found in report.items() if found}


def test_a_merged_retriever_is_whole_and_embeds_by_its_cards_code(
    retriever: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(retriever, "merged", out)
    assert _auto(out)[1] == {}
    close_by_card(retriever, out)
    again = exported.embeddings(out)
    for found, wanted in zip(again, exported.embeddings(retriever), strict=True):
        close(found, wanted)


@pytest.mark.parametrize(
    "name", _params(name for name in RERANKERS if RERANKERS[name] not in OWN_HEAD)
)
def test_a_merged_reranker_is_whole_and_scores_by_its_cards_code(name: str, tmp_path: Path) -> None:
    path, out = exported.reranker(tmp_path / "model", **RERANKERS[name]), tmp_path / "out"
    export(path, "merged", out)
    assert _auto(out)[1] == {}
    close_by_card(path, out)
    close(exported.scores(out, PAIRS), exported.scores(path, PAIRS))


@pytest.mark.parametrize("settings", ODD)
def test_a_merged_folder_takes_any_template(settings: dict[str, Any], tmp_path: Path) -> None:
    make = exported.reranker if "kind" in settings else exported.retriever
    path = make(tmp_path / "model", "decoder", **settings)
    export(path, "merged", tmp_path / "out")
    close_by_card(path, tmp_path / "out")


def test_a_merged_decoder_scores_batches_though_its_eos_was_its_padding(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = exported.reranker(tmp_path / "model", "decoder", pad="</s>", **JOINED)
    export(path, "merged", tmp_path / "out")
    model, _ = _auto(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    read = Pairing(*folder.load(path)[1:3], "").wanted(PAIRS)
    batch = tokenizer.pad({"input_ids": [pair.ids for pair in read]}, return_tensors="pt")
    with torch.no_grad():
        close(model(**batch).logits[:, 0], exported.scores(path, PAIRS))


def test_a_likelihood_is_a_language_model_and_nothing_else(tmp_path: Path) -> None:
    path = exported.reranker(tmp_path / "model", "decoder", **SCORING)
    export(path, "merged", tmp_path / "out")
    model, report = _auto(tmp_path / "out")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert report == {}
    close_by_card(path, tmp_path / "out")
    with pytest.raises(InputError, match=r"the query's likelihood.*; export it as merged$"):
        export(path, "sentence-transformers", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_adapted_language_model_keeps_its_output_layer(tmp_path: Path) -> None:
    from caravan.models.llara import Layout, SlotEncoder

    own, given = exported.encoding(**LLARA), exported.tokenizer("decoder")
    backbone = exported.tiny_backbone().language_model(given)
    model = SlotEncoder(backbone, backbone.base_model, own, Layout(1, (4, 4), 1))
    folder.save(tmp_path / "model", model, given, own, {})
    export(tmp_path / "model", "merged", tmp_path / "out")
    found, report = _auto(tmp_path / "out")
    assert (type(found).__name__, report) == ("LlamaForCausalLM", {})
    close_by_card(tmp_path / "model", tmp_path / "out")
    export(tmp_path / "model", "sentence-transformers", tmp_path / "st")
    found = run_card(tmp_path / "st")["model"].encode_query(TEXTS)
    close(found, exported.embeddings(tmp_path / "model")[0])


@pytest.mark.parametrize("kind", ["retriever", "slots", "encoder", "reranker"])
def test_an_adapter_on_its_base_gives_the_same_by_its_cards_code(kind: str, tmp_path: Path) -> None:
    path, out = tmp_path / "model", tmp_path / "out"
    if kind == "reranker":
        exported.reranker(path, "decoder", lora=True, pad="</s>", **JOINED)
    else:
        settings = {"slots": SLOTS, "encoder": {**PLAIN, "pooling": "cls"}}.get(kind, {})
        name = "encoder" if kind == "encoder" else "decoder"
        exported.retriever(path, name, lora=True, **settings)
    export(path, "adapter", out)
    assert not (out / "model.safetensors").exists()
    close_by_card(path, out)
