"""The commands on the tiny collection, and the threshold against a loop over all thresholds."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.conftest import Call
from tests.refusals import refused

import caravan
from caravan import manifests
from caravan.data.collection import Collection
from caravan.data.qrels import Qrels
from caravan.data.readers.labelled import Beir
from caravan.data.runs import Run, read_run
from caravan.negatives import LEAST, choose_threshold, main, relabel

Command = Callable[..., tuple[int, str]]
"""`python -m caravan.negatives` on the tiny collection: its exit code and errors."""
QUERIES, PASSAGES = 12, 10


@pytest.fixture
def command(call: Call, beir: Path, tmp_path: Path) -> Command:
    def run(name: str, *arguments: object) -> tuple[int, str]:
        data = ["data=beir", f"data.path={beir}", f"cache_dir={tmp_path / 'cache'}"]
        more = [f"run_dir={tmp_path / 'run'}", "precision=float32", "batching.num_workers=0"]
        code, _, error = call(main, name, *data, *more, *arguments)
        return code, error

    return run


def test_an_audit_by_a_reranker_hides_positives_and_writes_its_scores_as_a_run(
    command: Command,
    bm25_runs: dict[str, Path],
    folders: dict[str, str],
    collection: Collection,
    tmp_path: Path,
) -> None:
    sampler = (f"sampler.runs=[{bm25_runs['train']}]", "sampler.depth=8")
    code, error = command("audit", *sampler, "--teacher", folders["reranker"], "--hide")
    assert code == 0, error
    folder = tmp_path / "run/audit"
    run = read_run(folder / "teacher.trec", collection.queries, collection.corpus)
    qrels = collection.qrels("train")
    for query in (0, 5):
        rows, scores = run.of(query)
        assert set(qrels.positives(query)) - set(rows) <= set(qrels.positives(query)[1:])
        ((_, asked),) = collection.queries.get([query])
        texts = collection.corpus.get(rows)
        expected = caravan.load(folders["reranker"], precision="float32").score(
            [asked] * len(texts), texts
        )
        assert scores == pytest.approx(expected, abs=1e-4)
    found = json.loads((folder / "audit.json").read_text())
    assert found["queries"][0]["queries"] == 16
    ranked = read_run(bm25_runs["train"], collection.queries, collection.corpus, depth=8)
    hidden = 0
    several = [q for q in qrels.queries.tolist() if len(qrels.positives(q)) > 1]
    assert len(several) == 4
    for query in several:
        hidden += np.isin(qrels.positives(query), ranked.of(query)[0]).any()
    assert 0 < found["hidden_positives"][0]["hidden"] <= hidden
    assert found["verdict"] in (folder / "audit.html").read_text()
    assert "| bm25.train.trec | 1-5 |" in (folder / "audit/suspects.md").read_text()


def test_new_judgements_can_be_trained_with(
    command: Command, bm25_runs: dict[str, Path], beir: Path, collection: Collection, tmp_path: Path
) -> None:
    given = ("--teacher", bm25_runs["train"], "--held-out", bm25_runs["dev"], "--precision")
    code, error = command("relabel", *given, "0.1")
    assert code == 0, error
    path = tmp_path / "run/relabel/train.tsv"
    facts = manifests.facts(path)
    old = (beir / "qrels/train.tsv").read_text().splitlines()
    lines = path.read_text().splitlines()
    assert set(lines[: len(old)]) == set(old)
    assert len(lines) - len(old) == facts["relabelled"] > 0
    assert {line.split("\t")[2] for line in lines[len(old) :]} == {"1"}
    assert facts["original"] == len(old) - 1
    assert facts["threshold"]["precision"] >= 0.1
    assert (manifests.read(path) or {})["inputs"]["teacher"]["split"] == "train"
    code, error = command("relabel", *given, "0.1")
    assert code == 0, error
    code, error = command("relabel", *given, "0.05")  # would overwrite other judgements
    assert (code, str(path) in error) == (2, True)
    assert path.read_text().splitlines() == lines
    again = tmp_path / "data"
    shutil.copytree(beir, again)
    shutil.copy(path, again / "qrels/relabelled.tsv")
    read = Beir(str(again)).collection(tmp_path / "cache").qrels("relabelled")
    assert len(read) == len(collection.qrels("train")) + facts["relabelled"]


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["audit", "--teacher", "DEV"], "sampler.runs=[...]"),
        (["audit", "sampler.runs=[TRAIN]"], "--teacher"),
        (["audit", "sampler.runs=[DEV]", "--teacher", "TRAIN"], "bm25.dev.trec"),
        (["relabel", "--teacher", "DEV", "--held-out", "DEV"], "bm25.dev.trec"),
        (["audit", "sampler.rnus=[TRAIN]", "--teacher", "TRAIN"], "sampler.runs"),
        (["audit", "-m", "seed=1,2"], "-m"),
        (["audit", "stage=adaptation"], "stage="),
        (["relabel", "--held-out", "DEV", "--precision", "90"], "--precision"),
    ],
)
def test_mistakes_are_refused(
    arguments: list[str], place: str, command: Command, bm25_runs: dict[str, Path]
) -> None:
    for split, path in bm25_runs.items():
        arguments = [text.replace(split.upper(), str(path)) for text in arguments]
    code, error = command(*arguments)
    assert (code, place in error) == (2, True), error


def _random(seed: int, digits: int) -> tuple[Run, Qrels]:
    """A run whose scores tie, and judgements of which some are not in the run."""
    rng = np.random.default_rng(seed)
    pairs = np.array([(q, p) for q in range(QUERIES) for p in range(PASSAGES)])
    relevant = rng.random(len(pairs)) < 0.4
    scores = np.round(rng.normal(2.0 * relevant, 1.0), digits)
    ranked = rng.random(len(pairs)) < 0.9
    grades = np.where(relevant, rng.integers(1, 4, len(pairs)), rng.integers(-1, 1, len(pairs)))
    judged = relevant | (rng.random(len(pairs)) < 0.3)
    run = Run.from_flat(*pairs[ranked].T, scores[ranked])
    return run, Qrels(*pairs[judged].T, grades[judged])


@pytest.mark.parametrize("precision", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("relevant_from", [1, 2])
@pytest.mark.parametrize(("seed", "digits"), [(0, 1), (1, 6)])
def test_the_threshold_is_the_lowest_with_the_wanted_precision(
    precision: float, relevant_from: int, seed: int, digits: int
) -> None:
    run, qrels = _random(seed, digits)
    grades = dict(
        zip(zip(*(qrels.query_rows, qrels.passage_rows), strict=True), qrels.grades, strict=True)
    )
    lines = [
        (float(score), grades.get((q, p), 0) >= relevant_from)
        for q in range(QUERIES)
        for p, score in zip(*run.of(q), strict=True)
    ]
    relevant = sum(grade >= relevant_from for grade in grades.values())
    best = None
    for at in sorted({score for score, _ in lines}, reverse=True):
        above = [is_relevant for score, is_relevant in lines if score >= at]
        if len(above) >= LEAST and sum(above) / len(above) >= precision:
            best = (at, sum(above) / len(above), sum(above) / relevant, len(above))
    if best is None:
        with refused("no-threshold", "--precision"):
            choose_threshold(run, qrels, precision, relevant_from)
    else:
        assert choose_threshold(run, qrels, precision, relevant_from) == pytest.approx(best)


def test_only_unjudged_passages_of_judged_queries_are_added() -> None:
    run, qrels = _random(0, 6)
    qrels = qrels.only(np.arange(QUERIES - 1))  # the last query has no judgement
    own = np.where(np.arange(QUERIES - 1) % 2, -1, 3)
    new, against = relabel(run, qrels, own, 1.0)
    judged = {*zip(qrels.query_rows.tolist(), qrels.passage_rows.tolist(), strict=True)}
    above = {
        (q, int(p))
        for q in range(QUERIES - 1)
        for p, score in zip(*run.of(q), strict=True)
        if score >= 1.0 and p != own[q]
    }
    added = {*zip(new.query_rows.tolist(), new.passage_rows.tolist(), strict=True)}
    assert added == above - judged
    assert added
    assert new.grades.tolist() == [1] * len(new)
    refuted = [pair for pair in above & judged if qrels.grades[_at(qrels, pair)] < 1]
    assert against == len(refuted) > 0


def _at(qrels: Qrels, pair: tuple[int, int]) -> int:
    return int(np.flatnonzero((qrels.query_rows == pair[0]) & (qrels.passage_rows == pair[1]))[0])
