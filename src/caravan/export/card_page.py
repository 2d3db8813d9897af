"""A README.md as the Hub wants it: a block of metadata, then sections of Markdown.

Model folders (`caravan.export.model_card`) and exported folders (`caravan.export`) have one;
the metadata is written by huggingface_hub, which knows its names.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from caravan.encoding import FILE, Encoding, read_encoding
from caravan.models.digests import adapter_base

HERE = "path/to/this/folder"
"""Stands for the folder in a page's code."""
MOST_FOLDERS = 8
"""Trainings, each begun with the one before, that are looked through for where it all began."""


def page(
    folder: Path,
    facts: dict[str, Any],
    library: str,
    pipeline: str,
    tags: list[str],
    sections: list[str],
    **metadata: Any,
) -> str:
    """The page.

    Args:
        folder, facts: of the model folder.
        library, pipeline, tags: of the Hub: library_name, pipeline_tag, tags.
        sections: Markdown, a blank line apart.
        metadata: more of `huggingface_hub.ModelCardData`; None is left out.
    """
    from huggingface_hub import ModelCardData

    base = hub_base(folder, facts)
    if base is not None:
        adapter = facts["weights"] == "adapter"
        metadata["base_model_relation"] = "adapter" if adapter else "finetune"
    name = str(facts.get("name") or "model")
    data = ModelCardData(
        library_name=library,
        pipeline_tag=pipeline,
        base_model=base,
        tags=list(dict.fromkeys(["caravan", *tags])),
        model_name=name if metadata.get("eval_results") else None,
        **metadata,
    )
    return "\n\n".join([f"---\n{data}\n---\n# {name}", *sections]) + "\n"


def table(rows: dict[str, Any]) -> str:
    """Settings and their values."""
    lines = [f"| {cell(key)} | {cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| setting | value |", "|---|---|", *lines])


def cell(value: Any) -> str:
    r"""A value in a cell: chat templates have bars and line breaks, which would end it.

    >>> print(cell("`<|user|>`"))
    `<\|user\|>`
    """
    return str(value).replace("|", "\\|").replace("\n", "\\n")


def code(python: str) -> str:
    return f"```python\n{python}```"


def exported(
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
    """The page of an exported folder.

    Args:
        about: what the model does, to go on after "It".
        example: Python that loads the exported folder and uses it.
        rows: a table of settings.
        notes: a paragraph each.
    """
    told = (
        f"It {about}. Trained with Caravan and exported from a model folder, whose numbers are"
        " the same: they were compared on the way."
    )
    return page(folder, facts, library, pipeline, tags, [told, code(example), table(rows), *notes])


def exported_plain(
    folder: Path, facts: dict[str, Any], encoding: Encoding, library: str, example: str
) -> str:
    """The page of a folder that transformers or PEFT loads."""
    return exported(
        folder,
        facts,
        library=library,
        pipeline=pipeline_tag(encoding),
        tags=[encoding.kind],
        about=does(encoding),
        example=example,
        rows=reads(encoding),
        notes=[
            "Nothing in this folder adds prompts or an EOS by itself; the code does. `caravan.json`"
            " says the same to Caravan, for which this is a model folder too."
        ],
    )


def pipeline_tag(encoding: Encoding) -> str:
    """The Hub's word for what the model is for."""
    return "feature-extraction" if encoding.kind == "retriever" else "text-ranking"


def does(encoding: Encoding) -> str:
    if encoding.kind == "retriever":
        return "embeds queries and passages"
    return "scores a query with a passage"


def reads(encoding: Encoding) -> dict[str, str]:
    """How texts become tokens, and states a number or numbers."""
    rows = {
        "query": f"`{encoding.query_template}`, {encoding.query_length} tokens",
        "passage": f"`{encoding.passage_template}`, {encoding.passage_length} tokens",
    }
    if encoding.kind == "retriever":
        scale = ", unit length" if encoding.normalize else ""
        rows["embedding"] = f"{encoding.pooling} pooling{scale}"
    else:
        whole = encoding.query_length + encoding.passage_length
        joined = "one text" if encoding.pair == "joined" else "a pair"
        rows["input"] = f"{joined}, {whole} tokens; the passage gives way"
        rows["score"] = f"a linear head on the {encoding.pooling} token"
        if encoding.scoring == "likelihood":
            rows["score"] = "the mean log probability of the query's tokens after the passage"
    rows["EOS"] = "appended" if encoding.append_eos else "as the tokenizer has it"
    if encoding.bidirectional:
        rows["attention"] = "both ways: `config.is_causal=False` in transformers"
    return rows


def hub_base(folder: Path, facts: dict[str, Any]) -> str | None:
    """The id on the Hub of the model that training began with, however many folders ago.

    None where it began with random weights, or with a folder that has no name on the Hub.
    """
    base = _base(folder, facts)
    for _ in range(MOST_FOLDERS):
        if base is None or not (Path(base) / FILE).is_file():
            break
        base = _base(Path(base), read_encoding(Path(base))[1])
    known = re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)) and not Path(str(base)).exists()
    return base if known else None


def _base(folder: Path, facts: dict[str, Any]) -> str | None:
    if facts["weights"] == "adapter":
        return adapter_base(folder)[0]
    base = facts.get("base_model")
    return base if isinstance(base, str) else None
