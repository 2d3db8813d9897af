"""A Hub that cannot be reached is reported after one request; local folders need no request."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.refusals import refused

from caravan.data.readers.texts import UnlabelledTexts
from caravan.hub import refuse_unreachable
from caravan.models.backbone import Pretrained

REVISION = "0123456789012345678901234567890123456789"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names requested from a Hub that does not answer."""

    class ConnectError(Exception):
        """Of the Hub's client; not an OSError."""

    names: list[str] = []

    def unreachable(_: object, name: str, **__: object) -> None:
        names.append(name)
        raise ConnectError("no route to host")

    monkeypatch.setattr("huggingface_hub.HfApi.repo_info", unreachable)
    return names


@pytest.mark.parametrize(
    "load",
    [
        lambda folder: Pretrained("my-model").tokenizer(None, folder),
        lambda folder: Pretrained("my-model").model(None),
        lambda folder: UnlabelledTexts("my-texts").collection(folder),
    ],
)
def test_an_unreachable_hub_is_reported_without_waiting(
    load: Callable[[Path], Any],
    requests: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for retrying in ("datasets.load_dataset", "transformers.utils.peft_utils.cached_file"):
        monkeypatch.setattr(retrying, lambda *_, **__: pytest.fail("it retries"))
    with refused("hub-unreachable", "my-", "no route to host"):
        load(tmp_path)
    assert len(requests) == 1


def test_folders_and_cached_models_need_no_request(
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
    with refused("hub-unreachable", "some/other"):
        refuse_unreachable("some/other")
    with refused("folder-not-found", "./gone"):
        refuse_unreachable("./gone")
