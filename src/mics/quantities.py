"""Sizes, counts, shares, times, rates and dtypes as text, and back from it.

What is not known is ``None`` and shown as "n/a". Text that means nothing is read as ``None``: who
reads it knows which option to name in the error.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

KIB, MIB, GIB = 2**10, 2**20, 2**30

_BINARY = {"GiB": GIB, "MiB": MIB, "KiB": KIB, "B": 1}
_DECIMAL = {"GB": 10**9, "MB": 10**6}
_MOST_BITS = 1e13  # ten of the fastest links that are sold
_BITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}


@dataclass(frozen=True)
class Within:
    """The numbers that an option may have, beside its type: ``Annotated[int, Within(1, 9)]``.

    Args:
        least: the smallest.
        most: the largest.
    """

    least: float
    most: float

    def __contains__(self, value: float) -> bool:
        return self.least <= value <= self.most  # never of what is no number

    def __str__(self) -> str:
        return f"from {_plain(self.least)} to {_plain(self.most)}"


def _plain(number: float) -> str:
    return f"{number:,}" if isinstance(number, int) else f"{number:,g}"


# -- as text ---------------------------------------------------------------------------------------


def size(
    num_bytes: float | None, style: str = ".2f", *, least: str = "B", most: str = "GiB"
) -> str:
    """Write bytes in the largest binary unit of which they are at least one: 3.00 MiB, 12 B.

    Args:
        num_bytes: to be written.
        style: of the number, as format strings have it; bytes themselves are whole.
        least: the smallest unit to be used.
        most: the largest one.
    """
    if num_bytes is None:
        return "n/a"
    units = list(_BINARY)
    for unit in units[units.index(most) : units.index(least)]:
        if num_bytes >= _BINARY[unit]:
            return f"{num_bytes / _BINARY[unit]:{style}} {unit}"
    return f"{num_bytes} B" if least == "B" else f"{num_bytes / _BINARY[least]:{style}} {least}"


def megabytes(num_bytes: float | Fraction) -> str:
    """Write bytes as networks count them: 12.500 MB."""
    return f"{float(num_bytes) / 1e6:.3f} MB"


def count(number: int) -> str:
    """Write a large number: 10.08 B, 3.34 M, 512."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.2f} {unit}"
    return str(number)


def first_of(names: Sequence[str]) -> str:
    """Write some names of many: a, b, c and 2 more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def percent(share: float | None) -> str:
    """Write a share: 41.5%."""
    return "n/a" if share is None else f"{share:.1%}"


def seconds(value: float | None) -> str:
    """Write seconds that are a few: 0.25 s."""
    return "n/a" if value is None else f"{value:.2f} s"


def milliseconds(value: float | None) -> str:
    """Write seconds that are a fraction of one: 12.5 ms."""
    return "n/a" if value is None else f"{value * 1e3:.1f} ms"


def clock(value: float | None) -> str:
    """Write seconds that are many: 1:02:05, 2:05."""
    if value is None:
        return "n/a"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def dtype_name(dtype: object) -> str:
    """Write a dtype of torch without the name of its package: float32."""
    return str(dtype).removeprefix("torch.")


# -- from text -------------------------------------------------------------------------------------


def parse_size(text: str, *, units: tuple[str, ...]) -> int | None:
    """Read bytes: 64KiB, 5GB. ``None`` unless it is a whole number of one of the units."""
    known = {unit.upper(): scale for unit, scale in (_BINARY | _DECIMAL).items() if unit in units}
    match = re.fullmatch(r"([1-9]\d{0,17})\s*([a-z]+)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in known:
        return None
    return int(match[1]) * known[match[2].upper()]


def parse_rate(text: str) -> float | None:
    """Read the bits per second of a link, as ``tc`` writes them: 200mbit, 1.5gbit."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmg]?)bit", text, re.IGNORECASE)
    bits = 0.0 if match is None else float(match[1]) * _BITS[match[2].lower()]
    return bits if 0 < bits <= _MOST_BITS else None


def parse_milliseconds(text: str) -> float | None:
    """Read a latency: 0.5ms."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)ms", text)
    milliseconds = float(match[1]) if match else math.inf
    return milliseconds if milliseconds < math.inf else None
