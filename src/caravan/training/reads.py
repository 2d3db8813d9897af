"""What a training reads: the DataModule of its collections, and their validations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from caravan.data.batching import TrainingSet
from caravan.data.datamodule import DataModule
from caravan.data.mixing import MixedSet
from caravan.data.mixture import Mixture, Part
from caravan.data.unlabelled import Unlabelled
from caravan.data.validation import Validation
from caravan.models import hardware
from caravan.training.stage import Stage


class Reads:
    """The collections of a training, read by a stage.

    Args:
        source: the data source of the run.
        parts: its collections (`caravan.data.mixture.open_parts`).
        validation: arguments of `Validation`.
    """

    def __init__(
        self, source: Any, parts: Sequence[Part], module: Stage, validation: Mapping[str, Any]
    ) -> None:
        self.source, self.parts, self.module = source, parts, module
        self.validation = dict(validation)

    def data_module(self, batching: Mapping[str, Any]) -> DataModule:
        """The DataModule; without validations for unlabelled text.

        Args:
            batching: arguments of `DataModule`; a `token_budget` of None is chosen by device.
        """
        budget = hardware.chunk(batching["token_budget"])
        trained = [part for part in self.parts if part.entry.weight]
        sets = [
            self.module.training_set(one.collection, one.train_split, one.sampler, budget)
            for one in trained
        ]
        training: TrainingSet = sets[0]
        name = self.parts[0].collection.name
        if isinstance(self.source, Mixture):
            training = MixedSet(self.source, trained, sets, self.module.seed)
            name = self.source.name
        labelled = not isinstance(sets[0], Unlabelled)
        validations = self.validations(only_labelled=not labelled)
        return DataModule(name, training, validations, **{**batching, "token_budget": budget})

    def validations(
        self, split: str = "dev_split", only_labelled: bool = False, **settings: Any
    ) -> list[Validation]:
        """The validation of each collection.

        Args:
            split: "dev_split" or "train_split", as the data sources name them.
            only_labelled: leave collections without qrels out, instead of refusing them.
            settings: in place of those of the run.
        """
        found = []
        for part in self.parts:
            if only_labelled and not part.collection.splits:
                continue
            own = {"run": part.entry.validation_run} if part.entry.validation_run else {}
            templates = self.module.reading(part.collection.name)
            given = {**self.validation, **own, **settings, "name": part.name}
            found.append(Validation(part.collection, templates, getattr(part, split), **given))
        return found

    def names(self) -> str:
        """The collections with the beginnings of their digests."""
        found = (part.collection for part in self.parts)
        return ", ".join(f"{one.name} ({one.digest[:12]})" for one in found)


def validated(validations: Sequence[Validation]) -> dict[str, Any]:
    """Facts of the validation for the model card; numbers are sums over the collections."""
    names = ", ".join(one.collection.name for one in validations)
    searched = [len(one.passages) for one in validations if one.candidates is None]
    return {
        "collection": names if len(validations) == 1 else f"mean of {names}",
        "split": ", ".join(dict.fromkeys(one.split for one in validations)),
        "queries": sum(len(one.qrels.queries) for one in validations),
        "passages": sum(searched) if searched else None,
    }
