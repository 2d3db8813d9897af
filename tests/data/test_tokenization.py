from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.refusals import refused

from caravan.data import tokenization as module
from caravan.data.tokenization import Template, Templates, special_tokens
from caravan.encoding import Encoding

LONG = "camel caravan desert dune " * 50


def test_ids_are_those_of_encoding_to_one_less_and_appending_eos(
    tokenizer: Any, encoding: Encoding
) -> None:
    templates, eos = Templates(tokenizer, encoding), tokenizer.eos_token_id
    texts = [("Title", LONG), ("", LONG), ("Title", "camel")]
    for (title, text), ids in zip(texts, templates.passages(texts), strict=True):
        whole = " ".join(filter(None, ("passage:", title, text)))
        most = encoding.passage_length - 1
        assert ids == [*tokenizer(whole, truncation=True, max_length=most)["input_ids"], eos]
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(eos) == 1
    (query,) = templates.queries([("", LONG)])
    assert (len(query), query[-1]) == (encoding.query_length, eos)


def test_what_follows_the_text_in_a_template_is_never_truncated(
    tokenizer: Any, encoding: Encoding
) -> None:
    adapted = replace(encoding, passage_template="{text} The original sentence: ")
    ids = Templates(tokenizer, adapted).passages([("", LONG)])[0]
    suffix = tokenizer(" The original sentence: ", add_special_tokens=False)["input_ids"]
    assert ids[-1 - len(suffix) : -1] == suffix
    assert len(ids) == encoding.passage_length


@pytest.mark.parametrize(
    ("template", "title", "text", "whole"),
    [
        ("passage: {title} {text}", "", "salt", "passage: salt"),
        ("passage: {title} {text}", "Salt", "salt", "passage: Salt salt"),
        ("passage: {title} {text}", "{text}", "{x}", "passage: {text} {x}"),
        ("{{title}} {{{title} {text}", "", "camels", "{title} {camels"),
        ("{{title}} {{{title} {text}", "Salt", "camels", "{title} {Salt camels"),
    ],
)
def test_only_fields_are_replaced_and_an_empty_title_leaves_no_space(
    template: str, title: str, text: str, whole: str
) -> None:
    assert Template(template).render(title, text) == whole


@pytest.mark.parametrize(
    ("template", "named"),
    [
        *(("{title} {text:%d}", ""), ("{title} {text!x}", ""), ("{title} {text:>9}", "")),
        *((f"{field} {{text}}", f"{field} is unknown") for field in ("{titel}", "{}", "{text.x}")),
    ],
)
def test_a_field_that_is_unknown_or_has_a_format_is_refused(template: str, named: str) -> None:
    with refused("invalid-encoding", "encoding.passage_template", named):
        Encoding(passage_template=template)


def test_an_eos_that_the_tokenizer_lacks_is_refused(tokenizer: Any, encoding: Encoding) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with refused("missing-eos", "encoding.append_eos"):
        Templates(bare, encoding)


@pytest.mark.parametrize("side", ["query", "passage"])
def test_a_length_without_room_for_text_is_refused(
    side: str, tokenizer: Any, encoding: Encoding
) -> None:
    template = "{text} camel caravan desert dune"
    settings: dict[str, Any] = {f"{side}_length": 4, f"{side}_template": template}
    with refused("no-room-for-text", f"encoding.{side}_length"):
        Templates(tokenizer, replace(encoding, **settings))


TEXTS = {
    "words": "camel caravan desert dune \N{BACTRIAN CAMEL} " * 500,
    "a long word": "x" * 5000 + " camel" * 100,
    "long words": " ".join("abcdefghij" * 30 for _ in range(50)),
    "runs of spaces": "camel" + " " * 3000 + "dune " * 1000,
    "spaces only": " " * 9000,
    "lines": "camel,\n\n\tdune;\r\n" * 800,
    "no spaces": "\N{CJK UNIFIED IDEOGRAPH-6C99}\N{CJK UNIFIED IDEOGRAPH-6F20}" * 3000,
    "accents": "ca\N{COMBINING ACUTE ACCENT}mel \N{LATIN SMALL LETTER E WITH ACUTE}t\u00a0é " * 900,
    "few tokens": "camel caravan" * 2000 + " caravan" * 20,
}


@pytest.mark.parametrize("kind", TEXTS)
def test_long_texts_give_the_ids_that_whole_texts_give(
    kind: str, tokenizer: Any, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    texts = [("", TEXTS[kind]), ("Title", TEXTS[kind][3:])]
    texts += [("", TEXTS[kind][int(start) :]) for start in rng.integers(0, 700, 20)]
    found = Templates(tokenizer, encoding).passages(texts)
    monkeypatch.setattr(module, "beginning", lambda text, room, start=0: text)
    assert found == Templates(tokenizer, encoding).passages(texts)


def test_only_the_beginning_of_a_long_text_is_tokenised(
    tokenizer: Any, encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates, sizes = Templates(tokenizer, encoding), []

    def ids(_: Any, texts: list[str]) -> list[list[int]]:
        sizes.extend(map(len, texts))
        return [[5] * 99] * len(texts)

    monkeypatch.setattr(module, "plain_ids", ids)
    templates.passages([("", "camel caravan " * 30_000)])
    assert max(sizes) < 16 * (encoding.passage_length + 17)


def test_special_tokens_of_a_bert_tokenizer_surround_the_text(bert: Any) -> None:
    assert special_tokens(bert) == ([2], [], [3])
    encoding = Encoding(append_eos=False, query_template="{text}", query_length=4)
    assert Templates(bert, encoding).queries([("", "a a a a a")]) == [[2, 4, 4, 3]]


@pytest.mark.parametrize("template", ["{instruction} query: {text}", "{text} {instruction}:"])
def test_a_query_has_its_own_instruction_which_is_never_truncated(
    template: str, tokenizer: Any, encoding: Encoding
) -> None:
    own = replace(encoding, query_template=template, instruction="salt")
    found = Templates(tokenizer, own).queries(
        [("", LONG), ("camel {water}", LONG), ("", "dune"), ("camel {water}", "dune")]
    )
    other = replace(own, instruction="camel {water}")
    assert found[::2] == Templates(tokenizer, own).queries([("", LONG), ("", "dune")])
    assert found[1::2] == Templates(tokenizer, other).queries([("", LONG), ("", "dune")])
    for ids, words in zip(found[:2], ("salt", "camel {water}"), strict=True):
        assert len(ids) == encoding.query_length
        assert words in tokenizer.decode(ids)
        assert ids[-1] == tokenizer.eos_token_id


def test_only_the_instruction_of_a_template_is_replaced(tokenizer: Any, encoding: Encoding) -> None:
    own = replace(
        encoding,
        query_template="{{instruction}} {{{instruction}}}: {text}",
        instruction="{instruction} or {text}",
        query_length=64,
    )
    found = Templates(tokenizer, own).queries([("", "{instruction}"), ("{title}", "{text}")])
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
    assert texts == [
        "{instruction} {{instruction} or {text}}: {instruction}",
        "{instruction} {{title}}: {text}",
    ]
    escaped = Encoding(query_template="{{instruction}} {text}")
    assert not escaped.uses_instruction
    assert Template(escaped.template("query")).render("", "salt") == "{instruction} salt"


def test_an_instruction_that_leaves_no_room_for_the_query_is_refused(
    tokenizer: Any, encoding: Encoding
) -> None:
    own = replace(encoding, query_template="{instruction} {text}", instruction="camel water " * 9)
    with refused("no-room-for-text", "encoding.query_length=16"):
        Templates(tokenizer, own)
    short = Templates(tokenizer, replace(own, instruction="salt"))
    with refused("no-room-for-text", "encoding.query_length=16"):
        short.queries([("camel water " * 9, "dune")])


def test_instructions_of_queries_that_no_template_uses_are_reported_once(
    tokenizer: Any, encoding: Encoding, caplog: pytest.LogCaptureFixture
) -> None:
    module.log_once.cache_clear()
    templates = Templates(tokenizer, encoding)
    plain = templates.queries([("", "dune")])
    assert templates.queries([("salt", "dune")]) == templates.queries([("silk", "dune")]) == plain
    assert caplog.text.count("{instruction}") == 1
