"""README and docs/: their commands compose, their code runs, their links work."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.cli.small_conf import CONF
from tests.commands import evaluate

from caravan.cli.compose import Composer, check, preflight, without_hydra
from caravan.cli.sources import parse
from caravan.errors import InputError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([\w{}-]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SETTING = r"(?:-\S+ |['\"~+]*[\w./@]+=).*|--.*"
ANSI_C = re.compile(r"\$'([^']*)'")
"""Bash's quotes for text with line breaks, which shlex does not know."""
PROGRAM = re.compile(rf"(?:^|\s)(?:-m caravan\.)?(train|evaluate|search)(?:\.py)? ({SETTING})$")


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page."""
    return [body for kind, body in FENCE.findall(page.read_text("utf-8")) if kind == language]


def lines(page: Path) -> Iterator[str]:
    """The lines of a page's blocks, continued ones joined, and the code within its sentences."""
    for body in blocks(page):
        yield from body.replace("\\\n", " ").splitlines()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text("utf-8")))


def command(line: str) -> tuple[str, list[str]] | None:
    """The root and the settings of a line that starts train.py, evaluate.py or a search.

    `<placeholder>` becomes a value, and code within a sentence (`train.py seed=1`) gets dots, like
    every other incomplete command.
    """
    if line.lstrip().startswith(("$ ", "#", "for ")) or (match := PROGRAM.search(line)) is None:
        return None
    typed = re.sub(r"<[^>]+>", "given", re.sub(r" --(?:ask|json|show) .*| < .*", "", match[2]))
    typed = ANSI_C.sub(lambda found: shlex.quote(found[1].replace("\\n", "\n")), typed)
    arguments = shlex.split(typed, comments=True)
    root = "train" if match[1] == "train" else "evaluate"
    return root, arguments + ["..."] * line.startswith(("train.py", "evaluate.py"))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder as `--config-dir`: the files and modules that the pages show and conf/ lacks."""
    home = tmp_path_factory.mktemp("shown")
    (home / "conf").mkdir()
    for page in PAGES:
        for body in blocks(page, "python"):
            if (name := re.match(r"# (\w+\.py)\n", body)) is not None:
                (home / name[1]).write_text(body)
        for body in blocks(page, "yaml"):
            name = re.match(r"(?:# @.*\n)?# (?:my_)?conf/(\S+\.yaml)\n", body)
            if name is not None and not (CONF / name[1]).exists():
                (home / "conf" / name[1]).parent.mkdir(parents=True, exist_ok=True)
                (home / "conf" / name[1]).write_text(body)
    sys.path.insert(0, str(home))
    yield home / "conf"
    sys.path.remove(str(home))


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """The commands of a page that no page before it has."""
    before = {
        (found[0], *found[1])
        for other in PAGES[: PAGES.index(page)]
        for line in lines(other)
        if (found := command(line)) is not None
    }
    for line in lines(page):
        if (found := command(line)) is not None and (found[0], *found[1]) not in before:
            before.add((found[0], *found[1]))
            yield found


def first_and_last(composer: Composer, arguments: list[str]) -> list[list[str]]:
    """Two jobs of a sweep; the arguments themselves if they are not a sweep."""
    jobs: tuple[list[str], list[str]] = ([], [])
    for text in arguments:
        override = parse(text, composer.parser)
        values = [text]
        if override.is_sweep_override():
            key = override.get_key_element()
            values = [f"{key}={value}" for value in override.sweep_string_iterator()]
        jobs[0].append(values[0])
        jobs[1].append(values[-1])
    return [jobs[0]] if jobs[0] == jobs[1] else list(jobs)


def _of_page(page: Path) -> Any:
    slow = [] if page.stem in ("README", "getting-started") else [pytest.mark.slow]
    return pytest.param(page, id=page.stem, marks=slow)


@pytest.mark.parametrize("page", map(_of_page, PAGES))
def test_every_command_composes_and_checks(page: Path, shown: Path) -> None:
    wrong, todo = [], list(commands(page))
    for root in ("train", "evaluate"):
        with Composer(CONF, root, shown) as composer:
            for given in [arguments for of, arguments in todo if of == root]:
                # `...` and `experiment=...` are the reader's to fill in; without them a command may
                # lack what it needs. So may what the reader's own folders hold: none is here.
                arguments = [text for text in given if "..." not in text and text != "-m"]
                # A loop has a variable; Ray's launcher is a separate package.
                arguments = [re.sub(r"\$\w+", "1", text) for text in arguments]
                arguments = [text for text in arguments if "launcher=ray" not in text]
                arguments = [text for text in arguments if "hydra.launcher.ray" not in text]
                if "--config-dir" in arguments:
                    del arguments[(at := arguments.index("--config-dir")) : at + 2]
                if any(text.startswith("--") for text in arguments):
                    continue  # --help, --cfg, --info: nothing is started
                for job in first_and_last(composer, arguments):
                    for mistake in check(without_hydra(composer.compose(job)), composer.root):
                        no_folder = mistake.kind == "folder" and "there is no" in mistake.text
                        left_out = mistake.kind != "wrong" and "..." in " ".join(given)
                        if not (no_folder or left_out):
                            wrong.append(f"{root}.py {shlex.join(given)}: {mistake}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_config_errors_on_the_pages_are_those_of_the_check(
    shown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    seen = 0
    for page in PAGES:
        for body in blocks(page):
            first, _, answer = body.partition("\n")
            if not first.startswith("$ python train.py"):
                continue
            arguments = ["--config-dir", str(shown), *shlex.split(first)[3:]]
            with pytest.raises(InputError) as caught:
                preflight(arguments, CONF, "train")
            assert str(caught.value).splitlines() == answer.rstrip().splitlines(), page
            seen += 1
    assert seen >= 2


def test_getting_started_shows_the_lines_of_the_quickstart() -> None:
    make = ["make", "--dry-run", "--always-make", "quickstart", "PY=python"]
    recipe = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    started = r"^python (?:train|evaluate|-m caravan).*\S"
    wanted = re.findall(started, recipe, re.MULTILINE)
    shown = [body.splitlines() for body in blocks(ROOT / "docs" / "getting-started.md")]
    assert len(wanted) >= 8
    assert wanted in shown


def test_the_plot_of_the_readme_has_the_scores_of_its_table() -> None:
    rows = re.findall(r"^(\w+) +(0\.\d\S+) +\S+ +(\S+) +\S+ +\S+ +\S+$", PAGES[0].read_text(), re.M)
    plot = (ROOT / "docs" / "img" / "quickstart.svg").read_text()
    assert len(rows) == 4
    for system, mrr, recall in rows:
        assert f"{system}: MRR@10 {mrr}, R@100 {recall}" in plot


def test_every_other_program_is_there() -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    seen = 0
    for page in PAGES:
        for line in lines(page):
            for name in re.findall(r"(?:^|\s)python -m (caravan[\w.]*)", line):
                assert importlib.util.find_spec(name), f"{page.name}: {line}"
                seen += 1
            for name in re.findall(r"^\s*make ([\w-]+)", line):
                assert name in targets, f"{page.name}: {line}"
                seen += 1
            for name in re.findall(r"\b(?:benchmarks|notebooks|conf|tests)/[\w/]+\.\w+", line):
                if not line.startswith("# "):  # a file that the page itself shows
                    assert (ROOT / name).is_file(), f"{page.name}: {line}"
                    seen += 1
    assert seen >= 30


def _texts_of_the_code() -> str:
    """The string constants of src/caravan, cut where a value is inserted."""
    found: list[str] = []
    for path in (ROOT / "src" / "caravan").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        constants = (node.value for node in nodes if isinstance(node, ast.Constant))
        found += (text for text in constants if isinstance(text, str))
    return re.sub(r"%[-\w.]*[sd]", "\0", "\0".join(found))


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    cells = re.findall(r"^\| `([^`]*(?:\.\.\.|: )[^`]*)` \|", page, re.MULTILINE)
    texts = _texts_of_the_code()
    for message in cells:
        # The text between the values; a sentence may consist of several constants.
        pieces = [piece.strip(" ;:,()'") for piece in message.split("...")]
        assert [piece for piece in pieces if len(piece) > 3], message
        assert [piece for piece in pieces if piece not in texts] == [], message
    assert len(cells) >= 20


def _links(home: Path, folders: dict[str, str], beir: Path) -> None:
    """The folders that the pages name."""
    (home / "my-data").symlink_to(beir)
    (home / "conf").symlink_to(CONF)
    for name, kind in (
        ("mine/retriever", "retriever"),
        ("mine/reranker", "reranker"),
        ("quickstart/train/adapt", "retriever"),
        ("quickstart/train/retriever", "retriever"),
    ):
        (home / "runs" / name).mkdir(parents=True)
        (home / "runs" / name / "model").symlink_to(folders[kind])
    retriever = home / "runs/mine/retriever/model"
    evaluate(beir, home / "runs/mine/test", retriever, "index.k=20", "measures=[MRR@10]")


def test_the_code_of_the_pages_runs(
    folders: dict[str, str],
    beir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _links(tmp_path, folders, beir)
    monkeypatch.chdir(tmp_path)
    seen = 0
    for name in ("README", "docs/api", "docs/configuration"):
        for body in blocks(ROOT / f"{name}.md", "python"):
            if "mteb.get_tasks" in body:
                continue  # fetches the task; tests/test_mteb.py runs one that it makes itself
            exec(compile(body, name, "exec"), {})
            seen += 1
    assert seen >= 4
    assert capsys.readouterr().out.count("Salt") >= 2


@pytest.mark.slow
def test_the_built_pages_have_no_broken_link_and_need_no_network(tmp_path: Path) -> None:
    sphinx = [sys.executable, "-m", "sphinx", "--builder", "html", "--fail-on-warning"]
    given = ["--keep-going", "--quiet", "--conf-dir", "docs", "--doctree-dir", str(tmp_path / "d")]
    built = subprocess.run(
        [*sphinx, *given, ".", str(tmp_path / "html")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "html").rglob("*.html"))
    names = {page.stem for page in pages}
    assert {page.stem for page in PAGES} <= names
    listed = (tmp_path / "html/docs/index.html").read_text("utf-8").partition("<article")[2]
    assert [page.stem for page in PAGES[1:] if f"{page.stem}.html" not in listed] == ["index"]
    loaded = r"""<(?:script|img|link|iframe|source)\b[^>]*(?:src|href)=["'](?:https?:)?//[^"']*"""
    for page in pages:
        assert re.findall(loaded, page.read_text("utf-8")) == [], page
    sheets = [page.read_text("utf-8") for page in (tmp_path / "html").rglob("*.css")]
    assert sheets
    assert not any(re.search(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", text) for text in sheets)
    assert "Embeddings [N, dim] float32" in (tmp_path / "html/docs/api.html").read_text("utf-8")
