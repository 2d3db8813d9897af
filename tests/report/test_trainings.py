from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from caravan.report.trainings import POINTS, read_curves


def _log(folder: Path, values: dict[int, float], tag: str = "train/loss") -> None:
    with SummaryWriter(str(folder / "tensorboard")) as writer:
        for step, value in values.items():
            writer.add_scalar(tag, value, step)


def test_curves_have_the_last_value_of_each_step(tmp_path: Path) -> None:
    assert read_curves(tmp_path) == {}
    _log(tmp_path, {10: 4.0, 20: 3.0, 30: 9.0})
    _log(tmp_path, {20: 2.5, 30: 2.0})  # resumed
    _log(tmp_path, {29: 0.5}, "val/MRR@10")
    _log(tmp_path, {29: 1.0}, "lr-AdamW")
    expected = {"train/loss": ([10, 20, 30], [4.0, 2.5, 2.0]), "val/MRR@10": ([29], [0.5])}
    assert read_curves(tmp_path) == expected


def test_long_curves_keep_their_ends_and_few_points(tmp_path: Path) -> None:
    _log(tmp_path, {step: float(step) for step in range(0, 5000, 2)})
    steps, values = read_curves(tmp_path)["train/loss"]
    assert len(steps) == POINTS
    assert (steps[0], steps[-1]) == (0, 4998)
    assert values == [float(step) for step in steps]
