"""A model folder's card: metadata of the Hub, code that runs, metrics that were measured."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from tests.commands import evaluate, train
from tests.export.folders import CASES, assert_card_computes, cases, make, run_card
from tests.refusals import refused

from caravan.cli.train import source_facts
from caravan.data.readers.texts import UnlabelledTexts
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.export import sentence_transformers
from caravan.export.model_card import evaluated, write
from caravan.quickstart.pydocs import PyDocs

FLOAT = "precision=float32"


def metadata(folder: Path) -> Any:
    """The card's metadata, as huggingface_hub reads and checks it."""
    return ModelCard.load(folder / "README.md").data


def results(folder: Path, collection: str = "tiny") -> dict[str, float]:
    """The card's metrics on a collection."""
    found = metadata(folder).eval_results
    return {one.metric_name: one.metric_value for one in found if one.dataset_type == collection}


def set_facts(folder: Path, **facts: Any) -> None:
    record = json.loads((folder / "caravan.json").read_text())
    record["facts"] |= facts
    (folder / "caravan.json").write_text(json.dumps(record))


@pytest.mark.parametrize(
    "case",
    cases(
        "slots, adapter",
        "mean of an encoder",
        "token, adapter",
        "padding is EOS",
        "released encoder",
        "likelihood",
        slow=("retriever", "reranker, adapter"),
    ),
)
def test_the_cards_code_computes_the_folders_numbers(case: str, tmp_path: Path) -> None:
    path = make(tmp_path / "model", case)
    text = write(path).read_text()
    assert_card_computes(path, path)
    reranks = CASES[case].get("kind") == "reranker"
    assert metadata(path).pipeline_tag == ("text-ranking" if reranks else "feature-extraction")
    assert ("peft" in metadata(path).tags) == case.endswith("adapter")
    unsupported = "sentence-transformers cannot score by likelihood" in text
    assert unsupported == (case == "likelihood")


def test_a_card_says_that_transformers_has_no_class_for_a_head(tmp_path: Path) -> None:
    text = write(make(tmp_path / "head", "encoder")).read_text()
    assert "transformers has no class with this head" in text
    assert "AutoModel" not in text


@pytest.mark.parametrize("case", ["retriever", "reranker"])
def test_the_code_for_caravan_and_sentence_transformers_runs(
    case: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    path = make(tmp_path / "model", case)
    set_facts(path, base_model="Qwen/Qwen3-0.6B")
    write(path)
    assert len(run_card(path, "Use it in Caravan")["passages"]) == 2
    printed = capsys.readouterr().out
    assert "Camels cross it, by night." in printed
    assert "Salt is gold." in printed
    card = (path / "README.md").read_text()
    ((command, out),) = re.findall(r"`python -m caravan.export (\S+) \S+ (\S+)`", card)
    assert command == "sentence-transformers"
    sentence_transformers.export(path, Path(out))
    run_card(path, "Use it in sentence-transformers")
    assert capsys.readouterr().out.strip()
    data = metadata(Path(out))
    assert (data.library_name, data.base_model) == ("sentence-transformers", "Qwen/Qwen3-0.6B")


def test_a_trained_folder_has_the_validation_metric_and_the_settings(
    beir: Path, tmp_path: Path
) -> None:
    best = train(beir, tmp_path / "run", "validation.passages=30")
    folder = tmp_path / "run" / "model"
    (result,) = metadata(folder).eval_results
    assert (result.metric_name, result.metric_type) == ("MRR@10", "mrr_at_10")
    assert result.metric_value == best
    assert (result.dataset_type, result.dataset_split) == ("tiny", "dev")
    assert "4 queries over 30 passages; during training" in result.dataset_name
    assert metadata(folder).model_name == read_encoding(folder)[1]["name"]
    text = (folder / "README.md").read_text()
    for row in ("updates | 8", "loss | InfoNCE", "negatives a query | 2", "learning rate | 0.01"):
        assert f"| {row} |" in text
    assert "transformers 5." in text
    for unknown in ("license", "language", "datasets", "base_model"):
        assert getattr(metadata(folder), unknown) is None


def test_the_metrics_of_an_evaluation_are_those_of_this_model(
    beir: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    run_dir, folder, reranker = tmp_path / "run", tmp_path / "model", tmp_path / "reranker"
    shutil.copytree(folders["retriever"], folder)
    shutil.copytree(folders["reranker"], reranker)
    depth = (f"reranker={reranker}", "rerank.depth=7", "rerank.weight=0.4", "rerank.rest=keep")
    metrics = evaluate(beir, run_dir, f"[bm25,{folder}]", *depth, FLOAT)
    scores = {stage["stage"]: stage["overall"] for stage in metrics["stages"]}
    write(folder, [run_dir], license="apache-2.0", language=["en"])
    assert results(folder) == scores["retriever"]
    found = metadata(folder).eval_results
    assert {one.dataset_name for one in found} == {"tiny test (4 queries over 60 passages)"}
    assert (metadata(folder).license, metadata(folder).language) == ("apache-2.0", ["en"])
    write(reranker, [run_dir])
    assert results(reranker) == scores["reranked"]
    how = metadata(reranker).eval_results[0].dataset_name
    assert "; the top 7 of fused reranked with a weight of 0.4" in how
    assert f"| {scores['reranked']['MRR@10']:.4f} |" in (reranker / "README.md").read_text()
    before = (folder / "README.md").read_bytes()
    with (folder / "config.json").open("a") as file:
        file.write("\n")  # now another model
    with refused("metrics-of-another-model", str(folder)):
        write(folder, [run_dir])
    assert (folder / "README.md").read_bytes() == before


def test_metrics_of_several_collections_are_a_row_each(
    beir: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    folder, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(folders["retriever"], folder)
    for name in ("one", "two"):
        shutil.copytree(beir, data / name)
    metrics = evaluate(data, tmp_path / "run", folder, "collections=[one,two]", FLOAT)
    write(folder, [tmp_path / "run"])
    text = (folder / "README.md").read_text()
    for name, record in metrics["collections"].items():
        assert results(folder, name) == record["overall"]
        assert f"| {name} test (4 queries over 60 passages) |" in text
    (data / "one/queries.jsonl").unlink()
    with pytest.raises(InputError):
        evaluate(data, tmp_path / "half", folder, "collections=[one,two]", FLOAT)
    write(folder, [tmp_path / "half"])
    assert {one.dataset_type for one in metadata(folder).eval_results} == {"two"}


@pytest.mark.parametrize("record", ['{"stages": [{"stage": 1}]}', "[]", '{"stages', None])
def test_a_damaged_evaluation_is_refused(record: str | None, tmp_path: Path) -> None:
    if record is not None:
        (tmp_path / "metrics.json").write_text(record)
    with refused("unreadable", "metrics.json"):
        evaluated(make(tmp_path / "model"), tmp_path)


def test_a_card_has_the_first_base_the_dataset_and_the_language(tmp_path: Path) -> None:
    first = make(tmp_path / "first")
    second = make(tmp_path / "second", query_template="<|user|>\n{text}")
    hub = source_facts(UnlabelledTexts("wikimedia/wikipedia"))
    assert source_facts(UnlabelledTexts(str(tmp_path))) == {}
    set_facts(first, base_model="Qwen/Qwen3-0.6B")
    set_facts(second, base_model=str(first), **hub, **source_facts(PyDocs()))
    text = write(second).read_text()
    assert r"| query_template | `<\|user\|>\n{text}` |" in text  # stays in its cell
    data = metadata(second)
    assert (data.base_model, data.base_model_relation) == ("Qwen/Qwen3-0.6B", "finetune")
    assert (data.datasets, data.language) == (["wikimedia/wikipedia"], ["en"])
    for base in (str(second), "a/folder/of/this/machine"):  # its own base: the search ends
        set_facts(second, base_model=base)
        write(second)
        assert metadata(second).base_model is None


def test_the_card_serves_the_model_and_checks_the_server(tmp_path: Path) -> None:
    served = write(make(tmp_path / "retriever")).read_text()
    assert "vllm serve exported --runner pooling --dtype float32 --max-model-len 44\n" in served
    assert "conformance path/to/this/folder http://localhost:8000/v1/embeddings\n" in served
    token = write(make(tmp_path / "token", "token")).read_text()
    assert "transformers --classifier path/to/this/folder exported\n" in token
    assert "conformance path/to/this/folder http://localhost:8000/score\n" in token
    # A server has one tokenizer for both sides, and adds no EOS to a pair.
    for case in ("slots", "reranker"):
        assert "vllm" not in write(make(tmp_path / case, case)).read_text()
