"""Exports that are refused, what they leave, the card and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.export import exported
from tests.export.exported import JOINED, ODD, OWN_HEAD, PAIR

from caravan.errors import InputError
from caravan.export import __main__ as command
from caravan.export import tokens, verify
from caravan.export.pairing import Pairing
from caravan.export.write import export

TOLD = ("has a title after it", "repeats the text", "begins differently")


@pytest.mark.parametrize(("settings", "told"), zip(ODD, TOLD, strict=True))
def test_a_template_that_is_no_prompt_before_a_text_is_refused(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    make = exported.reranker if "kind" in settings else exported.retriever
    path = make(tmp_path / "model", "decoder", **settings)
    with pytest.raises(InputError, match=f"{told}.*; export it as merged$"):
        export(path, "sentence-transformers", tmp_path / "new" / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    "template", [{"passage_template": "document: {text}"}, {"query_template": "{text}?"}]
)
def test_words_inside_of_a_pair_with_token_types_are_refused(
    template: dict[str, str], tmp_path: Path
) -> None:
    settings = {**PAIR, "pooling": "cls", "released": True, **template}
    path = exported.reranker(tmp_path / "model", "encoder", **settings)
    with pytest.raises(InputError, match=r"words of its own between them.*export it as merged$"):
        export(path, "sentence-transformers", tmp_path / "out")
    export(path, "merged", tmp_path / "out")
    exported.close_by_card(path, tmp_path / "out")


def test_a_folder_without_an_adapter_has_none_to_export(tmp_path: Path) -> None:
    path = exported.retriever(tmp_path / "model", "decoder")
    with pytest.raises(InputError, match=r"whole weights and no adapter; export it as merged$"):
        export(path, "adapter", tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("settings", OWN_HEAD)
def test_a_head_that_transformers_does_not_have_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    path = exported.reranker(tmp_path / "model", **settings)
    forms = ["merged", "adapter"] if "lora" in settings else ["merged"]
    for form in forms:
        with pytest.raises(InputError, match=r"BertModel.*; export it as sentence-transformers$"):
            export(path, form, tmp_path / "out")


@pytest.mark.parametrize("kind", ["retriever", "reranker"])
def test_a_tokenizer_that_would_read_differently_is_refused_and_nothing_left(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = exported.retriever if kind == "retriever" else exported.reranker
    path = make(tmp_path / "model", "decoder", **(JOINED if kind == "reranker" else {}))
    framed = tokens.framed
    monkeypatch.setattr(
        tokens, "framed", lambda own, length, before, after, *more: framed(own, length, before, [])
    )
    monkeypatch.setattr(Pairing, "_chat_template", lambda *_: "{{ messages[0].content }}")
    with pytest.raises(InputError, match=r"would read .*camels.* as \[.*\] where the model reads"):
        export(path, "sentence-transformers", tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("form", ["sentence-transformers", "merged", "adapter"])
def test_other_numbers_are_refused_and_nothing_left(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models").mkdir()
    path = exported.retriever(tmp_path / "models" / "model", "decoder", lora=True)
    monkeypatch.setattr(verify, "CLOSE", -1.0)
    with pytest.raises(InputError, match="embeddings differ from the model folder's"):
        export(path, form, tmp_path / "out")
    assert [child.name for child in tmp_path.iterdir()] == ["models"]


def test_a_folder_that_is_taken_is_left_alone(tmp_path: Path) -> None:
    path = exported.retriever(tmp_path / "model", "decoder")
    (tmp_path / "out").mkdir()
    export(path, "merged", tmp_path / "out")
    before = {file: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match="is there already; give a folder that is new or empty"):
        export(path, "sentence-transformers", tmp_path / "out")
    assert {file: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_the_card_has_the_hubs_metadata(tmp_path: Path) -> None:
    path = exported.retriever(tmp_path / "model", "decoder")
    record = json.loads((path / "caravan.json").read_text())
    wanted = {"sentence-transformers": "sentence-transformers", "merged": "transformers"}
    for base, told in (("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"), (str(tmp_path), None)):
        record["facts"]["base_model"] = base
        (path / "caravan.json").write_text(json.dumps(record))
        for form, library in wanted.items():
            out = tmp_path / f"{form}-{told is None}"
            export(path, form, out)
            front = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
            assert (front["library_name"], front.get("base_model")) == (library, told)
            assert front["pipeline_tag"] in ("sentence-similarity", "feature-extraction")
            assert front["tags"][0] == "caravan"


# --- the command --------------------------------------------------------------------------------


def test_the_command_exports_and_tells_a_mistake_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported.retriever(tmp_path / "model", "decoder")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["caravan.export", *arguments])
        return command.main()

    assert run(str(path), "merged", str(tmp_path / "out")) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'} holds it")
    assert run(str(tmp_path / "none"), "merged", str(tmp_path / "other")) == 2
    assert capsys.readouterr().err == f"{tmp_path / 'none'}: no such model folder\n"
    (tmp_path / "file").touch()
    assert run(str(path), "merged", str(tmp_path / "file" / "out")) == 2
    assert "give another place" in capsys.readouterr().err


def test_help_is_there_without_torch() -> None:
    told = "import sys, caravan.export.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0
