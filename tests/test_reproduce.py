"""The ledger in reproduce/: its commands compose, its runner measures, and the pages show it."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf
from reproduce import run, tables
from tests.cli.small_conf import CONF
from tests.commands import ROOT, evaluate

from caravan.cli.compose import Composer, check, without_hydra

LEDGER = tables.ledger()
ROWS = run.rows()
RECIPES = ["--config-dir", "reproduce/conf"]


def _commands(root: str) -> Iterator[list[str]]:
    """The overrides of every command of the ledger that starts a program."""
    texts = [of["command"] for one in LEDGER.values() for of in one["results"] + one["steps"]]
    texts += [typed for row in ROWS.values() for of in row["commands"] for typed in run.typed(of)]
    for text in dict.fromkeys(texts):
        _, program, *arguments = shlex.split(text)
        if program == f"{root}.py":
            arguments = [text for text in arguments if text != "-m"]  # jobs are below its folder
            yield arguments[2:] if arguments[:2] == RECIPES else arguments


@pytest.fixture(scope="module")
def composed() -> list[tuple[list[str], Any]]:
    """Every command of the ledger with its config."""
    found = []
    for root in ("train", "evaluate"):
        with Composer(CONF, root, ROOT / RECIPES[1]) as composer:
            for overrides in _commands(root):
                cfg = without_hydra(composer.compose(overrides))
                wrong = [one for one in check(cfg, composer.root) if one.kind == "wrong"]
                assert not wrong, overrides
                found.append((overrides, cfg))
    return found


@pytest.mark.slow
def test_every_file_that_a_command_reads_is_written_by_another_one(
    composed: list[tuple[list[str], Any]],
) -> None:
    written = {cfg.run_dir for _, cfg in composed}
    written |= {f"runs/reproduce/random/{seed}" for seed in run.SEEDS}  # by random_weights.py
    for overrides, cfg in composed:
        text = OmegaConf.to_yaml(cfg, resolve=False)
        for line in re.findall(r"^ *(?:folder|retriever|reranker|run|-): (runs/.*)$", text, re.M):
            assert any(line.startswith(f"{folder}/") for folder in written), (overrides, line)


@pytest.mark.slow
def test_no_two_commands_write_the_same_folder(composed: list[tuple[list[str], Any]]) -> None:
    seen: dict[str, list[str]] = {}
    for overrides, cfg in composed:
        assert seen.setdefault(cfg.run_dir, overrides) == overrides


def test_every_result_names_its_table_row_value_and_tolerance() -> None:
    for paper in LEDGER.values():
        for result in paper["results"]:
            assert result["table"]
            assert result["row"]
            assert all(0 < value < 100 for value in result["published"].values())
            assert 0 < result["tolerance"] <= 1


def test_every_comparison_is_of_runs_that_its_commands_write() -> None:
    for row in ROWS.values():
        text = " ".join(row["commands"])
        written = {f"runs/{name}" for name in re.findall(r"\bname=(\S+)", text)}
        named = {row["expect"][key] for key in ("of", "better", "than") if key in row["expect"]}
        assert named <= written, row["id"]


def test_every_test_of_the_ledger_exists() -> None:
    for row in ROWS.values():
        if "test" in row:
            file, _, name = row["test"].partition("::")
            assert f"def {name}" in (ROOT / file).read_text(), row["id"]


@pytest.mark.parametrize("path", tables.PAGES, ids=lambda path: path.stem)
def test_a_page_shows_the_ledger(path: Path) -> None:
    page = path.read_text()
    assert "<!-- ledger: " in page
    assert tables.render(page) == page, "run `make ledger`"


Runner = Callable[..., int]


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    """`run.py` over rows of a test, in a separate folder."""
    home = tmp_path / "reproduce"
    home.mkdir()
    (home / "parity.yaml").write_text("rows: []")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "HERE", home)
    monkeypatch.setattr(run, "MEASURED", home / "measured.json")

    def start(rows: list[dict[str, Any]], *argv: str, code: str = "code") -> int:
        monkeypatch.setattr(run, "code_digest", lambda tests: code)
        (home / "small.yaml").write_text(yaml.safe_dump({"rows": rows}))
        return run.main(["--save", *argv])

    return start


def _row(name: str, *commands: str, **settings: Any) -> dict[str, Any]:
    row = {"id": name, "claim": "c", "seconds": 1, "commands": list(commands)}
    return row | {"expect": {"test": "passes"}} | settings


def _measured() -> dict[str, Any]:
    return json.loads(Path("reproduce/measured.json").read_text())


def test_a_row_that_fails_stops_no_other_and_the_status_is_one(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [_row("a", "false"), _row("b", "true"), _row("c", "cat /data/x")]
    assert runner(rows) == 1
    assert "needs --data" in capsys.readouterr().out
    assert set(_measured()) == {"b"}
    assert runner(rows[1:]) == 0
    Path("data").mkdir()
    Path("data/x").touch()
    assert runner(rows, "c") == 1  # named, and not measured
    assert runner(rows[2:], "--data", "data") == 0
    assert set(_measured()) == {"b", "c"}


def test_without_save_the_repositorys_values_stay(runner: Runner, tmp_path: Path) -> None:
    runner([_row("a", "true")])
    before = Path("reproduce/measured.json").read_bytes()
    (tmp_path / "reproduce/small.yaml").write_text(yaml.safe_dump({"rows": [_row("b", "true")]}))
    assert run.main([]) == 0
    assert Path("reproduce/measured.json").read_bytes() == before
    assert set(json.loads(Path("runs/reproduce/measured.json").read_text())) == {"b"}


def test_data_of_another_folder_are_read_anew_also_with_a_space_in_its_path(
    runner: Runner, tmp_path: Path
) -> None:
    for name in ("one", "an other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(f"{name}\n")
        assert runner([_row("a", "cat /data/x >> log")], "--data", name) == 0
    assert Path("log").read_text() == "one\nan other\n"


def test_a_test_that_is_skipped_has_not_passed(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner([_row("a", "echo 1 skipped # pytest")]) == 1
    assert "no test ran" in capsys.readouterr().out
    assert runner([_row("a", "echo 2 passed, 1 skipped # pytest")]) == 0


def test_a_difference_within_the_spread_of_the_seeds_is_not_significant() -> None:
    means = np.array([[0.5, 0.51], [0.5, 0.55], [0.5, 0.502]])
    assert run.over_seeds(means) > 0.1
    assert run.over_seeds(means[:, :1] + [[0.0, 0.01], [0.0, 0.011], [0.0, 0.012]]) < 0.01
    assert run.over_seeds(np.full((3, 2), 0.5)) == 1


def test_only_fast_or_named_rows_are_measured(runner: Runner) -> None:
    rows = [_row("a", "true", fast=True), _row("b", "true"), _row("c", "true")]
    assert runner(rows, "--fast") == 0
    assert set(_measured()) == {"a"}
    assert runner(rows, "b") == 0
    assert set(_measured()) == {"a", "b"}
    with pytest.raises(SystemExit):
        runner(rows, "d")


def test_a_finished_command_is_repeated_only_with_other_code(runner: Runner) -> None:
    rows = [_row("a", "echo $SEED >> log # name=reproduce/x$SEED"), _row("b", "echo 2 >> log")]
    runner(rows)
    assert Path("log").read_text().split() == ["1", "2", "3", "2"]
    assert [_measured()[name]["seeds"] for name in "ab"] == [[1, 2, 3], []]
    output = Path("runs/reproduce/x1/output")
    output.parent.mkdir()
    output.touch()
    assert not run.run_dir("echo 2 >> log").exists()
    runner(rows)
    runner(rows, "--keep", code="other")
    assert len(Path("log").read_text().split()) == 4
    assert output.exists()
    runner(rows, code="other")
    assert len(Path("log").read_text().split()) == 8
    assert not output.exists()


def test_values_are_compared_within_the_tolerance(runner: Runner) -> None:
    record = {"system": "x", "collection": {"name": "c", "digest": "d"}, "split": "test"}
    record |= {"queries": 1, "passages": 1, "seconds": 1.0, "run": "runs/x.trec"}
    metrics = json.dumps({**record, "overall": {"MRR@10": 0.5, "nDCG@10": 0.61}})
    command = f"mkdir -p runs/x; echo '{metrics}' > runs/x/metrics.json"
    expect = {"of": "runs/x", "values": {"MRR@10": 0.505, "nDCG@10": 0.6}}
    assert runner([_row("a", command, expect=expect, tolerance=0.02)]) == 0
    assert _measured()["a"]["values"] == {"MRR@10": 0.5, "nDCG@10": 0.61}
    assert runner([_row("a", command, expect=expect, tolerance=0.007)]) == 1
    assert not _measured()["a"]["passed"]


def test_a_system_is_better_if_it_is_ahead_with_every_seed_and_significantly(
    beir: Path, runner: Runner, tmp_path: Path
) -> None:
    best = evaluate(beir, tmp_path / "good", "bm25", "data.split=train")
    run_file = tmp_path / "good" / best["run"]
    lines = [line.split() for line in run_file.read_text().splitlines()]
    reverse = [f"{q} Q0 {p} 1 {-float(score)} r" for q, _, p, _, score, _ in lines]
    (tmp_path / "reverse.trec").write_text("\n".join(reverse))
    worst = evaluate(beir, tmp_path / "worst", tmp_path / "reverse.trec", "data.split=train")
    rows = [
        _row("a", "true # $SEED", expect={"better": "good", "than": "worst"}),
        _row("b", "true # $SEED", expect={"better": "worst", "than": "good"}),
        _row("c", "true # $SEED", expect={"better": "good", "than": "again"}),
    ]
    evaluate(beir, tmp_path / "again", "bm25", "data.split=train")
    assert runner(rows) == 1
    found = _measured()
    assert [found[name]["passed"] for name in "abc"] == [True, False, False]
    difference = best["overall"]["MRR@10"] - worst["overall"]["MRR@10"]
    assert found["a"]["values"]["difference"] == pytest.approx(difference, abs=1e-4)
    assert found["c"]["values"]["p"] == 1
