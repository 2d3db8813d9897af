"""Readers: from the files that people have to a `Collection`, built on first use, opened later.

`Beir` reads a BEIR folder: corpus.jsonl, queries.jsonl and qrels/<split>.tsv, each plain or .gz.
Whatever is wrong in a file is told in one sentence with file and line. A built collection is
found again by kind, path, size and time of every file, and the settings that shape it.

    python train.py data=beir data.path=/data/scifact
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from caravan.data.collection import (
    Collection,
    Judgement,
    cache_key,
    cached_collection,
    write_collection,
)
from caravan.data.files import lines, stamp, text_of
from caravan.data.texts import Record
from caravan.errors import InputError

QRELS_SUFFIXES = (".tsv", ".txt", ".qrels")
HEADERS = {"query-id", "query_id", "queryid", "qid", "query", "topic", "topic-id", "topic_id"}
GRADE = re.compile(r"[+-]?[0-9]{1,9}")


class Beir:
    """A folder in the layout of BEIR (Thakur et al. 2021, arXiv 2104.08663).

    Args:
        path: the folder.
        name: what reports call the collection; the folder's name by default.
        train_split, dev_split, split: qrels to train on, to validate on, and to score.
        unknown_ids: "refuse" judgements of unknown queries or passages, or "count" them and go on.
    """

    def __init__(
        self,
        path: str,
        name: str | None = None,
        train_split: str = "train",
        dev_split: str = "dev",
        split: str = "test",
        unknown_ids: str = "refuse",
    ) -> None:
        self.path = Path(path)
        self.name = name or self.path.resolve().name
        self.train_split, self.dev_split, self.split = train_split, dev_split, split
        self.unknown_ids = unknown_ids

    def collection(self, cache_dir: str | Path) -> Collection:
        """Open the collection, or build it under `cache_dir` first.

        Raises:
            InputError: a file is missing or wrong; says which, at which line, and what to do.
        """
        files = self._files()
        stamps = {part: stamp(file) for part, file in files.items()}
        key = cache_key("beir", str(self.path.resolve()), stamps, self.unknown_ids)
        return cached_collection(cache_dir, self.name, key, lambda to: self._build(to, files))

    def _build(self, folder: Path, files: dict[str, Path]) -> Collection:
        facts: Counter[str] = Counter(empty_passages=0)

        def where(part: str, n: int) -> str:
            of_qrels = part.startswith("qrels/")
            numbered = _judgements(files[part]) if of_qrels else lines(files[part])
            for number, _ in itertools.islice(numbered, n, None):
                return f"{files[part]}:{number}"
            return str(files[part])

        def corpus() -> Iterator[Record]:
            for record in _records(files["corpus"]):
                facts["empty_passages"] += not (record[1] or record[2]).strip()
                yield record

        qrels = {
            part.removeprefix("qrels/"): (judgement for _, judgement in _judgements(file))
            for part, file in files.items()
            if part.startswith("qrels/")
        }
        return write_collection(
            folder,
            self.name,
            corpus(),
            ((name, "", text) for name, _, text in _records(files["queries"])),
            qrels,
            facts=facts,
            where=where,
            unknown_ids=self.unknown_ids,
        )

    def _files(self) -> dict[str, Path]:
        """The file of each part: corpus, queries, qrels/<split> in alphabetical order."""
        layout = "a BEIR folder holds corpus.jsonl, queries.jsonl and qrels/<split>.tsv"
        if not self.path.is_dir():
            raise InputError(f"{self.path} is not a folder: set data.path to one, {layout}")
        found: dict[str, Path] = {}
        for part in ("corpus", "queries"):
            there = [self.path / f"{part}.jsonl{end}" for end in ("", ".gz")]
            there = [file for file in there if file.is_file()]
            if not there:
                raise InputError(f"{self.path}/{part}.jsonl (or .gz) is missing: {layout}")
            _add(found, part, there[0])
            for file in there[1:]:
                _add(found, part, file)
        for file in sorted((self.path / "qrels").glob("*")):
            plain = Path(file.name.removesuffix(".gz"))
            if plain.suffix in QRELS_SUFFIXES and file.is_file():
                _add(found, f"qrels/{plain.stem}", file)
        return found


def _add(found: dict[str, Path], part: str, file: Path) -> None:
    if part in found:
        raise InputError(f"{found[part]} and {file} are both {part}: keep one of them")
    found[part] = file


def _records(file: Path) -> Iterator[Record]:
    for number, line in lines(file):
        text = text_of(file, number, line)
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise _broken(file, number, f"not JSON ({error.msg}, column {error.colno})") from None
        except (ValueError, RecursionError) as error:  # a number or a nesting beyond all measure
            raise _broken(file, number, f"not JSON ({error})") from None
        if not isinstance(fields, dict):
            raise _broken(file, number, "JSON, but not an object")
        name, title, body = (fields.get(key) for key in ("_id", "title", "text"))
        if isinstance(name, int) and not isinstance(name, bool):
            name = str(name)
        if title is None:
            title = ""
        if not isinstance(name, str):
            raise _broken(file, number, "_id is not a string" if "_id" in fields else "no _id")
        if not isinstance(body, str):
            raise _broken(file, number, "text is not a string" if "text" in fields else "no text")
        if not isinstance(title, str):
            raise _broken(file, number, "title is not a string")
        yield name, title, body


def _broken(file: Path, number: int, problem: str) -> InputError:
    remedy = 'every line is one object such as {"_id": "7", "title": "...", "text": "..."}'
    return InputError(f"{file}:{number}: {problem}: {remedy}")


def judgements(file: Path) -> list[Judgement]:
    """The judgements of one file: BEIR's three columns or TREC's four, plain or .gz.

    Raises:
        InputError: a line is wrong; says which.
    """
    return [judgement for _, judgement in _judgements(file)]


def _judgements(file: Path) -> Iterator[tuple[int, Judgement]]:
    """(line number, judgement) of each line: BEIR's three columns or TREC's four."""
    width = 0
    for number, line in lines(file):
        text = text_of(file, number, line).strip("\r\n")
        columns = text.split("\t") if "\t" in text else text.split()
        columns = [column.strip() for column in columns]
        if not width and columns[0].casefold() in HEADERS and not GRADE.fullmatch(columns[-1]):
            continue
        if len(columns) not in (3, 4) or width not in (0, len(columns)):
            expected = f"{width} as above" if width else "3 (query, passage, grade) or 4 (TREC)"
            raise InputError(
                f"{file}:{number}: {len(columns)} columns where {expected} belong: "
                "separate them by single tabs"
            )
        width = len(columns)
        if not GRADE.fullmatch(columns[-1]):
            raise InputError(
                f"{file}:{number}: the grade {columns[-1]!r} is not an integer: "
                "grades are 0 (not relevant), 1, 2, ..."
            )
        yield number, (columns[0], columns[-2], int(columns[-1]))
