"""The finished runs below folders, and their tables.

    python -m caravan.report table runs/quickstart

A folder may be that of a sweep, and have evaluations of one collection, suites (evaluations of
several collections) and training runs below it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from caravan.errors import InputError
from caravan.report import sweep
from caravan.report.evaluations import by_collection, step_tests
from caravan.report.records import (
    Evaluation,
    Suite,
    Training,
    read_metrics,
    refuse_repeated,
)
from caravan.report.summary import results_table, suites_section, systems_of
from caravan.report.sweep import Sweep
from caravan.report.tables import show


@dataclass(frozen=True)
class Contents:
    """The finished runs below folders, by run directory.

    Attributes:
        folders: the folders; absolute if there are several.
        folder: the only one, or the one that holds all of them.
        sweep: None if the folder is not a sweep's; its jobs are also in the fields below.
        evaluations: also those of each collection of a suite.
        names: for jobs of the sweep and evaluations of suites; others are named by path.
    """

    folders: Sequence[Path]
    folder: Path
    sweep: Sweep | None
    suites: dict[Path, Suite]
    evaluations: dict[Path, Evaluation]
    trainings: dict[Path, Training]
    names: dict[Path, str]


def read(folders: Sequence[Path]) -> Contents:
    """Read all runs below folders. A sweep is recognized only in a single folder.

    Raises:
        InputError: If a folder does not exist or is given twice, a file is damaged, or there is no
            run.
    """
    for folder in folders:
        if not folder.is_dir():
            message = f"there is no folder {folder}; name a run directory, or a folder of several"
            raise InputError("folder-not-found", message)
    refuse_repeated(folders)
    folder, of_sweep = folders[0], None
    if len(folders) > 1:
        folders = [Path(os.path.abspath(one)) for one in folders]
        folder = Path(os.path.commonpath(folders))
    else:
        of_sweep = sweep.collect(folder)
    homes = sorted({path.parent for one in folders for path in one.rglob("metrics.json")})
    records = {home: read_metrics(home) for home in homes}
    names: dict[Path, str] = {}
    if of_sweep is not None:
        names |= of_sweep.labels
        for home, record in of_sweep.records.items():
            if isinstance(record, Evaluation):  # each job is one system: its last stage
                records[home] = record.model_copy(update={"stages": record.stages[-1:]})
    suites = {home: record for home, record in records.items() if isinstance(record, Suite)}
    for home, suite in suites.items():  # the evaluation of a collection is named after its suite
        name = suite.system if home == folder else str(home.relative_to(folder))
        names |= {home / member: name for member in suite.collections}
    evaluations = {
        home: record
        for home, record in records.items()
        if isinstance(record, Evaluation) and home not in suites
    }
    trainings = {home: record for home, record in records.items() if isinstance(record, Training)}
    if not records and of_sweep is None:
        places = ", ".join(map(str, folders))
        message = f"no run with metrics (metrics.json) below {places}; make one with train.py or"
        raise InputError("no-runs", f"{message} evaluate.py")
    return Contents(folders, folder, of_sweep, suites, evaluations, trainings, names)


def show_table(contents: Contents) -> None:
    """Print the jobs of the sweep, the table of all suites, and a table for each collection.

    Raises:
        InputError: If there are only trainings, or suites without a common table.
    """
    others = {home: one for home, one in contents.evaluations.items() if home not in contents.names}
    if not (contents.sweep or contents.suites or others):
        message = f"{contents.folder} holds no evaluation and no sweep; for training runs, use"
        raise InputError("no-evaluation", f"{message} `page`")
    if contents.sweep is not None:
        show(sweep.section(contents.sweep))
    if contents.suites:
        section, _ = suites_section(contents.suites)
        show(section)
    for group in by_collection(others):
        systems = systems_of(group, contents.folder)
        p_values, sentence = step_tests(systems)
        show(results_table(systems, p_values))
        if sentence:
            show(f"{sentence}\n")
