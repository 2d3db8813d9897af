"""A tokenizer that ends texts with a token of its own, which is not its EOS, as Qwen3-Embedding's.

Plain transformers is the judge of the ids.
"""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.commands import ROOT, adopt, from_folder
from tests.models.released import save_base
from tests.refusals import refused
from tokenizers import processors
from transformers import AutoTokenizer

from caravan.cli.compose import compose
from caravan.cli.train import train
from caravan.data.pairs import PairTemplates
from caravan.data.tokenization import Templates, without_second_end
from caravan.encoding import Encoding, read_encoding
from caravan.models.folder import load


@pytest.fixture(scope="module")
def released(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_base(tmp_path_factory.mktemp("ends"), tokenizer)
    own = type(tokenizer).from_pretrained(folder)
    end = own.pad_token or "<pad>"
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, own.convert_tokens_to_ids(end))]
    )
    own.save_pretrained(folder)
    return folder


def _plain(released: Path, text: str) -> list[int]:
    ids: list[int] = AutoTokenizer.from_pretrained(released)(text)["input_ids"]
    return ids


def test_no_second_end_is_appended_and_the_folder_records_it(
    released: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        model = adopt(released, tmp_path)
    assert "encoding.append_eos=false" in caplog.text
    encoding, _ = read_encoding(model)
    templates = Templates(AutoTokenizer.from_pretrained(model), encoding)
    assert templates.passages([("", "salt road")]) == [_plain(released, "passage: salt road")]
    assert not encoding.append_eos


def test_a_folder_that_was_saved_with_two_ends_keeps_them(released: Path, tmp_path: Path) -> None:
    older = adopt(released, tmp_path / "older")
    record = json.loads((older / "caravan.json").read_text())
    (older / "caravan.json").write_text(json.dumps({**record, "append_eos": True}))
    continued = ["trainer.max_steps=0", *from_folder(older), f"run_dir={tmp_path / 'continued'}"]
    train(compose(ROOT / "conf", "train", [*continued, "precision=float32"]))
    for model in (older, tmp_path / "continued" / "model"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        (ids,) = Templates(tokenizer, read_encoding(model)[0]).passages([("", "salt road")])
        assert ids == [*_plain(released, "passage: salt road"), tokenizer.eos_token_id]


def test_a_folder_whose_end_token_has_no_embedding_is_refused(
    released: Path, tmp_path: Path
) -> None:
    model = adopt(released, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<{number}>" for number in range(1000)])  # more than embeddings
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    tokenizer.save_pretrained(model)
    with refused("other-token-ids", str(model), "<end>"):
        load(model)


def test_a_special_token_that_no_text_gets_may_have_no_embedding(
    released: Path, tmp_path: Path
) -> None:
    model = adopt(released, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens([f"<{number}>" for number in range(1000)])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.save_pretrained(model)
    _, loaded, *_ = load(model)
    assert "<image>" in loaded.all_special_tokens


@pytest.mark.parametrize("pair", ["joined", "pair"])
def test_a_rerankers_input_gets_no_second_end_either(
    released: Path, encoding: Encoding, pair: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(released)
    if pair == "pair":
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <pad>",
            pair="$A <pad> $B <pad>",
            special_tokens=[("<pad>", tokenizer.convert_tokens_to_ids("<pad>"))],
        )
    given = replace(encoding, kind="reranker", pair=pair, query_length=64)
    settled = without_second_end(tokenizer, given)
    (read,) = PairTemplates(tokenizer, settled).pairs([("", "salt")], [("", "road")])
    texts = ["query: salt passage: road"] if pair == "joined" else ["query: salt", "passage: road"]
    assert read.ids == tokenizer(*texts)["input_ids"]


@pytest.mark.parametrize("setting", ["query_template", "passage_template"])
def test_a_template_that_ends_with_the_appended_eos_is_refused(
    tokenizer: Any, setting: str
) -> None:
    ended = replace(Encoding(), **{setting: f"{{text}}{tokenizer.eos_token}"})
    with refused("repeated-eos", f"encoding.{setting}"):
        without_second_end(tokenizer, ended)
    alone = replace(ended, append_eos=False)
    assert without_second_end(tokenizer, alone) is alone
