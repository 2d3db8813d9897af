"""BM25 against bm25s used plainly, its tokens in any script, and its files."""

import json
import unicodedata
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
import Stemmer
from tests.refusals import refused

from caravan.data.collection import Collection, write_collection
from caravan.retrieval import bm25
from caravan.retrieval.bm25 import BM25, tokens

TEXT = "the camels camel walking walks desert Wüste über salt salty of a b roads road x1 ١٢٣"
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """Short texts of few words, so that scores tie; one passage is empty, one has stop words."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, rng.integers(1, 9))) for _ in range(90)]
    texts[3], texts[60] = "", "the of a"
    corpus = [
        (f"p{i * 37 % 90}", "Salt-road" if i % 5 == 0 else "", t) for i, t in enumerate(texts)
    ]
    folder = tmp_path_factory.mktemp("words") / "words"
    return write_collection(folder, "words", corpus, [("q0", "", "salt")], {})


def plain(words: Collection, queries: list[str], method: str, language: str | None) -> np.ndarray:
    """Scores of every passage [Q, N] as bm25s gives them without us."""
    stemmer = Stemmer.Stemmer(language) if language else None
    corpus = [f"{title} {text}".strip() for title, text in words.corpus.get(slice(None))]
    options = {"stopwords": language, "stemmer": stemmer, "show_progress": False}
    index = bm25s.BM25(k1=0.9, b=0.4, method=method)
    index.index(bm25s.tokenize(corpus, **options), show_progress=False)
    asked = bm25s.tokenize(queries, return_ids=False, **options)
    return np.array([index.get_scores(q) if q else np.zeros(90) for q in asked])


@pytest.mark.parametrize(
    ("method", "language", "block"),
    [
        ("lucene", "english", 7),
        ("lucene", None, 99),
        ("robertson", None, 7),
        ("atire", "english", 7),
    ],
)
def test_scores_are_those_of_bm25s(
    tmp_path: Path, words: Collection, monkeypatch: Any, method: Any, language: Any, block: int
) -> None:
    monkeypatch.setattr(bm25, "BLOCK_ROWS", block)
    lexical = BM25(method=method, stopwords=language, stemmer=language)
    lexical.build(words.corpus, tmp_path / "index")
    rng = np.random.default_rng(1)
    queries = [" ".join(rng.choice(WORDS, 4)) for _ in range(20)] + ["", "zebra"]
    run = lexical.search(queries, np.arange(len(queries)))
    assert run.query_rows.tolist() == list(range(len(queries)))
    for query, scores in enumerate(plain(words, queries, method, language)):
        rows, found = run.of(query)
        # equal to the last bit, so that ties are the same ties
        np.testing.assert_array_equal(found, scores[rows].astype(np.float32))
        assert sorted(rows.tolist()) == np.flatnonzero(scores > 0).tolist()
        ranked = list(zip(found, words.corpus.ids(rows), strict=True))
        assert ranked == sorted(ranked, reverse=True)
    assert run.counts[-2:].tolist() == [0, 0]


def test_processes_find_what_one_finds(
    tmp_path: Path, words: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    lexical = BM25()
    lexical.build(words.corpus, tmp_path / "index")
    queries = [*WORDS, "", "salt camel", "zebra"] * 10
    rows = np.arange(len(queries))
    one = lexical.search(queries, rows, k=5)
    monkeypatch.setattr(bm25, "LARGE", 0)
    monkeypatch.setattr(bm25, "cores", lambda: 2)
    two = lexical.search(queries, rows, k=5)
    for name in ("query_rows", "offsets", "passage_rows", "scores"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_the_same_corpus_gives_the_same_bytes(tmp_path: Path, words: Collection) -> None:
    for name in ("one", "two"):
        BM25().build(words.corpus, tmp_path / name)
    vocabulary = list(json.loads((tmp_path / "one" / "vocab.index.json").read_text()))
    # bm25s alone would number terms by hash, differently in every process
    assert vocabulary == sorted(vocabulary)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two


def test_of_ties_at_the_cut_the_lower_rows_stay(tmp_path: Path, words: Collection) -> None:
    bm25 = BM25()
    bm25.build(words.corpus, tmp_path / "index")
    (scores,) = plain(words, ["camel"], "lucene", "english")
    best = np.lexsort((np.arange(90), -scores))[:5]
    assert np.sum(scores == scores[best[-1]]) > np.sum(scores[best] == scores[best[-1]])
    run = bm25.search(["camel"], np.array([7]), k=5)
    assert sorted(run.of(7)[0].tolist()) == sorted(best.tolist())


def test_an_unknown_language_and_a_corpus_without_a_word_are_refused(tmp_path: Path) -> None:
    empty = write_collection(tmp_path / "e", "e", [("p", "", "the a")], [("q", "", "x")], {})
    with refused("unknown-choice", "bm25.stemmer"):
        BM25(stemmer="klingon")
    with refused("unknown-choice", "bm25.stopwords"):
        BM25(stopwords="klingon").build(empty.corpus, tmp_path / "index")
    with refused("empty-corpus"):
        BM25().build(empty.corpus, tmp_path / "index")
    assert not (tmp_path / "index").exists()


SCRIPTS = {
    "Chinese": ("盐和黄金等重", "在沙漠里盐和黄金等重"),
    "Japanese": ("らくだは", "砂漠のらくだは水をのむ"),
    "Katakana": ("キャラバンルート", "塩のキャラバンルートと星"),
    "Korean": ("소금", "사막에서 소금은 금과 같았다"),
    "Thai": ("ทองคำ", "เกลือมีค่าเท่ากับทองคำ"),
    "Lao": ("ເກືອ", "ອູດແລະເກືອໃນທະເລຊາຍ"),
    "Khmer": ("អំបិល", "ឧដ្ឋនិងអំបិលក្នុងវាលខ្សាច់"),
    "Myanmar": ("ဆား", "ကုလားအုတ်နှင့်ဆား"),
    "Hindi": ("की", "रेगिस्तान की रात"),
    "Sinhala": ("ශ්‍රී", "ශ්‍රී ලංකා"),
    "one letter": ("水", "水 と 星"),
    "composed accents": ("café", "un cafe\u0301 noir"),
    "accents that do not compose": ("m\u0300ba", "le m\u0300ba noir"),
    "mixed scripts": ("手机", "iPhone手机壳"),
}


def test_a_query_finds_the_passage_with_its_words_in_any_script(tmp_path: Path) -> None:
    queries, answers = zip(*SCRIPTS.values(), strict=True)
    corpus = [(f"p{i}", "", text) for i, text in enumerate([*answers, "a salt road"])]
    collection = write_collection(tmp_path / "c", "scripts", corpus, [("q", "", "x")], {})
    bm25 = BM25()
    bm25.build(collection.corpus, tmp_path / "index")
    run = bm25.search(queries, np.arange(len(queries)))
    best = {script: run.of(i)[0][:1].tolist() for i, script in enumerate(SCRIPTS)}
    assert best == {script: [i] for i, script in enumerate(SCRIPTS)}


def test_english_has_the_tokens_of_bm25s_also_beside_other_scripts() -> None:
    codes = [*range(0x300), *range(0x370, 0x483), *range(0x2000, 0x20D0), *range(0x2100, 0x2C80)]
    # U+0130 has a small letter of two characters, and U+0374 another normal form.
    assigned = [chr(code) for code in codes if unicodedata.category(chr(code)) != "Cn"]
    signs = [sign for sign in assigned if sign not in "\u0130\u0374"]
    texts = [f"Salt{sign}road A{sign} {sign}b {sign}{sign} the camel's" for sign in signs]
    expected = bm25s.tokenize(texts, stopwords=None, return_ids=False, show_progress=False)
    for text, plainly in zip(texts, expected, strict=True):
        assert tokens(text) == plainly
        assert tokens(f"{text} 水 1\ufe0f\u20e3") == [*plainly, "水"]  # and the emoji of a 1


def test_queries_in_another_language_than_the_corpus_are_reported(
    tmp_path: Path, words: Collection, caplog: pytest.LogCaptureFixture
) -> None:
    bm25 = BM25(tokenizer="words")
    bm25.build(words.corpus, tmp_path / "index")
    bm25.search(["salt", "沙漠里盐", "駱駝"], np.arange(3))
    assert "2 of 3 queries" in caplog.text
    assert "bm25.tokenizer=words" in caplog.text
    caplog.clear()
    bm25.search(["salt", "camel", "駱駝"], np.arange(3))
    assert not caplog.text
