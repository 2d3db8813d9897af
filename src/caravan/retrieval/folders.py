"""The model folders of an evaluation, each opened once, whatever number of collections asks.

Weights load when the first text that is not on disk comes, and are held until another folder is
asked for: a retriever and a reranker of seven billion weights need not share a device.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from caravan import manifests
from caravan.encoding import read_encoding
from caravan.models.digests import folder_digest
from caravan.models.remote_code import FACT

if TYPE_CHECKING:
    from caravan.retrieval.inference import Encoder
    from caravan.retrieval.rerank import Scorer


class Folders:
    """Opens model folders with the settings of one evaluation.

    Args:
        precision: "auto", "bf16" or "float32".
        lengths: query_length and passage_length that replace a retriever's own.
        token_budget: padded tokens a chunk; None leaves them to the machine.
        block: passages a shard.
        num_workers: processes that tokenise ahead.
        attention, trust_remote_code: as in `caravan.models.folder.load`.
    """

    def __init__(
        self,
        precision: str = "auto",
        lengths: dict[str, int] | None = None,
        token_budget: int | None = None,
        block: int = 16384,
        num_workers: int = 1,
        attention: str = "auto",
        trust_remote_code: bool = False,
    ) -> None:
        self.precision = precision
        self.lengths = lengths or {}
        self.token_budget = token_budget
        self.block = block
        self.num_workers = num_workers
        self.how = (attention, trust_remote_code)
        self._digests: dict[Path, str] = {}
        self._held: tuple[Path, Any] | None = None

    def digest(self, model: Path) -> str:
        """The digest of a model folder, computed once."""
        if model not in self._digests:
            self._digests[model] = folder_digest(model)
        return self._digests[model]

    def determines(self, model: Path) -> dict[str, Any]:
        """What determines a model's vectors or scores, for a manifest."""
        attention, trust_remote_code = self.how
        remote_code = read_encoding(model)[1].get(FACT)  # unknown in folders of older versions
        return {
            "model": self.digest(model),
            "precision": self.precision,
            "token_budget": self.token_budget,
            "attention": attention,
            "remote_code": trust_remote_code if remote_code is None else remote_code,
            "versions": manifests.versions(),
        }

    def refuse_lengths(self, models: list[str], reranker: str | None, settings: Any) -> None:
        """Compare all lengths with the models' positions, before the first stage takes hours.

        Args:
            models: names of retrievers; those that are no folder are left out.
            settings: of `caravan.retrieval.rerank.Reranking`.

        Raises:
            InputError: a text could be longer than a model has positions for.
        """
        from caravan.models import folder
        from caravan.retrieval.rerank import Reranking

        asked = [(name, self.lengths, "") for name in models]
        if reranker is not None:
            asked.append((reranker, Reranking(**settings).lengths, "rerank."))
        for name, lengths, section in asked:
            if Path(name).is_dir():
                own: Any = read_encoding(Path(name))[0]
                where = section if lengths else "encoding."
                folder.refuse_lengths(Path(name), replace(own, **lengths), where, self.how[1])

    def encoder(self, model: Path) -> Encoder:
        """The folder of a retriever."""
        from caravan.retrieval.inference import Encoder

        if not self._holds(model, Encoder):
            settings = (self.precision, self.lengths, self.token_budget, self.block)
            self._hold(model, Encoder(model, *settings, self.num_workers, *self.how))
        encoder: Encoder = self._held[1]  # type: ignore[index]
        return encoder

    def scorer(self, model: Path, settings: dict[str, Any]) -> Scorer:
        """The folder of a reranker.

        Args:
            settings: of `caravan.retrieval.rerank.Reranking`.
        """
        from caravan.retrieval.rerank import Reranking, Scorer

        chosen = Reranking(**settings)
        if not self._holds(model, Scorer) or self._held[1].settings != chosen:  # type: ignore[index]
            of_machine = (self.precision, self.token_budget, self.num_workers)
            self._hold(model, Scorer(model, chosen, *of_machine, *self.how))
        scorer: Scorer = self._held[1]  # type: ignore[index]
        return scorer

    def _holds(self, model: Path, kind: type) -> bool:
        return self._held is not None and self._held[0] == model and type(self._held[1]) is kind

    def _hold(self, model: Path, opened: Any) -> None:
        self._held = None  # before the next is loaded
        self._held = (model, opened)
