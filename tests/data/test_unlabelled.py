"""Chunks of unlabelled text, and the sets of tokens that stand for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from tests.refusals import refused

from caravan.data.tokenization import Templates
from caravan.data.unlabelled import JointTemplates, Unlabelled
from caravan.encoding import Encoding

PROMPTS = (" the original:", " the next:")
CONTRACT = Encoding(
    query_template="{text} the next:", passage_template="{title} {text} the original:"
)
DOCUMENTS = [("", "camel caravan desert dune water oasis salt"), ("Trade", "route night")]


class Corpus:
    def __len__(self) -> int:
        return len(DOCUMENTS)

    def get(self, rows: Any) -> list[tuple[str, str]]:
        return [DOCUMENTS[int(row)] for row in rows]


@pytest.fixture
def templates(tokenizer: Any) -> JointTemplates:
    return JointTemplates(tokenizer, CONTRACT, PROMPTS)


def _sets(batch: Any) -> list[list[list[int]]]:
    """[text][task] the tokens."""
    flat = iter(batch.targets.split(batch.counts.flatten().tolist()))
    return [[next(flat).tolist() for _ in row] for row in batch.counts]


def _unlabelled(templates: JointTemplates, **settings: Any) -> Unlabelled:
    given = {"targets": "all", "words": 3, "tasks": ("ebae", "ebar"), "token_budget": 99, "seed": 0}
    return Unlabelled(Corpus(), templates, **{**given, **settings})


def test_a_text_ends_with_both_prompts_and_reads_as_each_would_alone(
    tokenizer: Any, templates: JointTemplates
) -> None:
    single = Templates(tokenizer, CONTRACT)
    passage, query = (read([("", "salt trade")])[0] for read in (single.passages, single.queries))
    ((joint,), (own,)) = templates.encode([("", "salt trade")])
    first, second = templates.prompts
    assert joint[: len(joint) - second] == passage
    assert joint[: len(joint) - first - second] + joint[-second:] == query
    assert own == tokenizer("salt trade", add_special_tokens=False)["input_ids"]


def test_texts_of_one_chunk_each_are_refused_if_the_next_chunk_is_predicted(
    templates: JointTemplates,
) -> None:
    with refused("nothing-follows", "stage.words"):
        _unlabelled(templates, words=9)
    assert len(_unlabelled(templates, words=9, tasks=("ebae",))) == 2


def test_a_length_that_is_mostly_prompts_is_reported(
    tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ends = len(tokenizer(" the next:", add_special_tokens=False)["input_ids"]) + 2  # BOS and EOS
    Templates(tokenizer, replace(CONTRACT, query_length=ends + 3))
    assert "leaves only 3 tokens for text" in caplog.text


def test_the_text_gives_way_to_the_prompts(tokenizer: Any) -> None:
    short = replace(CONTRACT, passage_length=32)
    templates = JointTemplates(tokenizer, short, PROMPTS)
    ((ids,), (own,)) = templates.encode([("", "camel " * 100)])
    assert len(ids) == 32
    assert ids[-len(templates.end) :] == templates.end
    assert len(own) == templates.room
    with refused("no-room-for-text", "encoding.passage_length"):
        JointTemplates(tokenizer, replace(CONTRACT, passage_length=8), PROMPTS)


def test_the_next_chunk_of_the_same_document_is_the_target(
    tokenizer: Any, templates: JointTemplates
) -> None:
    data = _unlabelled(templates)
    assert len(data) == 4  # camel caravan desert | dune water oasis | salt ; route night
    order = data.permutation(0).tolist()
    found = dict(zip(order, _sets(data[0, np.arange(4)].packed()), strict=True))

    def ids(text: str) -> list[int]:
        return sorted(set(tokenizer(text, add_special_tokens=False)["input_ids"]))

    assert found[0] == [ids("camel caravan desert"), ids("dune water oasis")]
    assert found[1] == [ids("dune water oasis"), ids("salt")]
    assert found[2] == [ids("salt"), []]
    assert found[3] == [ids("Trade route night"), []]


def test_a_batch_is_a_function_of_seed_epoch_and_place(templates: JointTemplates) -> None:
    some = (2, np.array([1, 3]))
    one, again = (_sets(_unlabelled(templates)[some].packed()) for _ in range(2))
    assert one == again
    orders = [_unlabelled(templates, seed=seed).permutation(2).tolist() for seed in range(9)]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(map(tuple, orders))) > 1


def test_what_was_not_read_is_no_target(tokenizer: Any) -> None:
    templates = JointTemplates(tokenizer, replace(CONTRACT, passage_length=40), PROMPTS)
    text = "the and of " * 40 + "camel"
    ((_,), (own,)) = templates.encode([("", text)])
    (found,) = _unlabelled(templates, targets="content").targets([text], [own])
    assert len(found) == 0


def test_an_opening_that_ends_with_a_space_is_not_counted_twice(tokenizer: Any) -> None:
    encoding = Encoding(passage_template="passage: {title} {text} the original:")
    templates = JointTemplates(tokenizer, encoding, PROMPTS)
    _, (own,) = templates.encode([("", "salt trade")])
    assert tokenizer.decode(own).strip() == "salt trade"


def test_a_task_that_is_not_trained_has_no_targets(tokenizer: Any) -> None:
    data = _unlabelled(JointTemplates(tokenizer, CONTRACT, PROMPTS[1:]), tasks=("ebar",))
    counts = data[0, np.arange(4)].packed().counts
    assert counts.shape == (4, 1)
    assert int((counts == 0).sum()) == 2


def test_content_leaves_punctuation_and_stop_words_out(
    tokenizer: Any, templates: JointTemplates
) -> None:
    content = _unlabelled(templates, targets="content")
    assert content.content("The camel, and its caravan_route!") == "camel caravan route"
    found, empty = content.targets(["The camel, and the caravan!", "and the!"], [[], []])
    expected = tokenizer("camel caravan", add_special_tokens=False)["input_ids"]
    assert found.tolist() == sorted(set(expected))
    assert len(empty) == 0
