"""A split to validate on where there is none: a share of the training queries, by their ids."""

from __future__ import annotations

from collections.abc import Collection

import xxhash

from caravan.errors import InputError

TRAIN, DEV = "train", "dev"


def is_held_out(query: str, share: float) -> bool:
    """Whether a training query belongs to the share; the same wherever and whenever it is asked."""
    return xxhash.xxh3_64_intdigest(query.encode("utf-8", "replace")) / 2**64 < share


def check_held_out(
    share: float, splits: Collection[str], train: str = TRAIN, dev: str = DEV
) -> None:
    """Refuse a share that is none, or of a split that is there already.

    Raises:
        InputError: which of them.
    """
    if not 0 <= share < 1:
        raise InputError(f"data.held_out is {share}: it must be 0 or more and below 1")
    if share and (dev in splits or train not in splits):
        raise InputError(
            f"data.held_out makes a split {dev} of {train}, and there are {', '.join(splits)}: set "
            "it to 0"
        )
