"""The README.md of an exported folder: a model card of the Hub, with code that loads the folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from caravan.contract import Contract, adapter_base

HERE = "path/to/this/folder"
"""Stands for the folder in the card's code."""


def card(
    folder: Path,
    facts: dict[str, Any],
    library: str,
    pipeline: str,
    tags: list[str],
    about: str,
    example: str,
    rows: dict[str, str],
    notes: list[str],
) -> str:
    """The card.

    Args:
        folder, facts: of the model folder.
        library, pipeline, tags: of the Hub: library_name, pipeline_tag, tags.
        about: what the model does, to go on after "It".
        example: Python that loads the exported folder and uses it.
        rows: a table of settings.
        notes: a paragraph each.
    """
    base = _base(folder, facts)
    name = str(facts.get("name") or "model")
    front = [
        f"library_name: {library}",
        f"pipeline_tag: {pipeline}",
        *([f"base_model: {base}"] if base else []),
        f"tags: [{', '.join(dict.fromkeys(['caravan', *tags]))}]",
    ]
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return "\n".join(
        [
            "---",
            *front,
            "---",
            f"# {name}\n",
            f"It {about}. Trained with Caravan and exported from a model folder, whose numbers are"
            " the same: they were compared on the way.\n",
            f"```python\n{example}```\n",
            f"| setting | value |\n|---|---|\n{table}\n",
            "\n\n".join(notes),
            "",
        ]
    )


def plain_card(
    folder: Path, facts: dict[str, Any], contract: Contract, library: str, example: str
) -> str:
    """The card of a folder that transformers or PEFT loads."""
    retrieves = contract.kind == "retriever"
    score = "the mean log probability of the query's tokens after the passage"
    if contract.scoring == "head":
        score = f"a linear head on the {contract.pooling} token"
    rows = {
        "query": f"`{contract.query_template}`, {contract.query_length} tokens",
        "passage": f"`{contract.passage_template}`, {contract.passage_length} tokens",
        "embedding": f"{contract.pooling} pooling" + (", unit length" * contract.normalize),
        "score": score,
        "EOS": "appended" if contract.append_eos else "as the tokenizer has it",
    }
    del rows["score" if retrieves else "embedding"]
    return card(
        folder,
        facts,
        library=library,
        pipeline="feature-extraction" if retrieves else "text-ranking",
        tags=[contract.kind],
        about="embeds queries and passages" if retrieves else "scores a query with a passage",
        example=example,
        rows=rows,
        notes=[
            "Nothing in this folder adds prompts or an EOS by itself; the code does. `caravan.json`"
            " says the same to Caravan, for which this is a model folder too."
        ],
    )


def _base(folder: Path, facts: dict[str, Any]) -> str | None:
    """The base model's id on the Hub, if it has one; a folder is nobody else's."""
    base = adapter_base(folder)[0] if facts["weights"] == "adapter" else facts.get("base_model")
    known = re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)) and not Path(str(base)).exists()
    return str(base) if known else None
