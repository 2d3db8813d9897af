"""Overrides and files that Hydra would take wrongly or not at all are kept, or refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from tests.cli.conftest import Lines
from tests.cli.small_conf import CONF
from tests.refusals import refused

from caravan.cli.compose import compose, preflight
from caravan.cli.sources import parse, quoted


@pytest.mark.parametrize("text", ["2024_11_29", "1e3", "1_1", "0123456", "true", "inf", "-5", "5."])
def test_a_text_that_looks_like_a_number_stays_as_it_was_typed(conf: Path, text: str) -> None:
    overrides = [f"name={text}", "data=beir", "data.path=.", f"data.split={text}"]
    cfg = compose(conf, "train", overrides)
    assert (cfg.name, cfg.run_dir, cfg.data.split) == (text, f"runs/{text}", text)
    assert preflight(overrides, conf, "train")[0][0] in (f"name={text}", f"name='{text}'")


def test_a_number_stays_a_number(conf: Path) -> None:
    cfg = compose(conf, "train", ["loss.size=1_0", "loss.rate=1e-3", "seed=2"])
    assert (cfg.loss.size, cfg.loss.rate, cfg.seed) == (10, 1e-3, 2)


@pytest.mark.parametrize("text", ["josé", "a(1)", "a[1]", "it's", 'a"b', "a=b", "~/a", "a\\", "1"])
def test_quotes_keep_any_text(text: str) -> None:
    assert parse(quoted(f"name={text}"), OverridesParser.create()).value() == text


@pytest.mark.parametrize(
    ("argv", "code", "place"),
    [
        (["--optimizer.lr=1e-3"], "unknown-option", "--optimizer.lr=1e-3"),
        (["-m", "--cfg", "job"], "conflicting-flags", "--cfg"),
        (["--resolve"], "conflicting-flags", "--cfg job"),
        (["--multirun", "--info", "searchpath"], "conflicting-flags", "--info"),
        (["--config-dir", "nowhere"], "folder-not-found", "nowhere"),
    ],
)
def test_flags_that_hydra_refuses_are_refused_in_a_sentence(
    argv: list[str], code: str, place: str, conf: Path
) -> None:
    with refused(code, place):
        preflight([*argv, "name=x"], conf, "train")


def test_a_wrong_option_in_defaults_is_reported_with_its_line(conf: Path, lines: Lines) -> None:
    text = "# @package _global_\ndefaults:\n  - override /data: biir\n"
    (conf / "experiment/wrong.yaml").write_text(text)
    (line,) = lines("experiment=wrong")
    assert "experiment/wrong.yaml:3: there is no data/biir; did you mean data=beir?" in line


def test_a_choice_that_another_file_sets_to_null_is_reported(conf: Path, lines: Lines) -> None:
    (conf / "experiment/without.yaml").write_text("# @package _global_\nloss: null\n")
    (line,) = lines("experiment=without", "loss=infonce")
    assert "experiment/without.yaml:2 sets loss to null; remove it" in line


@pytest.mark.parametrize(
    "override", ["data.path=${oc.env:CARAVAN_NO_SUCH}/a", "data.path=${x}/a", "data.path=${data.x}"]
)
@pytest.mark.parametrize("more", [[], ["collections=[a]"]])
def test_an_interpolation_without_a_value_is_reported_once(
    lines: Lines, override: str, more: list[str]
) -> None:
    given = ["retriever=bm25", "data=beir", override, "store=${data.path}/store", *more]
    found = lines(*given, root="evaluate")
    assert [line for line in found if "has no value" in line] == found[:1]
    assert found[0].startswith("data.path (command line)")


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("name: " + "{a: " * 300 + "1" + "}" * 300, "experiment=wild"),
        ("name: &a [*a]", "experiment=wild"),
        ("name: x\ndefaults: [wild]", "experiment=wild"),
        ("name: x\ndefaults: [/experiment: wild]", "experiment=wild"),
        ("1: x", "1 ("),
        ("hydra: {job: {chdir: true}}", "hydra.job.chdir"),
        ('name: "a\\0b"', "name ("),
        ("- name", "experiment=wild"),
        ("name: x\ntrainer:\n  max_steps: 3\n   max_epochs: 4", "wild.yaml:5: not YAML"),
        ("name: ${nme}", "name (conf/experiment/wild.yaml:2)"),
        ("name", "name ("),
        ("name: jos\udce9", "experiment=wild"),
    ],
)
def test_a_file_that_cannot_be_composed_is_refused_quickly(
    conf: Path, lines: Lines, text: str, place: str
) -> None:
    data = f"# @package _global_\n{text}\n".encode(errors="surrogateescape")
    (conf / "experiment/wild.yaml").write_bytes(data)
    started = time.monotonic()
    try:
        (line,) = lines("experiment=wild")
    finally:
        (conf / "experiment/wild.yaml").unlink()
    assert place in line
    assert time.monotonic() - started < 10


class TestSweeps:
    def test_every_value_is_checked(self, lines: Lines) -> None:
        found = lines("-m", "seed=1,2,x", "backbone=tiny_llama,tiny_lama", "trainer.max_step=1,2")
        keys = ["trainer.max_step", "seed", "backbone=tiny_lama"]
        assert [line.partition(" (")[0] for line in found] == keys
        assert "seed=x" in found[1].partition("[in the job")[2]

    def test_the_file_of_a_sweep_is_checked(self, conf: Path, lines: Lines) -> None:
        (conf / "sweep" / "rates.yaml").write_text(
            "# @package _global_\n"
            "hydra: {sweeper: {params: {optimizer.rate: '0.1,0.2', trainer.max_step: '1,2'}}}\n"
        )
        (line,) = lines("-m", "sweep=rates")
        assert "did you mean trainer.max_steps?" in line
        assert "add -m" in lines("sweep=rates")[-1]

    def test_the_command_line_goes_before_what_a_file_varies(self, conf: Path) -> None:
        text = "# @package _global_\nhydra: {sweeper: {params: {seed: '1,x', loss.size: '1,2'}}}\n"
        (conf / "sweep" / "seeds.yaml").write_text(text)
        argv, _ = preflight(["-m", "sweep=seeds", "seed=3"], conf, "train")
        assert argv[:4] == ["-m", "sweep=seeds", "seed=3", "loss.size=1,2"]

    def test_folders_of_jobs_are_named_by_what_differs(self, conf: Path) -> None:
        given = ["seed=1,2", "name=n", "backbone=tiny_llama", "-m"]
        argv, folder = preflight(given, conf, "train")
        assert argv[0] == "-m"
        assert argv[-2].endswith("exclude_keys=[run_dir,name,backbone]")
        assert argv[-1] == "hydra.sweep.dir='runs/n'"
        assert folder == Path("runs/n")

    @pytest.mark.parametrize(
        "override",
        ["experiment=glob(nothing/*)", "seed=range(1,1e12)", "loss.rate=range(0,1,0.0)"],
    )
    def test_values_that_no_job_can_have_are_refused(self, lines: Lines, override: str) -> None:
        (line,) = lines("-m", override)
        assert line.startswith(f"{override} (command line)")

    def test_texts_are_put_into_quotes(self, conf: Path) -> None:
        for values, expected in (("1_1,a,true", "'1_1',a,'true'"), ("choice(1_1,2)", "'1_1','2'")):
            argv, _ = preflight(["-m", f"loss.name={values}"], conf, "train")
            assert argv[1] == f"loss.name={expected}"

    @pytest.mark.parametrize(
        ("overrides", "wanted"),
        [
            ("trainer.devices=2", "trainer.devices"),
            pytest.param("trainer.num_nodes=2", "trainer.num_nodes", marks=pytest.mark.slow),
            ("trainer.devices=2 hydra.launcher._target_=x.RayLauncher", "trainer.devices"),
            ("trainer.devices=[0]", None),
            ("hydra/sweeper=ax", "hydra/sweeper/ax"),
            ("hydra/launcher=slurm", "hydra/launcher"),
        ],
    )
    def test_a_sweep_needs_one_device_and_its_plugins(
        self, monkeypatch: pytest.MonkeyPatch, lines: Lines, overrides: str, wanted: str | None
    ) -> None:
        monkeypatch.setattr("caravan.cli.sweeps.locate", _without_plugins)
        found = lines("-m", "seed=1,2", *overrides.split(), conf=CONF)
        assert bool(found) == (wanted is not None), found
        assert wanted is None or wanted in found[0]

    def test_a_sweep_is_not_started_by_several_processes(
        self, monkeypatch: pytest.MonkeyPatch, lines: Lines
    ) -> None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        (line,) = lines("-m", "seed=1,2")
        assert line.startswith("-m: ")


def _without_plugins(target: str) -> None:
    if "submitit" in target:
        raise LookupError(f"there is no class or function {target}")
