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

from caravan.data.pairs import MIN_PASSAGE, PairTemplates
from caravan.encoding import Encoding

JOINED = Encoding(
    kind="reranker",
    passage_template="document: {title} {text}",
    query_length=16,
    passage_length=48,
)


def _texts(words: int, seed: int = 0) -> tuple[str, str]:
    return "", " ".join(np.random.default_rng(seed).choice(WORDS, words))


def test_joined_ids_are_those_of_the_whole_string_cut_and_then_eos(tokenizer: Any) -> None:
    templates = PairTemplates(tokenizer, JOINED)
    for words in (2, 12, 100, 3000):
        query, passage = _texts(4, words), ("Title", _texts(words)[1])
        (found,) = templates.pairs([query], [passage])
        whole = f"query: {query[1]} document: Title {passage[1]}"
        plain = tokenizer(whole)["input_ids"]
        assert found.ids == [*plain[: 16 + 48 - 1], tokenizer.eos_token_id]


def test_the_document_gives_way_and_never_the_query_nor_eos(tokenizer: Any) -> None:
    templates = PairTemplates(tokenizer, JOINED)
    query = _texts(20)  # more than query_length alone would hold
    (found,) = templates.pairs([query], [_texts(500, 1)])
    start = tokenizer(f"query: {query[1]}")["input_ids"]
    assert len(found.ids) == 64
    assert found.ids[: len(start)] == start
    assert found.ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("form", ["joined", "pair"])
def test_a_query_that_fills_the_input_leaves_the_document_its_least(
    form: str, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    templates = PairTemplates(tokenizer, replace(JOINED, pair=form))
    passage = ("", "oasis " * 200)
    with caplog.at_level(logging.WARNING):
        pairs = templates.pairs([_texts(300), _texts(300, 1)], [passage, passage])
    oasis = tokenizer("oasis oasis", add_special_tokens=False)["input_ids"][-1]
    for pair in pairs:
        assert len(pair.ids) == 64
        assert sum(token == oasis for token in pair.ids[-MIN_PASSAGE - 1 :]) >= 6
    assert len([record for record in caplog.records if "was truncated" in record.message]) == 1


def test_beside_a_long_query_only_the_beginning_of_a_document_is_tokenised(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = PairTemplates(tokenizer, JOINED)
    query, passage = _texts(300), _texts(50_000, 1)
    (expected,) = templates.pairs([query], [("", passage[1][:2000])])
    longest, call = [], type(tokenizer).__call__

    def watched(self: Any, texts: Any, *args: Any, **settings: Any) -> Any:
        longest.append(len(texts) if isinstance(texts, str) else max(map(len, texts)))
        return call(self, texts, *args, **settings)

    monkeypatch.setattr(type(tokenizer), "__call__", watched)
    (found,) = templates.pairs([query], [passage])
    assert found == expected
    assert max(longest) < 20_000 < len(passage[1])
    assert templates.cut == 2


def test_the_pair_form_is_the_tokenizers_own_with_its_token_types(bert: Any) -> None:
    encoding = replace(
        JOINED,
        pair="pair",
        append_eos=False,
        pooling="cls",
        query_template="{text}",
        passage_template="{title} {text}",
    )
    query, passage = _texts(5), _texts(9, 1)
    (found,) = PairTemplates(bert, encoding).pairs([query], [passage])
    plain = bert(query[1], passage[1])
    assert found.ids == plain["input_ids"]
    types = [int(i >= found.second) for i in range(len(found.ids))]
    assert types == plain["token_type_ids"]
    (long,) = PairTemplates(bert, encoding).pairs([query], [_texts(500, 2)])
    expected = bert(query[1], _texts(500, 2)[1], truncation="only_second", max_length=64)
    assert long.ids == expected["input_ids"]


def test_the_released_pair_form_has_two_bos_and_no_eos(tokenizer: Any) -> None:
    from tokenizers import processors

    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    encoding = replace(JOINED, pair="pair", append_eos=False)
    (found,) = PairTemplates(tokenizer, encoding).pairs([("", "salt")], [("", "silk road")])
    assert found.ids == tokenizer("query: salt", "document: silk road")["input_ids"]
    assert found.ids.count(tokenizer.bos_token_id) == 2
    assert tokenizer.eos_token_id not in found.ids
    assert found.second == len(found.ids)  # Llama knows no token types


LIKELIHOOD = replace(JOINED, scoring="likelihood", append_eos=False)


def test_a_likelihood_reads_the_document_then_the_prompt_then_the_query(tokenizer: Any) -> None:
    templates = PairTemplates(tokenizer, LIKELIHOOD)
    (_, query), passage = _texts(4), ("Title", _texts(12, 1)[1])
    (found,) = templates.pairs([("", query)], [passage])
    document = tokenizer(f"document: Title {passage[1]}")["input_ids"]
    prompt = tokenizer(" query:", add_special_tokens=False)["input_ids"]
    asked = tokenizer(f" query: {query}", add_special_tokens=False)["input_ids"]
    assert found.ids == [*document, *asked]
    assert found.second == len(document) + len(prompt)
    assert templates.typed


def test_a_query_that_fills_the_length_leaves_a_likelihood_some_of_the_document(
    tokenizer: Any,
) -> None:
    templates = PairTemplates(tokenizer, LIKELIHOOD)
    (found,) = templates.pairs([_texts(500)], [_texts(500, 1)])
    document = tokenizer(f"document: {_texts(500, 1)[1]}")["input_ids"]
    assert found.ids[: 1 + MIN_PASSAGE] == document[: 1 + MIN_PASSAGE]
    assert len(found.ids) == 16 + 48
    assert templates.cut == 1


@pytest.mark.parametrize("template", ["query: {text}", "Question:\n{text}", "{text}"])
def test_what_stands_before_the_query_is_not_scored_and_the_query_is(
    template: str, tokenizer: Any
) -> None:
    templates = PairTemplates(tokenizer, replace(LIKELIHOOD, query_template=template))
    (found,) = templates.pairs([("", "camel water")], [_texts(4)])
    assert tokenizer.decode(found.ids[found.second :]).strip() == "camel water"
    assert tokenizer.decode(found.ids[: found.second]).endswith(template.split("{")[0].rstrip(" "))


def test_an_eos_that_the_tokenizer_adds_is_no_part_of_a_querys_likelihood(tokenizer: Any) -> None:
    from tokenizers import processors

    ends = copy.deepcopy(tokenizer)
    ends.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        special_tokens=[("<s>", ends.bos_token_id), ("</s>", ends.eos_token_id)],
    )
    (found,) = PairTemplates(ends, LIKELIHOOD).pairs([("", "camel water")], [_texts(4)])
    assert ends.eos_token_id not in found.ids


def test_a_query_that_nothing_stands_before_is_scored_from_its_first_token(tokenizer: Any) -> None:
    from tokenizers import processors

    bare = copy.deepcopy(tokenizer)
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    encoding = replace(LIKELIHOOD, query_template="{text}", passage_template="{text}")
    (found,) = PairTemplates(bare, encoding).pairs([("", "camel water")], [("", "")])
    assert found.second == 1
    assert tokenizer.decode(found.ids[1:]).strip() == "camel water"


@pytest.mark.parametrize(
    "encoding",
    [
        replace(JOINED, query_length=10, passage_length=10),
        replace(
            LIKELIHOOD, query_template=f"{'Write the question that is answered. ' * 3}{{text}}"
        ),
    ],
)
def test_pairs_without_room_for_text_are_refused(tokenizer: Any, encoding: Encoding) -> None:
    with refused("no-room-for-text", "encoding.query_length"):
        PairTemplates(tokenizer, encoding)


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


def test_a_chat_template_is_read_whole_around_a_truncated_document(tokenizer: Any) -> None:
    templates = PairTemplates(tokenizer, CHAT)
    query, passages = ("", "camel {water}"), [("Title", "dune"), ("", "silk road " * 60)]
    for passage, pair in zip(passages, templates.pairs([query] * 2, passages), strict=True):
        document = " ".join(filter(None, passage))
        body = f"oasis {{trade}} query: camel {{water}}\ndocument: {document}"
        parts = [
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (CHAT.prefix, body, CHAT.suffix)
        ]
        parts[1] = parts[1][: 80 - len(parts[0]) - len(parts[2])]
        assert pair.ids == [token for part in parts for token in part]


def test_a_query_that_leaves_a_chat_template_no_room_for_the_document_is_refused(
    tokenizer: Any,
) -> None:
    templates = PairTemplates(tokenizer, CHAT)
    with refused("query-too-long", "encoding.query_length"):
        templates.pairs([("", "camel " * 60)], [("", "salt " * 20)])


def test_a_bos_that_the_tokenizer_adds_comes_once(tokenizer: Any) -> None:
    for prefix in ("<s>salt:\n", "salt:\n"):
        templates = PairTemplates(tokenizer, replace(CHAT, prefix=prefix))
        (pair,) = templates.pairs([("", "tent")], [("", "well")])
        assert tokenizer.decode(pair.ids).startswith("<s>salt:\n")


def test_a_query_has_its_own_instruction_before_its_document(tokenizer: Any) -> None:
    asked, long = "camel {water}", ("", "silk road " * 60)
    likelihood = replace(LIKELIHOOD, query_template="{instruction} ask: {text}", instruction="gold")
    for encoding in (CHAT, likelihood):
        found = PairTemplates(tokenizer, encoding).pairs(
            [("", asked), ("tent {well}", asked)], [long, long]
        )
        other = PairTemplates(tokenizer, replace(encoding, instruction="tent {well}"))
        assert found[0] == PairTemplates(tokenizer, encoding).pairs([("", asked)], [long])[0]
        assert found[1] == other.pairs([("", asked)], [long])[0]
        for pair, words in zip(found, (encoding.instruction, "tent {well}"), strict=True):
            text = tokenizer.decode(pair.ids)
            assert words in text
            assert asked in text
            assert len(pair.ids) == encoding.query_length + encoding.passage_length
