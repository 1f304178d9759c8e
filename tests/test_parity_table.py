"""Every row of the parity table: right beside one process, counted, and kept bit by bit."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import parity_table

pytestmark = [pytest.mark.extra, pytest.mark.timeout(900)]


@pytest.mark.parametrize("row", parity_table.ROWS, ids=lambda row: row.name)
def test_a_row_keeps_what_the_table_promises(row: Any, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch and torchao of each other
        result = parity_table.measure(row, parity_table.TESTED, tmp_path)
    assert [*parity_table.wrong(row, result)] == []
    page = parity_table.document([result], "a command")
    assert page.count(f"| {row.name} | n/a") == 2  # Muon is left to the command
