"""Texts by row and rows by id, from files that are mapped and never read whole."""

import unicodedata
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from tests.refusals import refused

from caravan.data import texts as texts_module
from caravan.data.texts import Texts, is_id, write_texts

REFUSED = "\x00\x0b\x1c\x1f\x7f\x85\x9f\u2028\u2029"


def write(folder: Path, records: list[tuple[str, str, str]]) -> Texts:
    write_texts(folder, "corpus", records, lambda part, n: f"{part}:{n + 1}")
    return Texts(folder, "corpus")


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Texts:
    monkeypatch.setattr(texts_module, "BATCH_ROWS", 7)  # several record batches, the last short
    return write(tmp_path, [(f"p{n}", f"title {n}", f"text {n} \u2028\r\n ü") for n in range(100)])


@pytest.mark.parametrize(
    "rows",
    [[5], [0, 99], [99, 0, 42, 42, 7, 6], slice(3, 30), slice(None), slice(90, 2, -9), []],
)
def test_texts_come_in_the_order_asked_for(many: Texts, rows: list[int] | slice) -> None:
    expected = list(range(100))[rows] if isinstance(rows, slice) else rows
    assert many.get(rows) == [(f"title {n}", f"text {n} \u2028\r\n ü") for n in expected]
    assert many.ids(rows) == [f"p{n}" for n in expected]


@pytest.mark.parametrize("row", [-1, 100])
def test_a_row_outside_is_an_error_and_never_the_last_passage(many: Texts, row: int) -> None:
    with pytest.raises(IndexError):
        many.get([3, row])


def test_ids_lead_back_to_rows_and_unknown_ids_to_minus_one(many: Texts) -> None:
    rows = np.random.default_rng(0).permutation(100)
    names = [*many.ids(rows), "p100", "", "P1"]
    assert many.rows(names).tolist() == [*rows.tolist(), -1, -1, -1]
    assert many.rows([]).tolist() == []


def test_ids_with_one_hash_stay_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts_module, "_id_hash", lambda name: len(name))
    found = write(tmp_path, [("aa", "", "1"), ("b", "", "2"), ("cc", "", "3"), ("dd", "", "4")])
    names = ["cc", "b", "dd", "ee", "aa", "f", "ggg"]
    assert found.rows(names).tolist() == [2, 1, 3, -1, 0, -1, -1]
    with refused("duplicate-id", "bb"):
        write(tmp_path, [(name, "", "x") for name in ("aa", "bb", "cc", "bb")])


def test_datasets_opens_the_same_file(many: Texts) -> None:
    rows = Dataset.from_file(str(many.folder / "corpus.arrow"))
    assert len(rows) == 100
    assert rows[42] == {"id": "p42", "title": "title 42", "text": many.get([42])[0][1]}


def test_no_records_make_texts_of_length_zero(tmp_path: Path) -> None:
    found = write(tmp_path, [])
    assert len(found) == 0
    assert found.get(slice(None)) == []
    assert found.rows(["a"]).tolist() == [-1]


def test_half_a_surrogate_pair_is_repaired_and_counted(tmp_path: Path) -> None:
    written = write_texts(
        tmp_path, "corpus", [("a", "", "x\ud800y"), ("b", "", "z")], lambda p, n: p
    )
    assert written.repaired == 1
    assert Texts(tmp_path, "corpus").get([0]) == [("", "x\ufffdy")]


@pytest.mark.parametrize("name", ["", " ", "a b", "a\tb", "a\n", *(f"a{c}b" for c in REFUSED)])
def test_an_id_that_breaks_a_run_file_is_refused(tmp_path: Path, name: str) -> None:
    with refused("invalid-id"):
        write(tmp_path, [("ok", "", "x"), (name, "", "x")])


def test_ids_are_refused_where_python_or_c_would_break_a_line() -> None:
    for code in range(0x3100):
        breaks = len(f"a{chr(code)}b".splitlines()) > 1
        control = unicodedata.category(chr(code)) == "Cc" or chr(code) == " "
        assert is_id(f"a{chr(code)}b") == (not breaks and not control)


def test_the_digest_follows_content_and_order_alone(tmp_path: Path) -> None:
    def digest(*records: tuple[str, str, str]) -> str:
        return write_texts(tmp_path, "corpus", records, lambda p, n: p).digest

    one, two = ("a", "b", "c"), ("d", "", "e")
    assert digest(one, two) == digest(one, two)
    assert len({digest(one, two), digest(two, one), digest(one), digest(("a", "bc", ""), two)}) == 4
