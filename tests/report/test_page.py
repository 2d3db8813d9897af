from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from tests.commands import evaluate
from tests.report.conftest import HARMFUL, Evaluations, Report, write_page, write_record
from tests.tiny import write_beir
from torch.utils.tensorboard import SummaryWriter

from caravan.manifests import write_json
from caravan.report import jobs
from caravan.report.page import POINTS, read_curves


class Parsed(HTMLParser):
    """Elements with their attributes, and the text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for attributes in self.all("h2")]


@pytest.fixture(scope="module")
def runs(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the quickstart's: evaluations and a training."""
    return shutil.copytree(whole / "mine", tmp_path_factory.mktemp("several") / "mine")


@pytest.fixture(scope="module")
def parsed(runs: Path) -> Parsed:
    return Parsed(write_page(runs))


def test_the_page_has_results_stages_tests_queries_curves_and_configs(
    parsed: Parsed, runs: Path
) -> None:
    first = ["results", "stages", "differences", "queries"]
    assert parsed.sections == [*first, "training", "made"]
    for text in ("1 training;", "paired t-test", "95 % confidence interval"):
        assert text in parsed.text
    assert "python train.py name=r" in parsed.text
    assert "_target_: a.B" in parsed.text
    assert len(parsed.all("article")) == 2 * 3  # queries that gain, and lose
    record = json.loads((runs / "pipeline/metrics.json").read_text())
    for stage in record["stages"]:
        for value in stage["overall"].values():
            assert f"{value:.4f}" in parsed.text


def test_a_text_is_shown_as_text_and_nothing_is_loaded_or_run(parsed: Parsed, runs: Path) -> None:
    assert parsed.text.count(HARMFUL) > 4  # in queries and in passages
    assert parsed.all("script") == []
    for tag, attributes in parsed.elements:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "srcset", "href", "data", "poster", "action"):
            value = attributes.get(name) or "#"
            assert value.startswith("#" if tag == "a" else ("#", "data:"))
    style = re.search(r"<style>(.*?)</style>", (runs / "report.html").read_text(), re.DOTALL)
    assert style is not None
    assert not re.search(r"url\(|@import", style[1])
    (policy,) = (m for m in parsed.all("meta") if "http-equiv" in m)
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")


def test_headings_links_images_and_tables_are_accessible(parsed: Parsed) -> None:
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for a in parsed.all("a")} <= set(ids)
    images = parsed.all("img")
    assert len(images) == len(parsed.all("figcaption")) >= 3
    assert all(image["alt"] for image in images)
    assert len(parsed.all("table")) == len(parsed.all("caption")) >= 4
    assert all(th.get("scope") in ("col", "row") for th in parsed.all("th"))


def test_plots_and_tables_are_beside_the_page(parsed: Parsed, runs: Path) -> None:
    files = {path.name for path in (runs / "report").iterdir()}
    for name in ("means-MRR-10", "curves-train-loss"):
        assert {f"{name}.png", f"{name}.svg"} <= files
    assert {"results.md", "results.tex", "stages-pipeline.tex", "significance.md"} <= files
    captions = (runs / "report/captions.md").read_text()
    assert captions.count("**") == 2 * len(parsed.all("img"))


@pytest.mark.usefixtures("undrawn")
def test_one_evaluation_is_a_page_named_after_its_system_even_without_its_collection(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    shutil.copytree(evaluations.folder / "bm25", tmp_path / "one")
    found = Parsed(write_page(tmp_path / "one"))
    assert found.sections == ["results", "made"]
    assert "no recorded command" in found.text
    assert "| bm25 |" in (tmp_path / "one/report/results.md").read_text()
    shutil.copytree(evaluations.folder, tmp_path / "runs")
    for path in (tmp_path / "runs").glob("*/config.yaml"):
        path.write_text("cache_dir: gone\n")
    found = Parsed(write_page(tmp_path / "runs"))
    assert "are left out. No test: the collection of" in found.text
    assert found.sections == ["results", "stages", "made"]


@pytest.mark.usefixtures("undrawn")
def test_a_suite_has_the_mean_of_its_collections_first(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_beir(tmp_path / "data" / name, seed=seed)
    suite = tmp_path / "runs/suite"
    evaluate(tmp_path / "data", suite, "bm25", "collections=[one,two]", "measures=[nDCG@10,R@5]")
    found = Parsed(write_page(suite))
    overall = json.loads((suite / "metrics.json").read_text())["overall"]
    overview = (suite / "report/overview.md").read_text().splitlines()
    assert overview[-1] == f"| mean | {overall['nDCG@10']:.4f} | {overall['R@5']:.4f} |"
    assert found.sections == ["overview", "1-results", "2-results", "made"]
    assert "| bm25 |" in (suite / "report/1-results.md").read_text()
    beside = shutil.copytree(
        suite, tmp_path / "runs/beside", ignore=shutil.ignore_patterns("report*")
    )
    for folders in ([tmp_path / "runs"], [beside, suite]):
        assert write_page(*folders) == tmp_path / "runs/report.html"
        results = (tmp_path / "runs/report/1-results.md").read_text()
        assert "| suite |" in results
        assert "| beside |" in results


@pytest.mark.usefixtures("undrawn")
def test_suites_without_a_common_table_leave_the_page_the_rest(tmp_path: Path) -> None:
    for number in range(14):
        write_json(tmp_path / f"{number:02}/metrics.json", {"updates": 5})
    failed = {"a": "a/corpus.jsonl:4: not JSON"}
    write_record(tmp_path / "suite", run="", overall={}, collections={}, failed=failed)
    found = Parsed(write_page(tmp_path))
    assert "No table: " in found.text
    assert "a/corpus.jsonl:4: not JSON" in found.text
    assert "14 trainings" in found.text
    assert "2 more trainings are not shown" in found.text


@pytest.mark.usefixtures("undrawn")
def test_a_sweep_has_its_table_plots_tests_queries_and_failed_jobs(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    folder = tmp_path / "sweeps/k1"
    cache = f"cache_dir={evaluations.folder.parent / 'cache'}"
    for k1 in ("0.1", "4"):
        job = folder / f"k1-{k1}"
        given = ("data.split=train", cache, "measures=[MRR@10,nDCG@10,R@5]")
        evaluate(evaluations.beir, job, "bm25", f"bm25.k1={k1}", *given)
        jobs.write(job, [f"bm25.k1={k1}"], jobs.FINISHED)
    jobs.write(folder / "k1-x", ["bm25.k1=x"], jobs.FAILED, "k1 must be a number <b>")
    found = Parsed(write_page(folder))
    assert "a sweep over bm25.k1, 2 evaluations" in found.text
    assert "Not finished: k1-x: k1 must be a number <b>" in found.text
    assert found.sections == ["sweep", "results", "differences", "queries", "made"]
    assert "| bm25.k1=0.1 |" in (folder / "report/results.md").read_text()
    assert (folder / "report/sweep-MRR-10.svg").exists()
    assert (folder / "sweep.csv").exists()
    lines = (folder / "report/sweep.md").read_text().splitlines()[4:]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["0.1", "4"]
    for k1, *scores, _ in rows:
        run = folder / f"k1-{k1}/runs/bm25.train.trec"
        for measure, text in zip(("MRR@10", "nDCG@10", "R@5"), scores, strict=True):
            assert text == f"{sum(evaluations.per_query(run, measure).values()) / 40:.4f}"
    assert "a sweep over" not in Parsed(write_page(folder / "k1-4")).text
    for k1, size in (("0.1", 64), ("4", 16)):  # the larger vectors are what others are tested with
        path = folder / f"k1-{k1}/metrics.json"
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "facts": {"bytes_per_vector": size}}))
    write_page(folder)
    tests = (folder / "report/significance.md").read_text().splitlines()[4:]
    assert {line.split("|")[2].strip() for line in tests} == {"bm25.k1=4 → bm25.k1=0.1"}
    (folder / "multirun.yaml").touch()
    found = Parsed(write_page(tmp_path / "sweeps"))  # the jobs of a sweep below are evaluations
    assert "a sweep over" not in found.text
    assert "2 evaluations" in found.text
    assert "| k1/k1-4 |" in (tmp_path / "sweeps/report/results.md").read_text()


def test_a_folder_without_runs_or_that_cannot_be_written_is_named(
    tmp_path: Path, report: Report
) -> None:
    code, _, error = report("page", tmp_path)
    assert code == 2
    assert str(tmp_path) in error
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "metrics.json").write_text('{"updates": 5}')
    (tmp_path / "report").write_text("a file in the way of the folder")
    code, _, error = report("page", tmp_path)
    assert code == 2
    assert error.startswith(str(tmp_path / "report"))
    assert not (tmp_path / "report.html").exists()


def test_curves_have_the_last_value_of_each_step_and_few_points(tmp_path: Path) -> None:
    def log(folder: str, steps: list[int], values: list[float], tag: str = "train/loss") -> None:
        with SummaryWriter(str(tmp_path / folder / "tensorboard")) as writer:
            for step, value in zip(steps, values, strict=True):
                writer.add_scalar(tag, value, step)

    assert read_curves(tmp_path) == {}
    log("resumed", [10, 20, 30], [4.0, 3.0, 9.0])
    log("resumed", [20, 30], [2.5, 2.0])
    log("resumed", [29], [0.5], "val/MRR@10")
    expected = {"train/loss": ([10, 20, 30], [4.0, 2.5, 2.0]), "val/MRR@10": ([29], [0.5])}
    assert read_curves(tmp_path / "resumed") == expected
    log("long", list(range(0, 5000, 2)), [float(step) for step in range(0, 5000, 2)])
    steps, values = read_curves(tmp_path / "long")["train/loss"]
    assert (len(steps), steps[-1]) == (POINTS, 4998)
    assert steps == sorted(steps)
    assert values == [float(step) for step in steps]
