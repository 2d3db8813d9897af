"""Audit the hard negatives of a training, and relabel the false ones.

    python -m caravan.negatives audit data=beir data.path=my-data 'sampler.runs=[bm25.trec]' \\
        --teacher runs/reranker/model
    python -m caravan.negatives relabel data=beir data.path=my-data --teacher train.trec \\
        --held-out dev.trec --precision 0.9

Settings (key=value) are those of train.py: data, sampler, seed, run_dir. So the command line of a
training audits its own negatives, with the rules of its sampler. The teacher is a run with scores
of positives and candidates (by default sampler.teacher), or a reranker's model folder.

relabel judges passages that a teacher scores high as relevant. RLHN (arXiv 2505.16967) relabels the
false negatives that a strong judge finds among the hard negatives, which raises nDCG@10 on BEIR.
Here the judge is a run whose scores can be compared across queries, and one threshold.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from omegaconf import DictConfig

from caravan import manifests
from caravan.data.collection import Collection, own_passages
from caravan.data.negatives import Negatives, run_over
from caravan.data.qrels import Qrels
from caravan.data.runs import Run, write_run
from caravan.errors import InputError, OccupiedError, answering
from caravan.files import replacing

LEAST = 20
"""Held-out passages above a threshold; the precision of fewer is mostly chance."""
log = logging.getLogger("caravan")


def main() -> int:
    parser = _parser()
    arguments, settings = parser.parse_known_args()
    if flags := [text for text in settings if text.startswith("-")]:
        parser.error(f"{flags[0]}: unknown option; settings are key=value, as for train.py")
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    return answering(lambda: _run(arguments, settings))


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    program = "python -m caravan.negatives"
    parser = argparse.ArgumentParser(prog=program, description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("audit", help="audit.html, audit.json and tables").add_argument
    add("--teacher", help="a run over the training queries, or a reranker's model folder")
    add("--teacher-margin", type=float, default=0.0, help="as sampler.teacher_margin (0)")
    add("--queries", type=int, default=1000, help="audited, drawn at random (1000); 0: all")
    hide = "hide a positive of each query that has several, to measure how many the audit finds"
    add("--hide", action="store_true", help=hide)
    add("--output", type=Path, help="a folder (run_dir/audit)")
    add = commands.add_parser("relabel", help="new qrels, with a manifest").add_argument
    add("--teacher", help="a run over the training queries")
    held_out = "the teacher's run over data.dev_split, whose judgements choose the threshold"
    add("--held-out", required=True, help=held_out)
    add("--precision", type=_share, default=0.9, help="wanted on the held-out judgements (0.9)")
    add("--output", type=Path, help="a folder (run_dir/relabel)")
    return parser


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError("must be above 0, and at most 1")
    return float(text)


def _run(given: argparse.Namespace, settings: list[str]) -> None:
    from caravan.cli.compose import CONF, compose
    from caravan.cli.schema import build

    cfg = compose(CONF, "train", settings)
    source, sampler = build(cfg, "data"), build(cfg, "sampler")
    if sampler is None:
        raise InputError(
            "no-negatives", "a training without labels has no negatives; choose stage="
        )
    given.teacher = given.teacher or cfg.sampler.get("teacher")
    given.output = given.output or Path(cfg.run_dir, given.command)
    if given.teacher is None:
        raise InputError("no-teacher", "give --teacher: a run, or a reranker's model folder")
    collection = source.collection(Path(cfg.cache_dir))
    if given.command == "audit":
        _audit(given, cfg, collection, source.train_split, sampler)
    else:
        _relabel(given, collection, source.train_split, source.dev_split)


def _audit(
    given: argparse.Namespace, cfg: DictConfig, collection: Collection, split: str, sampler: Any
) -> None:
    from caravan.report.audit import PAIR, audit, candidates, page
    from caravan.report.page import save
    from caravan.report.records import distinct, path_names

    if not isinstance(sampler, Negatives) or not sampler.paths:
        raise InputError("no-runs", "there is no run to audit; give those of the training as"
                         " sampler.runs=[...]")  # fmt: skip
    qrels, rng = collection.qrels(split), np.random.default_rng(cfg.seed)
    queries = qrels.relevant.queries
    if 0 < given.queries < len(queries):
        queries = np.sort(rng.choice(queries, given.queries, replace=False))
    qrels, hidden = qrels.only(queries), None
    if given.hide:
        qrels, hidden = _without_one(qrels, rng)
    of_rule = None
    if sampler.rules.teacher_margin is not None and sampler.teacher_path:
        of_rule = run_over(collection, sampler.teacher_path, qrels)
    names = distinct([path_names(path) for path in sampler.paths])
    runs = {
        name: run_over(collection, path, qrels, sampler.depth).only(queries)
        for name, path in zip(names, sampler.paths, strict=True)
    }
    own = own_passages(collection, qrels.queries)
    found = candidates(runs, qrels, own, sampler.rules, of_rule)
    if Path(given.teacher).is_dir():
        judged = np.stack((qrels.relevant.query_rows, qrels.relevant.passage_rows), axis=1)
        pairs = np.unique(np.concatenate((found[0][PAIR].to_numpy(), judged)), axis=0)
        teacher = _scored(Path(given.teacher), pairs, cfg, collection, given.output)
    else:
        teacher = run_over(collection, given.teacher, qrels)
    seen = audit(found, collection, qrels, teacher, given.teacher_margin, hidden)
    command = shlex.join(["python", "-m", "caravan.negatives", *sys.argv[1:]])
    html = given.output / "audit.html"
    save(page(seen, collection, qrels, given.teacher, command), html)
    made_from = {"collection": collection.digest, "split": split, "runs": list(cfg.sampler.runs)}
    made_from |= {"teacher": given.teacher, "teacher_margin": given.teacher_margin}
    numbers = html.with_suffix(".json")
    manifests.write_json(numbers, {**made_from, **seen.as_json()})
    log.info(seen.verdict())
    log.info("page %s, numbers %s, tables %s", html, numbers, html.with_suffix(""))


def _without_one(qrels: Qrels, rng: np.random.Generator) -> tuple[Qrels, Qrels]:
    """The judgements without a random positive of each query that has several, and these."""
    order = rng.permutation(np.flatnonzero(qrels.grades >= 1))
    _, first, counts = np.unique(qrels.query_rows[order], return_index=True, return_counts=True)
    at = order[first[counts > 1]]
    queries, passages, grades = qrels.query_rows, qrels.passage_rows, qrels.grades
    rest = np.delete(np.arange(len(qrels)), at)
    kept = Qrels(queries[rest], passages[rest], grades[rest], qrels.unknown)
    return kept, Qrels(queries[at], passages[at], grades[at])


def _scored(
    folder: Path, pairs: np.ndarray, cfg: DictConfig, collection: Collection, output: Path
) -> Run:
    """Score pairs of a query and a passage, rows [N, 2]; the scores are also written as a run."""
    from caravan.retrieval.inference import Models
    from caravan.retrieval.rerank import Reranker, Reranking

    models = Models(cfg.precision, cfg.batching.token_budget, cfg.batching.num_workers)
    reranker = Reranker(models.open(folder, "reranker", {}), Reranking())
    texts = collection.queries, collection.corpus
    queries, passages = pairs.T
    scores = reranker.scores(queries, passages, *texts)
    run = Run.from_flat(queries, passages, scores)
    write_run(output / "teacher.trec", run, *texts)
    log.info("the teacher's scores are also a run: %s", output / "teacher.trec")
    return run


def _relabel(given: argparse.Namespace, collection: Collection, split: str, dev: str) -> None:
    inputs: dict[str, Any] = {"collection": collection.digest, "precision": given.precision}
    runs = []
    for name, path, of in (("teacher", given.teacher, split), ("held_out", given.held_out, dev)):
        file = collection.run_path(path)
        runs.append(run_over(collection, path, collection.qrels(of)))
        inputs[name] = {"run": path, "xxh3": manifests.content_digest(file), "split": of}
    qrels, path = collection.qrels(split), given.output / f"{split}.tsv"
    if path.exists() and not manifests.matches(path, inputs):
        raise OccupiedError("output-occupied", f"{path} was made from other inputs, or elsewhere;"
                            " choose another --output, or delete it")  # fmt: skip
    relevant_from = collection.relevant_from.get(dev, 1)
    threshold = choose_threshold(runs[1], collection.qrels(dev), given.precision, relevant_from)
    own = own_passages(collection, qrels.queries)
    new, against = relabel(runs[0], qrels, own, threshold.score)
    write_qrels(path, [qrels, new], collection)
    facts = {"threshold": threshold._asdict(), "original": len(qrels), "relabelled": len(new)}
    facts |= {"queries_with_new": len(new.queries), "judged_not_relevant_but_above": against}
    facts["unknown_left_out"] = len(qrels.unknown.query_rows) + len(qrels.unknown.queries)
    manifests.write(path, inputs, facts)
    log.info("threshold %.4f: precision %.3f, recall %.3f on held-out judgements", *threshold[:3])
    log.info("%s: %d judgements, then %d new ones", path, len(qrels), len(new))
    log.info("to train with them, copy it to the qrels of data=beir as a new data.train_split")


class Threshold(NamedTuple):
    """The lowest teacher score that is relevant, and what it selects of the held-out passages."""

    score: float
    precision: float
    recall: float  # of all relevant passages, retrieved or not
    selected: int


def choose_threshold(run: Run, qrels: Qrels, precision: float, relevant_from: int = 1) -> Threshold:
    """The lowest score from which on the share of relevant passages is at least `precision`.

    A passage without a judgement counts as not relevant, so the share is a lower bound.

    Args:
        run: the teacher's, over held-out queries.
        qrels: the held-out judgements.
        relevant_from: the lowest relevant grade.

    Raises:
        InputError: "no-threshold", there is none.
    """
    run = run.only(qrels.queries)
    keys, relevant = _keys(run), qrels.grades >= relevant_from
    known = qrels.query_rows[relevant] << 32 | qrels.passage_rows[relevant]
    order = np.argsort(-run.scores, kind="stable")
    scores, hits = run.scores[order], np.cumsum(np.isin(keys, known)[order])
    selected = np.arange(1, len(scores) + 1)
    shares = hits / selected
    possible = np.append(scores[1:] < scores[:-1], True) & (selected >= LEAST)  # ties stay together
    chosen = np.flatnonzero(possible & (shares >= precision))
    if not len(chosen):
        best = shares[possible].max(initial=0.0)
        raise InputError(
            "no-threshold",
            f"no threshold reaches a precision of {precision:g} on {LEAST} held-out passages or"
            f" more (the best is {best:.3f}); lower --precision, or use a better teacher",
        )
    at = int(chosen[-1])
    recall = float(hits[at] / max(relevant.sum(), 1))
    return Threshold(float(scores[at]), float(shares[at]), recall, int(selected[at]))


def relabel(run: Run, qrels: Qrels, own: np.ndarray, threshold: float) -> tuple[Qrels, int]:
    """The passages from the threshold on that have no judgement, as judgements of grade 1.

    Only queries with a judgement get more. Every judgement stays, also one of a passage that is
    not relevant.

    Args:
        run: the teacher's, over the queries of `qrels`.
        own: the passage with the id of each judged query, [Q], -1 for none; it is left out.

    Returns:
        The new judgements, and how many passages from the threshold on are judged not relevant.
    """
    run = run.only(qrels.queries)
    run = run.where(run.scores >= np.float32(threshold)).without(qrels.queries, own)
    keys, judged = _keys(run), qrels.query_rows << 32 | qrels.passage_rows
    new = keys[~np.isin(keys, judged)]
    against = int(np.isin(keys, judged[qrels.grades < 1]).sum())
    return Qrels(new >> 32, new & 0xFFFFFFFF, np.ones(len(new), dtype=np.int32)), against


def write_qrels(path: Path, parts: list[Qrels], collection: Collection) -> None:
    """Write judgements in BEIR's form, a part after the other; unknown ids are left out."""
    lines = ["query-id\tcorpus-id\tscore\n"]
    for part in parts:
        queries = collection.queries.ids(part.query_rows)
        passages = collection.corpus.ids(part.passage_rows)
        fields = zip(queries, passages, part.grades.tolist(), strict=True)
        lines += [f"{query}\t{passage}\t{grade}\n" for query, passage, grade in fields]
    with replacing(path) as scratch:
        scratch.write_text("".join(lines), "utf-8")


def _keys(run: Run) -> np.ndarray:
    """A pair of query and passage as one integer, [N] int64."""
    return np.repeat(run.query_rows, run.counts) << 32 | run.passage_rows


if __name__ == "__main__":
    sys.exit(main())
