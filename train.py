"""Fit one stage: from a collection and a backbone to a model folder.

python train.py experiment=quickstart/retriever
python train.py --help
"""

from typing import TYPE_CHECKING

from caravan.cli.main import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig


@entry("train")
def main(cfg: "DictConfig") -> float | None:
    """Train as the (checked) config says; the monitored metric is what sweepers optimize."""
    from caravan.cli.train import train

    return train(cfg)


if __name__ == "__main__":
    main()
