"""Evaluations: metrics by trec tools, what is reused, refused, resumed, and shared."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import ir_measures
import pytest
from omegaconf import OmegaConf
from tests.commands import ROOT, evaluate
from tests.files import put
from tests.refusals import refused
from tests.tiny import write_beir

from caravan import manifests
from caravan.cli.compose import compose
from caravan.cli.evaluate import evaluate as evaluate_config
from caravan.data.collection import Collection
from caravan.data.runs import read_run
from caravan.retrieval import stages, store
from caravan.retrieval.metrics import score_run

SHORT = "measures=[MRR@5]"


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The products of the shards that a test writes, and the runs."""
    names: list[str] = []
    shard, run = store.write_shard, stages.write_run

    def write_shard(path: Path, *content: Any) -> None:
        names.append(path.parent.name.rpartition(".")[0])
        shard(path, *content)

    def write_run(path: Path, *content: Any) -> None:
        names.append(path.name)
        run(path, *content)

    monkeypatch.setattr(store, "write_shard", write_shard)
    monkeypatch.setattr(stages, "write_run", write_run)
    return names


def by_trec_tools(beir: Path, run: Path) -> dict[str, float]:
    qrels = []
    for line in (beir / "qrels/test.tsv").read_text().splitlines()[1:]:
        query, passage, grade = line.split("\t")
        qrels.append(ir_measures.Qrel(query, passage, int(grade)))
    measures = [ir_measures.RR @ 10, ir_measures.nDCG @ 10, ir_measures.R @ 20]
    found = ir_measures.calc_aggregate(measures, qrels, ir_measures.read_trec_run(str(run)))
    return {str(name).replace("RR", "MRR"): value for name, value in found.items()}


def test_every_stage_has_its_run_and_its_metrics(
    beir: Path,
    folders: dict[str, str],
    collection: Collection,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    metrics = evaluate(
        beir,
        tmp_path,
        f"[bm25,{folders['retriever']}]",
        f"reranker={folders['reranker']}",
        "rerank.depth=12",
        "measures=[MRR@10,nDCG@10,R@20]",
        "index.k=20",
    )
    assert metrics == json.loads((tmp_path / "metrics.json").read_text())
    names = [stage["stage"] for stage in metrics["stages"]]
    assert names == ["bm25", "retriever", "fused", "reranked"]
    best, texts = 0.0, (collection.queries, collection.corpus)
    runs = {}
    for stage in metrics["stages"]:
        path = tmp_path / stage["run"]
        wanted = by_trec_tools(beir, path)
        if stage["stage"] == "reranked":
            del wanted["R@20"]  # it looks deeper than the run
        assert stage["overall"] == pytest.approx(wanted, abs=1e-6)
        runs[stage["stage"]] = run = read_run(path, *texts)
        scored = score_run(run, collection.qrels("test"), *texts, list(stage["overall"]))
        assert stage["overall"] == scored["overall"]
        if stage["stage"] != "bm25":
            assert stage["gain"] == pytest.approx(scored["overall"]["MRR@10"] - best)
        best = max(best, scored["overall"]["MRR@10"])
        assert stage["queries_per_second"] > 0
    assert metrics["overall"] == metrics["stages"][-1]["overall"]
    assert set(metrics["per_query"]) == {"MRR@10", "nDCG@10"}
    (reason,) = (line for line in caplog.messages if "has no R@20" in line)
    assert "reranked on tiny: the run has 12 passages per query" in reason
    assert len(metrics["per_query"]["MRR@10"]) == metrics["queries"] == 4
    assert metrics["seconds"] > 0
    assert [stage["depth"] for stage in metrics["stages"]] == [20, 20, 20, 12]
    for row in runs["fused"].query_rows:
        assert set(runs["reranked"].of(row)[0]) == set(runs["fused"].of(row)[0][:12])
    config = OmegaConf.load(tmp_path / "config.yaml")
    assert (config.rerank.depth, config.store) == (12, f"{tmp_path}/store")


def of_files(folder: Path, files: dict[str, str], *overrides: str) -> dict[str, Any]:
    """The metrics of BM25 on a collection of small files."""
    given = [f"data.path={put(folder / 'data', files)}", f"run_dir={folder / 'run'}"]
    given += [f"cache_dir={folder}", "retriever=bm25", "num_workers=0", *overrides]
    return evaluate_config(compose(ROOT / "conf", "evaluate", given))


def test_trec_dl_counts_from_grade_two_on(tmp_path: Path) -> None:
    texts = {f"p{i}": f"camel {'caravan ' * i} salt {i}" for i in range(12)}
    files = {
        "collection.tsv": "".join(f"{name}\t{text}\n" for name, text in texts.items()),
        "msmarco-test2019-queries.tsv": "1\tcamel caravan\n2\tsalt 7\n3\tnobody judged\n",
        "2019qrels-pass.txt": "1 Q0 p3 1\n1 Q0 p2 2\n1 Q0 p0 3\n2 Q0 p7 1\n2 Q0 p9 0\n",
    }
    measures = 'measures=[MRR@10,nDCG@10,R@100,"MRR(rel=1)@10"]'
    metrics = of_files(tmp_path, files, "data=msmarco_passage", "data.split=dl19", measures)
    qrels = [*ir_measures.read_trec_qrels(str(tmp_path / "data/2019qrels-pass.txt"))]
    run = [*ir_measures.read_trec_run(str(tmp_path / "run" / metrics["run"]))]
    wanted = {
        "MRR(rel=2)@10": ir_measures.RR(rel=2) @ 10,
        "nDCG@10": ir_measures.nDCG @ 10,
        "R(rel=2)@100": ir_measures.R(rel=2) @ 100,
        "MRR(rel=1)@10": ir_measures.RR @ 10,
    }
    found = ir_measures.calc_aggregate(wanted.values(), qrels, run)
    assert metrics["overall"] == pytest.approx({name: found[of] for name, of in wanted.items()})
    assert metrics["overall"]["MRR(rel=2)@10"] < metrics["overall"]["MRR(rel=1)@10"]
    assert metrics["queries"] == 2


def test_what_counts_zero_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {
        "corpus.tsv": "p1\tcamel caravan\np2\tsalt\n",
        "queries.tsv": "1\tcamel\n2\tsalt\n3\tcaravan\n",
        "qrels.test.tsv": "1 0 p1 1\n1 0 gone 2\n2 0 gone 1\n3 0 p2 0\nnobody 0 p1 1\n",
    }
    caplog.set_level("INFO")
    more = ("data=tsv", "data.unknown_ids=count", "measures=[R@10]")
    assert of_files(tmp_path, files, *more)["overall"] == {"R@10": 1 / 8}
    assert "mean over 4 judged queries" in caplog.text
    assert "2 judgements of passages unknown to the corpus" in caplog.text


def test_another_evaluation_is_refused_until_the_metrics_are_removed(
    beir: Path, folders: dict[str, str], tmp_path: Path, written: list[str]
) -> None:
    run_dir, model = tmp_path / "run", folders["retriever"]
    first = evaluate(beir, run_dir, model, SHORT)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    written.clear()
    assert evaluate(beir, run_dir, model, SHORT) == first
    for setting in ("data.split=dev", "attention=eager", "precision=bf16", "passage_length=8"):
        key, _, value = setting.rpartition(".")[2].partition("=")
        with refused("occupied-run-dir", f"{key}: ", f" -> {value}"):
            evaluate(beir, run_dir, model, SHORT, setting)
    for retriever in ("bm25", f"[bm25,{model}]"):
        with refused("occupied-run-dir", "retriever", "name="):
            evaluate(beir, run_dir, retriever)
    with refused("occupied-run-dir", "collection: "):
        evaluate(write_beir(tmp_path / "data", seed=3), run_dir, model)
    with refused("occupied-run-dir", "training"):
        evaluate(beir, Path(model).parent, "bm25")
    assert not written
    assert before == {path: path.read_bytes() for path in before}
    assert set(evaluate(beir, run_dir, model, "measures=[R@5]")["overall"]) == {"R@5"}
    (run_dir / "metrics.json").unlink()
    evaluate(beir, run_dir, model, SHORT, "data.split=dev")
    assert sum(name.endswith(".trec") for name in written) == 1


def test_products_of_other_versions_are_made_again(
    beir: Path,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    written: list[str],
) -> None:
    asked = (beir, tmp_path / "run", folders["retriever"], f"reranker={folders['reranker']}")
    evaluate(*asked, "rerank.depth=3")
    versions = manifests.versions
    other = lambda *a: {**versions(*a), "transformers": "99.0"}  # noqa: E731
    monkeypatch.setattr(manifests, "versions", other)
    caplog.set_level(logging.INFO)
    written.clear()
    evaluate(*asked, "rerank.depth=3")
    runs = {"retriever.test.trec", "reranked.test.trec"}
    assert set(written) == {"passages", "queries.test", "scores.test"} | runs
    for product in ("passages", "retriever.test.trec", "reranked.test.trec"):
        assert any(product in line and "versions.transformers" in line for line in caplog.messages)


@pytest.mark.slow
def test_evaluations_share_a_store_and_overwrite_nothing_of_one_another(
    beir: Path, folders: dict[str, str], tmp_path: Path, written: list[str]
) -> None:
    second, store = write_beir(tmp_path / "data", seed=3), tmp_path / "store"
    rerank, dense = f"reranker={folders['reranker']}", folders["retriever"]
    evaluations: list[tuple[Any, ...]] = [
        (beir, f"[bm25,{dense}]", rerank, "rerank.depth=5"),
        (beir, dense, "data.split=train"),
        (beir, dense, "passage_length=8", "query_length=8"),
        (second, "bm25", "bm25.k1=2", rerank, "rerank.depth=3"),
    ]

    def evaluated(number: int, name: str) -> dict[str, bytes]:
        data, *given = evaluations[number]
        home = tmp_path / f"{name}{number}"
        evaluate(data, home, *given, f"store={store}", SHORT, "index.k=9")
        return {path.name: path.read_bytes() for path in (home / "runs").glob("*.trec")}

    runs = [evaluated(0, "first")]
    written.clear()
    runs.append(evaluated(1, "first"))
    assert set(written) == {"queries.train", "retriever.train.trec"}  # the passages are there
    runs += [evaluated(number, "first") for number in (2, 3)]
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*")}
    assert [evaluated(number, "again") for number in range(len(evaluations))] == runs
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*")} == before


def test_a_run_that_finds_nothing_counts_zero(tmp_path: Path) -> None:
    beir = write_beir(tmp_path / "data")
    lines = [f'{{"_id": "q{i}", "text": "unheard {i}"}}\n' for i in range(24)]
    (beir / "queries.jsonl").write_text("".join(lines))
    for _ in range(2):
        metrics = evaluate(beir, tmp_path / "run", "bm25")
        assert set(metrics["overall"].values()) == {0.0}
        assert set(metrics["per_query"]["MRR@10"].values()) == {0.0}
        assert (metrics["queries"], metrics["missing"]) == (4, 4)


def test_an_evaluation_without_its_record_is_not_overwritten(beir: Path, tmp_path: Path) -> None:
    evaluate(beir, tmp_path / "run", "bm25")
    (tmp_path / "run" / "config.yaml.manifest.json").write_text("")
    with refused("occupied-run-dir", f"{tmp_path / 'run'}"):
        evaluate(beir, tmp_path / "run", "bm25")


def test_ignore_identical_ids_drops_the_query_itself_at_the_same_depth(
    counterarguments: Path, folders: dict[str, str], tmp_path: Path, caplog: Any
) -> None:
    def run_of(name: str, stage: str) -> list[list[str]]:
        text = (tmp_path / name / f"runs/{stage}.test.trec").read_text()
        return [line.split() for line in text.splitlines()]

    retrievers, small = f"[bm25,{folders['retriever']}]", ("index.k=7", SHORT)
    ignoring = ("ignore_identical_ids=true", *small)
    evaluate(counterarguments, tmp_path / "dropped", retrievers, *ignoring)
    assert "queries have the id of a passage" not in caplog.text
    evaluate(counterarguments, tmp_path / "kept", retrievers, *small)
    assert "counter: 6 of 6 queries have the id of a passage" in caplog.text
    given = tmp_path / "kept/runs/bm25.test.trec"
    evaluate(counterarguments, tmp_path / "given", given, *ignoring)
    assert not any(line[0] == line[2] for line in run_of("given", "run"))
    for stage in ("bm25", "retriever"):
        kept, left = run_of("kept", stage), run_of("dropped", stage)
        assert any(line[0] == line[2] for line in kept)
        assert not any(line[0] == line[2] for line in left)
        assert len(left) == len(kept) == 6 * 7
        pairs = {(line[0], line[2]) for line in left}
        assert all((line[0], line[2]) in pairs for line in kept if line[0] != line[2])
