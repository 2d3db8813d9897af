"""Every notebook runs from its first cell to its last on the tiny collection."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import nbformat
import pytest
from nbclient import NotebookClient
from tests.commands import evaluate

ROOT = Path(__file__).parents[1]
NOTEBOOKS = ("compare", "embed", "inspect_run", "look")
FIGURES = {"compare": 3, "embed": 2, "inspect_run": 3, "look": 3}
LINES, COLUMNS = 25, 80
"""The most that a cell prints."""


def test_there_are_the_notebooks_that_the_docs_name() -> None:
    assert tuple(sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))) == NOTEBOOKS


@pytest.fixture(scope="module")
def quickstart(
    beir: Path, folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder with what `make quickstart` leaves, made of the tiny collection."""
    home = tmp_path_factory.mktemp("home")
    for name in ("retriever", "reranker"):
        (home / "runs/quickstart/train" / name).mkdir(parents=True)
        (home / "runs/quickstart/train" / name / "model").symlink_to(folders[name])
    quick = ("measures=[MRR@10,nDCG@10]", "index.k=20", "rerank.depth=10", "precision=float32")
    both = f"[bm25,{folders['retriever']}]"
    reranker = f"reranker={folders['reranker']}"
    evaluate(beir, home / "runs/quickstart/pipeline", both, reranker, *quick)
    return home


@pytest.fixture(autouse=True)
def _inputs(beir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CARAVAN_DATA", str(beir))
    monkeypatch.setenv("CARAVAN_CACHE", str(tmp_path))


@pytest.fixture
def _restored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Notebooks change the working directory, the import path and the look of plots."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    matplotlib.use("agg")
    with matplotlib.rc_context():
        yield
    plt.close("all")


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_prints_a_screen_a_cell_and_labels_its_figures(
    name: str, quickstart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARAVAN_HOME", str(quickstart))
    drawn: list[Any] = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(plt.gcf()))
    scope: dict[str, Any] = {}
    printed = ""
    for cell in code_cells(name):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(cell.source, name, "exec"), scope)
        lines = output.getvalue().splitlines()
        assert len(lines) <= LINES
        assert max(map(len, lines), default=0) <= COLUMNS
        printed += output.getvalue()
    assert len(drawn) == FIGURES[name]
    for axes in (axes for figure in drawn for axes in figure.axes):
        assert axes.get_ylabel() or [label.get_text() for label in axes.get_yticklabels()]
        assert axes.get_xlabel() or axes.images or axes.get_label() == "<colorbar>"
    for wanted in wanted_of(name, quickstart):
        assert wanted in printed


@pytest.mark.slow
def test_without_the_quickstart_embed_trains_a_model_once_in_jupyter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path))
    (tmp_path / "train.py").symlink_to(ROOT / "train.py")
    notebook = executed("embed", tmp_path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == FIGURES["embed"]
    model = tmp_path / "runs/notebooks/embed/model/caravan.json"
    written = model.stat().st_mtime_ns
    assert "train.py" not in executed("embed", tmp_path).cells[1].outputs[0].text
    assert model.stat().st_mtime_ns == written


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("name", ["compare", "inspect_run"])
def test_a_notebook_without_the_quickstart_names_the_command(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CARAVAN_HOME", str(tmp_path))
    first = next(code_cells(name))
    with pytest.raises(SystemExit, match="run `make quickstart`, or name"):
        exec(compile(first.source, name, "exec"), {})


def code_cells(name: str) -> Iterator[Any]:
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    return (cell for cell in notebook.cells if cell.cell_type == "code")


def executed(name: str, folder: Path) -> Any:
    """The notebook with the outputs of a Jupyter kernel."""
    notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    return notebook


def wanted_of(name: str, home: Path) -> list[str]:
    """Lines that a notebook prints, with scores that the evaluation has written."""
    record = json.loads((home / "runs/quickstart/pipeline/metrics.json").read_text())
    bm25, retriever, *_ = record["stages"]
    if name == "look":
        return [f"MRR@10   {bm25['overall']['MRR@10']:.4f}"]
    if name == "compare":
        named = {"BM25      ": bm25, "retriever ": retriever}
        return [f"{label} {one['overall']['MRR@10']:8.4f}" for label, one in named.items()]
    if name == "inspect_run":
        return ["4 queries, 10 passages each", f"reranked   {record['overall']['MRR@10']:9.4f}"]
    return ["model: runs/quickstart/train/retriever/model", "was "]
