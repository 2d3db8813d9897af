"""Search a collection with one system and score it: a TREC run and metrics.json.

python evaluate.py retriever=bm25 data=beir data.path=/data/scifact
python evaluate.py --help
"""

from typing import TYPE_CHECKING, Any

from caravan.cli.main import entry

if TYPE_CHECKING:
    from omegaconf import DictConfig


@entry("evaluate")
def main(cfg: "DictConfig") -> dict[str, Any]:
    """Evaluate as the (checked) config says."""
    from caravan.cli.evaluate import evaluate

    return evaluate(cfg)


if __name__ == "__main__":
    main()
