"""The encoding of a model folder: which settings are refused, and how a damaged file is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.refusals import refused
from tests.tiny import TOKEN

from caravan.encoding import Encoding, read_encoding, write_encoding

LIKELIHOOD = Encoding(kind="reranker", scoring="likelihood", append_eos=False)


@pytest.mark.parametrize(
    ("encoding", "change"),
    [
        (LIKELIHOOD, {"pair": "pair"}),
        (LIKELIHOOD, {"append_eos": True}),
        (LIKELIHOOD, {"kind": "retriever", "scoring": "likelihood"}),
        (LIKELIHOOD, {"query_template": "query: {text} ?"}),
        (LIKELIHOOD, {"scoring": "mean"}),
        (TOKEN, {"prefix": "", "suffix": "", "pair": "pair"}),
        (TOKEN, {"pooling": "cls"}),
        (TOKEN, {"positive": ""}),
        (TOKEN, {"negative": " salt"}),
        (TOKEN, {"instruction": ""}),
        (TOKEN, {"query_template": "{text}", "instruction": TOKEN.instruction}),
        (TOKEN, {"suffix": r"\nanswer:"}),
        (TOKEN, {"kind": "retriever", "scoring": "head", "prefix": TOKEN.prefix}),
    ],
)
def test_an_encoding_that_cannot_be_scored_is_refused(
    encoding: Encoding, change: dict[str, Any]
) -> None:
    with refused("invalid-encoding", f"encoding.{list(change)[-1]} is"):
        replace(encoding, **change)


def test_all_mistakes_of_an_encoding_are_reported_together() -> None:
    with refused("invalid-encoding", "encoding.kind", "encoding.pooling", "encoding.query_length"):
        Encoding(kind="ranker", pooling="max", query_length=0)


@pytest.mark.parametrize(
    ("change", "code", "place"),
    [
        (lambda c: c.pop("pooling"), "invalid-encoding", "missing 'pooling'"),
        (lambda c: c.update(poling="last"), "invalid-encoding", "unknown 'poling'"),
        (lambda c: c.update(pooling="max"), "invalid-encoding", "encoding.pooling is 'max'"),
        (lambda c: c.update(query_length="32"), "invalid-encoding", "'query_length' is '32'"),
        (lambda c: c.update(dim=-1), "invalid-encoding", "encoding.dim is -1"),
        (lambda c: c.update(append_eos=1), "invalid-encoding", "'append_eos' is 1"),
        (lambda c: c.update(format=99), "unknown-format", "caravan.json"),
        (lambda c: c.update(passage_template="{body}"), "invalid-encoding", "passage_template"),
        (lambda c: c["facts"].pop("weights"), "invalid-encoding", "weights"),
        (lambda c: c["facts"].update(name=0), "invalid-encoding", "'name' is 0"),
    ],
)
def test_a_broken_file_is_refused(change: Any, code: str, place: str, tmp_path: Path) -> None:
    write_encoding(tmp_path, Encoding(), {"weights": "full", "name": "tiny"})
    path = tmp_path / "caravan.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with refused(code, str(path), place):
        read_encoding(tmp_path)


def test_an_older_file_gets_the_defaults_of_later_settings(tmp_path: Path) -> None:
    write_encoding(tmp_path, Encoding(dim=8), {"weights": "full"})
    path = tmp_path / "caravan.json"
    record = json.loads(path.read_text())
    del record["scoring"], record["dim"]
    path.write_text(json.dumps({**record, "temperature": 0.05}))
    assert read_encoding(tmp_path)[0] == Encoding()
