"""A model folder's card: metadata of the Hub, code that runs, figures that were measured."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from tests.commands import evaluate, train
from tests.export import exported
from tests.export.exported import (
    JOINED,
    LLARA,
    OWN_HEAD,
    PAIR,
    PAIRS,
    PLAIN,
    SLOTS,
    TEXTS,
    TITLED,
    close,
)

from caravan.data.readers.texts import HubTexts
from caravan.encoding import read_encoding
from caravan.errors import InputError
from caravan.export import card_command as command
from caravan.export import card_page
from caravan.export.card_figures import evaluated
from caravan.export.model_card import write
from caravan.export.write import export
from caravan.quickstart.pydocs import PyDocs
from caravan.training.fit import data_facts

FLOAT = "precision=float32"
RETRIEVERS: dict[str, dict[str, Any]] = {
    "decoder": {"on": "decoder"},
    "adapter": {"on": "decoder", "lora": True},
    "LLaRA": {"on": "decoder", **LLARA},
    "slots": {"on": "decoder", **SLOTS},
    "slots, adapter": {"on": "decoder", "lora": True, **SLOTS},
    "encoder": {"on": "encoder", **PLAIN, "pooling": "mean"},
}
RERANKERS: dict[str, dict[str, Any]] = {
    "decoder": {"on": "decoder", **JOINED},
    "adapter": {"on": "decoder", "lora": True, **JOINED},
    "padding is EOS": {"on": "decoder", "pad": "</s>", **JOINED},
    "encoder": {"on": "encoder", "released": True, **PAIR, "pooling": "cls"},
}
LIKELIHOOD = {"kind": "reranker", "scoring": "likelihood", **PLAIN}


def blocks(folder: Path, heading: str) -> str:
    """The Python under a heading that begins so."""
    text = (folder / "README.md").read_text("utf-8")
    found = re.search(rf"^## {heading}.*?```python\n(.*?)```", text, re.DOTALL | re.MULTILINE)
    assert found is not None
    return found[1].replace(card_page.HERE, str(folder))


def run(folder: Path, heading: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(blocks(folder, heading), names)
    return names


def metadata(folder: Path) -> Any:
    """The card's metadata, as huggingface_hub reads and checks it."""
    return ModelCard.load(folder / "README.md").data


@pytest.mark.parametrize("kind", RETRIEVERS)
def test_the_code_of_a_retrievers_card_gives_its_numbers(kind: str, tmp_path: Path) -> None:
    path = exported.retriever(tmp_path / "model", **RETRIEVERS[kind])
    write(path)
    names = run(path, "Use it in (?:transformers|PEFT)")
    queries, passages = exported.embeddings(path)
    close([names["embed_query"](text) for text in TEXTS], queries)
    close([names["embed_passage"](text, title) for title, text in TITLED], passages)
    adapter = RETRIEVERS[kind].get("lora", False)
    assert metadata(path).pipeline_tag == "feature-extraction"
    assert ("peft" in metadata(path).tags) == adapter


@pytest.mark.parametrize("kind", RERANKERS)
def test_the_code_of_a_rerankers_card_gives_its_numbers(kind: str, tmp_path: Path) -> None:
    path = exported.reranker(tmp_path / "model", **RERANKERS[kind])
    write(path)
    names = run(path, "Use it in (?:transformers|PEFT)")
    found = [names["score"](query, text, title) for query, (title, text) in PAIRS]
    close(torch.tensor(found), exported.scores(path, PAIRS))
    assert metadata(path).pipeline_tag == "text-ranking"


def test_what_a_library_cannot_load_is_said(tmp_path: Path) -> None:
    own_head = exported.reranker(tmp_path / "head", **OWN_HEAD[0])
    write(own_head)
    text = (own_head / "README.md").read_text()
    assert "transformers has no class with its head; use it in sentence-transformers" in text
    assert "AutoModel" not in text
    likely = exported.reranker(tmp_path / "likely", on="decoder", **LIKELIHOOD)
    write(likely)
    assert "sentence-transformers has no score by likelihood" in (likely / "README.md").read_text()
    score = run(likely, "Use it in transformers")["score"]
    found = [score(query, text, title) for query, (title, text) in PAIRS]
    close(torch.tensor(found), exported.scores(likely, PAIRS))
    with pytest.raises(InputError, match="likelihood"):
        export(likely, "sentence-transformers", tmp_path / "out")


def test_the_cards_code_for_caravan_and_sentence_transformers_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = {
        "retriever": exported.retriever(tmp_path / "retriever", "decoder"),
        "reranker": exported.reranker(tmp_path / "reranker", "decoder", **JOINED),
    }
    for path in made.values():
        write(path)
        assert len(run(path, "Use it in Caravan")["passages"]) == 2
        told = capsys.readouterr().out
        assert "Camels cross it, by night." in told
        assert "Salt is gold." in told
        card = (path / "README.md").read_text()
        ((form, out),) = re.findall(r"`python -m caravan.export \S+ (\S+) (\S+)`", card)
        export(path, form, Path(out))
        run(path, "Use it in sentence-transformers")
        assert capsys.readouterr().out.strip()
        shutil.rmtree(out)


def test_a_trained_folder_has_the_validations_figure_and_the_recipe(
    beir: Path, tmp_path: Path
) -> None:
    best = train(beir, tmp_path / "run", "validation.passages=30")
    folder = tmp_path / "run" / "model"
    (result,) = metadata(folder).eval_results
    assert (result.metric_name, result.metric_type) == ("MRR@10", "mrr_at_10")
    assert result.metric_value == best
    assert (result.dataset_type, result.dataset_split) == ("tiny", "dev")
    assert "4 queries over 30 passages; while training" in result.dataset_name
    assert metadata(folder).model_name == read_encoding(folder)[1]["name"]
    text = (folder / "README.md").read_text()
    for row in ("updates | 8", "loss | InfoNCE", "negatives a query | 2", "learning rate | 0.01"):
        assert f"| {row} |" in text
    for unknown in ("license", "language", "datasets", "base_model"):
        assert getattr(metadata(folder), unknown) is None


def test_figures_of_an_evaluation_are_those_of_this_model(
    beir: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    run_dir, folder, reranker = tmp_path / "run", tmp_path / "model", tmp_path / "reranker"
    shutil.copytree(folders["retriever"], folder)
    shutil.copytree(folders["reranker"], reranker)
    stages = f"[bm25,{folder}]"
    depth = (f"reranker={reranker}", "rerank.depth=7", "rerank.weight=0.4", "rerank.rest=keep")
    metrics = evaluate(beir, run_dir, stages, *depth, FLOAT)
    figures = {stage["stage"]: stage["overall"] for stage in metrics["stages"]}
    write(folder, [run_dir], license="apache-2.0", language=["en"])
    found = metadata(folder).eval_results
    assert {one.metric_name: one.metric_value for one in found} == figures["retriever"]
    assert {one.dataset_name for one in found} == {"tiny test (4 queries over 60 passages)"}
    assert (metadata(folder).license, metadata(folder).language) == ("apache-2.0", ["en"])
    write(reranker, [run_dir])
    found = metadata(reranker).eval_results
    assert {one.metric_name: one.metric_value for one in found} == figures["reranked"]
    assert "; the top 7 of fused reranked with a weight of 0.4" in found[0].dataset_name
    assert f"{figures['reranked']['MRR@10']:.4f}" in (reranker / "README.md").read_text()


def test_figures_of_many_collections_are_a_row_each(
    beir: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    folder, data = tmp_path / "model", tmp_path / "data"
    shutil.copytree(folders["retriever"], folder)
    for name in ("one", "two"):
        shutil.copytree(beir, data / name)
    metrics = evaluate(data, tmp_path / "run", folder, "collections=[one,two]", FLOAT)
    write(folder, [tmp_path / "run"])
    text = (folder / "README.md").read_text()
    for name, of in metrics["collections"].items():
        found = {r.metric_name: r.metric_value for r in metadata(folder).eval_results
                 if r.dataset_type == name}  # fmt: skip
        assert found == of["overall"]
        assert f"| {name} test | 4 queries over 60 passages |" in text
    (data / "one/queries.jsonl").unlink()
    with pytest.raises(InputError, match="1 of 2 collections failed"):
        evaluate(data, tmp_path / "half", folder, "collections=[one,two]", FLOAT)
    write(folder, [tmp_path / "half"])
    assert {one.dataset_type for one in metadata(folder).eval_results} == {"two"}


def test_a_chat_template_stays_in_its_cell(tmp_path: Path) -> None:
    path = exported.retriever(tmp_path / "model", "decoder", query_template="<|user|>\n{text}")
    write(path)
    row = r"| query | `<\|user\|>\n{text}`, "
    assert any(line.startswith(row) for line in (path / "README.md").read_text().splitlines())


def test_figures_of_another_model_are_refused(
    beir: Path, folders: dict[str, str], tmp_path: Path
) -> None:
    evaluate(beir, tmp_path / "run", folders["retriever"], FLOAT)
    train(beir, tmp_path / "other", "trainer.max_steps=0", "seed=1")
    other = tmp_path / "other" / "model"
    before = (other / "README.md").read_bytes()
    with pytest.raises(InputError, match=r"none of its stages was computed by .* as it is now"):
        write(other, [tmp_path / "run"])
    with pytest.raises(InputError, match="no figures of an evaluation"):
        write(other, [tmp_path])
    assert (other / "README.md").read_bytes() == before


def test_the_base_is_that_of_the_first_training_and_of_the_hub(tmp_path: Path) -> None:
    first = exported.retriever(tmp_path / "first", "decoder")
    second = exported.retriever(tmp_path / "second", "decoder")
    for folder, base in ((first, "Qwen/Qwen3-0.6B"), (second, str(first))):
        record = json.loads((folder / "caravan.json").read_text())
        record["facts"]["base_model"] = base
        (folder / "caravan.json").write_text(json.dumps(record))
    write(second)
    data = metadata(second)
    assert (data.base_model, data.base_model_relation) == ("Qwen/Qwen3-0.6B", "finetune")
    record["facts"]["base_model"] = str(second)  # a folder that began with itself ends the search
    (second / "caravan.json").write_text(json.dumps(record))
    write(second)
    assert metadata(second).base_model is None


def test_what_is_known_of_the_data_is_told(tmp_path: Path) -> None:
    data = SimpleNamespace(dev_split=None)
    hub = data_facts(HubTexts("wikimedia/wikipedia"), data)
    assert hub == {"datasets": ["wikimedia/wikipedia"]}
    assert data_facts(HubTexts(str(tmp_path)), data) == {}
    path = exported.retriever(tmp_path / "model", "decoder")
    record = json.loads((path / "caravan.json").read_text())
    record["facts"] |= hub | data_facts(PyDocs(), data)
    (path / "caravan.json").write_text(json.dumps(record))
    write(path)
    assert metadata(path).datasets == ["wikimedia/wikipedia"]
    assert metadata(path).language == ["en"]


def test_the_command_writes_a_card_and_tells_a_mistake_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported.retriever(tmp_path / "model", "decoder")

    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["caravan.export.card_command", *arguments])
        return command.main()

    assert call(str(path), "--license", "mit", "--language", "en") == 0
    assert capsys.readouterr().out.startswith(f"{path / 'README.md'} is written; hf upload ")
    assert metadata(path).license == "mit"
    assert call(str(tmp_path / "none")) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'none'}: no such model folder\n"


def test_a_damaged_evaluation_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"stages": [{"stage": 1}]}')
    with pytest.raises(InputError, match=r"metrics\.json is damaged: stages\[0\]\.stage is not a"):
        evaluated(tmp_path, tmp_path)
