"""The model card of a model folder: figures, how to load it anywhere, how it reads, its training.

    python -m caravan.export.card_command <model folder> runs/test --license apache-2.0
    hf upload me/my-retriever runs/mine/retriever/model

A training writes it; the command writes it anew, with what evaluations have measured since.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caravan.encoding import Encoding, read_encoding
from caravan.export import card_page, card_recipes
from caravan.export.card_figures import Figures, evaluated, results, table, validated
from caravan.export.card_wording import quoted
from caravan.files import replacing
from caravan.models.digests import adapter_base
from caravan.models.folder import HEAD
from caravan.models.loading import load_tokenizer
from caravan.models.remote_code import FACT, SETTING

README = "README.md"
_OWN_CODE = (
    f"The model has code of its own, which comes with its weights or with its base; `{SETTING}`"
    " runs it. Read it first."
)


def write(
    folder: Path,
    evaluations: list[Path] | None = None,
    license: str | None = None,
    language: list[str] | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
) -> Path:
    """Write a model folder's README.md; returns its path.

    Args:
        evaluations: folders of `evaluate.py`, whose figures of this model go into the card.
        license: of the Hub's list, such as apache-2.0; None: nothing is said.
        language: codes such as en; None: those of the collection, where they are known.
        trust_remote_code: run the code of the folder's tokenizer (`caravan.models.remote_code`).
        tokenizer: the folder's, where it is loaded already.

    Raises:
        InputError: the folder is no model folder, or an evaluation is not of this model.
    """
    encoding, facts = read_encoding(folder)
    figures = [*validated(facts)]
    for evaluation in evaluations or ():
        figures += evaluated(folder, evaluation)
    if tokenizer is None:
        tokenizer = load_tokenizer(str(folder), trust_remote_code)
    text = card_page.page(
        folder,
        facts,
        library="caravan",
        pipeline=card_page.pipeline_tag(encoding),
        tags=["retrieval", encoding.kind, *(["peft", "lora"] * (facts["weights"] == "adapter"))],
        sections=_sections(folder, tokenizer, encoding, facts, figures),
        license=license,
        language=language or facts.get("language"),
        datasets=facts.get("datasets"),
        eval_results=results(encoding, figures) or None,
    )
    path = folder / README
    with replacing(path) as scratch:
        scratch.write_text(text, "utf-8")
    return path


def _sections(
    folder: Path,
    tokenizer: Any,
    encoding: Encoding,
    facts: dict[str, Any],
    figures: list[Figures],
) -> list[str]:
    told = f"A {encoding.kind} trained with Caravan: it {card_page.does(encoding)}."
    base = card_page.hub_base(folder, facts)
    began = "from random weights" if base is None else f"with [{base}](https://hf.co/{base})"
    if base is None and facts.get("base_model"):
        began = f"with `{facts['base_model']}`"
    training = {
        "began": began,
        "weights": "a LoRA adapter" if facts["weights"] == "adapter" else "all of them",
        **{name: facts[name] for name in ("collection", "updates") if name in facts},
        **facts.get("recipe", {}),
    }
    sections = [told]
    if figures:
        sections += ["## Figures", table(figures)]
    sections += [
        "## Use it in Caravan",
        "`caravan.json` holds all that its use needs: prompts, EOS, pooling, lengths.",
        card_page.code(_caravan(encoding, facts)),
        _evaluate(encoding, facts),
        *([_OWN_CODE] if facts.get(FACT) else _elsewhere(folder, tokenizer, encoding, facts)),
        "## How it reads",
        card_page.table(card_page.reads(encoding)),
        "## Training",
        card_page.table(training),
    ]
    return sections


def _elsewhere(
    folder: Path, tokenizer: Any, encoding: Encoding, facts: dict[str, Any]
) -> list[str]:
    """The model in other libraries."""
    return [
        "## Use it in sentence-transformers",
        *_sbert(encoding),
        f"## Use it in {'PEFT' if facts['weights'] == 'adapter' else 'transformers'}",
        *_plain(folder, tokenizer, encoding, facts),
    ]


def _caravan(encoding: Encoding, facts: dict[str, Any]) -> str:
    allowed = f", {SETTING}=True" if facts.get(FACT) else ""
    return f"""import caravan

model = caravan.load("{card_page.HERE}"{allowed})
query, passages = "Which animals cross the desert?", ["Camels cross it, by night.", "Salt is gold."]
for hit in model.search([query], passages, k=2)[0]:
    print(hit.score, passages[hit.row])
"""


def _evaluate(encoding: Encoding, facts: dict[str, Any]) -> str:
    first = "" if encoding.kind == "retriever" else "retriever=bm25 "
    given = f"{first}{encoding.kind}={card_page.HERE}"
    given += f" {SETTING}=true" if facts.get(FACT) else ""
    return f"On a BEIR folder: `python evaluate.py {given} data=beir data.path=<collection>`."


def _sbert(encoding: Encoding) -> list[str]:
    if encoding.scoring == "likelihood":
        return ["sentence-transformers has no score by likelihood; use it in transformers, below."]
    export = f"python -m caravan.export {card_page.HERE} sentence-transformers exported"
    name, use = "CrossEncoder", 'print(model.predict([(query, "Camels cross it, by night.")]))'
    if encoding.kind == "retriever":
        name = "SentenceTransformer"
        use = """passages = model.encode_document(["Camels cross it, by night."])
print(model.similarity(model.encode_query([query]), passages))"""
    return [
        f"Caravan writes it as a folder that adds prompts and EOS by itself: `{export}`. What it"
        " cannot express exactly it refuses.",
        card_page.code(f"""from sentence_transformers import {name}

model = {name}("exported")
query = "Which animals cross the desert?"
{use}
"""),
    ]


def _plain(folder: Path, tokenizer: Any, encoding: Encoding, facts: dict[str, Any]) -> list[str]:
    if (folder / HEAD).is_file():
        return ["transformers has no class with its head; use it in sentence-transformers, above."]
    name = auto_class(encoding, facts)
    loads = _adapter(folder, encoding, name) if facts["weights"] == "adapter" else _whole(name)
    if name == "AutoModelForSequenceClassification":
        loads += (
            "# a pair is read alone, up to its last token\n"
            "model.config.get_text_config().pad_token_id = None\n"
        )
    elif encoding.kind == "retriever" and name == "AutoModelForCausalLM":
        loads += "model = model.base_model  # embeddings are made without the output layer\n"
    return [
        "Prompts, lengths and EOS are in the code, since nothing adds them there by itself.",
        card_page.code(loads + card_recipes.recipe(tokenizer, encoding)),
    ]


def auto_class(encoding: Encoding, facts: dict[str, Any]) -> str:
    """The Auto class of transformers that loads the weights."""
    if encoding.kind == "reranker" and encoding.scoring == "head":
        return "AutoModelForSequenceClassification"
    if encoding.kind == "reranker" or "language_model" in facts:
        return "AutoModelForCausalLM"
    return "AutoModel"


def _whole(name: str) -> str:
    return f"""import torch
from transformers import {name}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{card_page.HERE}")
model = {name}.from_pretrained("{card_page.HERE}", dtype=torch.float32).eval()
"""


def _adapter(folder: Path, encoding: Encoding, name: str) -> str:
    base, revision = adapter_base(folder)
    more = "" if revision is None else f", revision={quoted(revision)}"
    more += ", num_labels=1" if name == "AutoModelForSequenceClassification" else ""
    lines = ""
    if encoding.bidirectional:
        lines += "base.config.is_causal = False  # it was trained to look both ways\n"
    if encoding.slots:
        lines += """if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
    base.resize_token_embeddings(len(tokenizer))
"""
    return f"""import torch
from peft import PeftModel
from transformers import {name}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{card_page.HERE}")
base = {name}.from_pretrained({quoted(base)}, dtype=torch.float32{more})
{lines}model = PeftModel.from_pretrained(base, "{card_page.HERE}").eval()
"""
