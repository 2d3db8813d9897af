"""The cache: collections, tokenizers and digests of files, shared by runs.

Whatever lies in the cache is used by its name, so whoever can write there decides what is searched
and trained on. A folder of another user, or one that everybody may write to, is refused; the
system's own (owned by root) are trusted. CARAVAN_TRUST_CACHE=1 trusts any.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from caravan.errors import InputError

TRUST = "CARAVAN_TRUST_CACHE"


def cache_folder(cache_dir: str | Path, part: str) -> Path:
    """`cache_dir/part`, made if need be.

    Raises:
        InputError: it, or `cache_dir`, belongs to another user or is writable by everybody.
    """
    folder = Path(cache_dir) / part
    for path in (Path(cache_dir), folder):
        path.mkdir(mode=0o775, parents=True, exist_ok=True)  # even if the umask is 0
        refuse_foreign(path)
    return folder


def refuse_foreign(folder: Path) -> None:
    """Refuse a folder of the cache that somebody else may have filled.

    Raises:
        InputError: it belongs to another user, or is writable by everybody.
    """
    if os.environ.get(TRUST) == "1":
        return
    found = folder.stat()
    remedy = (
        "choose another cache_dir= (or CARAVAN_CACHE), or set"
        f" {TRUST}=1 if you trust all who can write there"
    )
    if found.st_uid not in (0, os.geteuid()):
        raise InputError(
            f"{folder} belongs to another user (uid {found.st_uid}), who decides what is in there;"
            f" {remedy}"
        )
    if found.st_mode & stat.S_IWOTH:
        raise InputError(
            f"{folder} is writable by every user of this machine; run chmod o-w {folder}, {remedy}"
        )
