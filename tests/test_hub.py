"""A hub that cannot be reached is told after one request, and is not asked for what is here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from caravan.data.readers.texts import HubTexts
from caravan.errors import InputError
from caravan.hub import refuse_unreachable
from caravan.models.backbone import Pretrained

REVISION = "0123456789012345678901234567890123456789"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names asked for, of a hub that does not answer."""

    class ConnectError(Exception):
        """Of the hub's client, which is no OSError."""

    def unreachable(_: object, name: str, **__: object) -> None:
        asked.append(name)
        raise ConnectError("no route to host")

    asked: list[str] = []
    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    return asked


def _tokenizer(tmp_path: Path) -> Any:
    return Pretrained("my-model").tokenizer(None, tmp_path)


def _model(_: Path) -> Any:
    return Pretrained("my-model").model(None)


def _texts(tmp_path: Path) -> Any:
    return HubTexts("my-texts").collection(tmp_path)


@pytest.mark.parametrize("load", [_tokenizer, _model, _texts])
def test_a_hub_that_cannot_be_reached_is_told_without_waiting(
    load: Callable[[Path], Any],
    requests: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """transformers and datasets try for one to two minutes, for what may be a folder's name."""
    for lengthy in ("datasets.load_dataset", "transformers.utils.peft_utils.cached_file"):
        monkeypatch.setattr(lengthy, lambda *_, **__: pytest.fail("it asks at length"))
    with pytest.raises(InputError, match=r"no folder my-\w+, and .* \(no route to host\)"):
        load(tmp_path)
    assert len(requests) == 1


def test_a_folder_and_what_was_loaded_before_need_no_hub(
    requests: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_unreachable(str(tmp_path))
    stored = tmp_path / "models--some--model"
    (stored / "snapshots" / REVISION).mkdir(parents=True)
    (stored / "snapshots" / REVISION / "config.json").write_text("{}")
    (stored / "refs").mkdir()
    (stored / "refs/main").write_text(REVISION)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refuse_unreachable("some/model")
    assert requests == []
    with pytest.raises(InputError, match="no folder some/other"):
        refuse_unreachable("some/other")
    with pytest.raises(InputError, match=r"\./gone: there is no such folder"):
        refuse_unreachable("./gone")
