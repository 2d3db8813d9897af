"""Backbones: descriptions of a transformer, from which a stage builds its network.

`conf/backbone/*.yaml` names a backbone by `_target_`. Weights load only when a model is requested,
in float32; the precision of the arithmetic is up to the trainer or the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import PositiveInt
from torch import nn

from caravan.encoding import FILE, Encoding, read_encoding
from caravan.errors import InputError
from caravan.models import folder as model_folder
from caravan.models import loading
from caravan.models.adapters import adapter_config, copy_adapter, is_adapter, load_adapter
from caravan.models.crossencoder import with_head
from caravan.models.digests import adapter_base
from caravan.models.local_copy import local_copy
from caravan.models.preparing import prepared
from caravan.models.remote_code import is_allowed

INHERITED = (
    "query_template", "passage_template", "append_eos", "pooling", "normalize", "slots",
    "bidirectional", "instruction", "instructions",
)  # fmt: skip
"""Settings of `Encoding` that the next training takes from a model folder, unless it sets them."""


class Backbone(Protocol):
    """Everything that a stage needs of a transformer. Subclass `BaseBackbone` for the defaults.

    >>> from transformers import BertConfig, BertModel
    >>> class TinyBert(BaseBackbone):
    ...     def config(self, tokenizer):
    ...         shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ...         return BertConfig(vocab_size=100, intermediate_size=64, **shape)
    ...     def model(self, tokenizer):
    ...         return self.prepared(BertModel(self.config(tokenizer), add_pooling_layer=False))
    >>> model = TinyBert("tiny_bert", checkpointing=True).model(tokenizer=None)
    >>> model(torch.tensor([[5, 6, 7]])).last_hidden_state.shape
    torch.Size([1, 3, 32])

    Attributes:
        name: hub id or folder; recorded as the base model.
        attention: transformers' implementation; "auto" is `caravan.models.cpu` where suitable,
            "unpadded" is `caravan.models.varlen`.
        checkpointing: recompute activations in the backward pass.
        bidirectional: each token attends to the whole text; an encoder does so with False, too.
        trains_tokenizer: whether `tokenizer` reads the collection.
        quantization: transformers' config to quantize the base while loading, or None.
        dtype: of the weights when loaded; "auto" is that of the file.
        head_is_new: whether `scorer` has initialized a head at random.
    """

    name: str
    attention: str
    checkpointing: bool
    bidirectional: bool
    trains_tokenizer: bool
    quantization: Any
    dtype: torch.dtype | str
    head_is_new: bool

    def tokenizer(self, collection: Any, cache_dir: Path) -> Any:
        """transformers' tokenizer; `collection` is None where no training data is read."""

    def config(self, tokenizer: Any) -> Any:
        """transformers' config of the model, or of an adapter's base."""

    def model(self, tokenizer: Any) -> nn.Module:
        """The transformer without a head, for a retriever."""

    def scorer(self, tokenizer: Any) -> nn.Module:
        """The transformer with the head that it has, else with a new one, for a reranker."""

    def language_model(self, tokenizer: Any) -> Any:
        """The transformer with its output layer."""

    def use_adapters(self, peft: Any) -> None:
        """Called before weights load, with the `LoRA` of the run, or None."""

    def adapted(self, peft: Any, model: nn.Module, rows: Sequence[int] = ()) -> nn.Module:
        """The model with the adapters of `peft` (`LoRA.apply`)."""


@dataclass(eq=False)
class BaseBackbone(Backbone):
    """Settings and defaults that backbones share.

    Args:
        compile: compile the layers by torch.compile.
        trust_remote_code: run remote code (`caravan.models.remote_code`).
        The others: see `Backbone`.

    Raises:
        InputError: If `name` is a model folder, and its bidirectional model would become causal.
    """

    trains_tokenizer = False
    quantization = None
    dtype = torch.float32
    head_is_new = False
    name: str
    attention: str = "auto"
    checkpointing: bool = False
    bidirectional: bool = False
    compile: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        causal = not self.bidirectional and (Path(self.name) / FILE).is_file()
        if causal and read_encoding(Path(self.name))[0].bidirectional:
            text = f"{self.name} was trained with bidirectional attention"
            raise InputError("direction-mismatch", f"{text}; set backbone.bidirectional=true")

    def scorer(self, tokenizer: Any) -> nn.Module:
        self.head_is_new = True
        return with_head(self.model(tokenizer), tokenizer.pad_token_id)

    def language_model(self, tokenizer: Any) -> Any:
        raise InputError("no-language-model", f"backbone={self.name} has no language model")

    def use_adapters(self, peft: Any) -> None:
        self.quantization = None if peft is None else peft.quantization()

    def adapted(self, peft: Any, model: nn.Module, rows: Sequence[int] = ()) -> nn.Module:
        return peft.apply(model, rows)

    def prepared(self, model: nn.Module) -> nn.Module:
        """The model with this backbone's attention direction, checkpointing and compilation."""
        return prepared(model, self.checkpointing, self.bidirectional, self.compile)

    def _loader(self, load: Any, **settings: Any) -> Any:
        """A function of `caravan.models.loading` with the settings of this backbone."""
        settings |= {"attention": self.attention, "quantization": self.quantization}
        trusted = self.trust_remote_code
        return partial(load, dtype=self.dtype, trust_remote_code=trusted, **settings)


class Pretrained(BaseBackbone):
    """Any decoder or encoder of transformers, by hub id or folder.

    Args:
        name: hub id or folder, of a model or an adapter; None for the model of `gguf_file`.
        revision: a branch, tag or commit of the hub.
        gguf_file: path of a GGUF file, or `<package>/<file>` of an installed package, which is read
            where `name` is not available (`caravan.models.local_copy`).
        layers: keep the first layers only; None keeps all.
        The others: see `BaseBackbone`.
    """

    def __init__(
        self,
        name: str | None,
        revision: str | None = None,
        gguf_file: str | None = None,
        layers: PositiveInt | None = None,
        attention: str = "auto",
        trust_remote_code: bool = False,
        checkpointing: bool = False,
        bidirectional: bool = False,
        compile: bool = False,
    ) -> None:
        if name is None and gguf_file is None:
            raise InputError("nothing-chosen", "set backbone.name, or backbone.gguf_file")
        given = name or str(gguf_file)
        super().__init__(given, attention, checkpointing, bidirectional, compile, trust_remote_code)
        self.revision = revision
        self._copied: dict[str, Any] = {"name": name, "revision": revision, "layers": layers}
        self._copied |= {"gguf_file": gguf_file, "trust_remote_code": trust_remote_code}

    def tokenizer(self, collection: Any, cache_dir: Path) -> Any:
        if copy := local_copy(cache_dir, **self._copied):
            self.name, self.revision = str(copy), None
        name, revision = self.name, self.revision
        if not loading.has_tokenizer(name, revision):
            name, revision = self._source()
        tokenizer = loading.load_tokenizer(name, self.trust_remote_code, revision=revision)
        if not self.trust_remote_code:
            self.config(tokenizer)  # refuses a model with remote code before data is read
        return tokenizer

    def config(self, tokenizer: Any) -> Any:
        name, revision = self._source()
        return loading.load_config(name, self.trust_remote_code, revision=revision)

    def model(self, tokenizer: Any) -> nn.Module:
        model = self.prepared(self._load(loading.load_weights))
        if is_adapter(self.name, self.revision):
            return load_adapter(model, self.name, self.revision, trainable=True)
        return model

    def language_model(self, tokenizer: Any) -> Any:
        if is_adapter(self.name, self.revision):
            raise InputError("no-language-model", f"{self.name} is an adapter; set its base")
        if loading.is_classifier(self.config(tokenizer)):
            text = f"{self.name} has a trained head for scores; set encoding.scoring=head"
            raise InputError("no-language-model", text)
        return self.prepared(self._load(loading.load_language_model))

    def scorer(self, tokenizer: Any) -> nn.Module:
        pad_id = tokenizer.pad_token_id
        if is_adapter(self.name, self.revision):
            model = with_head(self.prepared(self._load(loading.load_weights)), pad_id)
            return load_adapter(model, self.name, self.revision, trainable=True)
        self.head_is_new = not loading.is_classifier(self.config(tokenizer))
        return self.prepared(self._load(loading.load_scorer, pad_id=pad_id))

    def _source(self) -> tuple[str, str | None]:
        """Name and revision of the weights: those of the base that a released adapter names."""
        if not is_adapter(self.name, self.revision):
            return self.name, self.revision
        config = adapter_config(self.name, self.revision)
        return config.base_model_name_or_path, config.revision

    def _load(self, load: Any, **settings: Any) -> Any:
        name, revision = self._source()
        return self._loader(load, **settings)(name, revision=revision)


class FromFolder(BaseBackbone):
    """The transformer of a model folder, to train further.

    With adapters (`peft`), the folder's own adapter stays apart and is trained on; without, it is
    merged and all weights are trained.

    Args:
        folder: of a retriever, a reranker or an adapted model.
        bidirectional: None is the folder's.
        The others: see `BaseBackbone`.

    Raises:
        InputError: If a bidirectional model would become causal, or remote code is not allowed.
    """

    def __init__(
        self,
        folder: str,
        attention: str = "auto",
        checkpointing: bool = False,
        bidirectional: bool | None = None,
        compile: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        encoding, facts = read_encoding(Path(folder))
        if bidirectional is None:
            bidirectional = encoding.bidirectional
        trusted = is_allowed(Path(folder), encoding, facts, trust_remote_code)
        super().__init__(folder, attention, checkpointing, bidirectional, compile, trusted)
        self.folder, self.encoding = Path(folder), encoding
        self.full = facts["weights"] == "full"
        self.keeps_adapter = False

    @staticmethod
    def inherited(folder: Path) -> dict[str, Any]:
        """The settings of `Encoding` that a training from a folder has by default.

        A retriever cannot use the prompts of a reranker, but the direction of attention stays.
        """
        encoding, _ = read_encoding(folder)
        if encoding.kind == "reranker":
            encoding = Encoding(bidirectional=encoding.bidirectional)
        return {name: getattr(encoding, name) for name in INHERITED}

    def tokenizer(self, collection: Any, cache_dir: Path) -> Any:
        return loading.load_tokenizer(self.name, self.trust_remote_code)

    def config(self, tokenizer: Any) -> Any:
        name, revision = (self.name, None) if self.full else adapter_base(self.folder)
        return loading.load_config(name, self.trust_remote_code, revision=revision)

    def use_adapters(self, peft: Any) -> None:
        super().use_adapters(peft)
        self.keeps_adapter = peft is not None and not self.full

    def model(self, tokenizer: Any) -> nn.Module:
        """The transformer without a head; a head that the folder has is left out."""
        if self.keeps_adapter:
            return self.prepared(self._base(loading.load_weights))
        if self.quantization is not None and not self._has_head:
            return self.prepared(self._loader(loading.load_weights)(self.name))
        model = self._full_model().base_model
        loading.drop_pooler(model)
        return self.prepared(model)

    def scorer(self, tokenizer: Any) -> nn.Module:
        """The transformer with its head, or with a new one if the folder is not a reranker's."""
        if not self._has_head:
            return super().scorer(tokenizer)
        if not self.keeps_adapter:
            return self.prepared(self._full_model())
        # `adapted` copies the folder's head with its adapter.
        return self.prepared(self._base(loading.load_scorer, pad_id=tokenizer.pad_token_id))

    def language_model(self, tokenizer: Any) -> Any:
        """The transformer with its output layer, which the folder or its base must have."""
        if self.keeps_adapter:
            return self.prepared(self._base(loading.load_language_model))
        whole = self.encoding.scoring != "head"
        if self.full and not whole:
            return self.prepared(self._loader(loading.load_language_model)(self.name))
        full = self._full_model()
        if whole:
            return self.prepared(full)
        # The adapter is of the trunk alone; the output layer is its base's.
        model = self._base(loading.load_language_model)
        loading.fit_vocabulary(model, tokenizer)
        model.base_model.load_state_dict(full.base_model.state_dict())
        model.tie_weights()
        return self.prepared(model)

    def adapted(self, peft: Any, model: nn.Module, rows: Sequence[int] = ()) -> nn.Module:
        """The model with adapters, initialized from the folder's if it keeps one."""
        model = super().adapted(peft, model, rows)
        if self.keeps_adapter:
            copy_adapter(model, self.name)
        return model

    @property
    def _has_head(self) -> bool:
        return self.encoding.kind == "reranker" and self.encoding.scoring == "head"

    def _base(self, load: Any, **settings: Any) -> Any:
        """The base of the folder's adapter."""
        return model_folder.load_base(self.folder, self._loader(load, **settings))

    def _full_model(self) -> Any:
        """The folder's transformer with everything that it has; an adapter is merged."""
        if self.quantization is not None:
            raise InputError(
                "not-quantizable",
                f"peft=qlora cannot be initialized from {self.name}, only from an adapter or from a"
                " fully fine-tuned retriever; set peft=lora",
            )
        dtype = self.dtype if self.full else torch.float32  # merging in bf16 would round
        trusted = self.trust_remote_code
        model, *_ = model_folder.load(self.folder, dtype, trust_remote_code=trusted)
        model.transformer.requires_grad_(True)  # a merged adapter leaves its base frozen
        return loading.set_attention(model.transformer, self.attention)
