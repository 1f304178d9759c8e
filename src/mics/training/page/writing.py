"""The page of a run: one file of HTML that needs nothing else."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mics.errors import ConfigError
from mics.planning.pages.document import (
    Section,
    document,
    facts,
    folded,
    lead,
    paragraphs,
    table,
    verbatim,
)
from mics.quantities import clock, count, percent, size
from mics.training.page.entries import (
    METRICS,
    Entry,
    History,
    number,
    numbers,
    read_history,
    thinned,
    typical,
)
from mics.training.page.figures import (
    bytes_figure,
    loss_figure,
    memory_figure,
    ranks_figure,
    speed_figure,
)
from mics.training.page.timeline import timeline, timeline_figure
from mics.version import __version__

PAGE = "run.html"


def write_page(folder: Path, page: Path) -> bool:
    """Write the page of the run in a folder.

    Args:
        folder: of the run, with ``metrics.jsonl``.
        page: file to write; one that is there is replaced.

    Returns:
        False when there is no step to show; nothing is written then.

    Raises:
        ConfigError: the folder has no metrics.
        OSError: something cannot be read or written.
    """
    try:
        history = read_history(folder / METRICS)
    except FileNotFoundError:
        raise ConfigError(
            f"{folder} is no folder of a run.",
            numbers=f"It has no {METRICS}.",
            write="the run.folder of mics train",
        ) from None
    if not history.steps:
        return False
    settings = folder / "config.toml"
    text = settings.read_text(errors="replace") if settings.is_file() else None
    page.write_text(run_page(history, folder.resolve().name, text))
    return True


def run_page(history: History, name: str, settings: str | None = None) -> str:
    """Write the page.

    Args:
        history: of the run, with one step at least.
        name: of the run.
        settings: its configuration as TOML, if that is known.
    """
    begin = history.begin
    title = f"{name}: {begin['model']}" if isinstance(begin.get("model"), str) else name
    sections = [
        _loss(history),
        Section(
            "Tokens per second, all ranks together",
            speed_figure(history),
            note=_thinning(history),
        ),
        _bytes(history),
        Section("Predicted against measured", html=_predicted(history)),
        _memory(history),
        _timeline(history),
    ]
    looks = history.of("stragglers")
    figure = ranks_figure(looks[-1]) if looks else None
    if figure is not None:
        sections.append(Section("Ranks, in the median step", figure, note=_ranks_note(looks[-1])))
    sample = history.end.get("sample")
    if isinstance(sample, str):
        sections.append(Section("A sample of the model", html=verbatim(sample)))
    below = folded("Configuration", verbatim(settings)) if settings is not None else ""
    below += paragraphs([_made_of(history)], small=True)
    sections.append(Section("How it was run", html=below))
    return document(title, lead(_state(history)) + facts(_facts(history)), sections)


def _state(history: History) -> str:
    """Say in a sentence how far the run has come."""
    last, begin = history.steps[-1], history.begin
    of = number(begin, "steps")
    text = f"Step {last['step']}" + ("" if of is None else f" of {of:.0f}")
    if not history.end:
        text += ", running or interrupted"
    elif of is not None and last["step"] >= of:
        text += ", finished"
    else:
        text += ", stopped before its end"
    text += f". Loss {_loss_of(last)}"
    if history.evaluations:
        text += f", held out {_loss_of(history.evaluations[-1])}"
    for name, entries in sorted(history.sets.items()):
        text += f", {name} {_loss_of(entries[-1])}"
    return f"{text}. {count(int(number(last, 'tokens') or 0))} tokens."


def _loss_of(entry: Entry) -> str:
    loss, bits = number(entry, "loss"), number(entry, "bits_per_byte")
    if loss is None:
        return "n/a"
    return f"{loss:.4f}" + ("" if bits is None else f" ({bits:.3f} bits per byte)")


def _facts(history: History) -> dict[str, str]:
    begin, steps = history.begin, history.steps
    speed, each = (typical(steps, f"tokens_per_second{e}") for e in ("", "_per_gpu"))
    skipped = sum(entry.get("taken") is False for entry in steps)
    spans = timeline(history.entries).stretches
    ran = spans[-1].end if spans else None
    return {
        "tokens per second, median": _number(speed),
        "of each rank": _number(each),
        "MFU, median": percent(typical(steps, "mfu")),
        "step, median": _seconds(typical(steps, "seconds")),
        "peak memory, rank 0": size(max(numbers(steps, "memory_bytes"), default=None)),
        "between nodes, a step": size(typical(steps, "bytes_between_nodes")),
        "partition x replicas": _layout(begin),
        "nodes x ranks": _pair(begin, "nodes", "gpus_per_node"),
        "parameters": _with(begin, "parameters", lambda n: count(int(n))),
        "began (UTC)": _date(next(iter(history.of("begin")), {})),
        "last entry (UTC)": _date(history.entries[-1]),
        "ran for": clock(ran),
        "restarts": str(max(len(history.of("begin")) - 1, 0)) if begin else "n/a",
        "skipped, rollbacks": f"{skipped}, {len(history.of('rollback'))}",
        "steps taken again": str(history.again),
    }


def _loss(history: History) -> Section:
    in_bits = number(history.steps[-1], "bits_per_byte") is not None
    key, unit = ("bits_per_byte", "bits per byte") if in_bits else ("loss", "nats per token")
    return Section(f"Loss, {unit}", loss_figure(history, key), note=_thinning(history))


def _memory(history: History) -> Section:
    if not numbers(history.steps, "memory_bytes"):
        return Section("Memory", html=paragraphs(["n/a: this device does not say."]))
    note = "The peak so far. "
    if history.begin.get("device") == "cpu":
        note += "On the CPU it is that of the process, libraries included. "
    return Section("Memory", memory_figure(history), note=note + _thinning(history))


def _bytes(history: History) -> Section:
    mics = typical(history.steps, "bytes_between_nodes")
    full = number(history.begin, "full_sharding_between_nodes")
    if mics is None or full is None:
        text = "What full sharding would have sent: n/a."
    elif mics == 0:
        text = f"Nothing was sent between nodes; full sharding would have sent {size(full)} a step."
    else:
        text = (
            f"Full sharding would have sent {full / mics:.2f} times as much between nodes: "
            f"{size(full)} a step instead of {size(mics)}."
        )
    return Section(
        "Bytes of a step, all ranks together",
        bytes_figure(history),
        html=paragraphs([text]),
        note="Counted: what collectives were given, median of the steps. Full sharding is worked "
        "out for the same units, micro-steps and backend, flat over all ranks, without the padding "
        "of its smaller shards.",
    )


def _predicted(history: History) -> str:
    begin, steps = history.begin, history.steps
    grown = None
    before, peak = number(begin, "memory_before_bytes"), numbers(steps, "memory_bytes")
    if before is not None and peak:
        grown = max(peak) - before
    equal = sum(entry.get("traffic_as_predicted") is True for entry in steps)
    rows: list[tuple[str, float | None, float | None, Callable[[float | None], str]]] = [
        (
            "step",
            number(begin, "predicted_seconds"),
            typical(steps[1:] or steps, "seconds"),
            _seconds,
        ),
        ("memory for training", number(begin, "predicted_memory_bytes"), grown, size),
    ]
    rows += [
        (
            f"bytes {link} nodes",
            number(begin, f"predicted_{link}_nodes"),
            typical(steps, f"bytes_{link}_nodes"),
            size,
        )
        for link in ("between", "inside")
    ]
    cells = [
        (name, text(one), text(two), percent(two / one) if one and two is not None else "n/a")
        for name, one, two, text in rows
    ]
    told = (
        f"Bytes were as predicted on every rank, stage and link in {equal} of {len(steps)} steps."
    )
    head = ("", "predicted", "measured", "share")
    if begin.get("device") == "cpu":
        told += " Memory on the CPU is that of the process, libraries included."
    return table(head, cells) + paragraphs([told], small=True)


def _timeline(history: History) -> Section:
    found = timeline(history.entries)
    if not found.stretches:
        return Section("Timeline", html=paragraphs(["n/a: no entry says how long it took."]))
    figure, each = timeline_figure(found)
    note = (
        "As rank 0 measured it. Drag over the figure, or move the ends of the strip below it, to "
        "zoom; a double click shows all. "
    )
    if each > 1:
        note += f"A bar is {each} entries together, their seconds summed. "
    if any(mark.kind == "restart" for mark in found.marks):
        note += "Time in which the run did not run is left out. "
    return Section("Timeline: what filled the time since the run began", figure, note=note)


def _ranks_note(look: Entry) -> str:
    slow = look.get("slow")
    words = "; ".join(map(str, slow)) if isinstance(slow, list) and slow else "Nobody is slow"
    return f"Looked at after step {look['step']}. {words}."


def _thinning(history: History) -> str:
    each = thinned(history.steps, "loss").each
    if each == 1:
        return ""
    return (
        f"{len(history.steps):,} steps: a point is the median of {each} of them, the band reaches "
        "from the least to the most."
    )


def _made_of(history: History) -> str:
    begin = history.begin
    versions = ", ".join(f"{name} {begin[name]}" for name in ("mics", "torch") if name in begin)
    return (
        f"Made of {len(history.entries):,} entries of {METRICS} by mics {__version__}"
        + (f"; trained with {versions}" if versions else "")
        + ". What was not measured is n/a."
    )


def _layout(begin: Entry) -> str:
    ranks, partition = number(begin, "ranks"), number(begin, "partition")
    if ranks is None or not partition:
        return "n/a"
    return f"{partition:.0f} x {ranks / partition:.0f}"


def _pair(begin: Entry, first: str, second: str) -> str:
    one, two = number(begin, first), number(begin, second)
    return "n/a" if one is None or two is None else f"{one:.0f} x {two:.0f}"


def _with(entry: Entry, key: str, text: Callable[[float], str]) -> str:
    value = number(entry, key)
    return "n/a" if value is None else text(value)


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:,.0f}"


def _seconds(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f} s"


def _date(entry: Entry) -> str:
    wall = number(entry, "time")
    return "n/a" if wall is None else time.strftime("%Y-%m-%d %H:%M", time.gmtime(wall))
