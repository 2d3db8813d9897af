from __future__ import annotations

from pathlib import Path

import pytest
from tests.refusals import refused

from caravan.report import jobs


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "[" * 100_000, '{"state": 1}', '{"state": "finished"}'),
        '{"state": "finished", "overrides": {"k1": []}, "error": null}',
        '{"state": "failed", "overrides": {}, "error": {"x": 1}}',
    ],
)
def test_a_damaged_record_of_a_job_is_named(text: str, tmp_path: Path) -> None:
    jobs.write(tmp_path, ["bm25.k1=1", "+name='a b'"], jobs.FINISHED)
    overrides = {"bm25.k1": "1", "name": "a b"}
    record = {"overrides": overrides, "state": "finished", "error": None}
    assert jobs.read(tmp_path) == ({tmp_path: record}, [])
    (tmp_path / "job.json").write_text(text)
    with refused("damaged-file", "job.json"):
        jobs.read(tmp_path)
