"""The command line: exit codes, what is printed, where a run writes, and sweeps."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tests.cli.small_conf import APP, HOME, small_conf
from tests.refusals import refused, uninstall

from caravan.cli import main
from caravan.cli.evaluate import engine_of
from caravan.files import LOCK

HEAVY = {"torch", "transformers", "pytorch_lightning", "datasets", "faiss", "numpy"}
Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    small_conf(tmp_path)
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.fixture
def app(home: Path) -> Program:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "app.py", *arguments],
            cwd=home,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )

    return run


def files(home: Path) -> set[str]:
    """What a run has written below a folder, beside locks."""
    known = ("conf", "__pycache__")
    paths = (path.relative_to(home) for path in home.rglob("*") if path.is_file())
    return {
        str(p) for p in paths if p.parts[0] not in known and p.suffix != ".py" and p.name != LOCK
    }


def program(*arguments: str, cwd: Path = HOME) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("given", ["name=one", "hydra.run.dir=runs/one"])
def test_a_run_writes_into_run_dir_alone(given: str, app: Program, home: Path) -> None:
    done = app(given)
    assert done.returncode == 0, done.stderr
    assert files(home) == {f"runs/one/{name}" for name in ("out.json", "metrics.json", "log.txt")}
    out = (home / "runs/one/out.json").read_text()
    assert out == f'{{"cwd": "{home}", "run_dir": "runs/one", "seed": 0}}'
    assert " I hello from " in done.stderr.splitlines()[-1]
    assert "INFO caravan.some.module: hello from " in (home / "runs/one/log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("second", "code"),
    [
        pytest.param(["run_dir='runs/waits/seed=0'"], 2, id="alone"),
        pytest.param(
            *(["-m", "run_dir=runs/waits", "seed=0,1"], 1), id="in a sweep", marks=pytest.mark.slow
        ),
    ],
)
def test_a_second_process_in_a_run_dir_is_refused_at_once(
    app: Program, home: Path, second: list[str], code: int
) -> None:
    first = subprocess.Popen(
        [sys.executable, "app.py", "name=waits", "run_dir='runs/waits/seed=0'"],
        cwd=home,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    assert first.stdout.readline() == "waits\n"
    done = app(*second)
    assert done.returncode == code
    assert "Traceback" not in done.stderr
    assert f"run_dir is in use by app.py, process {first.pid} on " in done.stderr
    assert not (home / "runs/waits/seed=0/job.json").exists()
    first.communicate("\n")
    assert first.returncode == 0
    assert (home / "runs/waits/seed=0/out.json").exists()


@pytest.mark.slow
def test_jobs_of_a_sweep_write_into_folders_of_their_own(app: Program, home: Path) -> None:
    (home / "conf/sweep/seeds.yaml").write_text(
        "# @package _global_\nname: many\n"
        "hydra: {sweeper: {params: {seed: '1,2', loss.name: 'c,here/\\${seed}/model'}}}\n"
    )
    done = app("-m", "sweep=seeds", "batching.num_workers=0")
    assert done.returncode == 0, done.stderr
    jobs = {path.parent.name for path in home.glob("runs/many/*/job.json")}
    written = ("out.json", "metrics.json", "job.json", "log.txt")
    expected = {f"runs/many/{job}/{file}" for job in jobs for file in written}
    expected |= {f"runs/many/{name}" for name in ("multirun.yaml", "report.html", "sweep.csv")}
    assert {name for name in files(home) if "/report/" not in name} == expected
    found = [json.loads(path.read_text())["loss"] for path in home.rglob("metrics.json")]
    assert sorted(found) == ["c", "c", "here/1/model", "here/2/model"]
    out = (home / "runs/many/loss.name=c,seed=2/out.json").read_text()
    assert '"run_dir": "runs/many/loss.name=c,seed=2", "seed": 2' in out


def test_a_wrong_config_ends_before_anything_is_written(app: Program, home: Path) -> None:
    done = app("trainer.max_step=5", "seed=x", "backbone=tiny_lama")
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[0] == "3 mistakes in the config; nothing was started:"
    assert len(lines) == 4
    assert files(home) == set()


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--cfg", "job", "--resolve", "--package", "encoding"], "pooling: last"),
        (["--info", "defaults-tree"], "train_schema"),
        (["--hydra-help"], "Hydra"),
        (["--config-dir", "more", "--config-name", "other", "--cfg", "job"], "seed: 99"),
        (["-sc", "install=bash"], "hydra_bash_completion"),
        (["--config-dir", "more", "--cfg", "job", "experiment=mine"], "seed: 98"),
    ],
)
def test_flags_of_hydra_go_on_working(
    arguments: list[str], wanted: str, app: Program, home: Path
) -> None:
    (home / "more/experiment").mkdir(parents=True)
    (home / "more/experiment/mine.yaml").write_text("# @package _global_\nseed: 98\n")
    (home / "more/other.yaml").write_text("defaults: [train, _self_]\nseed: 99\n")
    done = app(*arguments)
    assert done.returncode == 0, done.stderr
    assert wanted in done.stdout


def test_a_program_without_arguments_shows_its_help_and_starts_nothing(
    app: Program, home: Path
) -> None:
    done = app()
    assert done.returncode == 0
    assert done.stdout == app("--help").stdout
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["name=resolves", "loss.name=${oc.env:CARAVAN_NO_SUCH}"], "loss.name"),
        (["name=instantiates", "loss._target_=subprocess.getoutput", "loss.cmd=ls"], "loss"),
        (["name=instantiates", "loss._target_=transformers.NoSuchModel"], "loss._target_"),
        (["--cfg", "job", "loss=wandb"], "loss/wandb"),
        (["--cfg", "job", "--resolve", "loss.name=${oc.env:CARAVAN_NO_SUCH}"], "CARAVAN_NO_SUCH"),
        (["name=x", "run_dir=/proc/nowhere"], "/proc/nowhere: No such file or directory; choose"),
    ],
)
def test_what_hydra_refuses_is_one_line_with_the_key(
    arguments: list[str], place: str, app: Program, home: Path
) -> None:
    done = app(*arguments)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert any(place in line for line in done.stderr.splitlines()), done.stderr
    assert not {name for name in files(home) if not name.endswith("log.txt")}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "package"),
    [
        ("joblib", "hydra_joblib_launcher"),
        ("submitit_local", "hydra_submitit_launcher"),
        ("ray", "hydra_ray_launcher._core"),
    ],
)
def test_a_launcher_runs_the_jobs_in_other_processes(
    launcher: str, package: str, app: Program, home: Path
) -> None:
    pytest.importorskip(f"hydra_plugins.{package}")
    done = app("-m", "seed=1,2", f"hydra/launcher={launcher}", "name=many")
    assert done.returncode == 0, done.stderr
    records = [json.loads((home / f"runs/many/seed={i}/out.json").read_text()) for i in (1, 2)]
    assert [record["seed"] for record in records] == [1, 2]
    assert (home / "runs/many/sweep.csv").exists()


RESUME = "interrupted; the same command with resume=true continues"
REFUSED = "the corpus is empty: corpus.jsonl:1; give another folder"


@pytest.mark.parametrize(
    ("name", "code", "last"),
    [
        ("refuses", 2, REFUSED),
        ("refuses_inside", 2, REFUSED),
        ("stopped", 130, RESUME),
        ("stopped_by_lightning", 130, RESUME),
        ("terminated", 143, RESUME),
        ("worker_terminated", 143, RESUME),
        ("worker_terminated seed=1,2 -m", 143, RESUME),
        ("fails", 1, "ZeroDivisionError: a defect"),
    ],
)
def test_how_a_job_ends(name: str, code: int, last: str, app: Program, home: Path) -> None:
    done = app(*f"name={name}".split())
    assert done.returncode == code
    lines = done.stderr.splitlines()
    assert lines[-1].endswith(last)
    assert ("Traceback" in done.stderr) == (code == 1)
    if code == 2:
        assert REFUSED in (home / f"runs/{name}/log.txt").read_text()


@pytest.mark.slow
def test_jobs_keep_their_results_apart_and_their_values_as_typed(app: Program, home: Path) -> None:
    texts = ["a/b", "a_b", "a:b", "A/B", "1_1", "11", "1e3"]
    done = app("-m", f"loss.name={','.join(texts)}", "name=2024_1")
    assert done.returncode == 0, done.stderr
    folders = [path.parent for path in home.glob("runs/2024_1/*/metrics.json")]
    results = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert sorted(result["loss"] for result in results) == sorted(texts)
    records = [json.loads((folder / "job.json").read_text()) for folder in folders]
    assert {"1_1", "11", "1e3"} <= {record["overrides"]["loss.name"] for record in records}


@pytest.mark.slow
def test_a_failing_job_does_not_stop_the_others_and_the_end_names_it(
    app: Program, home: Path
) -> None:
    done = app("-m", "name=fails,refuses,fine", "run_dir=runs/mixed")
    assert done.returncode == 1
    records = (json.loads(path.read_text()) for path in home.glob("runs/mixed/*/job.json"))
    states = [record["state"] for record in records]
    assert sorted(states) == ["failed", "failed", "finished"]
    printed = [line for line in done.stdout.splitlines() if line.startswith("Not finished: ")]
    assert sorted(printed) == [
        "Not finished: name=fails: ZeroDivisionError: a defect",
        f"Not finished: name=refuses: {REFUSED}",
    ]
    assert (home / "runs/mixed/name=fine/out.json").exists()


@pytest.mark.slow
def test_a_sweep_that_is_started_again_resumes_its_jobs_and_keeps_their_records(
    app: Program, home: Path
) -> None:
    done = app("-m", "seed=1,2", "name=many")
    assert done.returncode == 0, done.stderr
    assert json.loads((home / "runs/many/seed=1/metrics.json").read_text())["resume"] is True
    assert "0.25" in (home / "runs/many/sweep.csv").read_text()
    record = (home / "runs/many/seed=1/job.json").read_bytes()
    done = app("-m", "seed=1,2", "name=many", OTHER_DATA="1")
    assert done.returncode == 1
    assert "holds another run" in done.stdout + done.stderr
    assert (home / "runs/many/seed=1/job.json").read_bytes() == record


# --- the real programs ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "groups"),
    [
        ("train.py", ["data", "index", "backbone", "loss"]),
        pytest.param("evaluate.py", ["data", "index"], marks=pytest.mark.slow),
        pytest.param("-m caravan.search", [], marks=pytest.mark.slow),
    ],
)
def test_help_imports_nothing_heavy_and_opens_with_commands(
    command: str, groups: list[str]
) -> None:
    done = program("-X", "importtime", *command.split(), "--help")
    assert done.returncode == 0, done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hydra" in imported
    assert not HEAVY & imported
    examples = [line for line in done.stdout.splitlines()[:8] if f"python {command} " in line]
    assert len(examples) >= 3
    for group in groups:
        assert f"\n{group}: " in done.stdout


def test_a_run_may_open_as_many_files_as_the_system_allows(home: Path) -> None:
    code = "import resource, sys; print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    text = APP.replace("    from hydra.utils", f"    {code}\n    from hydra.utils", 1)
    (home / "app.py").write_text(text)
    command = f"ulimit -Sn 256; ulimit -Hn 512; {shlex.quote(sys.executable)} app.py name=one"
    done = subprocess.run(["bash", "-c", command], cwd=home, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["(512, 512)"]


def test_a_setting_that_a_library_refuses_is_named_with_its_key() -> None:
    for target, sentence in (
        ("torch.nn.Dropout", "a: dropout probability has to be between 0 and 1, but got 7"),
        ("fractions.Fraction", None),  # any other code keeps its traceback
    ):
        argument = "p" if sentence else "numerator"
        with pytest.raises(InstantiationException) as raised:
            instantiate({"a": {"_target_": target, argument: 7 if sentence else "x"}})
        assert main._sentence(raised.value) == sentence


def test_a_thread_that_fails_on_a_full_disk_prints_no_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for error in (OSError(28, "No space left on device"), ValueError("a defect")):
        main._thread_failed(threading.ExceptHookArgs((type(error), error, None, None)))
        assert ("a defect" in capsys.readouterr().err) == isinstance(error, ValueError)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall(monkeypatch, "ray", "caravan.retrieval.cluster")
    with refused("missing-extra", "caravan-retrieval[ray]"):
        engine_of(OmegaConf.create({"engine": "ray"}))
