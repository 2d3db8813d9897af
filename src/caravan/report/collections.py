"""The table of suites under its former name, until evaluations no longer print it themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caravan.report.suites import collect_suites, read_suites, show_suites


def show(folders: Sequence[Path]) -> None:
    show_suites(read_suites(folders), folders[0] if len(folders) == 1 else None)


def collect(folders: Sequence[Path]) -> tuple[Any, Any, Any]:
    found = collect_suites(read_suites(folders))
    columns = {column: of.dropna().to_dict() for column, of in found.scores.items()}
    return list(found.scores.index), columns, found.notes
