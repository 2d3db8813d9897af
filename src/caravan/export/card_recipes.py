"""Python for the card of a folder that plain transformers or PEFT loads.

What a model folder promises (prompts, lengths, EOS, pooling) is written out as code, since nothing
applies it there by itself. The code gives the same numbers.
"""

from __future__ import annotations

from typing import Any

from caravan.data.tokenization import PairTemplates, Template, Templates
from caravan.encoding import Encoding
from caravan.export.card_wording import TEXT, TITLE, fields, quoted

_POOLED = {"last": "states[-1]", "mean": "states.mean(dim=0)", "cls": "states[0]"}


def recipe(tokenizer: Any, encoding: Encoding) -> str:
    """Functions that use `tokenizer` and `model`, and a call of them."""
    if encoding.kind == "retriever":
        return _embed(Templates(tokenizer, encoding), encoding)
    pairs = PairTemplates(tokenizer, encoding)
    if encoding.scoring == "likelihood":
        return _likelihood(pairs, encoding)
    return _score(pairs, encoding)


def _embed(templates: Templates, encoding: Encoding) -> str:
    pooled = _POOLED.get(encoding.pooling, f"states[-{encoding.slots}:].mean(dim=0)")
    if encoding.normalize:
        pooled = f"torch.nn.functional.normalize({pooled}, dim=0)"
    before, tails = templates.before, templates.tails
    return f"""

def embed(text, length, after):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = {before} + ids[: length - {len(before)} - len(after)] + after
    with torch.no_grad():
        states = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return {pooled}


def embed_query(text):
    return embed({_literal(encoding.query_template)}, {encoding.query_length}, {tails["query"]})


def embed_passage(text, title=""):
    whole = {_passage(encoding)}
    return embed(whole, {encoding.passage_length}, {tails["passage"]})


query = embed_query("Which animals cross the desert?")
print(query @ embed_passage("Camels cross it, by night."))
"""


def _score(pairs: PairTemplates, encoding: Encoding) -> str:
    query = Template(encoding.query_template)
    if encoding.pair == "joined":
        body = f"""    whole = f"{{first}} {{second}}"
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    ids = {pairs.before} + ids[:{pairs.room}] + {pairs.after}
    given = {{"input_ids": torch.tensor([ids])}}
"""
    else:
        types = """
    types = [0] * len(head) + [1] * (len(ids) - len(head))
    given["token_type_ids"] = torch.tensor([types])"""
        body = f"""    texts = [first, second]
    first, second = tokenizer(texts, add_special_tokens=False)["input_ids"]
    head, after = {pairs.before} + first + {pairs.between}, {pairs.after}
    ids = head + second[: {pairs.length} - len(head) - len(after)] + after
    given = {{"input_ids": torch.tensor([ids])}}{types if pairs.typed else ""}
"""
    return f"""

def score(query, text, title=""):
    first = {_literal(encoding.query_template, query.suffix, name="query")}
    second = {_passage(encoding)}
{body}    with torch.no_grad():
        return model(**given).logits[0, 0].item()


print(score("Which animals cross the desert?", "Camels cross it, by night."))
"""


def _likelihood(pairs: PairTemplates, encoding: Encoding) -> str:
    prompt = f" {Template(encoding.query_template).render('', '')}"
    return f"""

def score(query, text, title=""):
    told = {quoted(prompt)} + query
    told = tokenizer(told, add_special_tokens=False, return_offsets_mapping=True)
    passage = {_passage(encoding)}
    passage = tokenizer(passage, add_special_tokens=False)["input_ids"]
    ids = {pairs.before} + passage[: {pairs.room} - len(told["input_ids"])] + told["input_ids"]
    words = sum(end > {len(prompt)} for _, end in told["offset_mapping"])
    if not words:
        return 0.0
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0, -words - 1 : -1]
    return logits.log_softmax(dim=1)[range(words), ids[-words:]].mean().item()


print(score("Which animals cross the desert?", "Camels cross it, by night."))
"""


def _passage(encoding: Encoding) -> str:
    """A passage of a `title` and a `text`, as a Python expression."""
    untitled = _literal(encoding.passage_template, titled=False)
    if TITLE not in Template(encoding.passage_template).render(TITLE, ""):
        return untitled
    return f"{_literal(encoding.passage_template)} if title else {untitled}"


def _literal(template: str, end: str = "", titled: bool = True, name: str = "text") -> str:
    """A template, and what follows it, as an f-string of `title` and of `name`."""
    whole = Template(template).render(TITLE if titled else "", TEXT) + end
    return f"f{quoted(fields(whole, name))}"
