"""What was measured, as text."""

from __future__ import annotations

from collections.abc import Sequence

from mics.benching.collectives import Measured
from mics.benching.deepspeed_child import WORK_AROUND
from mics.benching.deepspeed_parent import RELEASES
from mics.benching.options import Name
from mics.benching.side_by_side import Compared, computation_of
from mics.quantities import MIB, milliseconds


def collectives_heading(link: str | None) -> str:
    """Name the columns, and the link whose rate the floor follows from."""
    return (
        f"floor: bytes that leave a node over {link or 'a link of unknown rate (n/a)'}\n"
        f"{'collective':<16}{'form':<14}{'ranks':>5}{'size':>12}{'time, median (quartiles)':>34}"
        f"{'algbw':>13}{'busbw':>13}{'floor':>11}{'over it':>9}"
    )


def collectives_line(one: Measured) -> str:
    """Lay out one collective of one size and form."""
    spent = one.seconds
    times = (
        f"{milliseconds(spent.median)} ({milliseconds(spent.low)} to {milliseconds(spent.high)})"
    )
    floor = milliseconds(one.floor)
    over = "n/a" if one.over_floor is None else f"{one.over_floor:.2f}"
    return (
        f"{one.collective:<16}{one.form:<14}{one.ranks:>5}{one.message_bytes / MIB:>8.2f} MiB"
        f"{times:>34}"
        f"{one.algbw / 1e9:>8.4f} GB/s{one.busbw / 1e9:>8.4f} GB/s{floor:>11}{over:>9}"
    )


def comparison_lines(compared: Sequence[Compared], link_bits: float | None) -> list[str]:
    """Lay out a comparison, one engine per line."""
    first = compared[0].engine
    rows = [
        f"{'engine':<24}{'step, median (quartiles)':>30}{f'time over {first}':>28}"
        f"{'bytes a node sends':>22}{'over the limit':>16}"
    ]
    computation = computation_of(compared)
    for one in compared:
        spent, ratio = one.seconds, one.ratio
        times = f"{spent.median:.2f} s ({spent.low:.2f} to {spent.high:.2f})"
        ratios = f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
        sent = "n/a" if one.bytes_sent is None else f"{one.bytes_sent:,}"
        limit = None if computation is None else one.limit(computation, link_bits)
        over = "n/a" if limit is None else f"{spent.median / limit:.2f}"
        rows.append(f"{one.engine:<24}{times:>30}{ratios:>28}{sent:>22}{over:>16}")
    return [*rows, "limit: the larger of computation and bytes sent over the rate of the link"]


def notes_on(engines: Sequence[Name], *, scaled: bool) -> list[str]:
    """Say what must be known of the engines beside their numbers."""
    notes = [
        f"{name}: DeepSpeed {RELEASES[name]}, its defaults in fp32, no clipping"
        for name in engines
        if name in RELEASES
    ]
    if notes and scaled:
        notes.append("DeepSpeed: its sizes in parameters are scaled as the model is")
    if "deepspeed mics" in engines:
        notes.append(f"deepspeed mics: {WORK_AROUND}")
    if "mics owned" in engines:
        notes.append(
            "mics owned: waits here for new shards, which in training come beside the next forward"
        )
    return notes
