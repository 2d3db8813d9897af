"""Texts by row and rows by id, from files that are mapped and never read whole."""

import logging
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
from datasets import Dataset
from tests.refusals import refused

from caravan.data import texts as texts_module
from caravan.data.texts import Texts, Written, is_id, write_texts

Records = list[tuple[str, str, str]]


def place(part: str, n: int) -> str:
    return f"{part}:{n + 1}"


def write(folder: Path, records: Records, resumes: bool = False) -> tuple[Texts, Written]:
    if not resumes:
        (folder / "corpus.arrow.journal").unlink(missing_ok=True)
    written = write_texts(folder, "corpus", records, place)
    return Texts(folder, "corpus"), written


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Texts:
    monkeypatch.setattr(texts_module, "BATCH_ROWS", 7)  # several record batches, the last short
    texts = [(f"p{n}", f"title {n}", f"text {n} \u2028\r\n ü") for n in range(100)]
    return write(tmp_path, texts)[0]


@pytest.mark.parametrize(
    "rows",
    [[5], [0, 99], [99, 0, 42, 42, 7, 6], slice(3, 30), slice(None), slice(90, 2, -9), []],
)
def test_texts_come_in_the_order_asked_for(many: Texts, rows: list[int] | slice) -> None:
    expected = list(range(100))[rows] if isinstance(rows, slice) else rows
    assert many.get(rows) == [(f"title {n}", f"text {n} \u2028\r\n ü") for n in expected]
    assert many.ids(rows) == [f"p{n}" for n in expected]


def test_a_row_outside_is_an_error_and_never_the_last_passage(many: Texts) -> None:
    for row in (-1, 100):
        with pytest.raises(IndexError):
            many.get([3, row])


def test_ids_lead_back_to_rows_and_unknown_ids_to_minus_one(many: Texts) -> None:
    rows = np.random.default_rng(0).permutation(100)
    names = [*many.ids(rows), "p100", "", "P1"]
    assert many.rows(names).tolist() == [*rows.tolist(), -1, -1, -1]
    assert many.rows([]).tolist() == []


def test_ids_with_one_hash_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "_id_hash", lambda name: len(name))
    found, _ = write(tmp_path, [(name, "", name) for name in ("aa", "b", "cc", "dd")])
    names = ["cc", "b", "dd", "ee", "aa", "f", "ggg"]
    assert found.rows(names).tolist() == [2, 1, 3, -1, 0, -1, -1]
    with refused("duplicate-id", "bb"):
        write(tmp_path, [(name, "", "x") for name in ("aa", "bb", "cc", "bb")])


def test_datasets_opens_the_same_file(many: Texts) -> None:
    rows = Dataset.from_file(str(many.folder / "corpus.arrow"))
    assert len(rows) == 100
    assert rows[42] == {"id": "p42", "title": "title 42", "text": many.get([42])[0][1]}


def test_no_records_make_texts_of_length_zero(tmp_path: Path) -> None:
    found, _ = write(tmp_path, [])
    assert len(found) == 0
    assert found.get(slice(None)) == []
    assert found.rows(["a"]).tolist() == [-1]


def _nothing(folder: Path) -> None: ...


def _cut_journal(folder: Path) -> None:
    journal = folder / "corpus.arrow.journal"
    journal.write_bytes(journal.read_bytes()[:-5])


def _no_journal(folder: Path) -> None:
    (folder / "corpus.arrow.journal").unlink()


def _flipped_bit(folder: Path) -> None:
    content = bytearray((folder / "corpus.arrow").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "corpus.arrow").write_bytes(content)


def _other_size(folder: Path) -> None:
    journal = folder / "corpus.arrow.journal"
    journal.write_bytes(b"9999999999999 x\n" + journal.read_bytes())


def _zeros(folder: Path) -> None:
    content = (folder / "corpus.arrow").read_bytes()
    (folder / "corpus.arrow").write_bytes(content[:-100] + bytes(100))


def _half_a_batch_more(folder: Path) -> None:
    with (folder / "corpus.arrow").open("ab") as file:
        file.write(b"\xff" * 50)


@pytest.mark.parametrize(
    ("damage", "kept"),
    [
        (_nothing, 42), (_half_a_batch_more, 42), (_cut_journal, 35), (_zeros, 35),
        (_flipped_bit, 14), (_no_journal, 0), (_other_size, 0),
    ],
)  # fmt: skip
def test_texts_continue_after_the_last_intact_batch_of_a_killed_process(
    tmp_path: Path,
    damage: Callable[[Path], None],
    kept: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(texts_module, "BATCH_ROWS", 7)
    records = [(f"p{n}\xa0", f"\ud800{n}", f"text {n}") for n in range(60)]
    for folder in ("killed", "whole"):
        (tmp_path / folder).mkdir()
    _interrupted(tmp_path / "killed", records[:45])
    damage(tmp_path / "killed")
    caplog.set_level(logging.INFO)
    _, continued = write(tmp_path / "killed", records, resumes=True)
    message = f"corpus: continuing after {kept} passages of an interrupted build"
    assert caplog.messages == ([message] if kept else [])
    _, whole = write(tmp_path / "whole", records)
    assert continued == whole
    for name in ("corpus.arrow", "corpus.ids.npy"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert write(tmp_path / "killed", [], resumes=True) == (ANY, whole)  # nothing is read again


def _interrupted(folder: Path, records: Records) -> None:
    """A write that is interrupted after these records."""

    def until() -> Iterator[tuple[str, str, str]]:
        yield from records
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_texts(folder, "corpus", until(), place)


def test_a_second_kill_loses_nothing_that_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(texts_module, "BATCH_ROWS", 7)
    records = [(f"p{n}", "", str(n)) for n in range(60)]
    _interrupted(tmp_path, records[:45])
    journal = (tmp_path / "corpus.arrow.journal").read_bytes()
    for read in (0, 20, 42, 44):  # before and while it reads the source again

        def until(read: int = read) -> Iterator[tuple[str, str, str]]:
            yield from records[:read]
            assert (tmp_path / "corpus.arrow.journal").read_bytes() == journal
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_texts(tmp_path, "corpus", until(), place)
    caplog.set_level(logging.INFO)
    write(tmp_path, records, resumes=True)
    assert caplog.messages == ["corpus: continuing after 42 passages of an interrupted build"]


A, B = ("a", "", "x"), ("b", "", "y")


@pytest.mark.parametrize(
    ("now", "line"), [([], 1), ([A], 2), ([A, ("b", "", "other")], 2), ([("a", "t", "x"), B], 1)]
)
def test_texts_of_another_source_are_not_mixed(
    tmp_path: Path, now: Records, line: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts_module, "BATCH_ROWS", 1)
    _interrupted(tmp_path, [A, B])
    with refused("changed-source", f"corpus:{line}"):
        write(tmp_path, now, resumes=True)
    assert len(write(tmp_path, now, resumes=True)[0]) == len(now)


def test_half_a_surrogate_pair_is_repaired(tmp_path: Path) -> None:
    found, _ = write(tmp_path, [("a", "", "x\ud800y"), ("b", "", "z")])
    assert found.get([0]) == [("", "x\ufffdy")]


def test_ids_are_refused_where_python_or_c_would_break_a_line(tmp_path: Path) -> None:
    for code in range(0x3100):
        breaks = len(f"a{chr(code)}b".splitlines()) > 1
        control = unicodedata.category(chr(code)) == "Cc" or chr(code) == " "
        assert is_id(f"a{chr(code)}b") == (not breaks and not control)
    for name in ("", " ", "a b", "a\n"):
        with refused("invalid-id", "corpus:2"):
            write(tmp_path, [("ok", "", "x"), (name, "", "x")])


def test_the_digest_follows_content_and_order_alone(tmp_path: Path) -> None:
    one, two = ("a", "b", "c"), ("d", "", "e")
    different = ([one, two], [two, one], [one], [("a", "bc", ""), two])
    digests = [write(tmp_path, records)[1].digest for records in (*different, different[0])]
    assert digests[0] == digests[-1]
    assert len(set(digests)) == 4
