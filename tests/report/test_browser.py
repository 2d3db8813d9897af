"""The page in a real browser: headless Chromium from the distribution, skipped where there is none.

The picture of each lies in the test's folder: pytest tests/report/test_browser.py --basetemp=...
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from tests.report.conftest import Evaluations, write_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason=f"no browser ({', '.join(NAMES)}); apt-get install chromium brings one",
)
PHONE, DESKTOP = 390, 1100

WATCH = """<!doctype html><body style="margin:0">
<iframe src="PAGE" style="border:0;width:WIDTHpx;height:2400px;color-scheme:light dark"></iframe>
<pre id="seen"></pre><script>
onload = () => {
  const inside = document.querySelector("iframe").contentWindow, page = inside.document;
  const style = inside.getComputedStyle(page.body);
  document.getElementById("seen").textContent = JSON.stringify({
    title: page.title,
    wide: page.documentElement.scrollWidth,
    ground: style.backgroundColor,
    images: [...page.images].map(one => one.complete && one.naturalWidth > 0),
    shown: [...page.images].map(one => one.getBoundingClientRect().width),
    p: Math.max(...[...page.querySelectorAll("thead th")]
      .filter(one => one.textContent.trim() == "p")
      .map(one => one.getBoundingClientRect().right)),
    fetched: inside.performance.getEntriesByType("resource").map(one => one.name)
      .filter(name => !name.startsWith("data:")),
    text: Math.min(...[...page.querySelectorAll("p,td,th")]
      .map(one => parseFloat(inside.getComputedStyle(one).fontSize))),
  });
};
</script>"""


def _browse(arguments: list[str], address: Path, home: Path) -> str:
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *("--allow-file-access-from-files", f"--user-data-dir={home / 'browser'}"),
            *(*arguments, f"file://{address}"),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def written(evaluations: Evaluations) -> Path:
    return write_page(evaluations.folder)


@pytest.mark.parametrize(("width", "dark"), [(DESKTOP, False), (PHONE, True)])
def test_the_page_opens_on_a_desktop_in_light_and_on_a_phone_in_the_dark(
    width: int, dark: bool, written: Path, tmp_path: Path
) -> None:
    watcher = tmp_path / "watch.html"
    watcher.write_text(WATCH.replace("PAGE", f"file://{written}").replace("WIDTH", str(width)))
    picture = tmp_path / "page.png"
    theme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    arguments = [theme, "--dump-dom", f"--screenshot={picture}", "--window-size=1100,2400"]
    dumped = _browse(arguments, watcher, tmp_path)
    found = re.search(r'<pre id="seen">(.+?)</pre>', dumped)
    assert found is not None
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    assert seen["title"] == "runs · Caravan"  # a script in a passage would have set another
    assert seen["wide"] <= width  # nothing but tables is pushed aside
    assert 0 < seen["p"] <= width  # a test's result is in view without scrolling
    assert seen["ground"] == ("rgb(21, 24, 28)" if dark else "rgb(255, 255, 255)")
    assert len(seen["images"]) >= 3
    assert all(seen["images"])
    assert all(width * 0.5 < shown <= width for shown in seen["shown"])
    assert seen["fetched"] == []
    assert seen["text"] >= 12
    assert picture.read_bytes().startswith(b"\x89PNG")
