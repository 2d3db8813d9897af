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


def test_eos_is_never_cut_off(tokenizer: Any, encoding: Encoding) -> None:
    for ids in Templates(tokenizer, encoding).passages([("", LONG), ("Title", "camel")]):
        assert ids[-1] == tokenizer.eos_token_id
        assert ids[0] == tokenizer.bos_token_id
        assert ids.count(tokenizer.eos_token_id) == 1


def test_lengths_count_prompt_and_special_tokens(tokenizer: Any, encoding: Encoding) -> None:
    templates = Templates(tokenizer, encoding)
    assert len(templates.passages([("", LONG)])[0]) == encoding.passage_length
    assert len(templates.queries([("", LONG)])[0]) == encoding.query_length


def test_ids_are_those_of_encoding_to_one_less_and_appending_eos(
    tokenizer: Any, encoding: Encoding
) -> None:
    ids = Templates(tokenizer, encoding).passages([("Title", LONG)])[0]
    plain = tokenizer(
        f"passage: Title {LONG}", truncation=True, max_length=encoding.passage_length - 1
    )["input_ids"]
    assert ids == [*plain, tokenizer.eos_token_id]


def test_what_follows_the_text_in_a_template_is_never_truncated(
    tokenizer: Any, encoding: Encoding
) -> None:
    adapted = replace(encoding, passage_template="{text} The original sentence: ")
    ids = Templates(tokenizer, adapted).passages([("", LONG)])[0]
    suffix = tokenizer(" The original sentence: ", add_special_tokens=False)["input_ids"]
    assert ids[-1 - len(suffix) : -1] == suffix
    assert len(ids) == encoding.passage_length


def test_an_empty_title_leaves_no_double_space() -> None:
    template = Template("passage: {title} {text}")
    assert template.render("", "text") == "passage: text"
    assert template.render("title", "text") == "passage: title text"


def test_an_escaped_title_is_text_also_without_a_title() -> None:
    template = Template("{{title}} {{{title} {text}")
    assert template.render("", "camels") == "{title} {camels"
    assert template.render("Salt", "camels") == "{title} {Salt camels"


def test_braces_in_a_text_are_text() -> None:
    assert Template("passage: {title} {text}").render("{text}", "{x}") == "passage: {text} {x}"


def test_an_eos_that_the_tokenizer_lacks_is_refused(tokenizer: Any, encoding: Encoding) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with refused("missing-eos", "encoding.append_eos"):
        Templates(bare, encoding)


def test_a_length_without_room_for_text_is_refused(tokenizer: Any, encoding: Encoding) -> None:
    suffixed = replace(encoding, query_length=4, query_template="{text} camel caravan desert dune")
    with refused("no-room-for-text", "encoding.query_length"):
        Templates(tokenizer, suffixed)
    suffixed = replace(encoding, passage_length=4, passage_template="{text} camel caravan desert")
    with refused("no-room-for-text", "encoding.passage_length"):
        Templates(tokenizer, suffixed)


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


def test_a_template_with_a_format_is_refused() -> None:
    for field in ("{text:%d}", "{text!x}", "{text:>9}"):
        with refused("invalid-encoding", "encoding.passage_template"):
            Encoding(passage_template=f"{{title}} {field}")


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


def test_only_the_fields_of_a_template_are_replaced(tokenizer: Any, encoding: Encoding) -> None:
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


@pytest.mark.parametrize("field", ["{titel}", "{}", "{text.x}"])
def test_an_unknown_field_of_a_template_is_refused_by_name(field: str) -> None:
    with refused("invalid-encoding", "encoding.passage_template", f"{field} is unknown"):
        Encoding(passage_template=f"{field} {{text}}")


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
    templates = Templates(tokenizer, encoding)
    plain = templates.queries([("", "dune")])
    assert templates.queries([("salt", "dune")]) == templates.queries([("silk", "dune")]) == plain
    assert caplog.text.count("{instruction}") <= 1  # once in a process
