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

COUNTS = [3, 1]  # ranks with unequal shares of a short last batch
GROUP = 2


def _data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(sum(COUNTS), 5, generator=generator)
    return queries, torch.randn(sum(COUNTS) * GROUP, 5, generator=generator)


def _loss(weight: Tensor, queries: Tensor, passages: Tensor) -> tuple[Tensor, list[int]]:
    counts = parallel.sizes(len(queries), queries.device)
    first = sum(counts[: parallel.rank()])
    gathered = parallel.gather(passages @ weight, [n * GROUP for n in counts])
    targets = (first + torch.arange(len(queries))) * GROUP
    loss = torch.nn.functional.cross_entropy((queries @ weight) @ gathered.T, targets)
    return loss * parallel.weight(counts), counts


def _rank() -> tuple[Tensor | None, Tensor, list[int], Tensor]:
    rank = dist.get_rank()
    queries, passages = _data()
    mine = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    own = slice(mine.start * GROUP, mine.stop * GROUP)
    weight = torch.eye(5, requires_grad=True)
    loss, counts = _loss(weight, queries[mine], passages[own])
    loss.backward()
    rows = parallel.gather(torch.arange(own.start, own.stop), [n * GROUP for n in counts])
    return weight.grad, loss.detach(), counts, rows


def test_ranks_with_unequal_shares_average_to_the_one_process_gradient(two_ranks: TwoRanks) -> None:
    found = two_ranks(_rank)
    weight = torch.eye(5, requires_grad=True)
    loss, counts = _loss(weight, *_data())
    loss.backward()
    assert counts == [4]
    torch.testing.assert_close((found[0][0] + found[1][0]) / 2, weight.grad)
    torch.testing.assert_close((found[0][1] + found[1][1]) / 2, loss.detach())
    for _, _, sizes, rows in found:
        assert sizes == COUNTS
        assert rows.tolist() == list(range(8))


def test_on_one_process_collectives_are_no_ops() -> None:
    rows = torch.randn(3, 2)
    assert parallel.sizes(3, rows.device) == [3]
    assert parallel.gather(rows, [3]) is rows
    assert parallel.weight([3]) == 1
    assert (parallel.world(), parallel.rank()) == (1, 0)


def test_weights_average_to_one_over_all_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = []
    for rank in range(2):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        weights.append(parallel.weight(COUNTS))
    assert weights == [1.5, 0.5]


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
    failed, told = pair.ends[0].recv()
    pair.close()
    assert not failed
    assert "another process of this run has ended" in told
