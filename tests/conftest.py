"""What every test has of its own, not the user's: a cache of traces, and memory for states."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator

import pytest

# Else every program that a test starts compiles all of mics anew, and so does every one of its
# ranks that is not forked.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICS_CACHE", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_memory() -> Iterator[None]:
    """Runs that end in an error leave their state for the next start, which never comes here."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MICS_MEMORY", folder)
        yield
