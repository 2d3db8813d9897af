"""Records of a sweep's jobs."""

from __future__ import annotations

from pathlib import Path

import pytest

from caravan.errors import InputError
from caravan.report import jobs


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "[" * 100_000, '{"state": 1}', '{"state": "finished"}'),
        '{"state": "finished", "overrides": {"k1": []}, "error": null}',
        '{"state": "failed", "overrides": {}, "error": {}}',
    ],
)
def test_a_damaged_record_of_a_job_is_named(text: str, tmp_path: Path) -> None:
    jobs.write(tmp_path, ["bm25.k1=1"], jobs.FINISHED)
    ((_, record),) = jobs.read(tmp_path)
    assert record == {"overrides": {"bm25.k1": "1"}, "state": "finished", "error": None}
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(InputError, match=r"job\.json .*delete it"):
        list(jobs.read(tmp_path))
