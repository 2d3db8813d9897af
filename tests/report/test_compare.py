from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tests.commands import evaluate
from tests.report.conftest import Evaluations
from tests.tiny import write_beir

from caravan.errors import InputError
from caravan.report import __main__ as command
from caravan.report import compare, systems
from caravan.report.examples import examples


def _compared(*paths: Path, **settings: object) -> compare.Comparison:
    found = systems.told_apart([systems.system(path) for path in paths])
    return compare.compared(found, systems.judged(found), **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def pair(evaluations: Evaluations) -> compare.Comparison:
    return _compared(evaluations.folder / "bm25", evaluations.theirs)


def _run(arguments: list[object], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["report", *map(str, arguments)])
    return command.main()


@pytest.mark.parametrize("measure", ["MRR@10", "nDCG@10", "R@5"])
def test_figures_of_each_query_are_those_of_ir_measures_on_the_file(
    measure: str, pair: compare.Comparison, evaluations: Evaluations
) -> None:
    runs = [evaluations.folder / "bm25/runs/bm25.train.trec", evaluations.theirs]
    ids = pair.judged.queries.ids(pair.query_rows)
    assert len(ids) == 40
    for values, run in zip(pair.values[measure], runs, strict=True):
        expected = evaluations.per_query(run, measure)
        assert values == pytest.approx([expected.get(name, 0.0) for name in ids], abs=1e-6)


def test_the_t_test_and_its_interval_are_those_of_scipy(pair: compare.Comparison) -> None:
    for measure, (a, b) in pair.values.items():
        (found,) = pair.pairs[measure]
        expected = stats.ttest_rel(b, a)
        interval = expected.confidence_interval(0.95)
        assert found.p == pytest.approx(expected.pvalue)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
        assert found.difference == pytest.approx(np.mean(b) - np.mean(a))
        assert (found.gained, found.equal, found.lost) == (
            *(int((b > a).sum()), int((b == a).sum()), int((b < a).sum())),
        )


def test_the_randomisation_test_counts_changes_of_sign(pair: compare.Comparison) -> None:
    (found,) = compare.paired(pair.values["MRR@10"], [(0, 1)], "randomisation")
    differences = pair.values["MRR@10"][1] - pair.values["MRR@10"][0]
    signs = np.random.default_rng(7).choice([-1, 1], (20_000, len(differences)))
    drawn = np.abs((signs * differences).mean(axis=1))
    expected = float((drawn >= abs(differences.mean()) - 1e-12).mean())
    assert found.p == pytest.approx(expected, abs=0.02)
    assert found.p != pair.pairs["MRR@10"][0].p


def test_holm_multiplies_by_what_is_left_and_never_falls() -> None:
    # R: p.adjust(c(.01, .04, .03, .005), "holm")
    assert compare.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert compare.holm([0.9, 0.8]) == [1.0, 1.0]
    assert compare.holm([]) == []


def test_pairs_are_corrected_a_measure_at_a_time() -> None:
    values = np.random.default_rng(0).random((3, 30))
    values[2] += 0.3
    found = compare.paired(values, [(0, 1), (0, 2), (1, 2)])
    raw = [stats.ttest_rel(values[b], values[a]).pvalue for a, b in ((0, 1), (0, 2), (1, 2))]
    assert [one.corrected for one in found] == pytest.approx(compare.holm(raw))
    assert found[1].corrected > found[1].p


@pytest.mark.parametrize("test", compare.TESTS)
def test_systems_that_never_differ_are_not_different(test: str) -> None:
    (same,) = compare.paired(np.ones((2, 9)), [(0, 1)], test)
    assert (same.p, same.corrected, same.low, same.high) == (1.0, 1.0, 0.0, 0.0)
    (single,) = compare.paired(np.array([[0.0], [1.0]]), [(0, 1)], test)
    assert single.p == 1.0


def test_overlap_is_jaccards_over_the_first_passages(
    pair: compare.Comparison, evaluations: Evaluations
) -> None:
    tops: list[dict[str, list[str]]] = []
    for run in (evaluations.folder / "bm25/runs/bm25.train.trec", evaluations.theirs):
        lines = [line.split() for line in run.read_text().splitlines()]
        ranked: dict[str, list[str]] = {}
        for query, _, passage, _, score, _ in sorted(lines, key=lambda f: (float(f[4]), f[2])):
            ranked.setdefault(query, []).insert(0, passage)
            assert score
        tops.append(ranked)
    (found,) = pair.overlaps
    for k, share in found.jaccard.items():
        of = [
            len({*tops[0][q][:k]} & {*tops[1][q][:k]}) / len({*tops[0][q][:k], *tops[1][q][:k]})
            for q in tops[0]
        ]
        assert share == pytest.approx(np.mean(of))
    assert found.same_first == np.mean([tops[0][q][0] == tops[1][q][0] for q in tops[0]])


def test_a_query_that_a_run_lacks_counts_0_and_is_told(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    lines = evaluations.theirs.read_text().splitlines(keepends=True)
    first = lines[0].split()[0]
    short = tmp_path / "short.trec"
    short.write_text("".join(line for line in lines if line.split()[0] != first))
    found = _compared(evaluations.folder / "bm25", short)
    place = found.judged.queries.ids(found.query_rows).index(first)
    assert found.values["R@5"][1][place] == 0.0
    assert found.missing == [0, 1]
    assert "short lacks 1" in compare.tables(found)[0].caption


def test_queries_are_shown_with_ranks_and_texts(pair: compare.Comparison) -> None:
    gained, lost = examples(pair, 0, 1, 3)
    differences = np.sort(pair.values["MRR@10"][1] - pair.values["MRR@10"][0])
    assert [one.after - one.before for one in lost] == pytest.approx(differences[:3])
    assert all(one.after > one.before for one in gained)
    for one in [*gained, *lost]:
        assert one.text.startswith(pair.judged.queries.get(
            pair.judged.queries.rows([one.id]))[0][1].split()[0])  # fmt: skip
        assert all(1 in passage.ranks for passage in one.passages if any(passage.top_of))
        assert any(passage.grade >= 1 for passage in one.passages)
        for passage in one.passages:
            ((_, text),) = pair.judged.corpus.get(pair.judged.corpus.rows([passage.id]))
            assert passage.text == " ".join(text.split())


def test_long_texts_are_cut_so_that_a_page_stays_small(
    pair: compare.Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("caravan.report.examples.CHARACTERS", 24)
    gained, _ = examples(pair, 0, 1, 2)
    for text in (one.text for query in gained for one in [query, *query.passages]):
        assert text.endswith(" …")
        assert len(text) <= 24 + 1


def test_run_files_alone_are_judged_by_a_file_of_qrels(
    pair: compare.Comparison, evaluations: Evaluations
) -> None:
    paths = [evaluations.folder / "bm25/runs/bm25.train.trec", evaluations.theirs]
    found = [systems.System(path.stem, path) for path in paths]
    judged = systems.judged(found, evaluations.beir / "qrels/train.tsv")
    alone = compare.compared(found, judged, ["MRR@10", "R@5"])
    assert not judged.has_texts
    assert np.sort(alone.values["MRR@10"]) == pytest.approx(np.sort(pair.values["MRR@10"]))
    assert alone.pairs["R@5"][0].p == pytest.approx(pair.pairs["R@5"][0].p)
    gained, _ = examples(alone, 0, 1, 1)
    assert gained[0].text == ""
    assert gained[0].passages[0].id.startswith("p")


def test_a_stage_of_an_evaluation_is_named_by_its_run_file(evaluations: Evaluations) -> None:
    runs = evaluations.folder / "pipeline/runs"
    found = [
        systems.system(path) for path in (runs / "bm25.train.trec", evaluations.folder / "bm25")
    ]
    assert [one.name for one in found] == ["bm25", "bm25"]
    assert [one.name for one in systems.told_apart(found)] == ["pipeline/bm25", "runs/bm25"]
    with pytest.raises(InputError, match="given twice"):
        systems.told_apart([found[0], found[0]])


def test_other_collections_and_splits_are_not_compared(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    evaluate(evaluations.beir, tmp_path / "dev", "bm25", "data.split=dev")
    with pytest.raises(InputError, match=r"bm25 \(data train\), dev \(data dev\)"):
        _compared(evaluations.folder / "bm25", tmp_path / "dev")


def test_collections_of_one_name_are_told_apart_by_their_digests() -> None:
    found = [
        systems.System(name, Path(name), Path(), ("pydocs", digit * 32), "test")
        for name, digit in (("old", "a"), ("new", "b"))
    ]
    told = r"old \(pydocs test, digest a{12}\), new \(pydocs test, digest b{12}\)"
    with pytest.raises(InputError, match=told):
        systems.judged(found)


def test_measures_are_spelled_as_the_collection_wants_them(
    evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = systems.find
    monkeypatch.setattr(
        systems, "find", lambda *given: replace(find(*given), relevant_from={"train": 2})
    )
    found = _compared(
        evaluations.folder / "bm25", evaluations.theirs, measures=["MRR@10", " nDCG@10"]
    )
    assert list(found.values) == ["MRR(rel=2)@10", "nDCG@10"]


def test_a_measure_that_is_named_twice_counts_once(evaluations: Evaluations) -> None:
    paths = evaluations.folder / "bm25", evaluations.theirs
    once, twice = (_compared(*paths, measures=["R@5"] * times) for times in (1, 2))
    np.testing.assert_array_equal(once.values["R@5"], twice.values["R@5"])


def test_one_judgement_told_twice_counts_once_and_two_grades_are_refused(tmp_path: Path) -> None:
    qrels = tmp_path / "qrels.txt"
    qrels.write_text("q 0 p 1\nq 0 p 1\nq 0 r 0\n")
    assert systems.judged([], qrels).qrels.grades.tolist() == [1, 0]
    qrels.write_text("q 0 p 1\nr 0 p 1\nq 0 p 2\n")
    with pytest.raises(InputError, match=r"qrels\.txt:3: .* grade 2, but 1 at .*qrels\.txt:1"):
        systems.judged([], qrels)


def test_an_evaluation_of_many_collections_is_not_one_ranking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed, name in enumerate(("one", "two")):
        write_beir(tmp_path / "data" / name, seed=seed)
    suite = tmp_path / "suite"
    evaluate(tmp_path / "data", suite, "bm25", "collections=[one,two]")
    capsys.readouterr()
    assert _run(["compare", suite, suite / "one"], monkeypatch) == 2
    told = f"{suite} is an evaluation of several collections; compare one of them, such as {suite}"
    assert capsys.readouterr().err.startswith(f"{told}/one, or see them all with")
    for k1 in ("0.3", "2"):  # what it names instead works
        evaluate(tmp_path / "data", tmp_path / k1, "bm25", "collections=[one]", f"bm25.k1={k1}")
    assert _run(["compare", tmp_path / "0.3/one", tmp_path / "2/one"], monkeypatch) == 0
    assert "2/one" in capsys.readouterr().out


def test_a_run_directory_is_named_after_its_folder_from_within_too(
    evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evaluations.folder / "bm25")
    assert systems.system(Path()).name == "bm25"


def test_the_page_shows_as_many_queries_as_were_asked_for_and_its_own_command(
    evaluations: Evaluations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "out.html"
    given = ["compare", evaluations.folder / "bm25", evaluations.theirs]
    assert _run([*given, "--queries", 1, "--html", page], monkeypatch) == 0
    text = page.read_text()
    assert text.count("<article>") == 2
    said = " ".join(map(str, ["python -m caravan.report", *given, "--queries 1 --html", page]))
    assert f"<code>{said}</code>" in text


def test_compare_prints_figures_tests_overlap_and_queries_and_writes_a_page(
    evaluations: Evaluations,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    page = tmp_path / "out.html"
    arguments = ["compare", evaluations.folder / "bm25", evaluations.theirs, "--html", page]
    assert _run(arguments, monkeypatch) == 0
    printed = capsys.readouterr().out
    for told in ("0.", "paired t-test", "Jaccard@10", "bm25 → theirs: queries that lose most"):
        assert told in printed
    record = json.loads((evaluations.folder / "bm25/metrics.json").read_text())
    assert f"{record['overall']['MRR@10']:.4f}" in printed
    assert f"{record['overall']['MRR@10']:.4f}" in page.read_text()
    assert (tmp_path / "out/significance.tex").read_text().startswith(r"\begin{table}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["{runs}/bm25"], "two runs or more"),
        (["{runs}/bm25", "nowhere.trec"], "no run directory and no run file nowhere.trec"),
        (["{runs}/bm25", "{runs}"], "is not the run directory of an evaluation"),
        (["{theirs}", "{theirs}2"], "--qrels and a file of judgements"),
        (["{runs}/bm25", "{theirs}", "--measures", "nDCG"], "did you mean 'nDCG@10'"),
        (["{theirs}", "{theirs}2", "--qrels", "{theirs}"], ":1: 6 columns"),
        (["{runs}/bm25", "{theirs}", "--queries", "-1"], "give 0 or more"),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_sentence(
    arguments: list[str],
    told: str,
    evaluations: Evaluations,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(evaluations.theirs, f"{evaluations.theirs}2")
    given = [text.format(runs=evaluations.folder, theirs=evaluations.theirs) for text in arguments]
    assert _run(["compare", *given], monkeypatch) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.strip().splitlines()) == 1
