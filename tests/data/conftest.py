"""Fixtures: ir_datasets as an independent reader, and a tokenizer in the form of BERT."""

from __future__ import annotations

import os
from typing import Any

import pytest
from tests.tiny import WORDS


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
