from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from caravan.contract import Contract
from caravan.data.templates import Template, Templates, special_tokens
from caravan.errors import InputError

LONG = "camel caravan desert dune " * 50


def test_eos_is_never_cut_off(tokenizer: Any, contract: Contract) -> None:
    for ids in Templates(tokenizer, contract).passages([("", LONG), ("Title", "camel")]):
        assert ids[-1] == tokenizer.eos_token_id
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1


def test_lengths_count_prompt_and_special_tokens(tokenizer: Any, contract: Contract) -> None:
    templates = Templates(tokenizer, contract)
    assert len(templates.passages([("", LONG)])[0]) == contract.passage_length
    assert len(templates.queries([("", LONG)])[0]) == contract.query_length


def test_ids_are_those_of_encoding_to_one_less_and_appending_eos(
    tokenizer: Any, contract: Contract
) -> None:
    ids = Templates(tokenizer, contract).passages([("Title", LONG)])[0]
    plain = tokenizer(
        f"passage: Title {LONG}", truncation=True, max_length=contract.passage_length - 1
    )["input_ids"]
    assert ids == [*plain, tokenizer.eos_token_id]


def test_what_follows_the_text_in_a_template_is_never_truncated(
    tokenizer: Any, contract: Contract
) -> None:
    adapted = replace(contract, passage_template="{text} The original sentence: ")
    ids = Templates(tokenizer, adapted).passages([("", LONG)])[0]
    suffix = tokenizer(" The original sentence: ", add_special_tokens=False)["input_ids"]
    assert ids[-1 - len(suffix) : -1] == suffix
    assert len(ids) == contract.passage_length


def test_an_empty_title_leaves_no_double_space() -> None:
    template = Template("passage: {title} {text}")
    assert template.render("", "text") == "passage: text"
    assert template.render("title", "text") == "passage: title text"


def test_braces_in_a_text_are_text() -> None:
    assert Template("passage: {title} {text}").render("{text}", "{x}") == "passage: {text} {x}"


def test_an_eos_that_the_tokenizer_lacks_is_refused(tokenizer: Any, contract: Contract) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="append_eos=false"):
        Templates(bare, contract)


def test_a_length_without_room_for_text_is_refused(tokenizer: Any, contract: Contract) -> None:
    suffixed = replace(contract, query_length=4, query_template="{text} camel caravan desert dune")
    with pytest.raises(InputError, match=r"contract\.query_length=4"):
        Templates(tokenizer, suffixed).queries([("", "x")])


def test_special_tokens_of_a_bert_tokenizer_surround_the_text() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4}
    bert = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    bert.pre_tokenizer = pre_tokenizers.Whitespace()
    bert.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bert, pad_token="[PAD]")
    assert special_tokens(tokenizer) == ([2], [3])
    contract = Contract(append_eos=False, query_template="{text}", query_length=4)
    assert Templates(tokenizer, contract).queries([("", "a a a a a")]) == [[2, 4, 4, 3]]
