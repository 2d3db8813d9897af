"""What holds for every format: ids, packing, stray files, empty files and deep JSON."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from tests.files import judged, put, records
from tests.layouts import SOURCES, files_of
from tests.refusals import refused

from caravan.cli.evaluate import members
from caravan.data.collection import Collection
from caravan.data.readers.texts import UnlabelledTexts
from caravan.data.readers.training_rows import TrainingRows
from caravan.data.runs import Run, read_run, write_run

LABELLED = pytest.mark.parametrize("layout", [name for name in SOURCES if name != "flagembedding"])
FILES = [(layout, name) for layout in SOURCES for name in files_of(layout)]


def filled(layout: str, query: str = "q", passage: str = "p") -> dict[str, str]:
    """The files of one query and its passage."""
    return files_of(layout, [(passage, "", "fat")], [(query, "camel")], [(query, passage, 1)])


def build(folder: Path, layout: str) -> Collection:
    found: Collection = SOURCES[layout](str(folder)).collection(folder.parent / "cache")
    return found


@LABELLED
@pytest.mark.parametrize("space", ["\xa0", "\u3000"])
def test_ids_with_other_than_ascii_space_stay_whole(
    tmp_path: Path, layout: str, space: str, caplog: pytest.LogCaptureFixture
) -> None:
    query, passage = f"q{space}", f"{space}p{space}1"
    found = build(put(tmp_path / "set", filled(layout, query, passage)), layout)
    assert [name for name, *_ in records(found.corpus)] == [passage]
    assert judged(found, found.splits[-1]) == {(query, passage): 1}
    assert len([r for r in caplog.records if "2 ids have white space" in r.message]) == 1
    rows = found.queries.rows([query]), found.corpus.rows([passage])
    path = tmp_path / "x.trec"
    write_run(path, Run.from_flat(*rows, scores=[2.0]), found.queries, found.corpus)
    assert read_run(path, found.queries, found.corpus).passage_rows.tolist() == [0]
    # as trec_eval reads it: bytes.split divides where C's isspace does
    assert [len(line.split()) for line in path.read_bytes().splitlines()] == [6]


@LABELLED
def test_gzip_is_recognized_by_its_bytes(tmp_path: Path, layout: str) -> None:
    plain = build(put(tmp_path / "plain/set", filled(layout)), layout)
    zipped = put(tmp_path / "zipped/set", filled(layout), zipped=True)
    assert build(zipped, layout).digest == plain.digest
    for kind, packed in (("unnamed", True), ("misnamed", False)):
        for name, text in filled(layout).items():
            path = tmp_path / kind / "set" / (name if packed else f"{name}.gz")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        assert build(tmp_path / kind / "set", layout).digest == plain.digest
    cut = next(zipped.glob("*.gz"))
    cut.write_bytes(cut.read_bytes()[:-12])
    with refused("damaged-file", str(cut)):
        build(zipped, layout)


@LABELLED
def test_hidden_files_and_readmes_are_no_data(tmp_path: Path, layout: str) -> None:
    folder = put(tmp_path / "set", filled(layout))
    found = build(folder, layout)
    for below in (folder, folder / "qrels"):
        below.mkdir(exist_ok=True)
        for name in ("._test.tsv", "._queries.dev.tsv", "._train.jsonl", ".DS_Store"):
            (below / name).write_bytes(b"\0\5\x16\7\xb0")
        (below / "README.txt").write_text("about\n")
        (below / "readme.tsv").write_text("about\n")
    assert build(folder, layout).folder == found.folder


def test_hidden_files_are_neither_texts_nor_rows_nor_collections(tmp_path: Path) -> None:
    put(tmp_path / "texts", {"a.jsonl": '{"text": "camel"}\n', "._a.jsonl": "\0\5"})
    assert len(UnlabelledTexts(str(tmp_path / "texts")).collection(tmp_path / "cache").corpus) == 1
    row = '{"query": "camel", "pos": ["fat"], "neg": ["salt"]}\n'
    put(tmp_path / "rows", {"a.jsonl": row, "._a.jsonl": "\0\5"})
    assert len(TrainingRows(str(tmp_path / "rows")).collection(tmp_path / "cache").corpus) == 2
    put(tmp_path, {"suite/one/corpus.jsonl": "", "suite/._one/corpus.jsonl": ""})
    put(tmp_path, {"suite/forum/a/corpus.jsonl": "", "suite/forum/._a/corpus.jsonl": ""})
    names = [member.name for member in members(tmp_path / "suite", ["*"])]
    assert names == ["forum/a", "one"]


@pytest.mark.parametrize("content", ["", "\n \n"], ids=["no byte", "blank"])
@pytest.mark.parametrize(("layout", "name"), FILES)
def test_an_empty_file_is_named(layout: str, name: str, content: str, tmp_path: Path) -> None:
    folder = put(tmp_path / "set", filled(layout) | {name: content})
    with refused("empty-file", str(folder / name)):
        build(folder, layout)


@pytest.mark.parametrize("layout", ["beir", "tevatron beside a corpus", "flagembedding", "texts"])
@pytest.mark.parametrize("depth", [2_000, 200_000])
def test_deep_json_is_an_error_with_file_and_line(tmp_path: Path, layout: str, depth: int) -> None:
    deep = f'{{"text": {"[" * depth}{"]" * depth}}}\n'
    files = {"a.jsonl": '{"text": "fat"}\n'} if layout == "texts" else filled(layout)
    *_, last = files if layout != "beir" else ["corpus.jsonl"]
    folder = put(tmp_path / "set", files | {last: files[last] + deep})
    with refused("malformed-line", f"{last}:2"):
        if layout == "texts":
            UnlabelledTexts(str(folder)).collection(tmp_path)
        else:
            build(folder, layout)
