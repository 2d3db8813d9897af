"""Overrides and config files that Hydra takes wrongly or not at all are kept or answered."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.small_conf import HOME, small_conf

from caravan.cli import schema
from caravan.cli.compose import compose
from caravan.cli.preflight import preflight
from caravan.errors import InputError

Tell = Callable[..., list[str]]


@pytest.fixture(scope="module")
def conf(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    home = tmp_path_factory.mktemp("home")
    sys.path.insert(0, str(home))
    yield small_conf(home)
    sys.path.remove(str(home))


@pytest.fixture
def told(conf: Path) -> Tell:
    """The lines that a command line is answered with."""

    def tell(*overrides: str, root: str = "train") -> list[str]:
        try:
            preflight(list(overrides), conf, root, schema.ROOTS[root])
        except InputError as error:
            return [line.strip() for line in str(error).splitlines()[1:]]
        return []

    return tell


@pytest.mark.parametrize("text", ["2024_11_29", "1e3", "1_1", "0123456", "true", "inf", "-5", "5."])
def test_a_text_that_looks_like_a_number_stays_as_it_was_typed(conf: Path, text: str) -> None:
    overrides = [f"name={text}", "data=beir", f"data.path={text}", f"data.split={text}"]
    cfg = compose(conf, "train", [*overrides[:2], "data.path=.", overrides[3]])
    assert (cfg.name, cfg.run_dir, cfg.data.split) == (text, f"runs/{text}", text)
    given = preflight([*overrides[:2], "data.path=."], conf, "train", schema.Train)
    assert given[0] in (f"name={text}", f"name='{text}'")


def test_a_number_stays_a_number(conf: Path) -> None:
    cfg = compose(conf, "train", ["loss.size=1_0", "loss.rate=1e-3", "seed=2"])
    assert (cfg.loss.size, cfg.loss.rate, cfg.seed) == (10, 1e-3, 2)


@pytest.mark.parametrize(
    ("root", "override", "place"),
    [
        ("train", "name=null", "name"),
        ("evaluate", "retriever=[2024_1,bm25]", "retriever[0]"),
        ("evaluate", "collections=[1_1]", "collections[0]"),
    ],
)
def test_what_cannot_be_kept_is_refused_with_quotes(
    told: Tell, root: str, override: str, place: str
) -> None:
    retriever = ["retriever=bm25"] * (root == "evaluate" and "retriever" not in override)
    line = told(override, *retriever, root=root)[0]
    assert line.startswith(f"{place} (")
    assert "='...'" in line or "=['...']" in line


def test_a_number_in_a_file_is_not_taken_for_a_text(conf: Path, told: Tell) -> None:
    (conf / "experiment/date.yaml").write_text("# @package _global_\nname: 2024_11_29\n")
    (line,) = told("experiment=date")
    assert "date.yaml:2" in line


@pytest.mark.parametrize(
    "path",
    [
        *("/x/josé", "/x/日本", "/x/a(1)", "a(1)", "/x/a[1]", "/x/a&b", "/x/a#b", "/x/a;b"),
        *("/x/it's", '/x/a"b', "/x/a=b", "/x/a!b", "/x/<a>", "/x/`a`"),
    ],
)
def test_special_characters_are_answered_with_what_to_paste(told: Tell, path: str) -> None:
    (line,) = told(f"init_from={path}")
    (pasted,) = shlex.split(line.partition("quotes: ")[2])
    (line,) = told(pasted)
    assert line.startswith("init_from (command line): there is no folder " + path)


def test_a_tilde_that_the_shell_leaves_is_answered_with_the_home(told: Tell) -> None:
    (line,) = told("init_from=~/models/a")
    assert "\"init_from='$HOME/models/a'\"" in line


@pytest.mark.parametrize(
    ("root", "override", "meant"),
    [
        ("train", "+backbone=minilm", "backbone=minilm"),
        ("train", "++backbone=minilm", "backbone=minilm"),
        ("train", "model=mini", "backbone=minilm"),
        ("train", "network=minilm", "backbone=minilm"),
        ("train", "dataset=beir", "data=beir"),
        ("train", "seed=interval(1,3)", "add -m"),
        ("evaluate", "model=runs/x/model", "retriever=runs/x/model"),
    ],
)
def test_an_idiom_from_elsewhere_is_answered_with_what_to_type(
    conf: Path, told: Tell, root: str, override: str, meant: str
) -> None:
    (conf / "backbone/minilm.yaml").write_text("{_target_: parts.Part}")
    line = told(override, *["retriever=bm25"] * (root == "evaluate"), root=root)[0]
    assert line.startswith(override)
    assert meant in line.partition(": ")[2]


@pytest.mark.parametrize(
    ("root", "key"),
    [
        *[("train", key) for key in ("seed", "encoding", "encoding.pooling", "name")],
        *[("train", key) for key in ("trainer.max_steps", "trainer._partial_", "stage._partial_")],
        *[("evaluate", key) for key in ("measures", "rerank.depth", "index.k", "bm25")],
    ],
)
def test_a_needed_key_cannot_be_deleted(told: Tell, root: str, key: str) -> None:
    lines = told(f"~{key}", *["retriever=bm25"] * (root == "evaluate"), root=root)
    assert any(line.startswith(f"{key} (") for line in lines), lines


@pytest.mark.parametrize("seed", ["-1", "4294967296", "99999999999999"])
def test_a_seed_out_of_range_is_refused(told: Tell, seed: str) -> None:
    (line,) = told(f"seed={seed}")
    assert line.startswith("seed (command line)")


def test_a_remedy_is_a_number_that_can_be_typed(told: Tell) -> None:
    assert told("seed=1e9")[0].endswith("write 1000000000")
    assert "write" not in told("seed=1e99")[0]


@pytest.mark.parametrize(
    "override",
    [
        *("optimizer.eps=-1", "optimizer.weight_decay=-0.1", "trainer.gradient_clip_val=-1"),
        "callbacks.best.filename='{x'",
    ],
)
def test_what_torch_or_lightning_would_refuse_hours_later_is_refused(override: str) -> None:
    with pytest.raises(InputError, match=override.partition("=")[0]):
        compose(HOME / "conf", "train", [override])


@pytest.mark.parametrize(
    ("override", "remedy"),
    [("~data", "data=<option>"), ("~backbone._target_", "backbone=<option>")],
)
def test_a_group_without_a_class_is_answered_with_the_choice(override: str, remedy: str) -> None:
    with pytest.raises(InputError, match=re.escape(remedy)):
        compose(HOME / "conf", "train", [override, "data.path=x"])


@pytest.mark.parametrize("target", ["caravan.nope.X", "transformers.nope.X", "caravan.data.nope.X"])
def test_a_target_in_no_module_is_told(conf: Path, told: Tell, target: str) -> None:
    (line,) = told(f"loss._target_={target}")
    assert line.startswith("loss._target_ (command line)")
    (conf / "experiment/target.yaml").write_text(
        f"# @package _global_\nloss:\n  _target_: {target}\n"
    )
    (line,) = told("experiment=target")
    assert line.startswith("loss._target_ (")
    assert "target.yaml:3)" in line


@pytest.mark.parametrize(
    "override", ["data.path=${oc.env:CARAVAN_NO_SUCH}/a", "data.path=${x}/a", "data.path=${data.x}"]
)
@pytest.mark.parametrize("more", [[], ["collections=[a]"]])
def test_an_interpolation_without_a_value_is_told(
    told: Tell, override: str, more: list[str]
) -> None:
    lines = told("retriever=bm25", "data=beir", override, *more, root="evaluate")
    assert [line for line in lines if line.startswith("data.path (command line)")] == lines[:1]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 10)}]\n"
    for old, new in zip("abcdef", "bcdefg", strict=True)
)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (BOMB, ":5: "),
        ("name: " + "{a: " * 300 + "1" + "}" * 300, ":2: "),
        ("name: &a [*a]", ":2: "),
        ("name: x\ndefaults: [wild]", "experiment/wild"),
        ("name: x\ndefaults: [/experiment: wild]", "experiment/wild"),
        ("1: x", "1 ("),
        ("hydra: {job: {chdir: true}}", "hydra.job.chdir"),
        ("hydra: {run: {dir: x}}", "hydra.run.dir"),
        ('name: "a\\0b"', "name ("),
        ("- name", ":2: "),
        ("name", ":2: "),
    ],
)
def test_a_file_that_cannot_be_composed_is_refused_quickly(
    conf: Path, told: Tell, text: str, place: str
) -> None:
    (conf / "experiment/wild.yaml").write_text(f"# @package _global_\n{text}\n")
    started = time.monotonic()
    (line,) = told("experiment=wild")
    assert place in line
    assert time.monotonic() - started < 10


def test_a_file_that_is_not_utf8_is_named(conf: Path, told: Tell) -> None:
    (conf / "experiment/latin.yaml").write_bytes(
        "# @package _global_\nname: josé\n".encode("latin1")
    )
    (line,) = told("experiment=latin")
    assert "experiment/latin.yaml" in line


class TestSweeps:
    def test_a_pattern_stands_for_the_options_that_it_matches(self, conf: Path) -> None:
        for name in ("a", "b"):
            (conf / f"experiment/some/{name}.yaml").parent.mkdir(exist_ok=True)
            (conf / f"experiment/some/{name}.yaml").write_text("# @package _global_\nseed: 1\n")
        argv = preflight(["-m", "experiment=glob(some/*)"], conf, "train", schema.Train)
        assert argv[1] == "experiment=some/a,some/b"

    @pytest.mark.parametrize(
        "override",
        [
            "experiment=glob(nothing/*)",
            "loss.rate=interval(0.01,0.1)",
            "seed=range(1,1e12)",
            "loss.rate=range(0,1,0.0)",
        ],
    )
    def test_values_that_no_job_can_be_made_of_are_told(self, told: Tell, override: str) -> None:
        (line,) = told("-m", override)
        assert line.startswith(f"{override} (command line)")

    def test_texts_are_put_into_quotes(self, conf: Path) -> None:
        for values, quoted in (("1_1,a,true", "'1_1',a,'true'"), ("choice(1_1,2)", "'1_1','2'")):
            argv = preflight(["-m", f"loss.name={values}"], conf, "train", schema.Train)
            assert argv[1] == f"loss.name={quoted}"
