from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from caravan.report import page
from caravan.report.plots import (
    DARK,
    LIGHT,
    STEPS,
    Line,
    Plot,
    Theme,
    bars,
    changes,
    lines,
    write,
)

CSS = (Path(page.__file__).parent / "templates/page.css").read_text()


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2's ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_every_line_has_contrast_to_the_ground(theme: Theme) -> None:
    assert len(theme.colours) == len(set(theme.colours)) == 8
    for colour in theme.colours:
        assert _contrast(colour, theme.ground) >= 3, colour
    assert _contrast(theme.ink, theme.ground) >= 7


def test_every_text_of_the_page_has_contrast_in_light_and_dark() -> None:
    roots = re.findall(r":root \{(.*?)\}", CSS, flags=re.DOTALL)
    assert len(roots) == 2
    for root in roots:
        colours = dict(re.findall(r"--(\w+): (#\w{6})", root))
        texts = ("ink", "quiet", "link", "good")
        for text, ground in product(texts, ("ground", "raised")):
            assert _contrast(colours[text], colours[ground]) >= 4.5, (text, ground)


def test_the_page_and_its_plots_share_their_grounds() -> None:
    grounds = re.findall(r"--ground: (#\w{6})", CSS)
    assert grounds == [LIGHT.ground, DARK.ground]


def test_a_plot_is_written_as_png_and_svg_with_its_caption(tmp_path: Path) -> None:
    drawn = [Line("a", [1, 2, 4], [0.1, 0.2, 0.3], [0.01, 0, 0]), Line("b", [1, 2], [0.3, 0.1])]
    plot = Plot("depth", "MRR@10 over depth.", lines(drawn, "depth", "MRR@10"))
    write(tmp_path, [plot])
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "depth.svg").read_text()
    assert "<text" not in svg  # outlines, the same on every machine
    assert "**depth**: MRR@10 over depth." in (tmp_path / "captions.md").read_text()
    write(tmp_path, [plot])
    assert (tmp_path / "depth.svg").read_text() == svg


def test_a_plot_in_a_page_has_no_address_but_namespaces() -> None:
    plot = Plot("x", "", bars(["a", "b"], [0.1, 0.2], [0.01, 0.02], "MRR@10"))
    text = plot.svg(DARK, small=True)
    addresses = set(re.findall(r"https?://[^\"' )<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert DARK.ground in text
    assert ">MRR@10</text>" in text


def test_a_plot_of_all_queries_does_not_grow_with_them() -> None:
    def size(queries: int) -> int:
        differences = [i / queries - 0.5 for i in range(queries)]
        return len(Plot("x", "", changes(differences, "MRR@10")).svg(LIGHT, small=True))

    assert size(20 * STEPS) < 1.2 * size(STEPS)


@pytest.mark.parametrize(("x", "scale"), [([1, 2, 8], "log"), ([3, 6], "linear")])
def test_few_values_have_a_tick_each_and_a_logarithmic_axis_if_they_double(
    x: list[float], scale: str
) -> None:
    axes = Figure().add_subplot()
    lines([Line("", x, [0.1] * len(x))], "updates", "loss")(axes, LIGHT)
    assert axes.get_xticks().tolist() == x
    assert axes.get_xscale() == scale
