"""Released adapters, adopted by conf/experiment/released: what their model cards' code computes."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.commands import adopt
from tests.models.released import (
    OLDER_FIELDS,
    RERANKER,
    RERANKERS,
    RETRIEVER,
    adapter_weights,
    release,
    save_base,
)
from tests.models.small import close
from tests.refusals import refused
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from caravan.data.batch import pack
from caravan.data.pairs import PairTemplates
from caravan.data.tokenization import Templates
from caravan.encoding import Encoding
from caravan.models import folder
from caravan.models.adapters import load_adapter
from caravan.models.backbone import Pretrained
from caravan.models.biencoder import BiEncoder

QUERY = "which camel has water"
PASSAGES = [
    ("Title", "the caravan guide had water at the well"),
    ("https://oasis.example/salt Title", "salt route " * 9 + "market"),
    ("Title", "star"),
]


@pytest.fixture(scope="session")
def base(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("llama"), tokenizer)


def _adopt(experiment: str, released: Path, run_dir: Path) -> tuple[Any, Any, Any, Any]:
    """The model folder of an experiment on a released adapter, loaded."""
    return folder.load(adopt(released, run_dir, f"experiment=released/{experiment}"))


@torch.no_grad()
def _by_the_cards_code(experiment: str, released: Path, base: Path) -> Tensor:
    """Embeddings or scores, by the code of the model card."""
    reranks, tokenizer = experiment in RERANKERS, AutoTokenizer.from_pretrained(base)
    auto: Any = AutoModelForSequenceClassification if reranks else AutoModel
    plain = auto.from_pretrained(base, **({"num_labels": 1} if reranks else {}))
    model: Any = PeftModel.from_pretrained(plain, str(released)).merge_and_unload().eval()
    if reranks:
        pairs = [(f"query: {QUERY}", f"document: {title} {text}") for title, text in PASSAGES]
        return torch.stack(
            [model(**tokenizer(*pair, return_tensors="pt")).logits[0][0] for pair in pairs]
        )
    texts = [f"query: {QUERY}</s>", *(f"passage: {title} {text}</s>" for title, text in PASSAGES)]
    outputs = [model(**tokenizer(text, return_tensors="pt")) for text in texts]
    rows = [torch.nn.functional.normalize(out.last_hidden_state[0][-1], dim=0) for out in outputs]
    return torch.stack(rows)


@torch.no_grad()
def _computed(loaded: tuple[Any, Any, Any, Any]) -> Tensor:
    """Embeddings or scores of a model folder."""
    model, tokenizer, encoding, _ = loaded
    if encoding.kind == "reranker":
        pairs = PairTemplates(tokenizer, encoding).pairs([("", QUERY)] * len(PASSAGES), PASSAGES)
        return model.score(pack([pair.ids for pair in pairs], 64))
    templates = Templates(tokenizer, encoding)
    return model.embed(pack([*templates.queries([("", QUERY)]), *templates.passages(PASSAGES)], 64))


def _stored_in(file: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"file": file, "change": lambda weights: {k: w.to(dtype) for k, w in weights.items()}}


BIN = _stored_in("adapter_model.bin", torch.float16)
SAFE = _stored_in("adapter_model.safetensors", torch.float32)


@pytest.mark.parametrize(
    ("experiment", "form"), [(RETRIEVER, BIN), (RETRIEVER, SAFE), (RERANKER, BIN)]
)
def test_an_adopted_adapter_computes_what_its_model_card_does(
    experiment: str, form: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    """In float32, whatever the precision of its file."""
    released = release(tmp_path / "released", base, experiment, **form)
    loaded = _adopt(experiment, released, tmp_path / "run")
    expected = _by_the_cards_code(experiment, released, base)
    close(_computed(loaded), expected)
    assert expected.std() > 1e-2
    assert loaded[3]["weights"] == "adapter"


def test_a_released_adapter_is_trained_further(
    base: Path, tokenizer: Any, encoding: Encoding, tmp_path: Path
) -> None:
    released = release(tmp_path / "released", base, RETRIEVER)
    model = BiEncoder(Pretrained(str(released)).model(tokenizer), encoding)
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    assert len(trainable) == len(adapter_weights(reranks=False))
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    texts = pack([[5, 6, 7], [8, 9, 10, 11]], 99)
    before = model.embed(texts).detach()
    (model.embed(texts) @ torch.arange(32.0)).sum().backward()
    optimizer.step()
    folder.save(tmp_path / "m", model.eval(), tokenizer, encoding, {})
    loaded, _, _, facts = folder.load(tmp_path / "m")
    with torch.no_grad():
        close(loaded.embed(texts), model.embed(texts))
        assert (loaded.embed(texts) - before).abs().max() > 1e-3
    assert facts["weights"] == "adapter"


def _wrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The head's key with its wrapper, as a state_dict that was saved whole has it."""
    head = weights.pop("base_model.model.score.weight")
    return {**weights, "base_model.model.score.modules_to_save.weight": head}


def _named(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's name left in every key, and the head that was replaced beside its heir."""
    head = weights.pop("base_model.model.score.weight")
    named = {key.replace(".weight", ".default.weight"): w for key, w in weights.items()}
    named["base_model.model.score.original_module.weight"] = torch.ones(1, 32)
    return {**named, "base_model.model.score.modules_to_save.default.weight": head}


@pytest.mark.parametrize("change", [_wrapped, _named])
def test_older_layouts_of_the_head_are_read_as_todays(
    change: Any, base: Path, tmp_path: Path
) -> None:
    plain = release(tmp_path / "plain", base, RERANKER)
    released = release(tmp_path / "released", base, RERANKER, change=change, **OLDER_FIELDS)
    loaded = _adopt(RERANKER, released, tmp_path / "run")
    close(_computed(loaded), _by_the_cards_code(RERANKER, plain, base))


LAYER = "layers.1.mlp.up_proj.lora_B.weight"


def _without(part: str) -> Any:
    return lambda weights: {key: w for key, w in weights.items() if part not in key}


def _with(key: str, *shape: int) -> Any:
    return lambda weights: {**weights, f"base_model.model.{key}": torch.ones(shape)}


HEAD = "base_model.model.score"


@pytest.mark.parametrize(
    ("experiment", "change", "key"),
    [
        (RETRIEVER, _without(LAYER), f"{LAYER} missing"),
        (RERANKER, _without(LAYER), f"{LAYER} missing"),
        (RERANKER, _without("score.weight"), f"{HEAD}.weight missing"),
        (
            RERANKER,
            lambda weights: _with("score.original_module.weight", 1, 32)(_without(HEAD)(weights)),
            f"{HEAD}.original_module.weight not used",
        ),
        (
            RERANKER,
            _with("score.modules_to_save.weight", 1, 32),
            f"{HEAD}.modules_to_save.weight not used",
        ),
        (RETRIEVER, _with("layers.2.mlp.up_proj.lora_A.weight", 4, 32), "lora_A.weight not used"),
        (RETRIEVER, _with("score.weight", 1, 32), f"{HEAD}.weight not used"),
        (RETRIEVER, _with(LAYER, 40, 4), f"{LAYER} misshapen"),
    ],
)
def test_a_weight_missing_left_over_or_misshapen_is_refused_by_its_key(
    experiment: str, change: Any, key: str, base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    backbone = Pretrained(str(release(tmp_path / "released", base, experiment, change=change)))
    with refused("weights-mismatch", key):
        backbone.scorer(tokenizer) if experiment == RERANKER else backbone.model(tokenizer)


class _Malicious:
    """Unpickled without care, it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickled_adapter_does_not_run(zipped: bool, base: Path, tmp_path: Path) -> None:
    mark = tmp_path / "it ran"
    released = release(tmp_path / "released", base, RETRIEVER)
    weights: dict[str, Any] = {**adapter_weights(reranks=False), "code": _Malicious(mark)}
    if zipped:
        torch.save(weights, released / "adapter_model.bin")
    else:
        (released / "adapter_model.bin").write_bytes(pickle.dumps(_Malicious(mark)))
    with refused("unsafe-pickle", "adapter_model.bin"):
        Pretrained(str(released)).model(None)
    assert not mark.exists()
    if zipped:
        torch.load(released / "adapter_model.bin", weights_only=False)
        assert mark.exists()  # the file is what it is taken for


@pytest.mark.parametrize("file", ["adapter_model.bin", "adapter_model.safetensors", "a list"])
def test_a_truncated_adapter_or_one_without_named_weights_is_refused(
    file: str, base: Path, tmp_path: Path
) -> None:
    if file == "a list":
        released = release(tmp_path / "released", base, RETRIEVER)
        torch.save([1, 2], released / "adapter_model.bin")
    else:
        released = release(tmp_path / "released", base, RETRIEVER, file)
        (released / file).write_bytes((released / file).read_bytes()[:900])
    with refused("unreadable", str(released)):
        Pretrained(str(released)).model(None)


def test_an_adapter_keeps_the_name_of_its_base(base: Path, tmp_path: Path) -> None:
    named = {"base_model_name_or_path": "meta-llama/Llama-2-7b-hf", "revision": "0123abc"}
    released = release(tmp_path / "released", base, RETRIEVER, **named)
    kept = load_adapter(AutoModel.from_pretrained(base), str(released)).active_peft_config
    assert {name: getattr(kept, name) for name in named} == named


def test_a_tokenizer_beside_the_adapter_comes_before_its_bases(
    base: Path, tokenizer: Any, tmp_path: Path
) -> None:
    released = release(tmp_path / "released", base, RETRIEVER)
    own = type(tokenizer).from_pretrained(base)
    own.add_special_tokens({"pad_token": "<own>"})
    own.save_pretrained(released)
    assert Pretrained(str(released)).tokenizer(None, tmp_path).pad_token == "<own>"


def test_an_adapter_that_names_no_base_is_refused(base: Path, tmp_path: Path) -> None:
    released = release(tmp_path / "released", base, RETRIEVER, base_model_name_or_path=None)
    with refused("no-base-model", "adapter_config.json"):
        Pretrained(str(released)).tokenizer(None, tmp_path)
