"""Pairs of query and passage as token ids: what is kept, truncated and refused."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.refusals import refused
from tests.tiny import WORDS
from tokenizers import processors

from caravan.data.pairs import MIN_PASSAGE, Pair, PairTemplates
from caravan.data.tokenization import log_once
from caravan.encoding import Encoding

JOINED = Encoding(
    kind="reranker",
    passage_template="document: {title} {text}",
    query_length=16,
    passage_length=48,
)
LIKELIHOOD = replace(JOINED, scoring="likelihood", append_eos=False)
CHAT = replace(
    JOINED,
    append_eos=False,
    scoring="token",
    prefix="<s>salt:\n",
    query_template="{instruction} query: {text}\ndocument:",
    passage_template="{title} {text}",
    suffix="</s>\nroute:",
    instruction="oasis {trade}",
    positive=" salt",
    negative=" silk",
    query_length=40,
    passage_length=40,
)


def _texts(words: int, seed: int = 0) -> tuple[str, str]:
    return "", " ".join(np.random.default_rng(seed).choice(WORDS, words))


def _pair(tokenizer: Any, encoding: Encoding, query: Any, passage: Any) -> Pair:
    return PairTemplates(tokenizer, encoding).pairs([query], [passage])[0]


def _plain(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _with_special(tokenizer: Any, **processing: str) -> Any:
    """A copy of the tokenizer that adds other special tokens."""
    other = copy.deepcopy(tokenizer)
    known = [("<s>", other.bos_token_id), ("</s>", other.eos_token_id)]
    other.backend_tokenizer.post_processor = processors.TemplateProcessing(
        **processing, special_tokens=known
    )
    return other


def test_joined_ids_are_those_of_the_whole_string_cut_and_then_eos(tokenizer: Any) -> None:
    # the query of twenty words is longer than query_length, and is read whole
    for words, of_query in ((2, 4), (12, 4), (100, 4), (3000, 4), (500, 20)):
        query, passage = _texts(of_query, words), ("Title", _texts(words)[1])
        found = _pair(tokenizer, JOINED, query, passage)
        plain = tokenizer(f"query: {query[1]} document: Title {passage[1]}")["input_ids"]
        assert found.ids == [*plain[: 16 + 48 - 1], tokenizer.eos_token_id]


@pytest.mark.parametrize("form", ["joined", "pair"])
def test_a_query_that_fills_the_input_leaves_the_document_its_least(
    form: str, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    log_once.cache_clear()
    templates = PairTemplates(tokenizer, replace(JOINED, pair=form))
    passage = ("", "oasis " * 200)
    with caplog.at_level(logging.WARNING):
        pairs = templates.pairs([_texts(300), _texts(300, 1)], [passage, passage])
    oasis = _plain(tokenizer, "oasis oasis")[-1]
    for pair in pairs:
        assert len(pair.ids) == 64
        assert sum(token == oasis for token in pair.ids[-MIN_PASSAGE - 1 :]) >= 6
    assert len([record for record in caplog.records if "was truncated" in record.message]) == 1


def test_beside_a_long_query_only_the_beginning_of_a_document_is_tokenised(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, passage = _texts(300), _texts(50_000, 1)
    expected = _pair(tokenizer, JOINED, query, ("", passage[1][:2000]))
    longest, call = [], type(tokenizer).__call__

    def watched(self: Any, texts: Any, *args: Any, **settings: Any) -> Any:
        longest.append(len(texts) if isinstance(texts, str) else max(map(len, texts)))
        return call(self, texts, *args, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    assert _pair(tokenizer, JOINED, query, passage) == expected
    assert max(longest) < 20_000 < len(passage[1])


def test_the_pair_form_is_the_tokenizers_own_with_its_token_types(bert: Any) -> None:
    templates = {"query_template": "{text}", "passage_template": "{title} {text}"}
    encoding = replace(JOINED, pair="pair", append_eos=False, pooling="cls", **templates)
    query, passage = _texts(5), _texts(9, 1)
    found = _pair(bert, encoding, query, passage)
    plain = bert(query[1], passage[1])
    assert found.ids == plain["input_ids"]
    types = [int(i >= found.second) for i in range(len(found.ids))]
    assert types == plain["token_type_ids"]
    long = _pair(bert, encoding, query, _texts(500, 2))
    expected = bert(query[1], _texts(500, 2)[1], truncation="only_second", max_length=64)
    assert long.ids == expected["input_ids"]


def test_the_released_pair_form_has_two_bos_and_no_eos(tokenizer: Any) -> None:
    tokenizer = _with_special(tokenizer, single="<s> $A", pair="<s> $A <s> $B")
    encoding = replace(JOINED, pair="pair", append_eos=False)
    found = _pair(tokenizer, encoding, ("", "salt"), ("", "silk road"))
    assert found.ids == tokenizer("query: salt", "document: silk road")["input_ids"]
    assert found.ids.count(tokenizer.bos_token_id) == 2
    assert tokenizer.eos_token_id not in found.ids
    assert found.second == len(found.ids)  # Llama knows no token types


def test_a_likelihood_reads_the_document_then_the_prompt_then_the_query(tokenizer: Any) -> None:
    (_, query), passage = _texts(4), ("Title", _texts(12, 1)[1])
    found = _pair(tokenizer, LIKELIHOOD, ("", query), passage)
    document = tokenizer(f"document: Title {passage[1]}")["input_ids"]
    assert found.ids == [*document, *_plain(tokenizer, f" query: {query}")]
    assert found.second == len(document) + len(_plain(tokenizer, " query:"))
    assert PairTemplates(tokenizer, LIKELIHOOD).typed


def test_a_query_that_fills_the_length_leaves_a_likelihood_some_of_the_document(
    tokenizer: Any,
) -> None:
    found = _pair(tokenizer, LIKELIHOOD, _texts(500), _texts(500, 1))
    document = tokenizer(f"document: {_texts(500, 1)[1]}")["input_ids"]
    assert found.ids[: 1 + MIN_PASSAGE] == document[: 1 + MIN_PASSAGE]
    assert len(found.ids) == 16 + 48


@pytest.mark.parametrize("template", ["query: {text}", "Question:\n{text}", "{text}"])
def test_what_stands_before_the_query_is_not_scored_and_the_query_is(
    template: str, tokenizer: Any
) -> None:
    encoding = replace(LIKELIHOOD, query_template=template)
    found = _pair(tokenizer, encoding, ("", "camel water"), _texts(4))
    assert tokenizer.decode(found.ids[found.second :]).strip() == "camel water"
    assert tokenizer.decode(found.ids[: found.second]).endswith(template.split("{")[0].rstrip(" "))


def test_the_special_tokens_of_a_tokenizer_are_no_part_of_a_querys_likelihood(
    tokenizer: Any,
) -> None:
    ends = _with_special(tokenizer, single="<s> $A </s>")
    found = _pair(ends, LIKELIHOOD, ("", "camel water"), _texts(4))
    assert ends.eos_token_id not in found.ids
    # a query without anything before it is scored from its first token
    bare = _with_special(tokenizer, single="$A")
    encoding = replace(LIKELIHOOD, query_template="{text}", passage_template="{text}")
    found = _pair(bare, encoding, ("", "camel water"), ("", ""))
    assert found.second == 1
    assert tokenizer.decode(found.ids[1:]).strip() == "camel water"


def test_pairs_without_room_for_text_are_refused(tokenizer: Any) -> None:
    asked = f"{'Write the question that is answered. ' * 3}{{text}}"
    for encoding in (
        replace(JOINED, query_length=10, passage_length=10),
        replace(LIKELIHOOD, query_template=asked),
    ):
        with refused("no-room-for-text", "encoding.query_length"):
            PairTemplates(tokenizer, encoding)
    with refused("query-too-long", "encoding.query_length"):  # for a chat template
        _pair(tokenizer, CHAT, ("", "camel " * 60), ("", "salt " * 20))


def test_a_chat_template_is_read_whole_around_a_truncated_document(tokenizer: Any) -> None:
    prefix, suffix = (_plain(tokenizer, text) for text in (CHAT.prefix, CHAT.suffix))
    for passage in (("Title", "dune"), ("", "silk road " * 60)):
        document = " ".join(filter(None, passage))
        body = f"oasis {{trade}} query: camel {{water}}\ndocument: {document}"
        ids = _plain(tokenizer, body)[: 80 - len(prefix) - len(suffix)]
        found = _pair(tokenizer, CHAT, ("", "camel {water}"), passage)
        assert found.ids == [*prefix, *ids, *suffix]


def test_a_bos_that_the_tokenizer_adds_comes_once(tokenizer: Any) -> None:
    for prefix in ("<s>salt:\n", "salt:\n"):
        found = _pair(tokenizer, replace(CHAT, prefix=prefix), ("", "tent"), ("", "well"))
        assert tokenizer.decode(found.ids).startswith("<s>salt:\n")


def test_a_query_has_its_own_instruction_before_its_document(tokenizer: Any) -> None:
    asked, long = "camel {water}", ("", "silk road " * 60)
    likelihood = replace(LIKELIHOOD, query_template="{instruction} ask: {text}", instruction="gold")
    for encoding in (CHAT, likelihood):
        queries = [("", asked), ("tent {well}", asked)]
        found = PairTemplates(tokenizer, encoding).pairs(queries, [long, long])
        for pair, words in zip(found, (encoding.instruction, "tent {well}"), strict=True):
            alone = _pair(tokenizer, replace(encoding, instruction=words), ("", asked), long)
            assert pair == alone
            text = tokenizer.decode(pair.ids)
            assert words in text
            assert asked in text
            assert len(pair.ids) == encoding.query_length + encoding.passage_length
