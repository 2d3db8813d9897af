"""The audit of hard negatives: suspected false negatives, copies, queries without a usable one.

A candidate is suspected to be relevant if a teacher scores it above the positives of its query, by
the rule of `sampler.teacher_margin` (`caravan.data.mining.Rules`). A copy has the words of a
positive, a near-copy shares most of its word shingles (`caravan.data.texts`). A usable negative
is none of these. Positives that were hidden before the audit measure it: they are planted false
negatives.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd

from caravan.data.collection import Collection
from caravan.data.mining import Rules, mine
from caravan.data.qrels import Qrels
from caravan.data.runs import Run
from caravan.data.texts import NEAR_COPY, resemblance, shingles
from caravan.errors import InputError
from caravan.report.compare import Examples, Passage, Query, paired_tests, shortened
from caravan.report.page import Page
from caravan.report.tables import Section, Table, slug
from caravan.report.verdict import findings

BANDS = (5, 10, 20, 50, 100, 200, 500, 1000)  # the last ranks of the bands of ranks
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RECALLS = (0.25, 0.5, 0.75, 0.9)
"""Shares of the hidden positives that the margins of a table find."""
EXAMPLES = 20
PAIR = ["query", "passage"]
ALL = "all runs"
Candidates = tuple[pd.DataFrame, dict[str, dict[str, Any]]]
"""The candidates of all runs, and the counts of `caravan.data.mining.mine` by run."""


def candidates(
    runs: Mapping[str, Run],
    qrels: Qrels,
    own: np.ndarray,
    rules: Rules,
    rules_teacher: Run | None = None,
) -> Candidates:
    """The passages that the sampler's rules leave of each run (`caravan.data.mining.mine`).

    Returns:
        A table with `source`, `query` and `passage` (rows), `rank` in the run, `score`, and
        `relative`: the gap of the positives' lowest score to the score, as a share of the former.
    """
    found, facts = [], {}
    judged = _pairs(qrels.relevant.query_rows, qrels.relevant.passage_rows)
    for name, run in runs.items():
        kept, facts[name] = mine(run, qrels, own, rules, name, rules_teacher)
        every = _lines(run)
        of = _lines(kept)[PAIR].merge(every, on=PAIR)
        lowest = of["query"].map(_lowest(judged, every))
        found.append(of.assign(source=name, relative=(lowest - of["score"]) / lowest.abs()))
    return pd.concat(found, ignore_index=True), facts


@dataclass(frozen=True)
class Audit:
    """What was found out about candidates.

    Attributes:
        lines: those of `candidates`, with `teacher` (its score, NaN without one), `gap` (of the
            positives' lowest teacher score to it), `suspected`, `copy`, `near_copy`, `hidden`.
        queries: audited.
        teacher_margin: as for `audit`.
        rules: of each run, how many passages the sampler's rules removed.
    """

    lines: pd.DataFrame
    queries: int
    teacher_margin: float
    rules: dict[str, dict[str, Any]]

    @property
    def pairs(self) -> pd.DataFrame:
        """The candidates of all runs, each once."""
        return self.lines.drop_duplicates(PAIR)

    @property
    def sources(self) -> dict[str, pd.DataFrame]:
        return {str(name): of for name, of in self.lines.groupby("source", sort=False)}

    def by_rank(self) -> pd.DataFrame:
        """Counts of each run and band of ranks, and shares of suspects of what has scores."""
        bands = [f"{a + 1}-{b}" for a, b in pairwise((0, *BANDS))] + [f"{BANDS[-1] + 1}-"]
        columns = ["candidates", "scored", "suspected", "copy", "near_copy"]
        found = []
        for source, part in self.sources.items():
            part = part.assign(candidates=1, scored=part["gap"].notna())
            of = part.groupby(np.searchsorted(BANDS, part["rank"]))[columns].sum()
            of["share"] = of["suspected"] / of["scored"]
            of["share_to_here"] = of["suspected"].cumsum() / of["scored"].cumsum()
            of.insert(0, "run", source)
            of.insert(1, "ranks", [bands[band] for band in of.index])
            found.append(of)
        return pd.concat(found, ignore_index=True)

    def gaps(self) -> pd.DataFrame:
        """Quantiles of the score gaps of each run."""
        rows = [
            [source, name, *part[column].quantile(QUANTILES)]
            for source, part in self.sources.items()
            for name, column in (("teacher", "gap"), ("run, relative", "relative"))
        ]
        return pd.DataFrame(rows, columns=["run", "gap", *(f"{q:.0%}" for q in QUANTILES)])

    def usable(self) -> pd.DataFrame:
        """Queries without a candidate and without a usable one, by run and of all together."""
        rows = []
        for source, part in {**self.sources, ALL: self.pairs}.items():
            usable = part[~(part["suspected"] | part["copy"] | part["near_copy"])]
            lacking = [self.queries - of["query"].nunique() for of in (part, usable)]
            rows.append([source, self.queries, *lacking, len(usable) / self.queries])
        names = ["run", "queries", "without_candidates", "without_usable", "usable_per_query"]
        return pd.DataFrame(rows, columns=names)

    def planted(self) -> pd.DataFrame:
        """Precision and recall on hidden positives, at the margin and at those of `RECALLS`.

        Only queries with a hidden candidate count. A suspect that is relevant and was never judged
        counts as wrong, so the precision is a lower bound. Without a row if none is a candidate.
        """
        pairs = self.pairs
        of = pairs[pairs["query"].isin(pairs.loc[pairs["hidden"], "query"])]
        gaps = np.sort(of.loc[of["hidden"], "gap"].fillna(np.inf))
        margins = [float(gaps[int(recall * len(gaps))]) for recall in RECALLS if len(gaps)]
        # Three digits, as the page shows them, are what can be typed.
        margins = [np.ceil(margin * 1000 + 1e-3) / 1000 for margin in margins if margin < np.inf]
        rows = []
        for margin in [self.teacher_margin, *margins] if len(gaps) else []:
            suspected = of["gap"] < margin
            found, count = int((suspected & of["hidden"]).sum()), int(suspected.sum())
            rows.append([margin, len(gaps), count, found, found / max(count, 1), found / len(gaps)])
        names = ["margin", "hidden", "suspected", "found", "precision", "recall"]
        return pd.DataFrame(rows, columns=names)

    def verdict(self) -> str:
        """How many candidates are suspected, and whether the runs differ in their share."""
        scored = self.pairs["gap"].notna().sum()
        suspected = self.pairs["suspected"].sum()
        unusable = self.usable()["without_usable"].iloc[-1]
        text = (
            f"The teacher suspects {suspected:,} of {scored:,} hard negatives"
            f" ({suspected / scored:.1%}) to be relevant, and {unusable:,} of {self.queries:,}"
            " queries have no usable negative."
        )
        known = self.lines[self.lines["gap"].notna()]
        shares = known.pivot_table("suspected", "source", "query", sort=False).dropna(axis=1)
        if len(shares) < 2 or shares.shape[1] < 2:
            return f"{text} No test: no two runs have scored candidates of the same queries."
        couples = list(combinations(range(len(shares)), 2))
        tests = paired_tests(shares.to_numpy(dtype=float), couples)
        return f"{text} Share of suspects: {findings(list(shares.index), tests, 'exceeds')}"

    def as_json(self) -> dict[str, Any]:
        """The numbers of the page as plain data; a missing one is null."""
        tables = {"ranks": self.by_rank(), "gaps": self.gaps(), "queries": self.usable()}
        tables["hidden_positives"] = self.planted()
        rows = {name: json.loads(of.to_json(orient="records")) for name, of in tables.items()}
        return {"verdict": self.verdict(), "rules": self.rules, **rows}


def audit(
    found: Candidates,
    collection: Collection,
    qrels: Qrels,
    teacher: Run,
    teacher_margin: float = 0.0,
    hidden: Qrels | None = None,
) -> Audit:
    """Examine candidates.

    Args:
        found: of `candidates`.
        qrels: the judgements, without the hidden ones.
        teacher: scores of candidates and positives.
        teacher_margin: a candidate is suspected if its teacher score is above the lowest of the
            query's positives minus this.

    Raises:
        InputError: "no-teacher-scores", no candidate has a score together with a positive;
            "invalid-setting", the margin is not finite.
    """
    Rules(teacher_margin=teacher_margin)  # raises for NaN, by which nothing would be suspected
    of_lines, rules = found
    judged = _pairs(qrels.relevant.query_rows, qrels.relevant.passage_rows)
    scored = _lines(teacher)
    taught = scored[[*PAIR, "score"]].rename(columns={"score": "teacher"})
    of_lines = of_lines.merge(taught, on=PAIR, how="left")
    lowest = of_lines["query"].map(_lowest(judged, scored))
    of_lines["gap"] = lowest - of_lines["teacher"]
    if of_lines["gap"].isna().all():
        raise InputError(
            "no-teacher-scores",
            "the teacher scores no candidate together with a positive of its query; write its run"
            " over the training queries with evaluate.py, with rerank.judged=true",
        )
    of_lines["suspected"] = of_lines["gap"] < teacher_margin
    of_lines = of_lines.merge(_copies(collection, judged, of_lines), on=PAIR)
    planted = _pairs(hidden.query_rows, hidden.passage_rows) if hidden else judged[:0]
    marked = of_lines.merge(planted, on=PAIR, how="left", indicator="hidden")["hidden"]
    queries = judged["query"].nunique()
    return Audit(of_lines.assign(hidden=marked == "both"), queries, teacher_margin, rules)


def _pairs(query_rows: Any, passage_rows: Any) -> pd.DataFrame:
    return pd.DataFrame(dict(zip(PAIR, (query_rows, passage_rows), strict=True)))


def _lines(run: Run) -> pd.DataFrame:
    at = np.repeat(np.arange(len(run)), run.counts)
    rank = np.arange(len(at)) - run.offsets[at] + 1
    return _pairs(run.query_rows[at], run.passage_rows).assign(score=run.scores, rank=rank)


def _lowest(judged: pd.DataFrame, scored: pd.DataFrame) -> pd.Series:
    """The lowest score of each query's positives, among those with a score."""
    return judged.merge(scored, on=PAIR).groupby("query")["score"].min()


def _words(text: tuple[str, str]) -> list[str]:
    return re.findall(r"\w+", " ".join(text).lower())


def _copies(collection: Collection, judged: pd.DataFrame, found: pd.DataFrame) -> pd.DataFrame:
    """Which candidates are copies or near-copies of a positive of their query."""
    positives = dict(list(judged.groupby("query")["passage"]))
    parts = []
    for query, part in found[PAIR].drop_duplicates().groupby("query"):
        numbers: dict[str, int] = {}
        own, others = (
            [_words(text) for text in collection.corpus.get(rows.to_numpy())]
            for rows in (positives[query], part["passage"])
        )
        sketches = [shingles(words, numbers) for words in own]
        likeness = [
            max(resemblance(shingles(words, numbers), sketch) for sketch in sketches)
            for words in others
        ]
        copy = np.array([words in own for words in others])
        near = ~copy & (np.array(likeness) >= NEAR_COPY)
        parts.append(part.assign(copy=copy, near_copy=near))
    return pd.concat(parts)


def page(found: Audit, collection: Collection, qrels: Qrels, teacher: str, command: str) -> Page:
    """The page of an audit; `command` makes it again."""
    suspects = (
        "Candidates by rank in their run. Suspected: the teacher scores them above the lowest"
        f" positive of the query minus the margin ({found.teacher_margin:g}); share: of the"
        " candidates that it scores, in a row and down to it. Near-copies share"
        f" {NEAR_COPY:.0%} of the word shingles of a positive."
    )
    gaps = (
        "Quantiles of the gap of the lowest positive to the candidates; below 0 the candidate"
        " scores higher. Teacher: in its scores. Run, relative: in the run's scores, as a share of"
        " the positive's; sampler.relative_margin removes what is below it."
    )
    usable = "Usable: neither suspected, nor a copy or near-copy of a positive."
    hidden = (
        "Hidden positives among the candidates, suspects of their queries, and suspects that are"
        " hidden positives; at the margin of the audit, then at others. Precision is a lower bound:"
        " a suspect may be relevant and unjudged."
    )
    blocks: dict[str, Table | Examples] = {
        "Suspected false negatives": _table("suspects", suspects, found.by_rank(), 2),
        "Score gaps": _table("gaps", gaps, found.gaps(), 2),
        "Usable negatives": _table("usable", usable, found.usable()),
    }
    if len(planted := found.planted()):
        blocks["Hidden positives"] = _table("hidden", hidden, planted, 0)
    if (shown := examples(found, collection, qrels)).queries:
        blocks["Examples"] = shown
    sections = [Section(title, slug(title), [block]) for title, block in blocks.items()]
    line = f"{collection.name}, {found.queries:,} training queries; teacher: {teacher}"
    note = "A suspicion is the teacher's guess: read the examples before you act on it."
    return Page("Audit of hard negatives", line, sections, command, found.verdict(), note)


def _table(name: str, caption: str, frame: pd.DataFrame, labels: int = 1) -> Table:
    frame = frame.rename(columns=lambda column: column.replace("_", " "))
    formats = {column: "{:.3f}" if frame[column].dtype.kind == "f" else "{:,}" for column in frame}
    return Table.of(name, caption, frame, formats, labels)


def examples(found: Audit, collection: Collection, qrels: Qrels) -> Examples:
    """Suspects drawn at random, so that the share that is relevant estimates the precision."""
    every = found.pairs[found.pairs["suspected"]]
    queries = []
    for row in every.sample(min(EXAMPLES, len(every)), random_state=0).to_dict("records"):
        same = found.lines[(found.lines[PAIR] == [row["query"], row["passage"]]).all(axis=1)]
        ranks = zip(same["rank"], same["source"], strict=True)
        rows = np.array([row["passage"], qrels.positives(row["query"])[0]])
        place = ", ".join(f"rank {n} in {run}" for n, run in ranks)
        names, texts = collection.corpus.ids(rows), collection.corpus.get(rows)
        (name,) = collection.queries.ids([row["query"]])
        ((_, text),) = collection.queries.get([row["query"]])
        of_positive = row["teacher"] + row["gap"]
        line = f"teacher: {row['teacher']:.3f}, lowest of the positives {of_positive:.3f}"
        passages = [
            Passage(names[0], *shortened(*texts[0]), False, "Suspected", place),
            Passage(names[1], *shortened(*texts[1]), True, "Judged relevant", ""),
        ]
        queries.append(Query(name, shortened("", text)[1], line, passages))
    return Examples(f"{len(queries)} of {len(every):,} suspects, drawn at random", queries)
