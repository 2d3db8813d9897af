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
from urllib.parse import urljoin

import numpy as np

from caravan.errors import InputError, answering, first_line, printable, reading
from caravan.export import verify
from caravan.export.mistakes import Causes, Embeddings, Scores
from caravan.models.bidirectional import unwrapped
from caravan.models.positions import positions
from caravan.retrieval.inference import Inference

TIMEOUT_S = 300
HALF = 0.03
"""Largest relative difference that arithmetic in bf16 or float16 explains."""
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


class Server:
    """An endpoint that embeds texts or scores pairs.

    Args:
        model: the name under which it serves the model; None asks it.

    Raises: InputError "server-unreachable", "server-refused", "unknown-answer".
    """

    def __init__(self, url: str, model: str | None = None) -> None:
        self.url, self.model = url, model
        if model is None:
            root = url.rpartition("/v1/")[0] or urljoin(url, "/")
            try:
                self.model = self._answer(f"{root.rstrip('/')}/v1/models")["data"][0]["id"]
            except (InputError, LookupError, TypeError):
                self.model = "model"  # TEI ignores it

    def numbers(self, sent: Sequence[tuple[str, ...]], length: int) -> np.ndarray:
        """Embeddings [N, d] or scores [N] float32.

        Args:
            sent: a tuple for each text, or for each passage with the same query before it.
            length: tokens of the longest text, for servers that truncate by request.
        """
        body: dict[str, Any] = {"model": self.model, "truncate_prompt_tokens": length}
        *query, texts = zip(*sent, strict=True)
        if not query:
            body |= {"input": texts, "encoding_format": "float"}
        else:
            body |= {"use_activation": False, "raw_scores": True, "truncate": True}
            if self.url.endswith("score"):
                body |= {"text_1": query[0][0], "text_2": texts}
            else:  # the passages are documents for vLLM, and texts for TEI
                body |= {"query": query[0][0], "documents": texts, "texts": texts}
        answer = self._answer(self.url, json.dumps(body).encode())
        with reading(self.url, "its answer has no embeddings or scores", "unknown-answer"):
            rows = answer
            if isinstance(answer, dict):
                rows = answer["data"] if "data" in answer else answer["results"]
            keys = ("embedding", "score", "relevance_score")
            found = {row["index"]: next(row[key] for key in keys if key in row) for row in rows}
            numbers = np.array([found[i] for i in range(len(texts))], dtype=np.float32)
        if numbers.ndim != (1 if query else 2) or not np.isfinite(numbers).all():
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
        plain: whether the texts were sent without prompts.
        difference: the largest difference from the folder's numbers, relative to those above 1.
        causes: mistakes that explain the numbers; empty if they are the folder's.
        explained: whether the causes explain all of the difference.
    """

    side: str
    plain: bool
    difference: float
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
    findings = []
    for prompted, plain in zip(_sides(model, False), _sides(model, True), strict=True):
        tried = [_compare(prompted, server, tolerance)]
        if not tried[0].conforms and plain.sent != prompted.sent:
            tried.append(_compare(plain, server, tolerance))
        findings.append(min(tried, key=lambda one: (not one.explained, len(one.causes))))
    return findings


def _sides(model: Inference, plain: bool) -> list[Any]:
    if model.encoding.kind == "reranker":
        return [Scores(model, plain)]
    return [Embeddings(model, side, plain) for side in ("query", "passage")]


def _compare(side: Any, server: Server, tolerance: float) -> Finding:
    answers: dict[int, np.ndarray] = {}
    refusal: Causes = {}
    for row, sent in enumerate(side.sent):
        try:
            answers[row] = server.numbers([sent], side.length)[0]
        except InputError as error:
            if error.code != "server-refused" or not answers:
                raise
            refusal["truncation"] = f"it refuses a text ({error})"
    rows, found = list(answers), np.stack(list(answers.values()))
    together = server.numbers([side.sent[row] for row in rows], side.length)
    finding = _explained(side, rows, found, tolerance)
    finding.causes |= refusal
    apart = _difference(together, found)
    if apart > (tolerance if finding.conforms else HALF):
        text = f"numbers of a text change by {apart:.1e} with the texts beside it"
        finding.causes["padding side"] = text
    return finding


def _explained(side: Any, rows: list[int], found: np.ndarray, tolerance: float) -> Finding:
    """The mistakes, if any, with which the folder gives the server's numbers of some texts."""
    limit = positions(unwrapped(side.model.model.transformer).base_model) or sys.maxsize
    tried: list[tuple[float, Causes]] = []
    seen = []
    for mistake, read in side.readings():
        if read in seen or max(len(pair.ids) for pair in read) > limit:
            continue  # no server can read more tokens than the model has positions
        seen.append(read)
        for more, values in side.values(read):
            if found.shape[1:] != values.shape[1:]:
                raise InputError(
                    "other-dimension",
                    f"the server returns {found.shape[-1]} dimensions and the folder"
                    f" {values.shape[-1]}; it serves another model, or cuts embeddings elsewhere",
                )
            tried.append((_difference(found, values[rows]), {**mistake, **more}))
            if tried[-1][0] <= tolerance:
                return Finding(side.side, side.plain, tried[0][0], tried[-1][1])
    own, best = tried[0][0], min(tried, key=lambda one: one[0])
    if own <= min(HALF, 2 * best[0]):
        best = tried[0]
    if not best[0] <= HALF:
        return Finding(side.side, side.plain, own, {}, explained=False)
    precision = f"bf16 or float16 explains the difference of {best[0]:.1e}"
    return Finding(side.side, side.plain, own, {**best[1], "precision": precision})


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
        server = Server(options.url, options.model)
        findings.extend(check(options.folder, server, options.tolerance))
        for finding in findings:
            sys.stdout.write(printable("\n".join(finding.lines())) + "\n")

    return answering(run) or int(not all(finding.conforms for finding in findings))


if __name__ == "__main__":
    sys.exit(main())
