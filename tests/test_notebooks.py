"""Every notebook runs from its first cell to its last on the tiny collection."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from tests.commands import evaluate

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = {"look", "inspect_run"}


def test_there_are_the_notebooks_that_the_docs_name() -> None:
    names = {path.stem for path in NOTEBOOKS}
    assert names == {"look", "inspect_run", "compare", "embed"}


@pytest.fixture(scope="module")
def home(beir: Path, folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what `make quickstart` leaves, made of the tiny collection."""
    home = tmp_path_factory.mktemp("home")
    for name in ("retriever", "reranker"):
        (home / "runs/quickstart/train" / name).mkdir(parents=True)
        (home / "runs/quickstart/train" / name / "model").symlink_to(folders[name])
    quick = ("measures=[MRR@10,nDCG@10]", "index.k=20", "rerank.depth=10", "precision=float32")
    both = f"[bm25,{folders['retriever']}]"
    reranked = f"reranker={folders['reranker']}"
    evaluate(beir, home / "runs/quickstart/pipeline", both, reranked, *quick)
    evaluate(
        beir, home / "runs/quickstart/unadapted", folders["retriever"], "query_length=8", *quick
    )
    return home


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.slow] * (path.stem not in QUICK))
        for path in NOTEBOOKS
    ],
)
def test_a_notebook_runs_and_prints(
    path: Path, beir: Path, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARAVAN_DATA", str(beir))
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path))
    monkeypatch.setenv("CARAVAN_HOME", str(home))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells)
    assert all(cell.outputs for cell in cells)
    printed = [_text(output) for cell in cells for output in cell.outputs]
    for wanted in _wanted(path.stem, home):
        assert any(wanted in text for text in printed), wanted


@pytest.mark.parametrize("name", ["compare", "embed", "inspect_run"])
def test_a_notebook_without_the_quickstart_names_the_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path))
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    with pytest.raises(SystemExit, match=r"run `make (quickstart|ablation)`, or name"):
        exec(compile(first.source, name, "exec"), {})


def _text(output: Any) -> str:
    return str(output.get("text") or output.get("data", {}).get("text/plain", ""))


def _wanted(name: str, home: Path) -> list[str]:
    """What a notebook is to print: figures are those that the evaluations have written."""
    of = {
        folder: json.loads((home / "runs/quickstart" / folder / "metrics.json").read_text())
        for folder in ("unadapted", "pipeline")
    }
    if name == "look":
        bm25 = next(stage for stage in of["pipeline"]["stages"] if stage["stage"] == "bm25")
        return [f"'MRR@10': {round(bm25['overall']['MRR@10'], 4)}"]
    if name == "compare":
        return [f"without  {{'MRR@10': {round(of['unadapted']['overall']['MRR@10'], 4)}"]
    if name == "inspect_run":
        return [f"{of['pipeline']['queries']} queries with 10 passages each", "first stage "]
    return ["(3, 32) float32", "Return the number of times a value occurs in a list."]
