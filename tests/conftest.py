"""Fixtures: a tiny collection and a tiny model, without network or downloaded weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.commands import evaluate, train
from tests.tiny import WORDS, tiny_backbone, write_beir, write_counterarguments
from tests.two_ranks import TwoRanks

from caravan.data.collection import Collection
from caravan.data.readers.labelled import Beir
from caravan.encoding import Encoding
from caravan.models.biencoder import BiEncoder
from caravan.models.tiny_llama import train_bpe

Call = Callable[..., tuple[int, str, str]]
"""A program's `main` with arguments: its exit code, output and errors."""


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    def run(main: Callable[[], int], *arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", [main.__module__, *map(str, arguments)])
        try:
            code = main()
        except SystemExit as ended:  # of argparse
            code = int(ended.code or 0)
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tests run side by side, one a core


@pytest.fixture(scope="session")
def _pair() -> Iterator[list[TwoRanks]]:
    started: list[TwoRanks] = []
    yield started
    for pair in started:
        pair.close()


@pytest.fixture
def two_ranks(_pair: list[TwoRanks]) -> TwoRanks:
    """Two processes, started for the first test that needs them, and shared."""
    if not _pair or not _pair[-1].alive:
        _pair.append(TwoRanks())
    return _pair[-1]


@pytest.fixture(scope="session")
def beir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_beir(tmp_path_factory.mktemp("beir") / "tiny")


@pytest.fixture(scope="session")
def collection(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return Beir(str(beir)).collection(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of several collections."""
    home = tmp_path_factory.mktemp("suite")
    for seed, name in enumerate(("one", "two", "forums/x", "forums/y")):
        write_beir(home / name, seed=seed)
    return home


@pytest.fixture(scope="session")
def bm25_runs(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """BM25's run over the queries of each split, of 12 passages a query at most."""
    home = tmp_path_factory.mktemp("bm25")
    found = {}
    for split in ("train", "dev", "test"):
        given = (f"data.split={split}", "index.k=12", "measures=[R@5]")
        found[split] = home / split / evaluate(beir, home / split, "bm25", *given)["run"]
    return found


@pytest.fixture
def counterarguments(tmp_path: Path) -> Path:
    return write_counterarguments(tmp_path / "counter")


@pytest.fixture(scope="session")
def folders(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Model folders of an untrained retriever and of a reranker by likelihood."""
    to = tmp_path_factory.mktemp("folders")
    train(beir, to / "retriever", "trainer.max_steps=0")
    likelihood = ("stage=reranker_likelihood", "trainer.max_steps=0", "validation.run=null")
    train(beir, to / "reranker", *likelihood)
    return {name: str(to / name / "model") for name in ("retriever", "reranker")}


@pytest.fixture(scope="session")
def instructed(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a retriever, trained with an instruction, that has those of "one" too."""
    to = tmp_path_factory.mktemp("instructed")
    train(
        *(beir, to / "run", "trainer.max_steps=4", "encoding.query_length=24"),
        "encoding.query_template='{instruction} query: {text}'",
        *("encoding.instruction=camel", "encoding.instructions={one: salt road}"),
    )
    return to / "run" / "model"


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    def texts() -> Iterator[str]:
        yield from [" ".join(WORDS), "query: passage: Title"] * 20

    return PreTrainedTokenizerFast(
        tokenizer_object=train_bpe(texts(), 400),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )


@pytest.fixture(scope="session")
def encoding() -> Encoding:
    return Encoding(query_length=16, passage_length=24)


@pytest.fixture
def encoder(tokenizer: Any, encoding: Encoding) -> BiEncoder:
    torch.manual_seed(0)
    return BiEncoder(tiny_backbone().model(tokenizer), encoding).eval()
