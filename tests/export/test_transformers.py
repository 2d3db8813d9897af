"""Exports to transformers and PEFT: the card's code computes the model folder's numbers."""

from __future__ import annotations

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
    TOKEN,
    assert_card_computes,
    assert_close,
    make,
)
from tests.refusals import refused

from caravan.data.pairs import PairTemplates
from caravan.export import sentence_transformers, verify
from caravan.export.transformers import export
from caravan.models import folder

slow = pytest.mark.slow


def load(out: Path) -> tuple[Any, dict[str, Any]]:
    """The exported folder by the Auto class that its card names, and what loading it reported."""
    import transformers

    name = (out / "README.md").read_text().split("model = ")[1].split(".")[0]
    model, report = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    return model, {key: list(found) for key, found in report.items() if found}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"lora": True}, id="adapter"),
        pytest.param({"append_eos": False, "pooling": "mean", "normalize": False}, id="dot"),
        pytest.param(LLARA, id="LLaRA", marks=slow),
        pytest.param(SLOTS, id="slots"),
        pytest.param({"on": "encoder", **PLAIN, "pooling": "cls"}, id="encoder"),
        pytest.param(ODD[0], id="title after text", marks=slow),
        pytest.param(ODD[1], id="text twice", marks=slow),
        pytest.param({"lora": True, **JOINED}, id="reranker, adapter"),
        pytest.param({"pad": None, **JOINED}, id="reranker without padding", marks=slow),
        pytest.param({**PAIR, "append_eos": True, "query_template": "q: {text}"}, id="pair"),
        pytest.param(
            {"tokens": "llama2", **JOINED, "pair": "pair", "append_eos": False}, id="RankLLaMA"
        ),
        pytest.param(
            {"on": "encoder", "released": True, **PAIR, "pooling": "cls"}, id="released encoder"
        ),
        pytest.param(ODD[2], id="title with words", marks=slow),
        pytest.param(LIKELIHOOD, id="likelihood"),
        pytest.param(TOKEN, id="token"),
        pytest.param({"on": "qwen3", "lora": True, **TOKEN}, id="token, untied, adapter"),
    ],
)
def test_full_weights_load_whole_and_compute_the_same_by_the_cards_code(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path, out = make(tmp_path / "model", **settings), tmp_path / "out"
    export(path, out)
    assert load(out)[1] == {}
    assert_card_computes(path, out)
    assert_card_computes(out, out)  # the export is a model folder, too


@pytest.mark.parametrize("settings", [{"lora": True}, {"on": "qwen3"}])
def test_the_difference_of_two_rows_is_the_head_of_a_classifier(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path, out = make(tmp_path / "model", **settings, **TOKEN), tmp_path / "out"
    export(path, out, classifier=True)
    model, report = load(out)
    assert (model.config.num_labels, report) == (1, {})
    assert_card_computes(path, out)
    assert_close(folders.scores(out, PAIRS), folders.scores(path, PAIRS))  # a model folder, too
    with refused("not-token-scored", str(out)):
        export(out, tmp_path / "again", classifier=True)


def test_scores_that_are_not_linear_in_the_state_have_no_classifier(tmp_path: Path) -> None:
    path = make(tmp_path / "model", on="gemma2", **TOKEN)
    with refused("not-expressible", "Gemma2ForCausalLM caps"):
        export(path, tmp_path / "out", classifier=True)


def test_a_decoder_scores_padded_batches_though_its_eos_was_its_padding(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = make(tmp_path / "model", pad="</s>", **JOINED)
    export(path, tmp_path / "out")
    _, tokenizer, encoding, _ = folder.load(path)
    queries = [("", query) for query, _ in PAIRS]
    pairs = PairTemplates(tokenizer, encoding).pairs(queries, [passage for _, passage in PAIRS])
    exported = AutoTokenizer.from_pretrained(tmp_path / "out")
    batch = exported.pad({"input_ids": [pair.ids for pair in pairs]}, return_tensors="pt")
    with torch.no_grad():
        found = load(tmp_path / "out")[0](**batch).logits[:, 0]
    assert_close(found, folders.scores(path, PAIRS))


def test_an_adapted_language_model_keeps_its_output_layer(tmp_path: Path) -> None:
    path = folders.make_adapted(tmp_path / "model")
    export(path, tmp_path / "out")
    found, report = load(tmp_path / "out")
    assert (type(found).__name__, report) == ("LlamaForCausalLM", {})
    assert_card_computes(path, tmp_path / "out")


@pytest.mark.parametrize("settings", OWN_HEAD[:2])
def test_a_head_that_transformers_does_not_have_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = make(tmp_path / "model", **settings)
    with refused("head-not-in-transformers", str(path)):
        export(path, tmp_path / "out")


@pytest.mark.parametrize("exporter", [export, sentence_transformers.export])
def test_other_numbers_are_refused_and_nothing_is_left(
    exporter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    path = make(tmp_path / "models" / "model", lora=True)
    monkeypatch.setattr(verify, "TOLERANCE", -1.0)
    with refused("export-differs", str(path)):
        exporter(path, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["models"]


def test_an_export_takes_an_empty_folder_and_leaves_another_alone(tmp_path: Path) -> None:
    path, out = make(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    export(path, out)
    before = {file: file.read_bytes() for file in out.iterdir()}
    with refused("folder-not-empty", str(out)):
        sentence_transformers.export(path, out)
    assert {file: file.read_bytes() for file in out.iterdir()} == before
