"""The model card of a model folder: figures, how to load it anywhere, how it reads, its training.

    python -m caravan.cards runs/mine/retriever/model runs/mine/test --license apache-2.0
    hf upload me/my-retriever runs/mine/retriever/model

A training writes it; the command writes it anew, with what evaluations have measured since.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caravan.atomic import replacing
from caravan.cards import page, recipes
from caravan.cards.figures import Figures, evaluated, results, table, validated
from caravan.cards.wording import quoted
from caravan.contract import Contract, adapter_base, read_contract
from caravan.models.folder import HEAD
from caravan.models.loading import load_tokenizer
from caravan.trust import FACT, SETTING

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
        trust_remote_code: run code that the folder's tokenizer brings along (`caravan.trust`).
        tokenizer: the folder's, where it is loaded already.

    Raises:
        InputError: the folder is no model folder, or an evaluation is not of this model.
    """
    contract, facts = read_contract(folder)
    figures = [*validated(facts)]
    for evaluation in evaluations or ():
        figures += evaluated(folder, evaluation)
    if tokenizer is None:
        tokenizer = load_tokenizer(str(folder), trust_remote_code)
    text = page.page(
        folder,
        facts,
        library="caravan",
        pipeline=page.pipeline_tag(contract),
        tags=["retrieval", contract.kind, *(["peft", "lora"] * (facts["weights"] == "adapter"))],
        sections=_sections(folder, tokenizer, contract, facts, figures),
        license=license,
        language=language or facts.get("language"),
        datasets=facts.get("datasets"),
        eval_results=results(contract, figures) or None,
    )
    path = folder / README
    with replacing(path) as scratch:
        scratch.write_text(text, "utf-8")
    return path


def _sections(
    folder: Path,
    tokenizer: Any,
    contract: Contract,
    facts: dict[str, Any],
    figures: list[Figures],
) -> list[str]:
    told = f"A {contract.kind} trained with Caravan: it {page.does(contract)}."
    base = page.hub_base(folder, facts)
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
        page.code(_caravan(contract, facts)),
        _evaluate(contract, facts),
        *([_OWN_CODE] if facts.get(FACT) else _elsewhere(folder, tokenizer, contract, facts)),
        "## How it reads",
        page.table(page.reads(contract)),
        "## Training",
        page.table(training),
    ]
    return sections


def _elsewhere(
    folder: Path, tokenizer: Any, contract: Contract, facts: dict[str, Any]
) -> list[str]:
    """The model in other libraries."""
    return [
        "## Use it in sentence-transformers",
        *_sbert(contract),
        f"## Use it in {'PEFT' if facts['weights'] == 'adapter' else 'transformers'}",
        *_plain(folder, tokenizer, contract, facts),
    ]


def _caravan(contract: Contract, facts: dict[str, Any]) -> str:
    allowed = f", {SETTING}=True" if facts.get(FACT) else ""
    return f"""import caravan

model = caravan.load("{page.HERE}"{allowed})
query, passages = "Which animals cross the desert?", ["Camels cross it, by night.", "Salt is gold."]
for hit in model.search([query], passages, k=2)[0]:
    print(hit.score, passages[hit.row])
"""


def _evaluate(contract: Contract, facts: dict[str, Any]) -> str:
    first = "" if contract.kind == "retriever" else "retriever=bm25 "
    given = f"{first}{contract.kind}={page.HERE}"
    given += f" {SETTING}=true" if facts.get(FACT) else ""
    return f"On a BEIR folder: `python evaluate.py {given} data=beir data.path=<collection>`."


def _sbert(contract: Contract) -> list[str]:
    if contract.scoring == "likelihood":
        return ["sentence-transformers has no score by likelihood; use it in transformers, below."]
    export = f"python -m caravan.export {page.HERE} sentence-transformers exported"
    name, use = "CrossEncoder", 'print(model.predict([(query, "Camels cross it, by night.")]))'
    if contract.kind == "retriever":
        name = "SentenceTransformer"
        use = """passages = model.encode_document(["Camels cross it, by night."])
print(model.similarity(model.encode_query([query]), passages))"""
    return [
        f"Caravan writes it as a folder that adds prompts and EOS by itself: `{export}`. What it"
        " cannot express exactly it refuses.",
        page.code(f"""from sentence_transformers import {name}

model = {name}("exported")
query = "Which animals cross the desert?"
{use}
"""),
    ]


def _plain(folder: Path, tokenizer: Any, contract: Contract, facts: dict[str, Any]) -> list[str]:
    if (folder / HEAD).is_file():
        return ["transformers has no class with its head; use it in sentence-transformers, above."]
    name = auto_class(contract, facts)
    loads = _adapter(folder, contract, name) if facts["weights"] == "adapter" else _whole(name)
    if name == "AutoModelForSequenceClassification":
        loads += (
            "# a pair is read alone, up to its last token\n"
            "model.config.get_text_config().pad_token_id = None\n"
        )
    elif contract.kind == "retriever" and name == "AutoModelForCausalLM":
        loads += "model = model.base_model  # embeddings are made without the output layer\n"
    return [
        "Prompts, lengths and EOS are in the code, since nothing adds them there by itself.",
        page.code(loads + recipes.recipe(tokenizer, contract)),
    ]


def auto_class(contract: Contract, facts: dict[str, Any]) -> str:
    """The Auto class of transformers that loads the weights."""
    if contract.kind == "reranker" and contract.scoring == "head":
        return "AutoModelForSequenceClassification"
    if contract.kind == "reranker" or "language_model" in facts:
        return "AutoModelForCausalLM"
    return "AutoModel"


def _whole(name: str) -> str:
    return f"""import torch
from transformers import {name}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{page.HERE}")
model = {name}.from_pretrained("{page.HERE}", dtype=torch.float32).eval()
"""


def _adapter(folder: Path, contract: Contract, name: str) -> str:
    base, revision = adapter_base(folder)
    more = "" if revision is None else f", revision={quoted(revision)}"
    more += ", num_labels=1" if name == "AutoModelForSequenceClassification" else ""
    lines = ""
    if contract.bidirectional:
        lines += "base.config.is_causal = False  # it was trained to look both ways\n"
    if contract.slots:
        lines += """if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
    base.resize_token_embeddings(len(tokenizer))
"""
    return f"""import torch
from peft import PeftModel
from transformers import {name}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{page.HERE}")
base = {name}.from_pretrained({quoted(base)}, dtype=torch.float32{more})
{lines}model = PeftModel.from_pretrained(base, "{page.HERE}").eval()
"""
