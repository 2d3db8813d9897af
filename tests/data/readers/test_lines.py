"""Large files: memory does not grow with the corpus, and their digests are kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from caravan.data.readers import lines
from caravan.data.readers.lines import digest

CONVERT = """
import resource, sys
from caravan.data import texts
from caravan.data.readers.msmarco import MsMarcoPassage
from caravan.data.readers.training_rows import TrainingRows
reader, cache, *sources = sys.argv[1:]
texts.BATCH_BYTES = 2**20  # growth shows in files of some megabytes
for source in sources:
    found = {"msmarco": MsMarcoPassage, "tevatron": TrainingRows}[reader](source).collection(cache)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(len(found.corpus), peak / 1024, flush=True)
"""
TEXT = " ".join(f"word{n}" for n in range(400))  # 3 KB


def ms_marco(folder: Path, passages: int, text: str = TEXT) -> Path:
    folder.mkdir()
    with open(folder / "collection.tsv", "w") as file:
        file.writelines(f"{n}\t{n} {text}\n" for n in range(passages))
    (folder / "queries.train.tsv").write_text("q\twhat is it\n")
    (folder / "qrels.train.tsv").write_text(f"q 0 {passages - 1} 1\n")
    return folder


def tevatron(file: Path, passages: int) -> Path:
    """Rows of ten negatives, five of them those of the row before."""
    with open(file, "w") as rows:
        for n in range(0, passages, 5):
            texts = [{"docid": f"p{i}", "text": f"{i} {TEXT}"} for i in range(n, n + 11)]
            row = {"query_id": f"q{n}", "query": f"{n}", "positive_passages": texts[:1]}
            rows.write(json.dumps({**row, "negative_passages": texts[1:]}) + "\n")
    return file


def command(reader: str, cache: Path, *sources: Path) -> list[str]:
    return [sys.executable, "-c", CONVERT, reader, str(cache), *map(str, sources)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux tells it")
@pytest.mark.parametrize(
    ("small", "large"), [(2_000, 22_000), pytest.param(10_000, 600_000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("reader", ["msmarco", pytest.param("tevatron", marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_corpus(
    tmp_path: Path, reader: str, small: int, large: int
) -> None:
    write: Any = ms_marco if reader == "msmarco" else tevatron
    sources = [write(tmp_path / "1.jsonl", small), write(tmp_path / "2.jsonl", large)]
    printed = subprocess.run(
        command(reader, tmp_path, *sources), check=True, capture_output=True, text=True
    ).stdout.split()
    few, many = int(printed[0]), int(printed[2])
    before, after = float(printed[1]), float(printed[3])  # MiB, the peak so far
    assert (few, many) == ((small, large) if reader == "msmarco" else (small + 6, large + 6))
    text = (many - few) * len(TEXT) / 2**20
    assert after - before < text / 2
    assert after - before < 32 + 64 * (many - few) / 2**20  # some bytes for each id


def test_the_digest_of_a_large_file_is_kept_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "KEPT_FROM_BYTES", 4)
    file = tmp_path / "a.tsv"
    file.write_text("camel")
    first = digest(file, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(lines.manifests, "content", lambda _: pytest.fail("read again"))
        assert digest(file, tmp_path) == first
    times = file.stat()
    file.write_text("salty")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert digest(file, tmp_path) != first
