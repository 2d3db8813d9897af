"""Lost peers, and how often ranks reduce; for collectives with gradient see test_fsdp."""

from __future__ import annotations

import os
import signal
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tests.fitting import Fit, on_ranks
from tests.two_ranks import TwoRanks

from caravan.errors import sentence
from caravan.training import parallel


def _of_a_lost_peer() -> str | None:
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        while True:
            parallel.sizes(1, torch.device("cpu"))
    except RuntimeError as error:
        return sentence(error)


@pytest.mark.slow
def test_a_rank_whose_peer_is_killed_reports_it_in_a_sentence() -> None:
    pair = TwoRanks()
    for end in pair.ends:
        end.send((_of_a_lost_peer, (), {}))
    failed, message = pair.ends[0].recv()
    pair.close()
    assert not failed
    assert "another process of this run has ended" in message


def _in_pieces() -> list[np.ndarray]:
    counts = [(5, 2), (0, 3), (4, 4), (0, 0)]
    rank = dist.get_rank()
    parts = [torch.arange(pair[rank])[:, None] + 10.0 * rank for pair in counts]
    return [parallel.gather_to_host(part, torch.device("cpu"), at_once=2) for part in parts]


def test_rows_gathered_in_pieces_are_in_the_order_of_the_ranks(two_ranks: TwoRanks) -> None:
    one, other = two_ranks(_in_pieces)
    expected = [[0, 1, 2, 3, 4, 10, 11], [10, 11, 12], [0, 1, 2, 3, 10, 11, 12, 13], []]
    assert [rows[:, 0].tolist() for rows in one] == expected
    assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def _reductions(fit: Fit, steps: int) -> int:
    with mock.patch.object(parallel, "mean", wraps=parallel.mean) as mean:
        on_ranks(fit, "ddp", steps=steps, queries_per_batch=8)
    return mean.call_count


def test_ranks_reduce_what_is_logged_on_log_steps_alone(fit: Fit, two_ranks: TwoRanks) -> None:
    assert two_ranks(_reductions, fit, 7) == [3, 3]
