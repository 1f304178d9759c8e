"""What fits a terminal: its width, lines that break between words, tables that leave columns out.

A terminal breaks a long line wherever it ends, inside a number too. So nothing longer is printed: a
table leaves out what matters least and says so. The width is that of the terminal, ``COLUMNS``
where that is set, and 80 where there is neither, as in a file.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

_GAP = "  "
_NUMBER_AND_UNIT = re.compile(r"(?<=\d) (?=[A-Za-z])")
_JOINED = "\0"  # stands for a blank at which no line may end
_LEAST = 20  # columns of a terminal; fewer are taken for a mistake


def width() -> int:
    """Return how many columns a line may have."""
    return max(shutil.get_terminal_size((80, 24)).columns, _LEAST)


def fitted(text: str) -> str:
    """Break lines that are too long between words; what follows is indented."""
    lines = []
    for line in text.split("\n"):
        if len(line) <= width():
            lines.append(line)
            continue
        indent = line[: len(line) - len(line.lstrip())]
        lines += textwrap.wrap(
            _NUMBER_AND_UNIT.sub(_JOINED, line),
            width(),
            subsequent_indent=f"{indent}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    return "\n".join(lines).replace(_JOINED, " ")


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Args:
        name: its heading; of several words, two lines.
        rank: 0 is always shown; of the others the largest is left out first.
        left: whether it is flush left, as text is, and not flush right, as numbers are.
    """

    name: str
    rank: int = 0
    left: bool = False

    @property
    def heading(self) -> tuple[str, str]:
        """The two lines of the heading."""
        words = self.name.replace("-", "- ").split()
        upper, lower = " ".join(words[:-1]), words[-1]
        return (upper, lower)

    def wide(self, cells: Sequence[str]) -> int:
        """Count the columns of a terminal that heading and cells take."""
        return max(map(len, (*self.heading, *cells)))

    def cell(self, text: str, wide: int) -> str:
        """Fill a cell with blanks."""
        return text.ljust(wide) if self.left else text.rjust(wide)


def as_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[str]:
    """Write a table no wider than the terminal, and what of it was left out.

    Args:
        columns: all of them.
        rows: a cell for each column.

    Returns:
        The lines of the heading, of the rows, and one that names what is left out, if anything is.
    """
    widths = {column: column.wide([row[at] for row in rows]) for at, column in enumerate(columns)}
    shown = list(columns)
    while sum(widths[one] for one in shown) + len(_GAP) * (len(shown) - 1) > width():
        least = max(shown, key=lambda column: column.rank)
        if least.rank == 0:
            break
        shown.remove(least)
    lines = [
        _GAP.join(column.cell(column.heading[at], widths[column]) for column in shown).rstrip()
        for at in (0, 1)
    ]
    at = [columns.index(column) for column in shown]
    lines += [
        _GAP.join(columns[i].cell(row[i], widths[columns[i]]) for i in at).rstrip() for row in rows
    ]
    left_out = [column.name for column in columns if column not in shown]
    if left_out:
        lines += fitted(f"left out for want of room: {', '.join(left_out)}").split("\n")
    return [line for line in lines if line]
