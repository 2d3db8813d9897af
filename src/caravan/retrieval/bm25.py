"""BM25 by bm25s (Lù, arXiv 2407.03618): a query adds up the precomputed scores of its terms.

bm25s tokenizes, saves, loads and searches the index. The scores are computed here from sparse
matrices of counts, with at most 16 bytes per (term, passage) pair (3.5 GB for the 8.8 million
passages of MS MARCO), where bm25s holds the whole corpus as lists of tokens.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import re
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated, Any, Literal

import bm25s
import numpy as np
import regex
import Stemmer
from pydantic import Field
from scipy import sparse

from caravan import manifests
from caravan.data.collection import Collection
from caravan.data.runs import Run, canonical
from caravan.data.texts import Texts
from caravan.distributed import cores
from caravan.errors import InputError
from caravan.progress import track
from caravan.retrieval.store import Store

log = logging.getLogger(__name__)

BLOCK_ROWS = 16_384
LARGE = 1e10
"""Queries times passages above which processes search in parallel: ten seconds' work or more."""

_WORD = re.compile(r"\b\w\w+\b")  # bm25s' tokens
_OTHER_SCRIPTS = re.compile(
    "[\u0300-\u036f\u0483-\u0489\u0590-\u1dff\u20d0-\u20ff\u2c80-\U0010ffff]"
)
"""Blocks with all combining marks and all scripts without spaces. A text without these has bm25s'
tokens, which `re` finds five times as fast as `regex`."""
_UNSPACED = (
    r"[[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Hangul}\p{Line_Break=SA}\u30fc\uff70]"
    r"&&[\p{L}\p{N}\p{Mn}\p{Mc}]]"
)
"""Letters of scripts without spaces between words (Line_Break=SA: Thai, Lao, Khmer, Myanmar), and
Hangul, whose words end with particles."""
_MARK = r"[[\p{Mn}\p{Mc}]--[\ufe00-\ufe0f\U000e0100-\U000e01ef]]"  # without variation selectors
_LETTER = rf"[[\p{{L}}\p{{N}}_]--{_UNSPACED}]"  # `\w` of `re` without these
_JOINER = rf"(?<={_MARK})[\u200c\u200d]"  # of Indic conjuncts
_TOKEN = regex.compile(
    rf"({_UNSPACED}(?:{_UNSPACED}|{_MARK})*)|{_LETTER}(?:{_LETTER}|{_MARK}|{_JOINER})+",
    regex.VERSION1,
)
_CLUSTER = regex.compile(r"\X")


class BM25:
    """BM25 over "title text" of each passage, English stop words and stems by default.

    Args:
        k1, b: saturation of term frequency and weight of length; 0.9 and 0.4 are Anserini's.
        method: `lucene`, `robertson` or `atire`, see Kamphuis et al. (ECIR 2020).
        stopwords: a language that bm25s has a list for, or None to keep all words.
        stemmer: a language of the Snowball stemmer, or None to keep words as they are.
        tokenizer: `unicode` (see `tokens`), or `words`: the tokenization of bm25s, runs of two or
            more letters or digits, which finds nothing in scripts without spaces. English has the
            same tokens with both.
    """

    def __init__(
        self,
        k1: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.9,
        b: Annotated[float, Field(ge=0, le=1)] = 0.4,
        method: Literal["lucene", "robertson", "atire"] = "lucene",
        stopwords: str | None = "english",
        stemmer: str | None = "english",
        tokenizer: Literal["unicode", "words"] = "unicode",
    ) -> None:
        if stemmer not in (None, *Stemmer.algorithms()):
            known = ", ".join(Stemmer.algorithms())
            text = f"bm25.stemmer is {stemmer!r}; it must be null or one of {known}"
            raise InputError("unknown-choice", text)
        self.k1, self.b, self.method = k1, b, method
        self.stopwords, self.stemmer, self.tokenizer = stopwords, stemmer, tokenizer
        self._index: Any = None
        self._corpus: Any = None
        self._folder = Path()

    def build(self, corpus: Texts, folder: Path) -> None:
        """Index the corpus into `folder`, and open the index.

        The same corpus and settings give the same bytes.

        Raises:
            InputError: If the corpus has no word.
        """
        vocabulary: dict[str, int] = {}
        texts = track(_blocks(corpus), "BM25 index", len(corpus), "passages", len)
        blocks = [self._counts(block, vocabulary) for block in texts]
        index = bm25s.BM25(self.k1, self.b, method=self.method)
        index.vocab_dict = vocabulary
        index.nonoccurrence_array = None  # of other methods
        index.scores = self._scores(blocks, len(vocabulary))
        index.save(folder, show_progress=False)
        self.open(corpus, folder)

    def open(self, corpus: Texts, folder: Path) -> None:
        """Open the index of a corpus memory-mapped."""
        self._index = bm25s.BM25.load(folder, mmap=True)
        self._corpus, self._folder = corpus, folder

    def search(self, texts: Sequence[str], query_rows: np.ndarray, k: int = 1000) -> Run:
        """The run of the queries in canonical order: `k` passages with a score above 0, or fewer.

        Of passages that tie at the cut, those of lower row are kept. With much work, each core
        searches a part of the queries in the memory-mapped index.
        """
        words = self._tokens(list(texts), return_ids=False)
        ids = [self._index.get_tokens_ids(of) for of in words]
        unknown = [text for text, of in zip(texts, ids, strict=True) if not of]
        if 2 * len(unknown) > len(texts):
            log.warning(
                f"BM25 finds nothing for {len(unknown)} of {len(texts)} queries, of which no token"
                f" is in the corpus (the first: {unknown[0][:80]!r}); check that both are in one"
                f" language, and bm25.tokenizer={self.tokenizer}, bm25.stopwords={self.stopwords}"
                f" and bm25.stemmer={self.stemmer}"
            )
        if len(texts) * len(self._corpus) <= LARGE:
            found = [
                _best(self._index.get_scores_from_ids(of), k)
                for of in track(ids, "BM25 search", len(ids), "queries")
            ]
        else:
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(cores(), context) as pool:
                best = pool.map(partial(_search, self._folder, k), ids, chunksize=64)
                found = list(track(best, "BM25 search", len(ids), "queries"))
        rows, scores = zip(*found, strict=True)
        run = Run.from_flat(
            np.repeat(query_rows, [len(of) for of in rows]),
            np.concatenate(rows),
            np.concatenate(scores),
            tag="bm25",
            all_queries=query_rows,
        )
        return canonical(run, self._corpus)

    def _tokens(self, texts: list[str], return_ids: bool = True) -> Any:
        """The terms of each text, or bm25s' `Tokenized`: ids, and the vocabulary of these texts."""
        pattern = _WORD.pattern
        if self.tokenizer == "unicode":
            texts, pattern = [" ".join(tokens(text)) for text in texts], r"\S+"
        try:
            return bm25s.tokenize(
                texts,
                token_pattern=pattern,
                stopwords=self.stopwords,
                stemmer=Stemmer.Stemmer(self.stemmer) if self.stemmer else None,
                return_ids=return_ids,
                show_progress=False,
            )
        except ValueError as error:
            raise InputError("unknown-choice", f"bm25.stopwords: {error}") from None

    def _counts(self, texts: list[str], vocabulary: dict[str, int]) -> Any:
        """How often each text has each term [n, V]; new terms are added to the vocabulary."""
        tokens = self._tokens(texts)
        # bm25s numbers terms in the order of a set, which differs between processes
        numbers = np.empty(len(tokens.vocab), dtype=np.int32)
        for name in sorted(tokens.vocab):
            numbers[tokens.vocab[name]] = vocabulary.setdefault(name, len(vocabulary))
        sizes = [len(ids) for ids in tokens.ids]
        terms = numbers[np.fromiter(itertools.chain(*tokens.ids), np.int64, sum(sizes))]
        rows = np.repeat(np.arange(len(texts), dtype=np.int32), sizes)
        ones = np.ones(len(terms), dtype=np.float32)
        return sparse.csr_array((ones, (rows, terms)), shape=(len(texts), len(vocabulary)))

    def _scores(self, blocks: list[Any], terms: int) -> dict[str, Any]:
        """The score of each term in each passage, term by term (CSC), as bm25s stores them."""
        frequencies = np.zeros(terms, dtype=np.int64)
        for block in blocks:
            frequencies += np.bincount(block.indices, minlength=terms)
        if not frequencies.any():
            text = "no passage of the corpus has a word that BM25 could index"
            raise InputError("empty-corpus", text)
        lengths = [block.sum(axis=1).astype(np.float64) for block in blocks]
        passages, average = sum(map(len, lengths)), np.concatenate(lengths).mean()
        idf = self._idf(frequencies, passages).astype(np.float32)
        gain = self.k1 + 1 if self.method == "atire" else 1
        for block, own in zip(blocks, lengths, strict=True):
            length = np.repeat(own, np.diff(block.indptr))
            saturation = self.k1 * ((1 - self.b) + self.b * length / average)
            scores = idf[block.indices] * (gain * block.data / (saturation + block.data))
            block.data = scores.astype(np.float32)
            block.resize(len(own), terms)
        columns = sparse.vstack(blocks, format="csr").tocsc()
        csc = {name: getattr(columns, name) for name in ("data", "indices", "indptr")}
        return {**csc, "num_docs": passages}

    def _idf(self, frequencies: np.ndarray, passages: int) -> np.ndarray:
        df = np.maximum(frequencies, 1).astype(np.float64)
        if self.method == "atire":
            return np.log(passages / df)
        odds = (passages - df + 0.5) / (df + 0.5)
        return np.log(1 + odds) if self.method == "lucene" else np.log(np.maximum(odds, 1))


def index_inputs(collection: Collection, settings: dict[str, Any]) -> dict[str, Any]:
    """What determines an index; `settings` are the arguments of `BM25`."""
    versions = manifests.versions(("bm25s", "PyStemmer"))
    return {"collection": collection.digest, "bm25": settings, "versions": versions}


def open_index(bm25: BM25, settings: dict[str, Any], collection: Collection, store: Store) -> BM25:
    """Open the index of a collection in a store, or build it there first; returns `bm25`."""
    inputs = index_inputs(collection, settings)
    folder = store.files("bm25", inputs, lambda path: bm25.build(collection.corpus, path))
    bm25.open(collection.corpus, folder)
    return bm25


def tokens(text: str) -> list[str]:
    """The tokens of a text in any script, before stop words and stems.

    The text is lowercased and normalized to Unicode's form C. A token is a run of two or more
    letters, digits and combining marks. In scripts without spaces between words, and in Hangul, it
    is a pair of neighbouring characters, as in Lucene's CJKAnalyzer, or a single isolated one.

    >>> tokens("A salt road, cafe\\u0301")
    ['salt', 'road', 'café']
    >>> tokens("iPhone手机壳 2020年")
    ['iphone', '手机', '机壳', '2020', '年']
    """
    text = unicodedata.normalize("NFC", text.lower())
    if not _OTHER_SCRIPTS.search(text):
        return _WORD.findall(text)
    found: list[str] = []
    for match in _TOKEN.finditer(text):
        if match[1] is None:
            found.append(match[0].replace("\u200c", "").replace("\u200d", ""))
            continue
        characters = _CLUSTER.findall(match[1])
        pairs = map("".join, itertools.pairwise(characters))
        found += pairs if len(characters) > 1 else characters
    return found


def _blocks(corpus: Texts) -> Iterator[list[str]]:
    """["title text", ...] of each block."""
    for start in range(0, len(corpus), BLOCK_ROWS):
        texts = corpus.get(slice(start, start + BLOCK_ROWS))
        yield [f"{title} {text}" if title else text for title, text in texts]


@lru_cache(maxsize=1)
def _opened(folder: Path) -> Any:
    return bm25s.BM25.load(folder, mmap=True)


def _search(folder: Path, k: int, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """`_best` of a query in a process that searches for another, which opens the index once."""
    return _best(_opened(folder).get_scores_from_ids(ids), k)


def _best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores of the `k` greatest scores [N] above 0; of ties at the cut the lower rows."""
    rows = np.flatnonzero(scores > 0)
    found = scores[rows]
    if len(rows) > k:
        worst = np.partition(found, len(found) - k)[len(found) - k]
        above, level = rows[found > worst], rows[found == worst]
        rows = np.sort(np.concatenate([above, level[: k - len(above)]]))
        found = scores[rows]
    order = np.argsort(-found, kind="stable")
    return rows[order], found[order]
