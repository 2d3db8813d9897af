"""Collectives with gradient: two ranks with unequal shares give what one process gives."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist
from tests.two_ranks import TwoRanks
from torch import Tensor

from caravan.errors import sentence
from caravan.training import parallel

COUNTS = [3, 1]  # a short last batch
GROUP = 2


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(sum(COUNTS), 5, generator=generator)
    return queries, torch.randn(sum(COUNTS) * GROUP, 5, generator=generator)


def _gradient(queries: Tensor, passages: Tensor) -> tuple[Tensor, Tensor, list[int], float]:
    weight = torch.eye(5, requires_grad=True)
    counts = parallel.sizes(len(queries), queries.device)
    first = sum(counts[: parallel.rank()])
    gathered = parallel.gather(passages @ weight, [n * GROUP for n in counts])
    targets = (first + torch.arange(len(queries))) * GROUP
    share = parallel.weight(counts)
    loss = torch.nn.functional.cross_entropy((queries @ weight) @ gathered.T, targets) * share
    loss.backward()
    assert weight.grad is not None
    return weight.grad, loss.detach(), counts, share


def _on_rank() -> tuple[Tensor, Tensor, list[int], float, list[int]]:
    rank = dist.get_rank()
    queries, passages = _data()
    mine = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    own = slice(mine.start * GROUP, mine.stop * GROUP)
    rows = parallel.gather(torch.arange(own.start, own.stop), [n * GROUP for n in COUNTS])
    return *_gradient(queries[mine], passages[own]), rows.tolist()


def test_ranks_with_unequal_shares_average_to_the_gradient_of_one_process(
    two_ranks: TwoRanks,
) -> None:
    one, other = two_ranks(_on_rank)
    gradient, loss, counts, share = _gradient(*_data())
    assert (counts, share) == ([4], 1)
    torch.testing.assert_close((one[0] + other[0]) / 2, gradient)
    torch.testing.assert_close((one[1] + other[1]) / 2, loss)
    assert (one[3], other[3]) == (1.5, 0.5)
    for found in (one, other):
        assert found[2] == COUNTS
        assert found[4] == list(range(8))


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
