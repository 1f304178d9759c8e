"""What fits a terminal: lines that break between words, tables that leave columns out."""

from __future__ import annotations

import pytest

from mics.ranks.columns import Column, as_table, fitted, width

COLUMNS = (Column("p"), Column("between nodes", 2), Column("engine", left=True), Column("MFU", 1))
ROWS = [("8", "12.5 GB", "mics", "41.5%"), ("16", "9.0 GB", "fsdp2", "39.0%")]


@pytest.fixture
def columns(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(request.param))


@pytest.mark.parametrize(
    ("columns", "wide"), [("60", 60), ("3", 20), ("", 80)], indirect=["columns"]
)
def test_the_width_is_the_terminals_or_80(columns: None, wide: int) -> None:
    assert width() == wide


@pytest.mark.parametrize("columns", [40], indirect=True)
def test_a_table_with_room_has_all_columns(columns: None) -> None:
    assert as_table(COLUMNS, ROWS) == [
        "    between",
        " p    nodes  engine    MFU",
        " 8  12.5 GB  mics    41.5%",
        "16   9.0 GB  fsdp2   39.0%",
    ]


@pytest.mark.parametrize("columns", [20], indirect=True)
def test_a_table_leaves_out_what_matters_least_and_says_so(columns: None) -> None:
    assert as_table(COLUMNS, ROWS) == [
        " p  engine    MFU",
        " 8  mics    41.5%",
        "16  fsdp2   39.0%",
        "left out for want of",
        "  room: between",
        "  nodes",
    ]


@pytest.mark.parametrize("columns", [20], indirect=True)
def test_a_line_breaks_between_words_and_no_number_parts_from_its_unit(columns: None) -> None:
    assert fitted("short") == "short"
    assert fitted("  it needs 1,234.5 GiB of 79.11 GiB\nand more").split("\n") == [
        "  it needs",
        "    1,234.5 GiB of",
        "    79.11 GiB",
        "and more",
    ]
