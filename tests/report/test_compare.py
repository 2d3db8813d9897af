from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tests.commands import evaluate
from tests.refusals import refused
from tests.report.conftest import Evaluations, Report, write_record

from caravan.report import systems
from caravan.report.compare import Comparison, compare, examples, holm, paired_tests
from caravan.report.evaluations import comparison_tables
from caravan.report.systems import System, read_judged, read_system, with_distinct_names


def _compare(*paths: Path, measures: tuple[str, ...] = ()) -> Comparison:
    found = with_distinct_names([read_system(path) for path in paths])
    return compare(found, read_judged(found), measures)


def _bm25(evaluations: Evaluations) -> Path:
    return evaluations.folder / "bm25/runs/bm25.train.trec"


@pytest.fixture(scope="module")
def pair(evaluations: Evaluations) -> Comparison:
    return _compare(evaluations.folder / "bm25", evaluations.theirs)


@pytest.mark.parametrize("measure", ["MRR@10", "nDCG@10", "R@5"])
def test_scores_of_each_query_are_those_of_ir_measures_on_the_file(
    measure: str, pair: Comparison, evaluations: Evaluations
) -> None:
    ids = pair.judged.queries.ids(pair.query_rows)
    assert len(ids) == 40
    runs = (_bm25(evaluations), evaluations.theirs)
    for values, run in zip(pair.values[measure], runs, strict=True):
        expected = evaluations.per_query(run, measure)
        assert values == pytest.approx([expected.get(name, 0.0) for name in ids], abs=1e-6)


def test_the_t_test_and_its_interval_are_those_of_scipy(pair: Comparison) -> None:
    for measure, (a, b) in pair.values.items():
        (found,) = pair.pairs[measure]
        expected = stats.ttest_rel(b, a)
        interval = expected.confidence_interval(0.95)
        assert found.p == pytest.approx(expected.pvalue)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
        assert found.difference == pytest.approx(np.mean(b) - np.mean(a))
        counts = [int(which.sum()) for which in (b > a, b == a, b < a)]
        assert [found.gained, found.equal, found.lost] == counts


def test_pairs_are_corrected_by_the_method_of_holm_a_measure_at_a_time() -> None:
    # R: p.adjust(c(.01, .04, .03, .005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    values = np.random.default_rng(0).random((3, 30))
    values[2] += 0.3
    couples = [(0, 1), (0, 2), (1, 2)]
    raw = [stats.ttest_rel(values[b], values[a]).pvalue for a, b in couples]
    corrected = [one.corrected for one in paired_tests(values, couples)]
    assert corrected == pytest.approx(holm(raw))


def test_systems_that_never_differ_are_not_different() -> None:
    (same,) = paired_tests(np.ones((2, 9)), [(0, 1)])
    assert (same.p, same.corrected, same.low, same.high) == (1.0, 1.0, 0.0, 0.0)
    (single,) = paired_tests(np.array([[0.0], [1.0]]), [(0, 1)])
    assert single.p == 1.0


def test_a_query_that_a_run_lacks_counts_0_and_is_reported(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    lines = evaluations.theirs.read_text().splitlines(keepends=True)
    first = lines[0].split()[0]
    short = tmp_path / "short.trec"
    short.write_text("".join(line for line in lines if line.split()[0] != first))
    found = _compare(evaluations.folder / "bm25", short)
    place = found.judged.queries.ids(found.query_rows).index(first)
    assert found.values["R@5"][1][place] == 0.0
    assert found.missing == [0, 1]
    assert "short lacks 1" in comparison_tables(found)[0].caption


@pytest.mark.parametrize("of_file", [False, True])
def test_a_shallower_run_is_neither_scored_nor_tested_by_a_deeper_measure(
    of_file: bool, evaluations: Evaluations, tmp_path: Path
) -> None:
    short = tmp_path / "short"
    if of_file:  # as deep as its longest list
        short = tmp_path / "short.trec"
        lines = _bm25(evaluations).read_text().splitlines(keepends=True)
        short.write_text("".join(line for line in lines if int(line.split()[3]) <= 20))
    else:
        cache = f"cache_dir={evaluations.folder.parent / 'cache'}"
        given = ("data.split=train", "index.k=20", "measures=[MRR@10]", cache)
        evaluate(evaluations.beir, short, "bm25", *given)
    found = _compare(short, evaluations.folder / "bm25", measures=("R@50", "MRR@10"))
    results, significance = comparison_tables(found)
    assert [row[1] == "\u2013" for row in results.rows] == [True, False]
    assert (found.measure, found.pairs["R@50"]) == ("MRR@10", [])
    assert [row[0] for row in significance.rows] == ["MRR@10"]
    assert results.caption.endswith("the measure looks deeper than the run.")
    # The same ranking: where both are deep enough, they are equal.
    assert found.pairs["MRR@10"][0].difference == 0.0


def test_examples_have_ranks_and_texts(pair: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    gained, lost = examples(pair, 0, 1, 3)
    differences = pair.values["MRR@10"][1] - pair.values["MRR@10"][0]
    ids = pair.judged.queries.ids(pair.query_rows)
    of = [[differences[ids.index(one.id)] for one in some.queries] for some in (lost, gained)]
    assert of[0] == pytest.approx(np.sort(differences)[:3])
    assert of[1] == pytest.approx(-np.sort(-differences)[:3])
    for one in (*gained.queries, *lost.queries):
        ((_, query),) = pair.judged.queries.get(pair.judged.queries.rows([one.id]))
        assert one.text == " ".join(query.split())
        assert {"bm25", "theirs"} == {
            run for passage in one.passages for run in re.findall(r"\b1 in (\w+)", passage.place)
        }
        assert any(passage.relevant for passage in one.passages)
        for passage in one.passages:
            ((_, text),) = pair.judged.corpus.get(pair.judged.corpus.rows([passage.id]))
            assert passage.text == " ".join(text.split())
    monkeypatch.setattr("caravan.report.compare.CHARACTERS", 24)
    cut = examples(pair, 0, 1, 2)[0].queries
    assert all(len(one.text) <= 25 and one.text.endswith(" …") for one in cut[0].passages)


def test_run_files_alone_are_judged_by_a_file_of_qrels(
    pair: Comparison, evaluations: Evaluations, tmp_path: Path
) -> None:
    found = [System(path.stem, path) for path in (_bm25(evaluations), evaluations.theirs)]
    judged = read_judged(found, evaluations.beir / "qrels/train.tsv")
    alone = compare(found, judged, ["MRR@10", "R@5"])
    assert np.sort(alone.values["MRR@10"]) == pytest.approx(np.sort(pair.values["MRR@10"]))
    assert alone.pairs["R@5"][0].p == pytest.approx(pair.pairs["R@5"][0].p)
    (query,) = examples(alone, 0, 1, 1)[0].queries
    assert (query.text, query.passages[0].id[0]) == ("", "p")
    for i, one in enumerate(found):  # short ones are scored if none is deeper
        lines = one.run.read_text().splitlines(keepends=True)
        short = tmp_path / f"{i}.trec"
        short.write_text("".join(line for line in lines if int(line.split()[3]) <= 3))
        found[i] = System(one.name, short)
    alone = compare(found, judged, ["MRR@10"])
    assert len(alone.pairs["MRR@10"]) == 1


def test_names_get_the_folders_above_them_until_they_differ(
    evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = evaluations.folder / "pipeline/runs/bm25.train.trec"
    found = [read_system(path) for path in (stage, evaluations.folder / "bm25")]
    assert [one.name for one in found] == ["bm25", "bm25"]
    assert [one.name for one in with_distinct_names(found)] == ["pipeline/bm25", "runs/bm25"]
    with refused("given-twice", str(stage)):
        with_distinct_names([found[0], found[0]])
    monkeypatch.chdir(evaluations.folder / "bm25")
    assert read_system(Path()).name == "bm25"


@pytest.mark.parametrize(("digest", "split"), [("b", "test"), ("a", "dev")])
def test_other_collections_and_splits_are_not_compared(
    digest: str, split: str, tmp_path: Path
) -> None:
    def system(name: str, digest: str, split: str) -> System:
        collection = {"name": "pydocs", "digest": digest * 32}
        return read_system(write_record(tmp_path / name, collection=collection, split=split))

    places = (f"old (pydocs test, digest {'a' * 12})", f"new (pydocs {split}, digest {digest}")
    with refused("mixed-collections", *places):
        read_judged([system("old", "a", "test"), system("new", digest, split)])


@pytest.mark.parametrize(
    ("relevant_from", "names"), [(1, ["MRR@10", "nDCG@10"]), (2, ["MRR(rel=2)@10", "nDCG@10"])]
)
def test_measures_count_from_the_grade_of_the_split_and_once(
    relevant_from: int, names: list[str], pair: Comparison
) -> None:
    judged = replace(pair.judged, relevant_from=relevant_from)
    found = compare(pair.systems, judged, ["MRR@10", " nDCG@10", "MRR@10"])
    assert list(found.values) == names
    assert {values.shape for values in found.values.values()} == {(2, 40)}


def test_a_suite_is_not_compared_as_a_whole(tmp_path: Path) -> None:
    with refused("no-evaluation", str(tmp_path)):
        read_system(write_record(tmp_path, run="", collections={}, failed={}))


@pytest.mark.usefixtures("undrawn")
def test_compare_prints_scores_tests_and_queries_and_writes_a_page(
    evaluations: Evaluations, tmp_path: Path, report: Report
) -> None:
    page = tmp_path / "out.html"
    given = ["compare", evaluations.folder / "bm25", evaluations.theirs, "--queries", 1]
    code, printed, _ = report(*given, "--html", page)
    assert code == 0
    for part in ("paired t-test", "bm25 → theirs: queries that lose most"):
        assert part in printed
    mean = sum(evaluations.per_query(_bm25(evaluations), "MRR@10").values()) / 40
    text = page.read_text()
    assert all(f"{mean:.4f}" in shown for shown in (printed, text))
    assert text.count("<article>") == 2
    command = " ".join(map(str, ["python -m caravan.report", *given, "--html", page]))
    assert f"<code>{command}</code>" in text
    assert (tmp_path / "out/significance.tex").read_text().startswith(r"\begin{table}")


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["{runs}/bm25", "nowhere.trec"], "nowhere.trec"),
        (["{runs}/bm25", "{runs}"], "{runs}"),
        (["{theirs}", "{theirs}2"], "--qrels"),
        (["{runs}/bm25", "{theirs}", "--measures", "nDCG"], "'nDCG'"),
        (["{theirs}", "{theirs}2", "--qrels", "{theirs}"], ":1:"),
        (["a"], "two runs"),
        (["a", "b", "--queries", "-1"], "--queries"),
        (["a", "b", "--html", "b.trec"], "--html"),
    ],
)
def test_wrong_arguments_and_inputs_are_short_errors(
    arguments: list[str], place: str, evaluations: Evaluations, report: Report
) -> None:
    shutil.copy(evaluations.theirs, f"{evaluations.theirs}2")
    names = {"runs": evaluations.folder, "theirs": evaluations.theirs}
    code, _, error = report("compare", *(text.format(**names) for text in arguments))
    assert code == 2
    assert place.format(**names) in error.splitlines()[-1]


def test_a_collection_is_found_in_the_cache_that_the_run_names(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    evaluation = read_system(evaluations.folder / "bm25").evaluation
    assert evaluation is not None
    digest = evaluation.collection.digest
    (tmp_path / "config.yaml").write_text("cache_dir: gone\n")
    with refused("collection-not-found", str(tmp_path), digest[:12]):
        systems.find(digest, tmp_path)
