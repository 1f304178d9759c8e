"""What every test has of its own, not the user's: a cache of traces, and memory for states.

``--minutes N`` begins no other test after so long, for a machine that has no more time. The order
of files is drawn anew every day, so that each has its turn, and the summary says how many had none.
"""

from __future__ import annotations

import datetime
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mics.recovery import job as jobs

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


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The memory of nodes in a test of its own, whose job is found by its name."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setenv("MICS_MEMORY", str(folder))
    monkeypatch.setenv("MICS_JOB", "test")
    monkeypatch.setattr(jobs, "_SECONDS", 1.0)
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="begin no other test after so long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--minutes") is not None:
        files = sorted({item.path for item in items})  # whose fixtures are made once
        random.Random(datetime.datetime.now(datetime.UTC).toordinal()).shuffle(files)
        items.sort(key=lambda item: files.index(item.path))


def pytest_runtestloop(session: pytest.Session) -> None:
    minutes = session.config.getoption("--minutes")
    if minutes is not None:
        session.config.stash[END] = time.monotonic() + 60 * minutes


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.monotonic() > item.config.stash.get(END, float("inf")):
        pytest.skip("no time was left to begin it")


END = pytest.StashKey[float]()
