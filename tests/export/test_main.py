"""`python -m caravan.export`: its subcommands, exit codes and messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from tests.export.folders import make

from caravan.export import __main__ as command


def test_the_commands_write_and_report_a_mistake_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["caravan.export", *map(str, arguments)])
        code = command.main()
        output = capsys.readouterr()
        return code, output.out + output.err

    path, out, none = make(tmp_path / "model"), tmp_path / "out", tmp_path / "none"
    code, output = run("transformers", path, out)
    assert (code, str(out) in output) == (0, True)
    assert (out / "model.safetensors").is_file()
    code, output = run("card", path, "--license", "mit", "--language", "en")
    assert (code, f"hf upload <user>/<name> {path}" in output) == (0, True)
    assert ModelCard.load(path / "README.md").data.license == "mit"
    for given in (("sentence-transformers", none, tmp_path / "other"), ("card", none)):
        assert run(*given) == (2, f"{none}: no such model folder\n")
    (tmp_path / "file").touch()
    code, output = run("transformers", path, tmp_path / "file" / "out")
    assert (code, str(tmp_path / "file") in output) == (2, True)


def test_help_does_not_import_torch() -> None:
    code = "import sys, caravan.export.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
