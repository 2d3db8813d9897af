"""Backbones: a transformer loaded from a name, or from a model folder to train on from.

A backbone is a small description (methods `tokenizer` and `model`, and for rerankers `scorer` and
`language_model`) that `conf/backbone/*.yaml` names by `_target_`; weights load only when a model is
asked for. Weights are float32 here; the precision of the arithmetic is the trainer's or the
encoder's affair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from caravan.encoding import FILE, adapter_base, read_encoding
from caravan.errors import InputError
from caravan.models import folder
from caravan.models.adapter_files import (
    copy_adapter,
    is_adapter,
    load_adapter,
    load_base,
    released_base,
)
from caravan.models.crossencoder import with_head
from caravan.models.loading import (
    fit_vocabulary,
    has_tokenizer,
    load_config,
    load_language_model,
    load_scorer,
    load_tokenizer,
    load_weights,
    set_attention,
)
from caravan.models.preparing import Checkpointing, new_head, prepared
from caravan.models.remote_code import allowed


class Pretrained:
    """Any decoder or encoder of transformers, by hub id or folder.

    Args:
        name: hub id or folder.
        revision: a branch, tag or commit of the hub.
        attention: transformers' attention implementation; "auto" is `caravan.models.cpu`.
        trust_remote_code: run the repository's own code (`caravan.models.remote_code`).
        checkpointing: recompute activations in the backward pass (`caravan.models.preparing`).
        bidirectional: each token sees the whole text (`caravan.models.bidirectional`); False of an
            encoder, which is made so.
        compile: the layers, by torch.compile.
    """

    def __init__(
        self,
        name: str,
        revision: str | None = None,
        attention: str = "auto",
        trust_remote_code: bool = False,
        checkpointing: Checkpointing = False,
        bidirectional: bool = False,
        compile: bool = False,
    ) -> None:
        self.name = name
        self.attention = attention
        self.bidirectional = bidirectional
        self.trust_remote_code = trust_remote_code
        self.hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        self.checkpointing = checkpointing
        self.compile = compile
        self.quantization: Any = None  # `LoRA.quantization`: the base is loaded in four bits
        self.dtype: torch.dtype | str = torch.float32  # "auto": as stored, mapped and not read

    trains_tokenizer = False

    def tokenizer(self, collection: Any, cache_dir: Path) -> Any:
        """The model's own tokenizer, or that of an adapter's base; the collection plays no part."""
        revision = self.hub["revision"]
        if is_adapter(self.name, revision) and not has_tokenizer(self.name, revision):
            base, revision = released_base(self.name, revision)
            found = load_tokenizer(base, **{**self.hub, "revision": revision})
        else:
            found = load_tokenizer(self.name, **self.hub)
        if not self.trust_remote_code:
            self.config(found)  # a model that wants code of its own is refused before data is read
        return found

    def config(self, tokenizer: Any) -> Any:
        """transformers' config of the model, or of an adapter's base."""
        if is_adapter(self.name, self.hub["revision"]):
            base, revision = released_base(self.name, self.hub["revision"])
            return load_config(base, **{**self.hub, "revision": revision})
        return load_config(self.name, **self.hub)

    def model(self, tokenizer: Any) -> nn.Module:
        if is_adapter(self.name, self.hub["revision"]):
            return load_adapter(self._base(), self.name, self.hub["revision"], trainable=True)
        model = load_weights(
            self.name, self.dtype, self.attention, quantization=self.quantization, **self.hub
        )
        return self._prepared(model)

    def language_model(self, tokenizer: Any) -> nn.Module:
        """The model with its output layer."""
        if is_adapter(self.name, self.hub["revision"]):
            raise InputError(
                f"{self.name} is an adapter; a likelihood needs a language model: name its base"
            )
        model = load_language_model(
            self.name, self.attention, quantization=self.quantization, **self.hub
        )
        return self._prepared(model)

    def scorer(self, tokenizer: Any) -> nn.Module:
        """The model with the head that it was released with, else with a new one."""
        if is_adapter(self.name, self.hub["revision"]):
            headed = with_head(self._base(), tokenizer.pad_token_id)
            return load_adapter(headed, self.name, self.hub["revision"], trainable=True)
        scorer: Any
        scorer, scorer.head_is_new = load_scorer(
            *(self.name, self.dtype, self.attention, tokenizer.pad_token_id),
            quantization=self.quantization,
            **self.hub,
        )
        return self._prepared(scorer)

    def _base(self) -> nn.Module:
        """The base that a released adapter names."""
        base, revision = released_base(self.name, self.hub["revision"])
        model = load_weights(
            *(base, self.dtype, self.attention), **{**self.hub, "revision": revision}
        )
        return self._prepared(model)

    def _prepared(self, model: Any) -> nn.Module:
        if not self.bidirectional and (Path(self.name) / FILE).is_file():
            refuse_to_turn(self.name)
        return prepared(model, self.checkpointing, self.bidirectional, self.compile)


class Trained:
    """The transformer of a model folder, to train on from (`init_from`).

    Args:
        folder: of a retriever, a reranker or an adapted model.
        adapter: keep an adapter apart, for `LoRA` to go on with; else it is merged.
        attention, checkpointing, compile: as in the other backbones.
        bidirectional: likewise; a model that looks both ways cannot begin one that does not.
        trust_remote_code: run code that the model brings along (`caravan.models.remote_code`).

    Raises:
        InputError: it would; or the model wants code of its own that may not run.
    """

    trains_tokenizer = False

    def __init__(
        self,
        folder: str,
        adapter: bool,
        attention: str = "auto",
        checkpointing: Checkpointing = False,
        bidirectional: bool = False,
        compile: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = folder
        self.bidirectional = bidirectional
        if not bidirectional:
            refuse_to_turn(folder)
        encoding, facts = read_encoding(Path(folder))
        self.trusted = allowed(Path(folder), facts, trust_remote_code)
        self.scores = encoding.kind == "reranker" and encoding.scoring == "head"
        self.adapter = folder if adapter and facts["weights"] == "adapter" else None
        self.attention = attention
        self.checkpointing = checkpointing
        self.compile = compile
        self.counts: tuple[int, int] = (0, 0)  # weights loaded, and new ones
        self.copied = 0  # weights of the adapter
        self.quantization: Any = None  # `LoRA.quantization`: the base is loaded in four bits
        self.dtype: torch.dtype | str = torch.float32  # "auto": as stored, mapped and not read

    def tokenizer(self, collection: Any, cache_dir: Path) -> Any:
        """The folder's own tokenizer; the collection plays no part."""
        return load_tokenizer(self.name, trust_remote_code=self.trusted)

    def config(self, tokenizer: Any) -> Any:
        """transformers' config of the model, or of an adapter's base."""
        if read_encoding(Path(self.name))[1]["weights"] == "adapter":
            base, revision = adapter_base(Path(self.name))
            return load_config(base, self.trusted, revision=revision)
        return load_config(self.name, self.trusted)

    def model(self, tokenizer: Any) -> nn.Module:
        """The transformer without a head; what a head the folder has is left out."""
        if self.adapter is not None:
            fetch = partial(
                load_weights,
                dtype=self.dtype,
                attention=self.attention,
                quantization=self.quantization,
                trust_remote_code=self.trusted,
            )
            model: Any = load_base(Path(self.adapter), fetch)
        elif self.quantization is not None:
            if self.scores or read_encoding(Path(self.name))[1]["weights"] == "adapter":
                raise self._not_quantised()
            model = load_weights(
                *(self.name, self.dtype, self.attention),
                quantization=self.quantization,
                trust_remote_code=self.trusted,
            )
        else:
            model = self._whole().base_model
            if getattr(model, "pooler", None) is not None:
                model.pooler = None
        return self._prepared(model)

    def scorer(self, tokenizer: Any) -> nn.Module:
        """The transformer with its head, or with a new one if it was no reranker."""
        if not self.scores:
            model = self.model(tokenizer)
            self.counts = (self.counts[0], 1)
            return new_head(model, tokenizer)
        if self.adapter is None:
            if self.quantization is not None:
                raise self._not_quantised()
            return self._prepared(self._whole())
        fetch = partial(
            load_scorer,
            dtype=self.dtype,
            attention=self.attention,
            pad_id=tokenizer.pad_token_id,
            quantization=self.quantization,
            trust_remote_code=self.trusted,
        )
        scorer = load_base(Path(self.adapter), fetch)[0]
        return self._prepared(scorer)  # its head comes with the adapter

    def language_model(self, tokenizer: Any) -> nn.Module:
        """The transformer with its output layer, which the folder or the base must have."""
        fetch = partial(
            load_language_model, attention=self.attention, trust_remote_code=self.trusted
        )
        if self.adapter is not None:
            quantised = partial(fetch, quantization=self.quantization)
            return self._prepared(load_base(Path(self.adapter), quantised))
        if self.quantization is not None:
            raise self._not_quantised()
        encoding, facts = read_encoding(Path(self.name))
        if encoding.scoring == "likelihood":
            return self._prepared(self._whole())
        if facts["weights"] == "full":
            return self._prepared(fetch(self.name))
        # The adapter is of the trunk alone; the output layer is its base's.
        model: Any = load_base(Path(self.name), fetch)
        fit_vocabulary(model, tokenizer)
        trunk = self._whole().base_model
        model.base_model.load_state_dict(trunk.state_dict())
        model.tie_weights()
        return self._prepared(model)

    def adapted(self, peft: Any, model: nn.Module, rows: Sequence[int] = ()) -> nn.Module:
        """The model with adapters on it, which go on from those of the folder if it has any."""
        model = peft.apply(model, rows)
        if self.adapter is not None:
            self.copied = copy_adapter(model, self.adapter)
        return model

    @property
    def told(self) -> str:
        """How many weights came from where; empty before they are loaded."""
        if not self.counts:
            return ""
        whole, new = self.counts
        of_base = ""
        if self.adapter is not None:
            of_base = f" and {whole} from its base {adapter_base(Path(self.adapter))[0]}"
            whole = self.copied
        head = ", 1 new (score.weight)" if new else ""
        return f"{whole} weights taken from {self.name}{of_base}{head}"

    def _not_quantised(self) -> InputError:
        return InputError(
            f"peft=qlora cannot begin with {self.name}: it goes on with an adapter, or with the"
            " whole weights of a retriever; choose peft=lora"
        )

    def _whole(self) -> Any:
        whole = read_encoding(Path(self.name))[1]["weights"] == "full"
        dtype = self.dtype if whole else torch.float32  # an adapter is merged
        loaded = folder.load(Path(self.name), dtype, trust_remote_code=self.trusted)
        transformer = loaded[0].transformer
        transformer.requires_grad_(True)  # an adapter that is merged leaves its base frozen
        return set_attention(transformer, self.attention)

    def _prepared(self, model: Any) -> nn.Module:
        ours = model if self.adapter is None else model.base_model  # a head comes with its adapter
        self.counts = (sum(1 for _ in ours.parameters()), 0)
        return prepared(model, self.checkpointing, self.bidirectional, self.compile)


def refuse_to_turn(folder: str) -> None:
    """A model that was trained to look both ways computes nothing of use when it looks one way."""
    if read_encoding(Path(folder))[0].bidirectional:
        raise InputError(
            f"{folder} was trained to look both ways, so what begins with it does too; set"
            " backbone.bidirectional=true"
        )


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable and total parameters; one of four bits counts as one."""
    total = 0
    for parameter in model.parameters():
        packed = getattr(parameter, "quant_state", None)
        total += parameter.numel() if packed is None else math.prod(packed.shape)
    return sum(p.numel() for p in model.parameters() if p.requires_grad), total
