"""A model folder that the tests of evaluations share."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.commands import train


@pytest.fixture(scope="module")
def model(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train(beir, run_dir, "trainer.max_steps=0")
    return run_dir / "model"
