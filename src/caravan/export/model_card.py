"""The model card (README.md) of a model folder and of exported folders.

    python -m caravan.export card runs/mine/model runs/test --license apache-2.0
    hf upload me/my-retriever runs/mine/model

Training writes the card of its model folder; the command writes it again with the metrics of
evaluations. The text is in `model_card.md.jinja`; its code for plain transformers computes the
numbers of the model folder.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from caravan import manifests
from caravan.data.pairs import PairTemplates, answer_ids
from caravan.data.tokenization import Template, Templates
from caravan.encoding import FILE, Encoding, read_encoding
from caravan.errors import InputError, reading
from caravan.files import replacing
from caravan.models.digests import adapter_base, folder_digest
from caravan.models.folder import HEAD
from caravan.models.loading import load_tokenizer
from caravan.models.remote_code import FACT
from caravan.retrieval.metrics import too_deep

MAX_BASES = 8
"""Model folders, each initialized from the one before, that are followed to the first base."""
TITLE, TEXT = "\1", "\2"
"""Stand for title and text in a rendered template."""
_POOLED = {"last": "states[-1]", "mean": "states.mean(dim=0)", "cls": "states[0]"}


def write(
    folder: Path,
    evaluations: Sequence[Path] = (),
    license: str | None = None,
    language: list[str] | None = None,
    trust_remote_code: bool = False,
    tokenizer: Any = None,
) -> Path:
    """Write a model folder's README.md; returns its path.

    Args:
        evaluations: folders written by `evaluate.py`, whose metrics of this model the card lists.
        license: an identifier of the Hub, such as apache-2.0.
        language: codes such as en; None: those of the training collection, if known.
        trust_remote_code: run the code of the folder's tokenizer (`caravan.models.remote_code`).
        tokenizer: the folder's, if already loaded.

    Raises:
        InputError: If the folder is not a model folder, or an evaluation is not of this model.
    """
    encoding, facts = read_encoding(folder)
    tokenizer = tokenizer or load_tokenizer(str(folder), trust_remote_code)
    base = None
    if facts["weights"] == "adapter":
        name, revision = adapter_base(folder)
        base = quoted(name) + (f", revision={quoted(revision)}" if revision else "")
    variables = {
        "sentence_transformers": not facts.get(FACT),
        "transformers": not facts.get(FACT),
        "auto_class": None if (folder / HEAD).is_file() else auto_class(encoding, facts),
        "adapter": base,
        "padding": None,
        **usage(tokenizer, encoding),
    }
    metadata = {
        "library_name": "caravan",
        "tags": ["caravan", "retrieval", encoding.kind, *(["peft", "lora"] if base else [])],
        "license": license,
        "language": language or facts.get("language"),
        "datasets": facts.get("datasets"),
    }
    return fill(folder, folder, encoding, variables, metadata, evaluations)


def fill(
    out: Path,
    folder: Path,
    encoding: Encoding,
    variables: dict[str, Any],
    metadata: dict[str, Any],
    evaluations: Sequence[Path] = (),
) -> Path:
    """Write the README.md of the folder `out` from the template; returns its path.

    Args:
        folder: the model folder that `out` is, or was exported from.
        encoding: of `out`.
        variables: of the template, in addition to those of every card.
        metadata: fields of ModelCardData, None for unknown ones.
    """
    facts = read_encoding(folder)[1]
    results = [*_validated(encoding, facts)]
    results += (result for one in evaluations for result in evaluated(folder, one))
    adapter = facts["weights"] == "adapter"
    base = hub_base(folder, facts)
    name = facts.get("name") or "model"
    data = ModelCardData(
        pipeline_tag="feature-extraction" if encoding.kind == "retriever" else "text-ranking",
        base_model=base,
        base_model_relation=("adapter" if adapter else "finetune") if base else None,
        model_name=name if results else None,
        eval_results=results or None,
        **metadata,
    )
    training = {
        "base model": base or facts.get("base_model") or "random weights",
        "weights": "a LoRA adapter" if adapter else "all",
        **{key: facts[key] for key in ("collection", "updates") if key in facts},
        **facts.get("recipe", {}),
    }
    versions = [f"{library} {version}" for library, version in manifests.versions().items()]
    card = ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("model_card.md.jinja")),
        here="path/to/this/folder",
        name=name,
        encoding=encoding,
        remote_code=bool(facts.get(FACT)),
        results=results,
        measures=list(dict.fromkeys(result.metric_name for result in results)),
        settings=_cells(encoding.settings()),
        training=_cells(training),
        versions=", ".join(versions),
        **variables,
    )
    path = out / "README.md"
    with replacing(path) as scratch:
        scratch.write_text(str(card), "utf-8")
    return path


def _result(
    encoding: Encoding, collection: str, split: str, how: str, name: str, value: float
) -> EvalResult:
    retriever = encoding.kind == "retriever"
    return EvalResult(
        task_type="information-retrieval" if retriever else "text-ranking",
        task_name="Information Retrieval" if retriever else "Reranking",
        dataset_type=collection,
        dataset_name=f"{collection} {split} ({how})",
        dataset_split=split,
        metric_type=name.lower().replace("@", "_at_"),
        metric_name=name,
        metric_value=value,
    )


def _validated(encoding: Encoding, facts: dict[str, Any]) -> Iterator[EvalResult]:
    """The validation metric by which the best checkpoint was chosen, if there is one."""
    measure, best, over = (facts.get(name) for name in ("monitored", "best", "validation"))
    if isinstance(measure, str) and isinstance(best, float) and isinstance(over, dict):
        searched = "candidates of a run reranked"
        if over.get("passages") is not None:
            searched = f"{over['passages']:,} passages"
        how = f"{over['queries']:,} queries over {searched}"
        how += "; during training, to choose the checkpoint"
        name = measure.removeprefix("val/")
        yield _result(encoding, over["collection"], over["split"], how, name, best)


def evaluated(folder: Path, evaluation: Path) -> list[EvalResult]:
    """The metrics of the stages of an evaluation that this model has computed.

    A stage counts if its manifest names the digest of the model folder, so that a card never lists
    metrics of another model, or of this one before it was trained again. Of an evaluation of
    several collections, those of each collection that has finished.

    Raises:
        InputError: If there is no evaluation, or none of its stages is of this model.
    """
    path = evaluation / "metrics.json"
    with reading(path, "not the metrics of an evaluation; give the folder of a run of evaluate.py"):
        record = json.loads(path.read_text("utf-8"))
        if record.get("collections"):
            parts = (evaluated(folder, evaluation / name) for name in record["collections"])
            return [result for part in parts for result in part]
        results = list(_stage_results(folder, evaluation, record))
    if not results:
        raise InputError(
            "metrics-of-another-model",
            f"{path}: none of its stages was computed by {folder} as it is now; evaluate it again",
        )
    return results


def _stage_results(folder: Path, evaluation: Path, record: dict[str, Any]) -> Iterator[EvalResult]:
    encoding, digest = read_encoding(folder)[0], folder_digest(folder)
    collection, passages, before = record["collection"]["name"], record["passages"], ""
    for stage in record["stages"]:
        manifest = manifests.read(evaluation / stage["run"]) or {"inputs": {}, "facts": {}}
        inputs = manifest["inputs"]
        how = f"{record['queries']:,} queries over {passages:,} passages"
        if "depth" in inputs:
            how += f"; the top {inputs['depth']} of {before} reranked"
            if inputs.get("weight", 1) != 1:
                how += f" with a weight of {inputs['weight']}"
        for setting in ("query_length", "passage_length", "dim"):
            if inputs.get(setting) is not None:
                how += f"; {setting}={inputs[setting]}"
        before = stage["stage"]
        if inputs.get("model") != digest or manifest["facts"].get("run_xxh3") != stage["run_xxh3"]:
            continue
        depth = stage.get("depth")
        unfair = [] if depth is None else too_deep(list(stage["overall"]), depth, passages)
        for name, value in stage["overall"].items():
            if name in unfair:  # earlier versions wrote them
                continue
            if not math.isfinite(value):
                raise ValueError(f"{name} of {before} is not finite")
            yield _result(encoding, collection, record["split"], how, name, float(value))


def _cells(rows: dict[str, Any]) -> dict[str, str]:
    """Escape what would end a table cell, such as the bars and line breaks of chat templates."""
    return {
        name: str(value).replace("|", "\\|").replace("\n", "\\n") for name, value in rows.items()
    }


def usage(tokenizer: Any, encoding: Encoding) -> dict[str, Any]:
    """The template's variables for plain transformers: token ids, lengths, and f-strings."""
    query, passage = (Template(encoding.template(side)) for side in ("query", "passage"))
    pooled = _POOLED.get(encoding.pooling, f"states[-{encoding.slots}:].mean(dim=0)")
    if encoding.dim:
        pooled += f"[:{encoding.dim}]"
    if encoding.normalize:
        pooled = f"torch.nn.functional.normalize({pooled}, dim=0)"
    text, titled = f_string(passage.render("", TEXT)), passage.render(TITLE, TEXT)
    if TITLE in titled:
        text = f"{f_string(titled)} if title else {text}"
    variables: dict[str, Any] = {"pooled": pooled, "passage": text}
    rendered = query.render("", TEXT)
    if encoding.kind == "retriever":
        variables |= {"tokens": Templates(tokenizer, encoding), "query": f_string(rendered)}
        return variables
    rendered += query.suffix
    if encoding.scoring == "likelihood":
        rendered = f" {rendered}"
        variables["prompt_length"] = rendered.index(TEXT)
    elif encoding.scoring == "token":
        variables["answers"] = answer_ids(tokenizer, encoding)
    return {
        **variables,
        "tokens": PairTemplates(tokenizer, encoding),
        "query": f_string(rendered, "query"),
    }


def f_string(rendered: str, text: str = "text") -> str:
    """An f-string of Python for a rendered template, with `{title}` and the field `text`."""
    escaped = rendered.replace("{", "{{").replace("}", "}}")
    return f"f{quoted(escaped.replace(TITLE, '{title}').replace(TEXT, f'{{{text}}}'))}"


def quoted(text: str) -> str:
    """A string literal of Python and Jinja."""
    return json.dumps(text, ensure_ascii=False)


def auto_class(encoding: Encoding, facts: dict[str, Any]) -> str:
    """The Auto class of transformers that loads the weights."""
    if encoding.kind == "reranker" and encoding.scoring == "head":
        return "AutoModelForSequenceClassification"
    if encoding.kind == "reranker" or "language_model" in facts:
        return "AutoModelForCausalLM"
    return "AutoModel"


def hub_base(folder: Path, facts: dict[str, Any]) -> str | None:
    """The Hub id of the first base model, through all model folders that were trained in between.

    None if the first training started from random weights or from a folder without a Hub id.
    """
    base: Any = None
    for _ in range(MAX_BASES):
        base = adapter_base(folder)[0] if facts["weights"] == "adapter" else facts.get("base_model")
        if not isinstance(base, str) or not (Path(base) / FILE).is_file():
            break
        folder, facts = Path(base), read_encoding(Path(base))[1]
    known = re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)) and not Path(str(base)).exists()
    return base if known else None
