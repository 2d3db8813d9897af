"""The sections of a page that tell how runs were made: trainings, commands, configs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caravan.report import curves, systems
from caravan.report.blocks import Block, Code, Facts, Note, Section
from caravan.report.compare import slug
from caravan.report.plots import Line, Plot, lines, panels
from caravan.report.records import read_metrics

MOST_TRAININGS = 12
MOST_CONFIGS = 12
MOST_CURVES = 8


def trainings(folder: Path, homes: Sequence[Path]) -> list[Section]:
    """Facts and curves of each training below a folder."""
    blocks: list[Block] = []
    for home in homes[:MOST_TRAININGS]:
        record = read_metrics(home) or {}
        name = _name(home, folder)
        blocks.append(Facts(training_facts(home, record), name))
        found = curves.read(home)
        if found:
            blocks.append(_curves(name, found))
        else:
            blocks.append(Note(f"{name} has no event files of TensorBoard, so no curves."))
    if len(homes) > MOST_TRAININGS:
        left_out = len(homes) - MOST_TRAININGS
        blocks.append(
            Note(f"{left_out} more trainings are not shown; each folder can have a page.")
        )
    return [Section("Training", "training", blocks)] if blocks else []


def training_facts(home: Path, record: dict[str, Any]) -> list[tuple[str, str]]:
    """What metrics.json and the config say of a training, as far as they say it."""
    config = systems.config(home)
    facts = [
        ("base model", record.get("base_model")),
        ("collection", record.get("collection")),
        ("loss", _class(config.get("loss"))),
        ("adapter", _class(config.get("peft"))),
        ("updates", _number(record.get("updates"))),
        ("queries an update", _number(_within(config, "batching", "queries_per_batch"))),
        ("learning rate", _number(_within(config, "optimizer", "lr"))),
        ("seed", config.get("seed")),
        ("trained weights", _number(record.get("trained_parameters"))),
        ("memory", f"{record['memory_gib']:.1f} GiB" if record.get("memory_gib") else None),
        ("seconds", f"{record['train_seconds']:,.0f}" if "train_seconds" in record else None),
        (
            f"best {record.get('monitored')}",
            f"{record['best']:.4f}" if record.get("best") is not None else None,
        ),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def overlaid(found: dict[str, dict[str, curves.Curve]], tag: str, stem: str) -> Plot | None:
    """One curve of several trainings; None where none of them has it."""
    having = {name: of[tag] for name, of in found.items() if tag in of}
    if not having:
        return None
    shown = dict(list(having.items())[:MOST_CURVES])
    cut = f" (the first {MOST_CURVES} of {len(having)})" if len(having) > len(shown) else ""
    told = "; ".join(f"{name}: {curve.values[-1]:.4f}" for name, curve in shown.items())
    drawn = [Line(name, curve.steps, curve.values) for name, curve in shown.items()]
    return Plot(
        f"{stem}-{slug(tag)}",
        f"{tag} over updates, a line for each training{cut}.",
        f"{tag} over updates. At the end: {told}.",
        lines(drawn, "updates", tag, ticks=False),
    )


def _curves(name: str, found: dict[str, curves.Curve]) -> Plot:
    """Loss and validation of one training, side by side."""
    groups = []
    if "train/loss" in found:
        groups.append(("training loss", [Line("", *_points(found["train/loss"]))]))
    watched = [tag for tag in found if tag.startswith("val/")]
    if watched:
        few = [tag for tag in watched if "first_stage" not in tag][:3]
        few += [tag for tag in watched if "first_stage" in tag][:1]
        drawn = [Line(tag.removeprefix("val/"), *_points(found[tag])) for tag in few]
        groups.append(("validation", drawn))
    if not groups:
        groups = [(tag, [Line("", *_points(curve))]) for tag, curve in list(found.items())[:2]]
    told = "; ".join(
        f"{line.label or title}: {line.y[0]:.4f} to {line.y[-1]:.4f}"
        for title, some in groups
        for line in some
    )
    return Plot(
        f"curves-{slug(name)}",
        f"{name}: {' and '.join(title for title, _ in groups)} over updates.",
        f"{' and '.join(title for title, _ in groups)} of {name} over updates. {told}.",
        panels(groups, "updates"),
        height=2.2,
    )


def _points(curve: curves.Curve) -> tuple[list[int], list[float]]:
    return curve.steps, curve.values


def _within(config: dict[str, Any], group: str, key: str) -> Any:
    node = config.get(group)
    return node.get(key) if isinstance(node, dict) else None


def _class(node: Any) -> str | None:
    target = node.get("_target_") if isinstance(node, dict) else None
    return target.rsplit(".", 1)[-1] if isinstance(target, str) else None


def _number(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def made_by(folder: Path, homes: Sequence[Path]) -> list[Section]:
    """The commands and resolved configs of runs."""
    commands: dict[str, None] = {}
    configs: list[Block] = []
    for home in homes:
        path = home / "config.yaml"
        if not path.is_file():
            continue
        text = path.read_text("utf-8", errors="replace")
        head, _, rest = text.partition("\n")
        if head.startswith("# "):
            commands.setdefault(head.removeprefix("# "))
            text = rest
        if len(configs) < MOST_CONFIGS:
            configs.append(Code(f"{_name(home, folder)}/config.yaml", text))
    blocks: list[Block] = []
    if commands:
        blocks.append(Code("commands", "\n".join(commands), folded=False))
    elif configs:
        told = "These runs were not started by a command, or by one that was not written down."
        blocks.append(Note(told))
    blocks += configs
    if len(homes) > MOST_CONFIGS:
        blocks.append(
            Note(f"The configs of {len(homes) - MOST_CONFIGS} more runs lie beside them.")
        )
    return [Section("Commands and configs", "made", blocks)] if blocks else []


def _name(home: Path, folder: Path) -> str:
    return str(home.relative_to(folder)) if home != folder else home.resolve().name
