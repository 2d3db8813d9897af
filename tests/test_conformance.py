"""The check of a server: a local one that makes each mistake, and whether the mistake is named."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import Call
from tests.export.folders import make
from tests.refusals import refused

from caravan.conformance import Server, check, main
from caravan.data.pairs import PairTemplates
from caravan.models import folder
from caravan.models.pooling import pooled_states, pooling_of

EMBEDDINGS = "/v1/embeddings"


class Stub:
    """A server of a model folder; its mistakes are settings. It shares no code with the check."""

    def __init__(self, path: Path) -> None:
        self.model, self.tokenizer, self.encoding, _ = folder.load(path)
        self.mistakes: dict[str, Any] = {}
        self.requests: list[dict[str, Any]] = []
        self.url = serve(self)

    def __call__(self, url: str, body: dict[str, Any]) -> Any:
        self.requests.append(body)
        if url.endswith("/v1/models"):
            return {"data": [{"id": "tiny"}]}
        if url.endswith("/v1/embeddings"):
            rows = self._embed(body["input"])
            if "in_a_batch" in self.mistakes and len(rows) > 1:
                rows = [self.mistakes["in_a_batch"]] * len(rows)
            return {"data": [{"index": i, "embedding": row} for i, row in enumerate(rows)][::-1]}
        passages = body["text_2"] if url.endswith("score") else body["texts"]
        query = body["text_1"] if url.endswith("score") else body["query"]
        scores = [self._score(query, passage) for passage in passages]
        if url.endswith("score"):
            return {"data": [{"index": i, "score": one} for i, one in enumerate(scores)]}
        if self.mistakes.get("form") == "TEI":
            return [{"index": i, "score": one} for i, one in enumerate(scores)][::-1]
        return {"results": [{"index": i, "relevance_score": s} for i, s in enumerate(scores)]}

    def _ids(self, text: str) -> list[int]:
        start, *ids = self.tokenizer(self.mistakes.get("prompt", "") + text)["input_ids"]
        end = [self.tokenizer.eos_token_id] * self.mistakes.get("ends", 1)
        if not self.encoding.append_eos:  # BERT's [SEP]
            end = [ids.pop()]
        room = self.mistakes.get("length", self.encoding.passage_length) - 1 - len(end)
        if self.mistakes.get("cut") == "end":
            return [start, *ids, *end][: room + 1 + len(end)]
        if self.mistakes.get("cut") == "left":
            return [start, *ids[-room:], *end]
        if self.mistakes.get("cut") == "refuse" and len(ids) > room:
            raise ValueError("the text is too long")
        return [start, *ids[:room], *end]

    @torch.no_grad()
    def _embed(self, texts: list[str]) -> list[list[float]]:
        ids = [self._ids(text) for text in texts]
        pooling = pooling_of(replace(self.encoding, pooling=self.mistakes.get("pooling", "last")))
        rows = []
        for one in ids:
            given = torch.tensor([one])
            mask = torch.ones_like(given)
            if self.mistakes.get("padding") and len(ids) > 1:
                missing = max(map(len, ids)) - len(one)
                given = torch.nn.functional.pad(given, (0, missing), value=0)
                mask = torch.ones_like(given)
            row = pooled_states(self.model.backbone, given, mask, pooling, True, True)[0]
            row = row[: self.encoding.dim or None]
            if self.mistakes.get("normalize", True):
                row = torch.nn.functional.normalize(row, dim=0)
            if self.mistakes.get("half"):
                row = row.bfloat16().float()
            rows.append(row.tolist())
        return rows

    @torch.no_grad()
    def _score(self, query: str, passage: str) -> float:
        own, typed = self.encoding, "token_type_ids" in self.tokenizer.model_input_names
        second = 0
        if own.pair == "pair" or self.mistakes.get("template"):
            (pair,) = PairTemplates(self.tokenizer, own).pairs([("", query)], [("", passage)])
            ids, second = pair.ids, pair.second
        else:
            starts = {"add_special_tokens": own.scoring == "head"}  # else they are in the template
            ids = self.tokenizer(query + passage, **starts)["input_ids"]
            suffix = self.tokenizer(own.suffix, add_special_tokens=False)["input_ids"]
            end = [self.tokenizer.eos_token_id] if own.append_eos else []
            after = [*suffix, *end * self.mistakes.get("ends", 1)]
            room = own.query_length + own.passage_length - len(after)
            ids = [*ids[: len(ids) - len(suffix)][:room], *after]
        given = torch.tensor([ids])
        types = (torch.arange(len(ids)) >= second).long()[None] if typed else None
        score = self.model(given, torch.ones_like(given), True, types)[0]
        return float(torch.sigmoid(score) if self.mistakes.get("sigmoid") else score)


def serve(stub: Stub) -> str:
    """Start a server; returns its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            try:
                answer = stub(self.path, json.loads(self.rfile.read(length) or b"{}"))
                self.send_response(200)
            except ValueError as error:
                answer = {"error": str(error)}
                self.send_response(400)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retriever") / "model"
    return make(path, query_length=64, passage_length=64)


@pytest.fixture(scope="module")
def stub(retriever: Path) -> Stub:
    return Stub(retriever)


@pytest.mark.parametrize(
    ("mistakes", "causes"),
    [
        ({}, []),
        ({"prompt": "query: "}, ["prompt"]),
        ({"ends": 0}, ["EOS"]),
        ({"ends": 2}, ["EOS"]),
        ({"pooling": "mean"}, ["pooling"]),
        ({"normalize": False}, ["normalization"]),
        ({"pooling": "cls", "normalize": False}, ["pooling", "normalization"]),
        ({"ends": 0, "pooling": "mean"}, ["EOS", "pooling"]),
        ({"padding": True}, ["padding side"]),
        ({"length": 1000}, ["truncation"]),
        ({"cut": "end"}, ["truncation"]),
        ({"cut": "left"}, ["truncation"]),
        ({"cut": "refuse"}, ["truncation"]),
        ({"half": True}, ["precision"]),
    ],
)
def test_the_mistake_of_a_server_is_named(
    mistakes: dict[str, Any],
    causes: list[str],
    retriever: Path,
    stub: Stub,
) -> None:
    stub.mistakes = mistakes
    findings = check(retriever, Server(stub.url + EMBEDDINGS))
    assert [one.side for one in findings] == ["query", "passage"]
    if mistakes.get("prompt"):  # it is the query's own: only passages are wrong
        assert findings[0].conforms
        assert findings[0].plain
        findings = findings[1:]
    for finding in findings:
        assert list(finding.causes) == causes, finding
        assert finding.explained
        assert finding.conforms == (not causes)
    assert stub.requests[-1]["model"] == "tiny"


@pytest.mark.parametrize("row", [[float("nan")] * 32, None, [[0.1] * 32], "AAAA"])
def test_an_answer_without_numbers_is_refused_also_if_only_a_batch_has_it(
    row: Any, retriever: Path, stub: Stub
) -> None:
    stub.mistakes = {"in_a_batch": row}
    with refused("unknown-answer", "/v1/embeddings"):
        check(retriever, Server(stub.url + EMBEDDINGS))


def test_other_weights_are_not_explained(retriever: Path) -> None:
    torch.manual_seed(1)
    other = Stub(retriever)
    with torch.no_grad():
        for weight in other.model.parameters():
            weight.normal_(std=0.3)
    findings = check(retriever, Server(other.url + EMBEDDINGS))
    assert not any(finding.explained for finding in findings)


def test_short_embeddings_of_a_model_with_learned_positions_are_checked_too(tmp_path: Path) -> None:
    lengths = {"query_length": 80, "passage_length": 80}
    path = make(tmp_path / "model", "mean of an encoder", dim=24, **lengths)
    stub = Stub(path)
    stub.mistakes = {"pooling": "cls"}
    for finding in check(path, Server(stub.url + EMBEDDINGS)):
        assert list(finding.causes) == ["pooling"]


@pytest.mark.parametrize(
    ("case", "url", "mistakes", "causes"),
    [
        ("reranker", "/score", {}, []),
        ("reranker", "/score", {"ends": 0}, ["EOS"]),
        ("reranker", "/rerank", {"sigmoid": True}, ["activation"]),
        ("token", "/v1/rerank", {"form": "TEI"}, []),
        ("token", "/score", {"template": True}, []),
        ("released encoder", "/score", {}, []),
    ],
)
def test_the_scores_of_a_server_are_checked(
    case: str,
    url: str,
    mistakes: dict[str, Any],
    causes: list[str],
    tmp_path: Path,
) -> None:
    lengths = {} if "encoder" in case else {"query_length": 40, "passage_length": 80}
    path = make(tmp_path / "model", case, **lengths)
    stub = Stub(path)
    stub.mistakes = mistakes
    (finding,) = check(path, Server(stub.url + url))
    assert list(finding.causes) == causes, finding
    assert finding.explained
    assert finding.plain == bool(mistakes.get("template"))


def test_the_command_reports_and_exits(retriever: Path, stub: Stub, call: Call) -> None:
    address = stub.url + EMBEDDINGS
    for mistakes, code, said in (
        ({}, 0, "passage: the folder's numbers"),
        ({"pooling": "mean"}, 1, "pooling: mean instead of last"),
    ):
        stub.mistakes = mistakes
        ended, shown, _ = call(main, retriever, address)
        assert (ended, said in shown) == (code, True)
    with refused("server-unreachable", "127.0.0.1:9"):
        check(retriever, Server("http://127.0.0.1:9/v1/embeddings"))
