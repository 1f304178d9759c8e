"""Quantities as text and back: every text is one that some command prints or reads."""

from __future__ import annotations

import pytest

from mics.quantities import (
    GIB,
    KIB,
    MIB,
    clock,
    dtype_name,
    megabytes,
    milliseconds,
    parse_milliseconds,
    parse_rate,
    parse_size,
    percent,
    seconds,
    size,
)


def test_a_size_is_written_in_the_largest_unit_it_fills() -> None:
    assert [size(n) for n in (1023, KIB, MIB - 1, 5 * GIB, 5000 * GIB)] == [
        "1023 B",
        "1.00 KiB",
        "1024.00 KiB",
        "5.00 GiB",
        "5000.00 GiB",
    ]


def test_a_size_keeps_to_the_units_and_the_style_it_is_given() -> None:
    assert size(MIB / 2, least="MiB") == "0.50 MiB"
    assert size(2 * GIB, "g", least="KiB", most="MiB") == "2048 MiB"
    assert size(65_520, ".3g", least="KiB", most="MiB") == "64 KiB"


def test_what_is_not_known_is_not_guessed() -> None:
    for write in (size, percent, seconds, milliseconds, clock):
        assert write(None) == "n/a"


def test_shares_and_times() -> None:
    assert percent(0.4151) == "41.5%"
    assert seconds(0.25) == "0.25 s"
    assert milliseconds(0.0125) == "12.5 ms"
    assert [clock(n) for n in (59.6, 125, 3725)] == ["1:00", "2:05", "1:02:05"]
    assert megabytes(12_500_000) == "12.500 MB"
    assert dtype_name("torch.bfloat16") == dtype_name("bfloat16") == "bfloat16"


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("64KiB", 65_536), ("2GiB", 2**31), ("5GB", 5 * 10**9), (" 500 mb ", 500 * 10**6)],
)
def test_a_size_is_read(text: str, num_bytes: int) -> None:
    assert parse_size(text, units=("KiB", "GiB", "MB", "GB")) == num_bytes


@pytest.mark.parametrize("text", ["", "0KiB", "64", "KiB", "1.5GiB", "-1MiB", "64MB", "64 KiBs"])
def test_what_is_no_size_in_these_units_is_none(text: str) -> None:
    assert parse_size(text, units=("KiB", "MiB", "GiB")) is None


def test_rates_and_latencies_are_read_as_tc_means_them() -> None:
    assert [parse_rate(text) for text in ("200mbit", "1.5Gbit", "9bit")] == [2e8, 1.5e9, 9.0]
    assert [parse_rate(text) for text in ("0mbit", "200", "200mb", "-1mbit")] == [None] * 4
    assert [parse_rate(text) for text in (f"{'9' * 30}gbit", f"{'9' * 400}bit")] == [None] * 2
    assert [parse_milliseconds(text) for text in ("0.5ms", "0ms", "1s", "ms")] == [
        0.5,
        0.0,
        None,
        None,
    ]
