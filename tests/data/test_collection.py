"""Collections on disk: complete or absent, opened without a copy, wrong input named."""

import copy
import itertools
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tests.refusals import refused

from caravan.data.collection import Collection, Qrels, write_collection
from caravan.data.source import cached_collection
from caravan.data.texts import BATCH_ROWS, Record

ROOT = Path(__file__).parents[2]
CORPUS = [("a", "A", "first"), ("b", "", "second"), ("c", "C", "third")]
QUERIES = [("1", "", "one"), ("2", "", "two")]


def write(folder: Path, **changes: object) -> Collection:
    parts: dict = {"corpus": CORPUS, "queries": QUERIES, "qrels": {"test": [("2", "a", 1)]}}
    return write_collection(folder, "tiny", **{**parts, **changes})


def test_a_collection_reads_back_what_was_written(tmp_path: Path) -> None:
    judged = [("2", "c", 2), ("1", "b", 1), ("2", "a", 0), ("2", "b", -1)]
    write(tmp_path / "c", qrels={"dev": judged, "test": []})
    found = Collection.open(tmp_path / "c")
    assert (found.name, found.splits) == ("tiny", ("dev", "test"))
    assert found.corpus.get([2, 0]) == [("C", "third"), ("A", "first")]
    assert found.queries.get([1]) == [("", "two")]
    qrels = found.qrels("dev")
    assert qrels.query_rows.tolist() == [0, 1, 1, 1]
    assert qrels.passage_rows.tolist() == [1, 0, 1, 2]
    assert qrels.grades.tolist() == [1, 0, -1, 2]
    assert len(found.qrels("test")) == 0
    assert found.corpus.digest
    assert found.corpus.digest != found.queries.digest
    assert len(pickle.dumps(found)) < 500  # a worker gets the path and opens it itself
    assert copy.copy(found).digest == found.digest


def test_qrels_answer_by_query() -> None:
    qrels = Qrels(np.array([9, 4, 9, 9]), np.array([3, 1, 0, 2]), np.array([1, 2, 0, 3]))
    assert qrels.queries.tolist() == [4, 9]
    assert [values.tolist() for values in qrels.of(9)] == [[0, 2, 3], [0, 3, 1]]
    assert qrels.positives(9).tolist() == [2, 3]
    assert qrels.of(5)[0].tolist() == qrels.positives(5).tolist() == []


def test_an_unknown_split_is_refused_with_those_there_are(tmp_path: Path) -> None:
    for qrels in ({"test": [("2", "a", 1)]}, {}):
        with refused("unknown-split", "data.train_split"):
            write(tmp_path / str(len(qrels)), qrels=qrels).qrels("dev")


def test_unknown_and_repeated_judgements_are_left_out_when_allowed(tmp_path: Path) -> None:
    judged = [("1", "a", 1), ("1", "z", 1), ("9", "a", 1), ("1", "a", 1), ("2", "b", 1)]
    found = write(tmp_path / "c", qrels={"test": judged}, unknown_ids="count")
    assert len(found.qrels("test")) == 2


def test_the_digest_is_that_of_the_content(tmp_path: Path) -> None:
    digests = [
        write(tmp_path / "1").digest,
        write(tmp_path / "far" / "2").digest,
        write(tmp_path / "3", corpus=CORPUS[::-1]).digest,
        write(tmp_path / "4", qrels={"test": [("2", "a", 2)]}).digest,
        write(tmp_path / "5", qrels={"dev": [("2", "a", 1)]}).digest,
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


@pytest.mark.parametrize("record", ["", "null", "[]", "{}", "[" * 100_000])
def test_a_folder_without_a_record_is_refused(tmp_path: Path, record: str) -> None:
    write(tmp_path / "c")
    (tmp_path / "c" / "collection.json").write_text(record)
    with refused("damaged-collection"):
        Collection.open(tmp_path / "c")


def test_a_folder_of_the_cache_is_named_after_its_collection(tmp_path: Path) -> None:
    found = cached_collection(tmp_path, "a b/c", "key", write)
    assert found.folder == tmp_path / "collections" / "a-b-c-key"


PARTS = ("collection.json", "corpus.arrow", "corpus.ids.npy", "queries.arrow", "qrels/test.npz")


@pytest.mark.parametrize("damage", ["missing", "cut", "zeros", "a bit"])
@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_collection_of_the_cache_is_built_again(
    tmp_path: Path, part: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = cached_collection(tmp_path, "c", "key", write).folder
    right = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    file, content = folder / part, bytearray(right[folder / part])
    content[len(content) // 2] ^= 1
    if damage == "missing":
        file.unlink()
    else:
        zeros = bytearray(len(content))
        file.write_bytes({"cut": content[:-1], "zeros": zeros, "a bit": content}[damage])
    (folder / "notes.txt").write_text("of somebody else")
    cached_collection(tmp_path, "c", "key", write)
    assert caplog.messages == [f"{file} is missing or damaged; {folder} is built again"]
    assert {path: path.read_bytes() for path in right} == right
    assert (folder / "notes.txt").read_text() == "of somebody else"


def test_a_damaged_collection_behind_a_link_is_refused(tmp_path: Path) -> None:
    folder = cached_collection(tmp_path, "c", "key", write).folder
    moved = folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(moved)
    cached_collection(tmp_path, "c", "key", lambda _: pytest.fail("built"))
    (moved / "corpus.arrow").write_bytes(b"")
    with refused("link-in-cache", str(folder)):
        cached_collection(tmp_path, "c", "key", write)
    assert (moved / "corpus.arrow").read_bytes() == b""


KILLED_BUILD = """
import sys, time
from caravan.data.source import cached_collection
from tests.data.test_collection import long_build, records
def until(part, last):
    for n, record in enumerate(records()):
        if n == last:
            print(part, flush=True)
            time.sleep(60)
        yield record
slow = {"corpus": lambda: until("corpus", 40_000), "queries": lambda: until("queries", 10)}
build = long_build(**{sys.argv[2]: slow[sys.argv[2]]})
cached_collection(sys.argv[1], "long", "key", build, resumes=True)
"""


def records() -> Iterator[Record]:
    return ((f"p{n}", "", "x" * 100) for n in range(50_000))


def long_build(
    corpus: Callable[[], Iterator[Record]] = records,
    queries: Callable[[], Iterator[Record]] = records,
) -> Callable[[Path], Collection]:
    return lambda folder: write_collection(folder, "long", corpus(), queries(), {}, resumes=True)


@pytest.mark.parametrize("part", ["corpus", "queries"])
def test_a_killed_build_is_continued_to_the_same_bytes(
    tmp_path: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    command = [sys.executable, "-c", KILLED_BUILD, str(tmp_path / "cache"), part]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    assert process.stdout.readline() == f"{part}\n"
    process.kill()
    process.wait()
    process.stdout.close()
    cache = tmp_path / "cache" / "collections"
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == []

    def not_again() -> Iterator[Record]:
        pytest.fail("the corpus was whole")
        yield "", "", ""

    caplog.set_level(logging.INFO)
    build = long_build() if part == "corpus" else long_build(not_again)
    found = cached_collection(tmp_path / "cache", "long", "key", build, resumes=True)
    message = {
        "corpus": f"corpus: continuing after {2 * BATCH_ROWS} passages of an interrupted build",
        "queries": "corpus: an interrupted build has written all 50000 passages",
    }
    assert message[part] in caplog.messages
    assert [path.name for path in cache.iterdir() if path.is_dir()] == ["long-key"]
    whole = long_build()(tmp_path / "whole").folder
    assert {path.name: path.read_bytes() for path in found.folder.glob("*.*")} == {
        path.name: path.read_bytes() for path in whole.glob("*.*")
    }


def test_a_folder_that_a_kill_left_is_written_anew_unless_told_to_resume(tmp_path: Path) -> None:
    def killed() -> Iterator[Record]:
        yield from QUERIES
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_collection(tmp_path, "c", CORPUS, killed(), {})
    others = [(name, title, f"now {text}") for name, title, text in CORPUS]
    found = write_collection(tmp_path, "c", others, QUERIES, {})
    assert found.corpus.get([0]) == [("A", "now first")]


def _stopped_by(error: BaseException) -> Callable[[Path], Collection]:
    def corpus() -> Iterator[Record]:
        yield from itertools.islice(records(), 20_000)
        raise error

    return long_build(corpus)


def test_a_build_that_fails_is_not_continued_and_one_that_is_interrupted_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for error, continued in ((ValueError(), False), (KeyboardInterrupt(), True)):
        with pytest.raises(type(error)):
            cached_collection(tmp_path, "long", "key", _stopped_by(error), resumes=True)
        scratches = [path for path in (tmp_path / "collections").iterdir() if path.is_dir()]
        assert len(scratches) == continued
    found = cached_collection(tmp_path, "long", "key", long_build(), resumes=True)
    assert len(found.corpus) == 50_000
    assert sum("continuing after" in message for message in caplog.messages) == 1


@pytest.mark.parametrize("other_user", [False, True])
def test_what_is_left_by_another_user_or_not_asked_for_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other_user: bool
) -> None:
    stopped = _stopped_by(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        cached_collection(tmp_path, "long", "key", stopped, resumes=True)
    if other_user:
        monkeypatch.setenv("CARAVAN_TRUST_CACHE", "1")
        user = os.geteuid() + 12345
        monkeypatch.setattr(os, "geteuid", lambda: user)

    def build(folder: Path) -> Collection:
        assert list(folder.iterdir()) == []
        return write(folder)

    assert len(cached_collection(tmp_path, "long", "key", build, resumes=other_user).corpus) == 3
    assert not list((tmp_path / "collections").glob(".*.part"))


MEASURE = """
import resource, sys, time
import numpy as np
from caravan.data.collection import Collection
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith("Rss")}
import pyarrow.compute, pyarrow.ipc, xxhash
before = resident()
started = time.perf_counter()
collection = Collection.open(sys.argv[1])
opened = time.perf_counter()
rows = np.random.default_rng(0).integers(0, len(collection.corpus), 1000)
texts = collection.corpus.get(rows)
assert [text.split()[0] for _, text in texts] == [str(row) for row in rows]
assert collection.corpus.rows(collection.corpus.ids(rows)).tolist() == rows.tolist()
after = resident()
print((opened - started) * 1e3, (after["RssAnon"] - before["RssAnon"]) / 1024,
      (after["RssFile"] - before["RssFile"]) / 1024)
"""


def synthetic(count: int) -> Iterator[Record]:
    tail = " ".join(f"word{n}" for n in range(50))
    return ((f"p{n}", f"title {n}", f"{n} {tail}") for n in range(count))


def measured(folder: Path, count: int) -> tuple[float, float, float]:
    """(ms to open, MiB of private memory, MiB of mapped file) of a fresh process."""
    write_collection(folder, "synthetic", synthetic(count), QUERIES, {})
    command = [sys.executable, "-c", MEASURE, str(folder)]
    answer = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(answer[0]), float(answer[1]), float(answer[2])


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux' /proc")
@pytest.mark.parametrize(
    ("small", "large"), [(2_000, 60_000), pytest.param(10_000, 1_000_000, marks=pytest.mark.slow)]
)
def test_memory_stays_flat_while_the_corpus_grows(tmp_path: Path, small: int, large: int) -> None:
    _, few_private, _ = measured(tmp_path / "small", small)
    opening, many_private, many_mapped = measured(tmp_path / "large", large)
    size = (tmp_path / "large" / "corpus.arrow").stat().st_size / 2**20
    logging.getLogger(__name__).info(
        "%d passages, %.0f MiB: opened in %.0f ms, private memory %.1f MiB (%d passages: %.1f), "
        "mapped file %.0f MiB",
        *(large, size, opening, many_private, small, few_private, many_mapped),
    )
    assert many_private - few_private < 8
    assert many_mapped < 128  # of what was read last; a fixed number of pages
    assert opening < 2_000
