"""ir_datasets as the independent reader of what ours read, with its files in a test's folder."""

from __future__ import annotations

import os
from typing import Any

import pytest


@pytest.fixture(scope="session")
def irds(tmp_path_factory: pytest.TempPathFactory) -> Any:
    os.environ["IR_DATASETS_HOME"] = str(tmp_path_factory.mktemp("ir_datasets"))
    return pytest.importorskip("ir_datasets")
