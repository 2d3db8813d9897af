"""Which ids were there before, beside a dict that knows."""

from __future__ import annotations

import itertools

import numpy as np

from caravan.data.texts import IdDeduplicator as Seen


def test_repeated_batches_are_recognized_as_by_a_dict() -> None:
    rng = np.random.default_rng(0)
    seen, known = Seen(), dict[str, str]()
    different = 0
    for _ in range(60):
        ids = [f"p{i}" for i in rng.integers(0, 900, int(rng.integers(1, 40)))]
        texts = [f"{name} {rng.integers(0, 20) == 0}" for name in ids]
        new, other = seen.add(ids, texts)
        for name, text, is_new, is_other in zip(ids, texts, new, other, strict=True):
            assert is_new == (name not in known)
            assert is_other == (known.setdefault(name, text) != text)
            different += is_other
    assert different
    sizes = [len(part) for part, _ in seen._levels]
    assert sum(sizes) == len(known)
    assert all(left >= 2 * right for left, right in itertools.pairwise(sizes))
