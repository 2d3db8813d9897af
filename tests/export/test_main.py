"""`python -m caravan.export`: its subcommands, exit codes and messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tests.export.folders import make

from caravan.export import __main__ as command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def call(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["caravan.export", *map(str, arguments)])
        code = command.main()
        output = capsys.readouterr()
        return code, output.out + output.err

    return call


def test_exports_and_reports_a_mistake_in_one_line(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path, out = make(tmp_path / "model"), tmp_path / "out"
    code, output = run("transformers", path, out)
    assert (code, str(out) in output) == (0, True)
    assert (out / "model.safetensors").is_file()
    code, output = run("sentence-transformers", tmp_path / "none", tmp_path / "other")
    assert (code, output) == (2, f"{tmp_path / 'none'}: no such model folder\n")
    (tmp_path / "file").touch()
    code, output = run("transformers", path, tmp_path / "file" / "out")
    assert (code, str(tmp_path / "file") in output) == (2, True)


def test_writes_a_card_and_reports_a_mistake_in_one_line(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    path = make(tmp_path / "model")
    code, output = run("card", path, "--license", "mit", "--language", "en")
    assert code == 0
    assert f"hf upload <user>/<name> {path}" in output
    assert ModelCard.load(path / "README.md").data.license == "mit"
    code, output = run("card", tmp_path / "none")
    assert (code, output) == (2, f"{tmp_path / 'none'}: no such model folder\n")


def test_help_does_not_import_torch() -> None:
    code = "import sys, caravan.export.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
