"""A step's timeline for Perfetto and chrome://tracing."""

from __future__ import annotations

from collections.abc import Sequence

from mics.simulation.rank import Span


def chrome_trace(spans: Sequence[Span]) -> dict[str, object]:
    """Write a timeline as Chrome's trace events (microseconds), which Perfetto reads too."""
    streams = list(dict.fromkeys(span.stream for span in spans))
    events: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "tid": n, "name": "thread_name", "args": {"name": stream}}
        for n, stream in enumerate(streams)
    ]
    events += [
        {
            "ph": "X",
            "pid": 0,
            "tid": streams.index(span.stream),
            "name": span.name,
            "ts": span.start * 1e6,
            "dur": (span.end - span.start) * 1e6,
        }
        for span in spans
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
