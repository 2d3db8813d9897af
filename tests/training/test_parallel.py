"""A rank that loses its peer reports it; for collectives with gradient see test_fsdp."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
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
