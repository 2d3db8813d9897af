from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.fitting import Fit

from caravan.contract import Contract
from caravan.data.collection import Collection


@pytest.fixture
def fit(collection: Collection, tokenizer: Any, contract: Contract, tmp_path: Path) -> Fit:
    return Fit(collection, tokenizer, contract, tmp_path)
