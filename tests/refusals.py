"""Asserts that an input is refused, by the code of the error and the place in its message."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from caravan.errors import InputError


@contextmanager
def refused(code: str, *places: str) -> Iterator[pytest.ExceptionInfo[InputError]]:
    """Expect an InputError with this code, whose message names each of the places.

    Args:
        places: what the message must contain for the user to find the mistake: a config key, a
            file and line, an offending value.
    """
    with pytest.raises(InputError) as caught:
        yield caught
    assert caught.value.code == code, f"{caught.value.code}: {caught.value}"
    for place in places:
        assert place in str(caught.value)


def uninstall(monkeypatch: pytest.MonkeyPatch, package: str, module: str) -> None:
    """Make imports of `package` fail, and `module`, which needs it, import again."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, module, raising=False)
