"""The LoRA adapter as PEFT loads it, on the base that it names."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from caravan.encoding import Encoding, read_encoding, write_encoding
from caravan.errors import InputError
from caravan.export import card_page, card_recipes, plain, verify
from caravan.export.card_wording import quoted
from caravan.export.model_card import auto_class
from caravan.export.transformers import set_padding
from caravan.models import folder as model_folder
from caravan.models.digests import adapter_base
from caravan.models.loading import fit_vocabulary

FILES = ("adapter_config.json", model_folder.ADAPTER)


def write(folder: Path, out: Path) -> None:
    """Write the adapter and check it on its base.

    Raises:
        InputError: the folder has no adapter, the reranker's head is none that transformers has,
            or base and adapter compute other numbers.
    """
    if read_encoding(folder)[1]["weights"] != "adapter":
        raise InputError(f"{folder} holds whole weights and no adapter; export it as merged")
    model, tokenizer, encoding, facts = model_folder.load(folder)
    plain.refuse_foreign_head(folder, model)
    sample = plain.Sample.of(model, tokenizer, encoding)
    del model  # there may not be room for two
    for name in FILES:
        shutil.copyfile(folder / name, out / name)
    write_encoding(out, encoding, facts)
    loads, found = _load(folder, out, tokenizer, encoding, facts)
    tokenizer.save_pretrained(out)
    what = "embeddings" if encoding.kind == "retriever" else "scores"
    verify.refuse_other_numbers(str(folder), what, sample.wanted, sample.by(found))
    text = card_page.exported_plain(
        folder, facts, encoding, "peft", loads + card_recipes.recipe(tokenizer, encoding)
    )
    (out / "README.md").write_text(text, "utf-8")


def _load(
    folder: Path, out: Path, tokenizer: Any, encoding: Encoding, facts: dict[str, Any]
) -> tuple[str, Any]:
    """Code that loads the exported adapter on its base, and what it loads."""
    from peft import PeftModel

    base, revision = adapter_base(folder)
    name = auto_class(encoding, facts)
    hub: dict[str, Any] = {} if revision is None else {"revision": revision}
    if name == "AutoModelForSequenceClassification":
        hub["num_labels"] = 1
    told = "".join(f", {key}={value!r}" for key, value in hub.items())
    with verify.quiet():
        model = getattr(transformers, name).from_pretrained(
            base, dtype=torch.float32, trust_remote_code=False, **hub
        )
    lines = ""
    if encoding.bidirectional:
        lines += "base.config.is_causal = False  # it was trained to look both ways\n"
        model.config.is_causal = False
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        lines += "base.resize_token_embeddings(len(tokenizer))\n"
        fit_vocabulary(model, tokenizer)
    if hasattr(model, "score"):
        set_padding(model.config, tokenizer, encoding)
        padding = model.config.get_text_config().pad_token_id
        lines += f"base.config.pad_token_id = {padding}  # by which a pair's last token is found\n"
    return (
        f"""import torch
from peft import PeftModel
from transformers import {name}, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{card_page.HERE}")
base = {name}.from_pretrained({quoted(base)}, dtype=torch.float32{told})
{lines}model = PeftModel.from_pretrained(base, "{card_page.HERE}").eval()
""",
        PeftModel.from_pretrained(model, out).eval(),
    )
