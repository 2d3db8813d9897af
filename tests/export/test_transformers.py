"""Exports to transformers and PEFT: the card's code computes the model folder's numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tests.export import folders
from tests.export.folders import PAIRS, assert_card_computes, assert_close, cases, make
from tests.refusals import refused

from caravan.data.pairs import PairTemplates
from caravan.export import sentence_transformers, verify
from caravan.export.transformers import export
from caravan.models import folder


def load(out: Path) -> tuple[Any, dict[str, Any]]:
    """The exported folder by the Auto class that its card names, and what loading it reported."""
    import transformers

    name = (out / "README.md").read_text().split("model = ")[1].split(".")[0]
    model, report = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    return model, {key: list(found) for key, found in report.items() if found}


@pytest.mark.parametrize(
    "case",
    cases(
        *("retriever, adapter", "dot", "slots", "[CLS] of an encoder", "reranker, adapter", "pair"),
        *("RankLLaMA", "released encoder", "likelihood", "token", "untied token, adapter"),
        slow=("LLaRA", "title after text", "text twice", "title with words", "no padding"),
    ),
)
def test_full_weights_load_whole_and_compute_the_same_by_the_cards_code(
    case: str, tmp_path: Path
) -> None:
    path, out = make(tmp_path / "model", case), tmp_path / "out"
    export(path, out)
    assert load(out)[1] == {}
    assert_card_computes(path, out)
    assert_card_computes(out, out)  # the export is a model folder, too


@pytest.mark.parametrize("case", ["token, adapter", "untied token"])
def test_the_difference_of_two_rows_is_the_head_of_a_classifier(case: str, tmp_path: Path) -> None:
    path, out = make(tmp_path / "model", case), tmp_path / "out"
    export(path, out, classifier=True)
    model, report = load(out)
    assert (model.config.num_labels, report) == (1, {})
    assert_card_computes(path, out)
    assert_close(folders.scores(out, PAIRS), folders.scores(path, PAIRS))  # a model folder, too
    with refused("not-token-scored", str(out)):
        export(out, tmp_path / "again", classifier=True)


def test_a_decoder_scores_padded_batches_though_its_eos_was_its_padding(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = make(tmp_path / "model", "padding is EOS")
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


@pytest.mark.parametrize(
    ("case", "changes", "code", "place"),
    [
        ("encoder", {}, "head-not-in-transformers", "model"),
        ("encoder, adapter", {}, "head-not-in-transformers", "model"),
        # A score that is not linear in the state has no classifier.
        ("token", {"on": "gemma2"}, "not-expressible", "Gemma2ForCausalLM caps"),
        ("retriever, adapter", {}, "export-differs", "model"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_is_left(
    case: str,
    changes: dict[str, Any],
    code: str,
    place: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if code == "export-differs":
        monkeypatch.setattr(verify, "TOLERANCE", -1.0)
    path = make(tmp_path / "model", case, **changes)
    with refused(code, place):
        export(path, tmp_path / "out", classifier=case == "token")
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


def test_an_export_takes_an_empty_folder_and_leaves_another_alone(tmp_path: Path) -> None:
    path, out = make(tmp_path / "model"), tmp_path / "out"
    out.mkdir()
    export(path, out)
    assert ModelCard.load(out / "README.md").data.library_name == "transformers"
    before = {file: file.read_bytes() for file in out.iterdir()}
    with refused("folder-not-empty", str(out)):
        sentence_transformers.export(path, out)
    assert {file: file.read_bytes() for file in out.iterdir()} == before
