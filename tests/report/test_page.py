from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from tests.commands import evaluate
from tests.report.conftest import HARMFUL, Evaluations
from tests.tiny import write_beir
from torch.utils.tensorboard import SummaryWriter

from caravan import manifests
from caravan.errors import InputError
from caravan.report import __main__ as command
from caravan.report import jobs, page


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


@pytest.fixture(scope="module")
def runs(evaluations: Evaluations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the quickstart's: evaluations and a training."""
    folder = tmp_path_factory.mktemp("several") / "mine"
    shutil.copytree(evaluations.folder, folder)
    for path in folder.glob("*/config.yaml"):
        path.write_text(f"# python evaluate.py name={path.parent.name}\n{path.read_text()}")
    training = folder / "train/retriever"
    writer = SummaryWriter(str(training / "tensorboard"))
    for step in range(5):
        writer.add_scalar("train/loss", 4 - step / 2, step)
        writer.add_scalar("val/MRR@10", step / 10, step)
    writer.close()
    record = {"name": "r", "base_model": "tiny", "collection": "data (abc)", "updates": 5}
    record |= {"monitored": "val/MRR@10", "best": 0.4, "train_seconds": 2.5}
    (training / "metrics.json").write_text(json.dumps(record))
    (training / "config.yaml").write_text("# python train.py name=r\nname: r\nseed: 7\n")
    return folder


@pytest.fixture(scope="module")
def parsed(runs: Path) -> Parsed:
    return Parsed(page.write(runs))


def test_the_page_holds_results_stages_tests_queries_curves_and_configs(parsed: Parsed) -> None:
    headings = [attributes["id"] for attributes in parsed.all("h2")]
    assert headings == ["facts", "results", "stages", "differences", "queries", "training", "made"]
    for told in ("1 training", "paired t-test", "Jaccard@10", "95 % confidence interval"):
        assert told in parsed.text
    assert "python train.py name=r" in parsed.text
    assert "seed: 7" in parsed.text
    assert len(parsed.all("article")) == 10  # five gain and five lose


def test_its_figures_are_those_of_metrics_json(parsed: Parsed, runs: Path) -> None:
    record = json.loads((runs / "pipeline/metrics.json").read_text())
    for stage in record["stages"]:
        for value in stage["overall"].values():
            assert f"{value:.4f}" in parsed.text
    assert "equal to metrics.json in every digit shown" in parsed.text


def test_a_text_is_shown_as_text_whatever_it_holds(parsed: Parsed) -> None:
    assert parsed.text.count(HARMFUL) > 4  # in queries and in passages
    assert parsed.all("script") == []
    for _, attributes in parsed.elements:
        assert not any(name.startswith("on") for name in attributes)
    assert all((img["src"] or "").startswith("data:") for img in parsed.all("img"))


def test_the_page_asks_for_nothing_over_the_network(parsed: Parsed, runs: Path) -> None:
    for _, attributes in parsed.elements:
        for name in ("src", "srcset", "href", "data", "poster", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/svg+xml;base64,", "#"))
    text = (runs / "report.html").read_text()
    (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style
    (policy,) = (m for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert (policy["content"] or "").startswith("default-src 'none'; img-src data:;")


def test_the_page_can_be_heard_and_walked_through(parsed: Parsed) -> None:
    assert parsed.all("html") == [{"lang": "en"}]
    assert len(parsed.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    ids = [attributes["id"] for _, attributes in parsed.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {(a["href"] or "")[1:] for a in parsed.all("a")} <= set(ids)
    images = parsed.all("img")
    assert len(images) == len(parsed.all("figcaption")) >= 4
    assert all(re.search(r"\d\.\d", image["alt"] or "") for image in images)  # figures in words
    assert len(parsed.all("table")) == len(parsed.all("caption")) >= 4
    assert parsed.all("th")
    assert all(th.get("scope") in ("col", "row") for th in parsed.all("th"))


def test_plots_and_tables_lie_beside_the_page(parsed: Parsed, runs: Path) -> None:
    files = {path.name for path in (runs / "report").iterdir()}
    for name in ("means-MRR-10", "stages-pipeline-gain", "curves-train-retriever"):
        assert {f"{name}.png", f"{name}.svg"} <= files
    assert {"results.md", "results.tex", "stages-pipeline.tex", "overlap.md"} <= files
    captions = (runs / "report/captions.md").read_text()
    assert captions.count("**") == 2 * len(parsed.all("img"))


def test_one_evaluation_is_a_page_too(evaluations: Evaluations, tmp_path: Path) -> None:
    folder = tmp_path / "bm25"
    shutil.copytree(evaluations.folder / "bm25", folder)
    shutil.copytree(evaluations.folder.parent / "cache", tmp_path / "cache")
    found = Parsed(page.write(folder))
    assert [one["id"] for one in found.all("h2")] == ["facts", "results", "made"]
    assert "not started by a command" in found.text
    assert "| bm25 |" in (folder / "report/results.md").read_text()  # and not "."


def test_a_page_without_its_collection_says_so_and_has_the_rest(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(evaluations.folder, folder)
    for path in folder.glob("*/config.yaml"):
        path.write_text("cache_dir: gone\n")
    found = Parsed(page.write(folder))
    assert "Figures query by query and texts are left out: the collection of" in found.text
    assert [one["id"] for one in found.all("h2")] == ["facts", "results", "stages", "made"]


def test_a_run_file_that_was_changed_is_told(evaluations: Evaluations, tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(evaluations.folder / "bm25", folder / "bm25")
    shutil.copy(evaluations.theirs, folder / "bm25/runs/bm25.train.trec")
    shutil.copytree(evaluations.folder.parent / "cache", tmp_path / "cache")
    found = Parsed(page.write(folder))
    assert (
        "they differ from metrics.json, so a run file is not as it was: bm25 MRR@10" in found.text
    )


def test_several_collections_are_one_table_and_a_section_each(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    for name in ("one", "two"):
        shutil.copytree(evaluations.folder / "bm25", folder / name)
    record = json.loads((folder / "two/metrics.json").read_text())
    record["collection"] = {"name": "other", "digest": "0" * 32}
    record["overall"]["MRR@10"] = 0.1
    record["stages"][0]["overall"]["MRR@10"] = 0.1
    (folder / "two/metrics.json").write_text(json.dumps(record))
    found = Parsed(page.write(folder))
    first = json.loads((folder / "one/metrics.json").read_text())["overall"]["MRR@10"]
    overview = (folder / "report/overview.md").read_text()
    assert f"| bm25 | {first:.4f} | 0.1000 | {(first + 0.1) / 2:.4f} |" in overview
    assert {"1-results", "2-results"} <= {one["id"] for one in found.all("h2")}


def test_two_systems_of_one_name_are_two_rows_of_the_table_of_all(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    folder = tmp_path / "runs"
    for model, figure in (("minilm", 0.2), ("e5", 0.4)):
        for name, digit in (("one", "1"), ("two", "2")):
            home = folder / model / name
            shutil.copytree(evaluations.folder / "bm25", home)
            record = json.loads((home / "metrics.json").read_text())
            record["collection"] = {"name": "pydocs", "digest": digit * 32}
            record["overall"]["MRR@10"] = figure
            (home / "metrics.json").write_text(json.dumps(record))
    page.write(folder)
    overview = (folder / "report/overview.md").read_text().splitlines()
    assert overview[2:] == [
        "| system | pydocs train (11111111) | pydocs train (22222222) | mean |",
        "| --- | ---: | ---: | ---: |",
        "| e5 | **0.4000** | **0.4000** | **0.4000** |",
        "| minilm | 0.2000 | 0.2000 | 0.2000 |",
    ]


def _on(folder: Path, evaluated: Path, digit: str, figure: float, **settings: object) -> None:
    """A copy of an evaluation, as if it were of another collection, and of other settings."""
    shutil.copytree(evaluated, folder)
    record = json.loads((folder / "metrics.json").read_text())
    record["collection"] = {"name": f"c{digit}", "digest": digit * 32}
    record["overall"]["MRR@10"] = figure
    (folder / "metrics.json").write_text(json.dumps(record))
    kept = manifests.read(folder / "metrics.json") or {}
    for stage in kept["inputs"]["stages"]:
        stage |= {"collection": digit * 32, **settings}
    manifests.write(folder / "metrics.json", kept["inputs"])


def _overview(folder: Path) -> list[list[str]]:
    page.write(folder)
    lines = (folder / "report/overview.md").read_text().splitlines()[4:]
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]


def test_two_systems_of_one_stage_on_a_collection_each_do_not_share_a_row(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    _on(tmp_path / "runs/one", evaluations.folder / "bm25", "1", 0.2)
    _on(tmp_path / "runs/two", evaluations.folder / "bm25", "2", 0.4, bm25={"k1": 2})
    assert _overview(tmp_path / "runs") == [
        ["one", "0.2000", "\u2013", "0.2000 (1 of 2)"],
        ["two", "\u2013", "0.4000", "0.4000 (1 of 2)"],
    ]


def test_two_systems_below_one_folder_do_not_share_a_row(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    for digit in "12":
        home = tmp_path / "runs/all"
        _on(home / f"a{digit}", evaluations.folder / "bm25", digit, 0.2)
        _on(home / f"b{digit}", evaluations.folder / "bm25", digit, 0.4, bm25={"k1": 2})
    names = [row[0] for row in _overview(tmp_path / "runs")]
    assert names == ["all/a1", "all/b1", "all/a2", "all/b2"]


def test_a_run_file_is_one_system_on_several_collections_if_its_folder_says_so(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    for digit in "12":
        for name in ("mine", "other"):
            home = tmp_path / "runs" / name / digit
            _on(home, evaluations.folder / "bm25", digit, 0.2, given=f"{name}{digit}")
    assert [row[0] for row in _overview(tmp_path / "runs")] == ["mine", "other"]
    for digit in "34":  # and alone, where nothing says that both are one
        _on(tmp_path / f"flat/{digit}", evaluations.folder / "bm25", digit, 0.2, given=digit)
    assert [row[0] for row in _overview(tmp_path / "flat")] == ["3", "4"]


def test_a_mean_over_some_of_the_collections_says_over_how_many(
    evaluations: Evaluations, tmp_path: Path
) -> None:
    for digit, figure in (("1", 0.2), ("2", 0.4), ("3", 0.9)):
        _on(tmp_path / "runs/bm25" / digit, evaluations.folder / "bm25", digit, figure)
    for digit in "12":
        _on(tmp_path / "runs/fused" / digit, evaluations.folder / "pipeline", digit, 0.5)
    assert _overview(tmp_path / "runs") == [
        ["bm25", "0.2000", "0.4000", "0.9000", "0.5000"],
        ["fused", "0.5000", "0.5000", "\u2013", "0.5000 (2 of 3)"],
    ]


def test_suites_that_one_table_cannot_hold_leave_the_page_the_rest(tmp_path: Path) -> None:
    write_beir(tmp_path / "data/one")
    for split in ("test", "train"):
        given = (f"collections=[one:{split}]", "measures=[R@5]")
        evaluate(tmp_path / "data", tmp_path / "runs" / split, "bm25", *given)
    found = Parsed(page.write(tmp_path / "runs"))
    assert "There is no table of all: " in found.text
    assert {"1-results", "2-results"} <= {one["id"] for one in found.all("h2")}


def test_a_sweep_among_other_runs_does_not_hide_them(
    evaluations: Evaluations, sweep: Path, tmp_path: Path
) -> None:
    shutil.copytree(sweep, tmp_path / "runs/k1")
    shutil.copytree(evaluations.folder / "bm25", tmp_path / "runs/bm25")
    found = Parsed(page.write(tmp_path / "runs"))
    assert "4 evaluations" in found.text


def test_two_sweeps_of_a_folder_are_not_taken_for_one(sweep: Path, tmp_path: Path) -> None:
    for name in ("first", "second"):
        shutil.copytree(sweep, tmp_path / "sweeps" / name)
        (tmp_path / "sweeps" / name / "multirun.yaml").touch()
    found = Parsed(page.write(tmp_path / "sweeps"))
    assert "a sweep over" not in found.text
    assert "6 evaluations" in found.text
    results = (tmp_path / "sweeps/report/results.md").read_text()
    assert "| first/k1-0.9 |" in results
    assert "| second/k1-0.9 |" in results
    found = Parsed(page.write(tmp_path / "sweeps/first"))
    assert "a sweep over bm25.k1: 3 jobs finished, 1 not" in found.text


def test_trainings_that_are_not_shown_are_counted(tmp_path: Path) -> None:
    for number in range(14):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}/metrics.json").write_text('{"updates": 5}')
    found = Parsed(page.write(tmp_path))
    assert "14 trainings" in found.text
    assert "2 more trainings are not shown" in found.text


def test_an_evaluation_of_many_collections_opens_with_their_mean(tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        write_beir(tmp_path / "data" / name, seed=seed)
    given = ("collections=[one,two]", "measures=[nDCG@10,R@5]")
    evaluate(tmp_path / "data", tmp_path / "runs/suite", "bm25", *given)
    found = Parsed(page.write(tmp_path / "runs/suite"))
    record = json.loads((tmp_path / "runs/suite/metrics.json").read_text())["overall"]
    overview = (tmp_path / "runs/suite/report/overview.md").read_text().splitlines()
    assert overview[-1] == f"| mean | {record['nDCG@10']:.4f} | {record['R@5']:.4f} |"
    headings = [one["id"] for one in found.all("h2")]
    assert headings == ["facts", "overview", "1-results", "2-results", "made"]
    assert "| bm25 |" in (tmp_path / "runs/suite/report/1-results.md").read_text()
    again = tmp_path / "runs/beside"
    shutil.copytree(tmp_path / "runs/suite", again, ignore=shutil.ignore_patterns("report*"))
    page.write(tmp_path / "runs")
    results = (tmp_path / "runs/report/1-results.md").read_text()
    assert "| suite |" in results
    assert "| beside |" in results


def test_many_collections_of_which_none_is_finished_leave_the_rest_of_a_page(
    tmp_path: Path, evaluations: Evaluations
) -> None:
    shutil.copytree(evaluations.folder / "bm25", tmp_path / "runs/bm25")
    (tmp_path / "runs/suite").mkdir()
    record = {"collections": {}, "failed": {"a": "a/corpus.jsonl:4: not JSON"}, "overall": {}}
    (tmp_path / "runs/suite/metrics.json").write_text(json.dumps(record))
    found = Parsed(page.write(tmp_path / "runs"))
    assert "There is no table of all: no collection of" in found.text
    assert "a/corpus.jsonl:4: not JSON" in found.text
    assert "results" in {one["id"] for one in found.all("h2")}


# --- sweeps -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(evaluations: Evaluations, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BM25 at three values of k1."""
    folder = tmp_path_factory.mktemp("sweeps") / "k1"
    for k1 in ("0.1", "0.9", "4"):
        job = folder / f"k1-{k1}"
        evaluate(
            evaluations.beir, job, "bm25", f"bm25.k1={k1}", "data.split=train",
            f"cache_dir={folder.parent / 'cache'}", "measures=[MRR@10,nDCG@10,R@5]",
        )  # fmt: skip
        jobs.write(job, [f"bm25.k1={k1}"], jobs.FINISHED)
    jobs.write(folder / "k1-x", ["bm25.k1=x"], jobs.FAILED, "k1 must be a number <b>")
    page.write(folder)
    return folder


def test_the_table_of_a_sweep_is_what_ir_measures_gives_on_its_run_files(
    sweep: Path, evaluations: Evaluations
) -> None:
    lines = (sweep / "report/sweep.md").read_text().splitlines()[4:]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in rows] == ["0.1", "0.9", "4"]
    for k1, *figures, _ in rows:
        run = sweep / f"k1-{k1}/runs/bm25.train.trec"
        for measure, told in zip(("MRR@10", "nDCG@10", "R@5"), figures, strict=True):
            values = evaluations.per_query(run, measure)
            assert len(values) == 40
            assert told == f"{sum(values.values()) / 40:.4f}"


def test_a_sweep_has_curves_tests_queries_and_its_failed_jobs(sweep: Path) -> None:
    found = Parsed(sweep / "report.html")
    assert "a sweep over bm25.k1: 3 jobs finished, 1 not" in found.text
    assert "Not finished: k1-x: k1 must be a number <b>" in found.text
    assert {"results", "differences", "queries", "made"} <= {h["id"] for h in found.all("h2")}
    (alt,) = (i["alt"] for i in found.all("img") if (i["alt"] or "").startswith("MRR@10 over bm25"))
    assert re.search(r"bm25\.k1 0\.9: 0\.\d{4}", alt or "")
    assert (sweep / "report/sweep-MRR-10.svg").exists()


def test_a_sweep_over_seeds_draws_their_spread(tmp_path: Path) -> None:
    for rate in (1, 2):
        for seed in (1, 2, 3):
            folder = tmp_path / f"rate={rate},seed={seed}"
            jobs.write(folder, [f"optimizer.lr={rate}", f"seed={seed}"], jobs.FINISHED)
            record = {"validation": {"MRR@10": rate / 10 + seed / 100}}
            (folder / "metrics.json").write_text(json.dumps(record))
    found = Parsed(page.write(tmp_path))
    assert "Mean and standard deviation over 3 seeds." in found.text
    assert "0.1200 ± 0.0100" in found.text


# --- the command ------------------------------------------------------------------------------


def test_a_folder_without_runs_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["report", "page", str(tmp_path)])
    assert command.main() == 2
    assert "holds no run with figures" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InputError, match="there is no folder"):
        page.write(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_is_told_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.json").write_text('{"updates": 5}')
    (tmp_path / "report").write_text("a file in the way of the folder")
    monkeypatch.setattr("sys.argv", ["report", "page", str(tmp_path)])
    assert command.main() == 2
    told = capsys.readouterr().err.splitlines()
    assert told == [f"{tmp_path / 'report'}: File exists; choose another path"]
    assert not (tmp_path / "report.html").exists()
