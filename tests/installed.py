"""An installed distribution, made by hand: files, metadata and their list."""

from __future__ import annotations

from pathlib import Path


def install(site: Path, name: str, files: dict[str, bytes], version: str = "1.0") -> None:
    """What an installer leaves in `site`; the order of `files` is that of the list (RECORD)."""
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    for file, content in files.items():
        (site / file).parent.mkdir(parents=True, exist_ok=True)
        (site / file).write_bytes(content)
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
