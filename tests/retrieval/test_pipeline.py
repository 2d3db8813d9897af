from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ir_measures
import pytest
from omegaconf import OmegaConf
from tests.commands import ROOT, evaluate, evaluate_arguments, train
from tests.files import put
from tests.tiny import write_beir

from caravan import manifests
from caravan.cli.compose import compose
from caravan.errors import InputError
from caravan.report.compare import compare
from caravan.report.systems import read_judged, read_system
from caravan.retrieval import shards, stages
from caravan.retrieval.pipeline import evaluate as evaluate_config


@pytest.fixture(scope="module")
def model(beir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("trained") / "run"
    train(beir, run_dir, "trainer.max_steps=0")
    return run_dir / "model"


def _by_trec_tools(beir: Path, run: Path) -> dict[str, float]:
    qrels = []
    for line in (beir / "qrels/test.tsv").read_text().splitlines()[1:]:
        query, passage, grade = line.split("\t")
        qrels.append(ir_measures.Qrel(query, passage, int(grade)))
    measures = [ir_measures.RR @ 10, ir_measures.nDCG @ 10, ir_measures.R @ 100]
    found = ir_measures.calc_aggregate(measures, qrels, ir_measures.read_trec_run(str(run)))
    return {str(name).replace("RR", "MRR"): value for name, value in found.items()}


@pytest.mark.parametrize("system", ["bm25", "dense"])
def test_figures_are_those_of_trec_tools_on_the_run_file(
    system: str, beir: Path, model: Path, tmp_path: Path
) -> None:
    metrics = evaluate(beir, tmp_path / "run", "bm25" if system == "bm25" else model)
    path = tmp_path / "run" / metrics["run"]
    for name, value in _by_trec_tools(beir, path).items():
        assert metrics["overall"][name] == pytest.approx(value, abs=1e-6)
    assert metrics == json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert len(metrics["per_query"]["MRR@10"]) == metrics["queries"] == 4
    assert metrics["seconds"] > 0


def test_trec_dl_counts_from_grade_two_on_and_says_so(tmp_path: Path) -> None:
    texts = {f"p{i}": f"camel {'caravan ' * i} salt {i}" for i in range(12)}
    folder = put(
        tmp_path / "msmarco",
        {
            "collection.tsv": "".join(f"{name}\t{text}\n" for name, text in texts.items()),
            "msmarco-test2019-queries.tsv": "1\tcamel caravan\n2\tsalt 7\n3\tnobody judged\n",
            "2019qrels-pass.txt": "1 Q0 p3 1\n1 Q0 p2 2\n1 Q0 p0 3\n2 Q0 p7 1\n2 Q0 p9 0\n",
        },
    )
    given = [
        *("data=msmarco_passage", f"data.path={folder}", "data.split=dl19", "retriever=bm25"),
        *(f"cache_dir={tmp_path}", f"run_dir={tmp_path / 'run'}", "num_workers=0"),
        'measures=[MRR@10,nDCG@10,R@100,"MRR(rel=1)@10"]',
    ]
    metrics = evaluate_config(compose(ROOT / "conf", "evaluate", given))
    qrels = [*ir_measures.read_trec_qrels(str(folder / "2019qrels-pass.txt"))]
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


def test_metrics_are_those_of_the_published_qrels_and_say_what_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    qrels = "1 0 p1 1\n1 0 gone 2\n2 0 gone 1\n3 0 p2 0\nnobody 0 p1 1\n"
    folder = put(
        tmp_path / "set",
        {
            "corpus.tsv": "p1\tcamel caravan\np2\tsalt\n",
            "queries.tsv": "1\tcamel\n2\tsalt\n3\tcaravan\n",
            "qrels.test.tsv": qrels,
        },
    )
    given = [
        *("data=tsv", f"data.path={folder}", "data.unknown_ids=count", "retriever=bm25"),
        *(f"cache_dir={tmp_path}", f"run_dir={tmp_path / 'run'}", "num_workers=0"),
        "measures=[MRR@10,nDCG@10,R@10]",
    ]
    caplog.set_level("INFO")
    metrics = evaluate_config(compose(ROOT / "conf", "evaluate", given))
    run = [*ir_measures.read_trec_run(str(tmp_path / "run" / metrics["run"]))]
    measures = [ir_measures.RR @ 10, ir_measures.nDCG @ 10, ir_measures.R @ 10]
    judged = [*ir_measures.read_trec_qrels(str(folder / "qrels.test.tsv"))]
    theirs = ir_measures.calc_aggregate(measures, judged, run)
    assert list(metrics["overall"].values()) == pytest.approx([theirs[one] for one in measures])
    counts = ("queries", "without_relevant", "unknown_passages", "unknown_queries")
    assert [metrics[name] for name in counts] == [4, 1, 2, 1]
    assert "mean over 4 judged queries" in caplog.text
    assert "2 judgements of passages unknown to the corpus" in caplog.text
    files = [tmp_path / "run" / metrics["run"], folder / "qrels.test.tsv"]
    inside, outside = (read_system(path) for path in (tmp_path / "run", files[0]))
    own = compare([inside], read_judged([inside]))
    by_file = compare([outside], read_judged([], files[1]), list(own.values))
    for name, overall in metrics["overall"].items():
        assert own.values[name].mean() == pytest.approx(overall)
        assert by_file.values[name].mean() == pytest.approx(overall)
    assert own.queries == by_file.queries == 4


@pytest.mark.parametrize("system", ["bm25", "dense"])
def test_a_finished_stage_is_skipped_and_gives_the_same_figures(
    system: str, beir: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = "bm25" if system == "bm25" else model
    first = evaluate(beir, tmp_path / "run", retriever)
    monkeypatch.setattr(stages, "write_run", lambda *_: pytest.fail("searched again"))
    assert evaluate(beir, tmp_path / "run", retriever) == first


@pytest.mark.parametrize(
    "change",
    [
        *("data.split=dev", "index.k=7", "query_length=8", "passage_length=8", "bm25.k1=2"),
        *("attention=eager", "precision=bf16"),
    ],
)
def test_another_evaluation_is_refused_and_what_it_had_not_finished_is_made_again(
    change: str, beir: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retriever = "bm25" if change.startswith("bm25") else model
    measures = "measures=[MRR@5]"
    evaluate(beir, tmp_path / "run", retriever, measures)
    written: list[Any] = []
    write = stages.write_run
    monkeypatch.setattr(stages, "write_run", lambda *a: (written.append(a[0]), write(*a)))
    key, _, value = change.rpartition(".")[2].partition("=")
    with pytest.raises(InputError, match=rf"holds another evaluation.*{key}: \w+.* -> {value}"):
        evaluate(beir, tmp_path / "run", retriever, measures, change)
    assert not written
    (tmp_path / "run" / "metrics.json").unlink()
    evaluate(beir, tmp_path / "run", retriever, measures, change)
    assert len(written) == 1


def test_results_of_another_model_or_collection_are_not_replaced(
    beir: Path, model: Path, tmp_path: Path
) -> None:
    own = write_beir(tmp_path / "data", seed=3)
    evaluate(own, tmp_path / "run", model)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    train(beir, tmp_path / "other", "trainer.max_steps=0", "seed=1")
    for retriever in (tmp_path / "other" / "model", "bm25", f"[bm25,{model}]"):
        with pytest.raises(InputError, match=r"holds another evaluation.*retriever"):
            evaluate(own, tmp_path / "run", retriever)
    with (own / "corpus.jsonl").open("a") as file:
        file.write('{"_id": "extra", "text": "camel caravan desert"}\n')
    with pytest.raises(InputError, match=r"holds another evaluation.*collection: .* name="):
        evaluate(own, tmp_path / "run", model)
    assert before == {path: path.read_bytes() for path in before}


def test_an_evaluation_is_scored_by_other_measures_and_computed_in_other_portions(
    beir: Path, model: Path, tmp_path: Path
) -> None:
    first = evaluate(beir, tmp_path / "run", model)
    other = ("measures=[R@5]", "token_budget=64", "block=8", "data.name=renamed", "index.k=1000")
    again = evaluate(beir, tmp_path / "run", model, *other)
    assert set(again["overall"]) == {"R@5"}
    assert first["collection"]["digest"] == again["collection"]["digest"]


@pytest.mark.parametrize("library", ["caravan", *manifests.LIBRARIES])
def test_embeddings_scores_and_runs_of_another_version_are_made_anew(
    library: str,
    beir: Path,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = (beir, tmp_path / "run", folders["retriever"], f"reranker={folders['reranker']}")
    evaluate(*asked, "rerank.depth=3")
    versions = manifests.versions
    other = lambda *a: {**versions(*a), library: "99.0"}  # noqa: E731
    monkeypatch.setattr(manifests, "versions", other)
    caplog.set_level(logging.INFO)
    written = _written(monkeypatch)
    evaluate(*asked, "rerank.depth=3")
    made = {name.rpartition(".")[0] for name in written}
    assert made == {"passages", "queries.test", "scores.test"}
    for product in ("passages", "retriever.test.trec is made again", "reranked.test.trec is made"):
        assert any(product in line and f"versions.{library}" in line for line in caplog.messages)


def test_exact_and_flat_find_the_same_passages(beir: Path, model: Path, tmp_path: Path) -> None:
    runs = []
    for index in ("flat", "exact"):
        metrics = evaluate(beir, tmp_path / index, model, f"index={index}")
        lines = (tmp_path / index / metrics["run"]).read_text().splitlines()
        runs.append([line.split()[:4] for line in lines])
    assert runs[0] == runs[1]
    assert len(runs[0]) == 4 * 60


def test_an_approximate_index_reports_its_recall(beir: Path, model: Path, tmp_path: Path) -> None:
    metrics = evaluate(beir, tmp_path / "hnsw", model, "index=hnsw")
    assert 0.5 < metrics["facts"]["recall_against_exact"] <= 1
    exact = evaluate(beir, tmp_path / "flat", model)
    assert "recall_against_exact" not in exact["facts"]


def _written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the blocks that are written from now on, as they are."""
    written: list[str] = []
    write = shards._write
    monkeypatch.setattr(shards, "_write", lambda *a: (written.append(a[0].parent.name), write(*a)))
    return written


def test_evaluations_share_a_store(
    beir: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(beir, tmp_path / "test", model)
    written = _written(monkeypatch)
    store = f"store={tmp_path / 'test' / 'store'}"
    evaluate(beir, tmp_path / "train", model, store, "data.split=train")
    assert {name.rpartition(".")[0] for name in written} == {"queries.train"}


def test_evaluations_of_anything_else_replace_nothing_in_a_store_that_they_share(
    beir: Path, folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(beir, tmp_path / "other", "trainer.max_steps=0", "seed=1")
    second = write_beir(tmp_path / "data", seed=3)
    rerank = f"reranker={folders['reranker']}"
    both = f"[bm25,{folders['retriever']}]"
    asked: list[tuple[Any, ...]] = [
        (beir, both, rerank),
        (beir, tmp_path / "other" / "model"),
        (beir, folders["retriever"], "passage_length=8", "query_length=8"),
        (beir, "bm25", "bm25.k1=2", rerank, "rerank.depth=3"),
        (second, both, rerank),
    ]

    def evaluated(number: int, name: str) -> dict[str, bytes]:
        data, *given = asked[number]
        home = tmp_path / f"{name}{number}"
        evaluate(data, home, *given, f"store={tmp_path / 'store'}", "measures=[MRR@5]", "index.k=9")
        return {path.name: path.read_bytes() for path in (home / "runs").glob("*.trec")}

    runs = [evaluated(number, "first") for number in range(len(asked))]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")}
    written = _written(monkeypatch)
    assert [evaluated(number, "again") for number in range(len(asked))] == runs
    assert not written
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*")} == before


def test_a_killed_evaluation_goes_on_in_its_half_after_another_one_had_the_store(
    beir: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = (beir, tmp_path / "run", model, f"store={tmp_path / 'store'}", "block=8")
    with monkeypatch.context() as patch:
        write, done = shards._write, list[Path]()

        def write_three_and_die(path: Path, *written: Any) -> None:
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(path)
            write(path, *written)

        patch.setattr(shards, "_write", write_three_and_die)
        with pytest.raises(KeyboardInterrupt):
            evaluate(*asked)
    evaluate(beir, tmp_path / "other", model, *asked[3:], "passage_length=8")
    written = _written(monkeypatch)
    evaluate(*asked)
    assert written.count(done[0].parent.name) == 8 - len(done)


def test_embeddings_under_a_name_of_older_stores_are_known_by_their_manifest(
    beir: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(beir, tmp_path / "run", model)
    store = tmp_path / "run" / "store"
    for path in store.glob("passages.*"):
        path.rename(store / f"passages{'' if path.is_dir() else '.manifest.json'}")
    written = _written(monkeypatch)
    evaluate(beir, tmp_path / "dev", model, f"store={store}", "data.split=dev")
    assert {name.rpartition(".")[0] for name in written} == {"queries.dev"}


def test_a_run_that_finds_nothing_counts_zero(tmp_path: Path) -> None:
    beir = write_beir(tmp_path / "data")
    lines = [f'{{"_id": "q{i}", "text": "unheard {i}"}}\n' for i in range(24)]
    (beir / "queries.jsonl").write_text("".join(lines))
    for _ in range(2):
        metrics = evaluate(beir, tmp_path / "run", "bm25")
        assert set(metrics["overall"].values()) == {0.0}
        assert set(metrics["per_query"]["MRR@10"].values()) == {0.0}
        assert (metrics["queries"], metrics["missing"]) == (4, 4)


def test_a_run_file_that_was_changed_is_made_again(beir: Path, tmp_path: Path) -> None:
    first = evaluate(beir, tmp_path / "run", "bm25")
    path = tmp_path / "run" / first["run"]
    written = path.read_bytes()
    path.write_bytes(b"".join(written.splitlines(keepends=True)[::2]))
    again = evaluate(beir, tmp_path / "run", "bm25")
    assert path.read_bytes() == written
    assert again["overall"] == first["overall"]


@pytest.mark.parametrize(
    "damage", [lambda text: "", lambda text: "[]", lambda text: text.replace("0.", "1.")]
)
@pytest.mark.parametrize("suffix", ["", ".manifest.json"])
@pytest.mark.parametrize("name", ["metrics.json", "runs/bm25.test.trec", "config.yaml"])
def test_a_damaged_file_of_an_evaluation_is_made_again_or_named(
    name: str, suffix: str, damage: Callable[[str], str], beir: Path, tmp_path: Path
) -> None:
    first = evaluate(beir, tmp_path / "run", "bm25")
    path = tmp_path / "run" / f"{name}{suffix}"
    written = path.read_text()
    path.write_text(damage(written))
    if name + suffix == "config.yaml.manifest.json" and path.read_text() != written:
        with pytest.raises(InputError, match="no record there says of which data"):
            evaluate(beir, tmp_path / "run", "bm25")
        return
    again = evaluate(beir, tmp_path / "run", "bm25")
    assert (again["overall"], again["per_query"]) == (first["overall"], first["per_query"])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == again


def test_figures_are_those_of_the_run_that_lies_there(beir: Path, tmp_path: Path) -> None:
    first = evaluate(beir, tmp_path / "run", "bm25")
    path = tmp_path / "run" / first["run"]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[::2]))
    record = manifests.read(path) or {}
    digest = manifests.content_digest(path)
    manifests.write(path, record["inputs"], {**record["facts"], "run_xxh3": digest})
    again = evaluate(beir, tmp_path / "run", "bm25")
    assert again["overall"] != first["overall"]
    assert again["overall"]["MRR@10"] == pytest.approx(_by_trec_tools(beir, path)["MRR@10"])


def test_an_evaluation_writes_what_was_asked(beir: Path, tmp_path: Path) -> None:
    evaluate(beir, tmp_path / "run", "bm25", "bm25.k1=1.5")
    written = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert written.bm25.k1 == 1.5
    assert written.store == f"{tmp_path / 'run'}/store"


def test_a_folder_that_is_no_model_is_refused(beir: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no caravan\.json"):
        evaluate(beir, tmp_path / "run", beir)


def test_a_split_that_there_is_not_names_those_there_are(
    beir: Path, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="its splits are"):
        evaluate(beir, tmp_path / "run", model, "data.split=tset")


@pytest.mark.slow
def test_an_evaluation_killed_at_any_moment_ends_in_the_same_bytes(
    model: Path, tmp_path: Path
) -> None:
    beir = write_beir(tmp_path / "data", passages=3000, queries=200)

    def command(name: str) -> list[str]:
        given = evaluate_arguments(beir, tmp_path / name, model, "block=50", "precision=float32")
        return [sys.executable, str(ROOT / "evaluate.py"), *given]

    subprocess.run(command("whole"), check=True, capture_output=True)
    for blocks in (5, 20, 40):
        process = subprocess.Popen(command("killed"), stderr=subprocess.DEVNULL)
        while len(list((tmp_path / "killed").rglob("0*.npy"))) < blocks:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.005)
        process.kill()
        process.wait()
    subprocess.run(command("killed"), check=True, capture_output=True)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*.npy")]
    files.append(Path("runs/retriever.test.trec"))
    assert len(files) > 60
    for path in files:
        assert (tmp_path / "whole" / path).read_bytes() == (tmp_path / "killed" / path).read_bytes()
