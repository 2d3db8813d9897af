"""Fixtures: a collection of ids, training groups, ir_datasets, and a tokenizer as BERT's."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.tiny import WORDS

from caravan.data.batching import Groups
from caravan.data.collection import Collection, write_collection
from caravan.data.negatives import Negatives
from caravan.data.runs import Run, read_run
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding

Read = Callable[..., Run]


@pytest.fixture(scope="session")
def names(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Passages p0 to p59, whose rows are shuffled, some with longer ids; queries q0 to q7."""
    numbers = np.random.default_rng(5).permutation(60)
    passages = [(f"p{i}" if i % 4 else f"é€{i}", "", "text") for i in numbers]
    queries = [(f"q{i}", "", "text") for i in range(8)]
    folder = tmp_path_factory.mktemp("names") / "names"
    return write_collection(folder, "names", passages, queries, {})


@pytest.fixture
def read(names: Collection, tmp_path: Path) -> Read:
    """Reads a run file of `names`, written with the content if there is one."""

    def of(content: str | bytes | None = None, depth: int | None = None) -> Run:
        path = tmp_path / "x.trec"
        if content is not None:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return read_run(path, names.queries, names.corpus, depth)

    return of


@pytest.fixture
def groups(collection: Collection, tokenizer: Any, encoding: Encoding) -> Groups:
    """The training queries of the tiny collection, each with two random negatives."""
    qrels, negatives = collection.qrels("train"), Negatives(number=2)
    found = Groups(collection, qrels, negatives, Templates(tokenizer, encoding), 128, seed=0)
    found.open()
    return found


@pytest.fixture(scope="session")
def irds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ["IR_DATASETS_HOME"] = str(tmp_path_factory.mktemp("ir_datasets"))
    return pytest.importorskip("ir_datasets")


@pytest.fixture
def bert() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
