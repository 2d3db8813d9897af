"""Low-rank adapters: put on a backbone, and loaded without a weight lost or left over.

PEFT loads an adapter onto the wrong base, or without its head, with no more than a warning; what
comes out then embeds or scores at random. Here every weight must find its place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from caravan.errors import InputError


class LoRA:
    """Low-rank adapters (arXiv 2106.09685) on a frozen backbone; defaults are RepLLaMA's.

    Args:
        rank, alpha, dropout: as in PEFT.
        targets: names of the linear layers, or "all-linear".
    """

    def __init__(
        self,
        rank: int = 32,
        alpha: int = 64,
        dropout: float = 0.1,
        targets: list[str] | str = "all-linear",
    ) -> None:
        self.settings: dict[str, Any] = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout}
        self.targets = targets

    def apply(self, model: nn.Module) -> nn.Module:
        """Freeze the model and put adapters on it; these and a reranker's head are trained."""
        from peft import LoraConfig, TaskType, get_peft_model

        scores = hasattr(model, "score") or hasattr(model, "classifier")
        config = LoraConfig(
            task_type=TaskType.SEQ_CLS if scores else TaskType.FEATURE_EXTRACTION,
            target_modules=self.targets,
            revision=getattr(model, "revision", None),  # the adapter finds the same base again
            **self.settings,
        )
        return get_peft_model(model, config)


def is_adapter(name: str, revision: str | None = None) -> bool:
    """Whether a hub id or folder holds an adapter and not a whole model."""
    folder = Path(name)
    if folder.is_dir():
        return (folder / "adapter_config.json").is_file()
    if folder.is_absolute() or name.count("/") > 1:
        return False
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        return HfApi().file_exists(name, "adapter_config.json", revision=revision)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError):
        return False  # what cannot be asked is told when the weights are loaded


def load_adapter(model: nn.Module, name: str, revision: str | None = None) -> Any:
    """Put a saved adapter (.safetensors or .bin) on its base; PEFT's model in eval mode.

    Args:
        name: folder or hub id.

    Raises:
        InputError: a weight of the adapter or of its head is missing, not used, or misshapen.
    """
    from peft import PeftModel, get_peft_model_state_dict
    from peft.utils import load_peft_weights

    hub: dict[str, Any] = {} if revision is None else {"revision": revision}
    try:
        stored = set(load_peft_weights(name, device="cpu", **hub))
        peft = PeftModel.from_pretrained(model, name, **hub)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        told = str(error).strip().splitlines()[0].rstrip(".")
        if isinstance(error, KeyError):
            told = f"{error.args[0]} missing"
        raise InputError(f"{name}: the adapter does not load ({told})") from None
    wanted = set(get_peft_model_state_dict(peft))
    if stored != wanted:
        missing, unused = sorted(wanted - stored), sorted(stored - wanted)
        keys = [f"{key} missing" for key in missing] + [f"{key} not used" for key in unused]
        base = type(model).__name__
        raise InputError(
            f"{name} does not fit {base}: {len(missing)} weights missing, {len(unused)} not used"
            f" ({', '.join(keys)[:300]}); it is of another base or task"
        )
    return peft


def merged(peft: Any) -> nn.Module:
    """The base with the adapter added into its weights: plain layers, which pack and run faster."""
    model = peft.merge_and_unload()
    if hasattr(model, "peft_config"):
        del model.peft_config  # else a saved model would be taken for an adapter
    return model


def copy_adapter(peft: Any, name: str) -> int:
    """Copy a saved adapter's low-rank weights into a new one; returns how many.

    A retriever's adapter sits on the transformer itself, a reranker's one level deeper.

    Raises:
        InputError: the new adapter has another rank or other targets.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils import load_peft_weights

    def layer(key: str) -> str:
        return key[key.index(".layer") :] if ".layer" in key else key

    stored = {layer(k): w for k, w in load_peft_weights(name, device="cpu").items() if ".lora" in k}
    new = {key: weight for key, weight in get_peft_model_state_dict(peft).items() if ".lora" in key}
    shapes = {layer(key): tuple(weight.shape) for key, weight in new.items()}
    if {key: tuple(weight.shape) for key, weight in stored.items()} != shapes:
        raise InputError(
            f"init_from={name} has an adapter of another rank or on other layers than peft asks"
            " for; set peft.rank and peft.targets to its own, or peft=none to merge it"
        )
    taken = {key: stored[layer(key)] for key in new}
    set_peft_model_state_dict(peft, {**get_peft_model_state_dict(peft), **taken})
    return len(taken)
