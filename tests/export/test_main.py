"""`python -m caravan.export`: its subcommands, exit codes and messages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from huggingface_hub import ModelCard
from tests.conftest import Call
from tests.export.folders import make

from caravan.export.__main__ import main


def test_the_commands_write_and_report_a_mistake_in_one_line(tmp_path: Path, call: Call) -> None:
    path, out, none = make(tmp_path / "model"), tmp_path / "out", tmp_path / "none"
    code, output, _ = call(main, "transformers", path, out)
    assert (code, str(out) in output) == (0, True)
    assert (out / "model.safetensors").is_file()
    code, output, _ = call(main, "card", path, "--license", "mit", "--language", "en")
    assert (code, f"hf upload <user>/<name> {path}" in output) == (0, True)
    assert ModelCard.load(path / "README.md").data.license == "mit"
    for given in (("sentence-transformers", none, tmp_path / "other"), ("card", none)):
        assert call(main, *given) == (2, "", f"{none}: no such model folder\n")
    (tmp_path / "file").touch()
    code, _, error = call(main, "transformers", path, tmp_path / "file" / "out")
    assert (code, str(tmp_path / "file") in error) == (2, True)


def test_help_does_not_import_torch() -> None:
    code = "import sys, caravan.export.__main__; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
