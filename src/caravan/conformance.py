"""Check whether a server returns a model folder's numbers and, if it does not, why.

    python -m caravan.conformance runs/mine/model http://localhost:8000/v1/embeddings

The folder's test texts are sent one by one and together, with the folder's prompts: to an
OpenAI-compatible /v1/embeddings (vLLM, TEI), or the pairs of a reranker to /score or /rerank (vLLM,
TEI). If the answers differ, texts without prompts are sent too, for a server that adds them. The
numbers are compared with those that the folder gives with a mistake in prompts, special tokens,
truncation, pooling, normalization or activation. The exit code is 0 if they are the folder's,
1 if not.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from caravan.encoding import read_encoding
from caravan.errors import InputError, answering, first_line, printable, reading
from caravan.export import verify
from caravan.export.mistakes import Causes, Embeddings, Scores, Text, fits
from caravan.retrieval.inference import Inference

TIMEOUT_S = 300
HALF = 0.03
"""Largest relative difference that arithmetic in bf16 or float16 explains."""
DEFAULT_PATH = {"retriever": "/v1/embeddings", "reranker": "/score"}
REMEDIES = {
    "prompt": "change its prompts, or send texts as the model card does",
    "EOS": "serve the export, whose tokenizer adds the tokens at the end",
    "special tokens": "serve the export, whose tokenizer adds them",
    "truncation": "set its maximum length to the folder's",
    "pooling": "serve the export, whose files name the pooling",
    "normalization": "set it in the server or in the request",
    "activation": "ask for raw scores; the order is the same",
    "padding side": "send one text at a time, or use another server",
    "precision": "serve in float32, or accept the difference with --tolerance",
}


@dataclass
class Server:
    """An endpoint that embeds texts or scores pairs.

    Args:
        model: the name under which it serves the model; None asks it.

    Raises: InputError "server-unreachable", "server-refused", "unknown-answer".
    """

    url: str
    model: str | None = None

    def __post_init__(self) -> None:
        if self.model is None:
            models = self.url.partition("/v1/")[0].rstrip("/") + "/v1/models"
            if "/v1/" not in self.url:
                models = "{0.scheme}://{0.netloc}/v1/models".format(urlsplit(self.url))
            try:
                self.model = self._answer(models)["data"][0]["id"]
            except (InputError, LookupError, TypeError):
                self.model = "model"  # TEI ignores it

    def numbers(self, texts: Sequence[Text], length: int) -> np.ndarray:
        """Embeddings [N, d] or scores [N] float32 of texts, or of pairs with one query.

        Args:
            length: tokens of the longest text, for servers that truncate by request.
        """
        body: dict[str, Any] = {"model": self.model, "truncate_prompt_tokens": length}
        if len(texts[0].sent) == 1:
            body |= {"input": [text.sent[0] for text in texts], "encoding_format": "float"}
        else:
            query, passages = texts[0].sent[0], [text.sent[1] for text in texts]
            body |= {"use_activation": False, "raw_scores": True, "truncate": True}
            if self.url.endswith("score"):
                body |= {"text_1": query, "text_2": passages}
            else:  # the passages are documents for vLLM, and texts for TEI
                body |= {"query": query, "documents": passages, "texts": passages}
        answer = self._answer(self.url, json.dumps(body).encode())
        with reading(self.url, "its answer has no embeddings or scores", "unknown-answer"):
            rows = answer
            if isinstance(answer, dict):
                rows = answer["data"] if "data" in answer else answer["results"]
            keys = ("embedding", "score", "relevance_score")
            found = {row["index"]: next(row[key] for key in keys if key in row) for row in rows}
            numbers = np.array([found[i] for i in range(len(texts))], dtype=np.float32)
        if numbers.ndim != 3 - len(texts[0].sent) or not np.isfinite(numbers).all():
            raise InputError(
                "unknown-answer",
                f"{self.url}: its answer for {len(texts)} texts has null, NaN or infinite values,"
                " or not one embedding or score for each; serve the model in float32",
            )
        return numbers

    @staticmethod
    def _answer(url: str, data: bytes | None = None) -> Any:
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace").strip() or error.reason
            raise InputError("server-refused", f"{url} answers {error.code}: {said}") from None
        except (OSError, ValueError) as error:
            text = f"{url} gives no JSON ({first_line(error)}); start the server, or change the URL"
            raise InputError("server-unreachable", text) from None


@dataclass
class Finding:
    """What a server returns for the texts of one side.

    Attributes:
        side: "query", "passage" or "pair".
        difference: the largest difference from the folder's numbers, relative to those above 1.
        plain: whether the texts were sent without prompts.
        causes: mistakes that explain the numbers; empty if they are the folder's.
        explained: whether the causes explain all of the difference.
    """

    side: str
    difference: float
    plain: bool
    causes: Causes
    explained: bool = True

    @property
    def conforms(self) -> bool:
        return self.explained and not self.causes

    def lines(self) -> list[str]:
        """The finding in words."""
        result = "the folder's numbers" if self.conforms else "other numbers than the folder's"
        found = [f"{self.side}: {result} (largest difference {self.difference:.1e})"]
        if self.conforms and self.plain:
            found.append("  the server adds the prompts itself: send texts without them")
        for kind, text in self.causes.items():
            found.append(f"  {kind}: {text}; {REMEDIES[kind]}")
        if not self.explained:
            found.append("  no known mistake explains the difference: it may serve other weights")
        return found


def check(folder: Path, server: Server, tolerance: float = verify.TOLERANCE) -> list[Finding]:
    """Compare a server with a model folder; returns a finding for each side.

    Args:
        tolerance: the largest relative difference of equal numbers.

    Raises:
        InputError: If the folder cannot be loaded, or the server does not answer.
    """
    model = Inference(folder, precision="float32")
    scoring: list[Any] = []
    if model.encoding.kind == "reranker":
        scoring = [Scores(model)]
    sides = scoring or [Embeddings(model, side) for side in ("query", "passage")]
    findings = []
    for side in sides:
        tried = [_compare(side, server, False, tolerance)]
        if not tried[0].conforms and side.texts(True) != side.texts(False):
            tried.append(_compare(side, server, True, tolerance))
        findings.append(min(tried, key=lambda one: (not one.explained, len(one.causes))))
    return findings


def _compare(side: Any, server: Server, plain: bool, tolerance: float) -> Finding:
    texts = side.texts(plain)
    alone, causes = [server.numbers(texts[:1], side.length)], {}
    for text in texts[1:]:
        try:
            alone.append(server.numbers([text], side.length))
        except InputError as error:
            if error.code != "server-refused":
                raise
            texts = [one for one in texts if one is not text]
            causes["truncation"] = f"it refuses a text ({error})"
    found = np.concatenate(alone)
    together = server.numbers(texts, side.length)
    finding = _explained(side, texts, found, plain, tolerance)
    finding.causes |= causes
    apart = _difference(together, found)
    if apart > (tolerance if finding.conforms else HALF):
        text = f"numbers of a text change by {apart:.1e} with the texts beside it"
        finding.causes["padding side"] = text
    return finding


def _explained(
    side: Any, texts: list[Text], found: np.ndarray, plain: bool, tolerance: float
) -> Finding:
    """The mistakes, if any, with which the folder gives the server's numbers."""
    best: tuple[float, Causes] = (np.inf, {})
    own, seen = np.inf, []
    for mistake, read in side.readings(texts, plain):
        if read in seen or not fits(side.model, read):
            continue
        seen.append(read)
        for more, values in side.values(read):
            if found.shape != values.shape:
                raise InputError(
                    "other-dimension",
                    f"the server returns {found.shape[-1]} dimensions and the folder"
                    f" {values.shape[-1]}; it serves another model, or cuts embeddings elsewhere",
                )
            difference = _difference(found, values)
            own = min(own, difference) if not mistake and not more else own
            if difference <= tolerance:
                return Finding(side.side, own, plain, {**mistake, **more})
            best = min(best, (difference, {**mistake, **more}), key=lambda one: one[0])
    if own <= min(HALF, 2 * best[0]):
        best = (own, {})
    if best[0] <= HALF:
        precision = {"precision": f"bf16 or float16 explains the difference of {best[0]:.1e}"}
        return Finding(side.side, own, plain, {**best[1], **precision})
    return Finding(side.side, own, plain, {}, explained=False)


def _difference(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max()) / max(float(np.abs(expected).max()), 1.0)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m caravan.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a model folder, such as runs/mine/model")
    parser.add_argument("url", help="of the endpoint, such as http://localhost:8000/v1/embeddings")
    parser.add_argument("--model", help="its name in the server; default: the first of /v1/models")
    parser.add_argument(
        "--tolerance", type=float, default=verify.TOLERANCE, help="default: %(default)s, relative"
    )
    options = parser.parse_args()
    findings: list[Finding] = []

    def run() -> None:
        url = options.url.rstrip("/")
        if urlsplit(url).path in ("", "/v1"):
            kind = read_encoding(options.folder)[0].kind
            url = url.removesuffix("/v1") + DEFAULT_PATH[kind]
        server = Server(url, options.model)
        findings.extend(check(options.folder, server, options.tolerance))
        for finding in findings:
            sys.stdout.write(printable("\n".join(finding.lines())) + "\n")

    return answering(run) or int(not all(finding.conforms for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
