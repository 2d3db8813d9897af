"""Fusion by hand."""

import numpy as np
from tests.refusals import refused

from caravan.data.runs import Run
from caravan.retrieval.fusion import ReciprocalRank, Weighted


def test_reciprocal_ranks_and_weights_by_hand() -> None:
    queries = np.array([0, 3])
    one = Run.from_topk(queries, np.array([[3.0, 1.0], [2.0, 1.0]]), np.array([[5, 6], [7, 8]]))
    two = Run.from_topk(np.array([0]), np.array([[9.0, 8.0]]), np.array([[6, 9]]))
    fused = ReciprocalRank(k=60)([one, two])
    assert fused.of(0)[0].tolist() == [6, 5, 9]
    np.testing.assert_allclose(fused.of(0)[1], [1 / 62 + 1 / 61, 1 / 61, 1 / 62], rtol=1e-6)
    assert fused.of(3)[0].tolist() == [7, 8]
    weighted = Weighted([0.25, 1.0])([one, two])
    assert dict(zip(*weighted.of(0), strict=True)) == {6: 1.0, 5: 0.25, 9: 0.0}
    plain = Weighted([1.0, 0.5], "none")([one, two])
    assert dict(zip(*plain.of(0), strict=True)) == {5: 3.0, 6: 5.5, 9: 4.0}
    deviations = Weighted(normalise="zscore")([one, two])
    np.testing.assert_allclose(sorted(deviations.of(0)[1]), [0.0, 2.0, 2.0], atol=1e-6)
    with refused("wrong-number-of-weights", "fuse.weights"):
        Weighted([1.0])([one, two])
