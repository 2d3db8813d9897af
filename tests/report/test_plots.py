from __future__ import annotations

import re
from itertools import product
from pathlib import Path

import matplotlib
import pytest
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from caravan.report.plots import (
    COLOURS,
    HEIGHT,
    STYLES,
    THEMES,
    WIDTH,
    Line,
    Plot,
    intervals,
    lines,
)

CSS = (STYLES / "page.css").read_text()
CSS_COLOURS = [
    dict(re.findall(r"--(\w+): (#\w{6})", root))
    for root in re.findall(r":root \{(.*?)\}", CSS, re.S)
]


def _contrast(*colours: str) -> float:
    """WCAG 2.2's ratio of two colours."""
    both = []
    for colour in colours:
        parts = (
            p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in to_rgb(colour)
        )
        both.append(sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), parts, strict=True)))
    return (max(both) + 0.05) / (min(both) + 0.05)


@pytest.mark.parametrize(("theme", "css"), zip(THEMES, CSS_COLOURS, strict=True))
def test_lines_and_texts_have_contrast_to_the_ground(theme: str, css: dict[str, str]) -> None:
    style = matplotlib.rc_params_from_file(STYLES / f"{theme}.mplstyle", use_default_template=False)
    ground = to_hex(style["figure.facecolor"])
    colours = set(style["axes.prop_cycle"].by_key()["color"])
    assert len(colours) == COLOURS
    assert all(_contrast(colour, ground) >= 3 for colour in colours)
    assert ground == css["ground"]
    for text, of in product(("ink", "quiet", "link", "good"), ("ground", "raised")):
        assert _contrast(css[text], css[of]) >= 4.5, (text, of)


def test_a_plot_is_written_as_png_and_svg(tmp_path: Path) -> None:
    drawn = [Line("a", [1, 2, 4], [0.1, 0.2, 0.3], [0.01, 0, 0]), Line("b", [1, 2], [0.3, 0.1])]
    plot = Plot("depth", "MRR@10 over depth.", lines(drawn, "depth", "MRR@10"))
    plot.write(tmp_path)
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "depth.svg").read_text()
    assert svg == plot.svg()
    assert "<text" not in svg  # outlines, the same on every machine


def test_a_plot_in_a_page_has_text_and_no_address_but_namespaces() -> None:
    plot = Plot("x", "", intervals(["a", "b"], [0.1, 0.2], [0.01, 0.02], "MRR@10"))
    text = plot.svg("dark", page=True)
    addresses = set(re.findall(r"https?://[^\"' )<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "#15181c" in text
    assert ">MRR@10</text>" in text


@pytest.mark.parametrize(("x", "scale"), [([1, 2, 8], "log"), ([3, 6], "linear")])
def test_few_values_have_a_tick_each_and_a_logarithmic_axis_if_they_double(
    x: list[float], scale: str
) -> None:
    axes = Figure().add_subplot()
    lines([Line("", x, [0.1] * len(x))], "updates", "loss")(axes)
    assert axes.get_xticks().tolist() == x
    assert axes.get_xscale() == scale


def test_long_labels_leave_room_for_the_axes() -> None:
    labels = [f"sampler.runs=[{'runs/' * 20}{i}.trec] sampler.depth={i}" for i in range(9)]
    for draw in (
        lines([Line(label, [1, 2], [0.1, 0.2]) for label in labels], "updates", "loss"),
        intervals(labels, [0.1] * 9, [0.01] * 9, "MRR@10"),
    ):
        with matplotlib.style.context(STYLES / "plots.mplstyle"):
            figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
            axes = figure.add_subplot()
            draw(axes)
            figure.draw_without_rendering()
        inches = axes.get_position().size * figure.get_size_inches()
        assert inches[0] > WIDTH / 3
        assert inches[1] > HEIGHT / 2
