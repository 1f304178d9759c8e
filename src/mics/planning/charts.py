"""Four charts of a plan as SVG: memory, a step, scaling, time against price."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

from mics.planning.plan import Plan
from mics.quantities import GIB
from mics.simulation.rank import Span

COLOURS = (
    *("#4477aa", "#66ccee", "#228833", "#ccbb44", "#ee6677"),
    *("#aa3377", "#bbbbbb", "#88aa99", "#332288"),
)
_WIDTH = 860
_LEFT = 200
_ROW = 26


def memory_bars(plans: Sequence[Plan]) -> str:
    """Draw one bar per plan: the largest moment, by kind, against what a GPU has."""
    capacity = plans[0].cluster.node.gpu.memory
    kinds = [kind for kind in vars(plans[0].need) if any(vars(p.need)[kind] for p in plans)]
    scale = (_WIDTH - _LEFT - 90) / capacity
    parts = []
    for row, plan in enumerate(plans):
        y, need, needed = row * _ROW, plan.need, plan.needed
        label = str(plan.way).replace("micro-batch", "b =")
        parts.append(_text(_LEFT - 8, y + 16, label, "end"))
        x = float(_LEFT)
        for colour, kind in zip(_colours(kinds), kinds, strict=True):
            size = vars(need)[kind]
            title = f"{kind.replace('_', ' ')}: {size / GIB:.2f} GiB"
            parts.append(_box(x, y + 3, size * scale, _ROW - 8, colour, title))
            x += size * scale
        lost = needed - need.total
        parts.append(
            _box(x, y + 3, lost * scale, _ROW - 8, "#8886", f"fragmentation: {lost / GIB:.2f} GiB")
        )
        parts.append(_text(_WIDTH - 4, y + 16, f"{needed / GIB:.1f} GiB", "end"))
    below = len(plans) * _ROW
    at = _LEFT + capacity * scale
    parts.append(_line(at, 0, at, below + 4, "#cc3311"))
    parts.append(_text(at, below + 18, f"{capacity / GIB:.4g} GiB", "middle"))
    names = [*(kind.replace("_", " ") for kind in kinds), "fragmentation"]
    legend, end = _legend(names, [*_colours(kinds), "#8886"], below + 40)
    return _svg(end + 8, [*parts, legend], "Memory of a GPU by partition size")


def step_timeline(spans: Sequence[Span], start: float, end: float) -> str:
    """Draw the streams of one rank, one row each, between two moments (seconds)."""
    streams = list(dict.fromkeys(span.stream for span in spans))
    colours = dict(zip(streams, _colours(streams), strict=True))
    scale = (_WIDTH - _LEFT - 20) / (end - start)
    parts = [_text(_LEFT - 8, row * _ROW + 16, stream, "end") for row, stream in enumerate(streams)]
    for span in spans:
        if span.end < start or span.start > end:
            continue
        x, until = max(span.start, start), min(span.end, end)
        title = f"{span.name}: {(span.end - span.start) * 1e3:.2f} ms at {span.start * 1e3:.1f} ms"
        y = streams.index(span.stream) * _ROW + 3
        place = (_LEFT + (x - start) * scale, y, (until - x) * scale, _ROW - 8)
        parts.append(_box(*place, colours[span.stream], title))
    height = len(streams) * _ROW + 26
    for tick in range(6):
        at = start + (end - start) * tick / 5
        x = _LEFT + (at - start) * scale
        parts.append(_text(x, height - 8, f"{at * 1e3:.0f} ms", "middle" if tick < 5 else "end"))
    return _svg(height, parts, "Timeline of a step")


def curves(series: Mapping[str, Sequence[tuple[float, float]]], x_name: str, y_name: str) -> str:
    """Draw lines over a logarithmic x axis.

    Args:
        series: points by name.
        x_name: of the horizontal axis.
        y_name: of the vertical one.
    """
    points = [point for line in series.values() for point in line]
    xs = sorted({x for x, _ in points})
    low, high = math.log2(xs[0]), math.log2(xs[-1])
    top = _round_up(max(y for _, y in points))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log2(x) - low) / ((high - low) or 1)
        return _LEFT / 2 + across * (_WIDTH - _LEFT), 250 - 230 * y / top

    parts = _axes(xs, top, place, x_name, y_name)
    for colour, (name, line) in zip(_colours(list(series)), series.items(), strict=True):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (place(*point) for point in line))
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2.5"/>'
        )
        for x, y in line:
            a, b = place(x, y)
            parts.append(_dot(a, b, colour, f"{name}: {y:.4g} at {x:g}"))
    legend, end = _legend(list(series), _colours(list(series)), 320)
    return _svg(end + 10, [*parts, legend], f"{y_name} over {x_name}")


def pareto(plans: Sequence[Plan]) -> str:
    """Draw plans as points of tokens per second and dollars per billion tokens, the best marked."""
    points = [
        (plan.tokens_per_second, price, plan)
        for plan in plans
        if (price := plan.dollars_per_billion_tokens) is not None
    ]
    if not points:
        return ""
    most_x = _round_up(max(x for x, _, _ in points))
    most_y = _round_up(max(y for _, y, _ in points))
    best = pareto_set(plans)

    def place(x: float, y: float) -> tuple[float, float]:
        return _LEFT / 2 + x / most_x * (_WIDTH - _LEFT), 250 - 230 * y / most_y

    ticks = [most_x * part / 4 for part in range(5)]
    parts = _axes(ticks, most_y, place, "tokens per second", "$ per billion tokens")
    for x, y, plan in points:
        a, b = place(x, y)
        colour = COLOURS[4] if plan in best else COLOURS[6]
        title = f"{plan.cluster.nodes} nodes, {plan.way}: {x:,.0f} tokens/s, ${y:,.0f}"
        parts.append(_dot(a, b, colour, title))
    names = ["no other is faster and cheaper", "others"]
    legend, end = _legend(names, [COLOURS[4], COLOURS[6]], 320)
    return _svg(end + 10, [*parts, legend], "Speed against price")


def pareto_set(plans: Sequence[Plan]) -> list[Plan]:
    """Pick those to which no other plan is both faster and cheaper."""
    priced = [plan for plan in plans if plan.dollars_per_billion_tokens is not None]
    chosen: list[Plan] = []
    cheapest = float("inf")
    for plan in sorted(priced, key=lambda one: -one.tokens_per_second):
        price = plan.dollars_per_billion_tokens
        if price is not None and price < cheapest * (1 - 1e-9):
            chosen.append(plan)
            cheapest = price
    return chosen


def _axes(
    xs: Sequence[float],
    top: float,
    place: Callable[[float, float], tuple[float, float]],
    x_name: str,
    y_name: str,
) -> list[str]:
    parts = [_text(4, 12, y_name), _text(_WIDTH - _LEFT / 2, 290, x_name, "end")]
    for x in xs:
        a, b = place(x, 0)
        parts.append(_text(a, b + 18, f"{x:,.0f}", "middle"))
    for part in range(5):
        y = top * part / 4
        a, b = place(xs[0], y)
        parts.append(_line(a, b, _WIDTH - _LEFT / 2, b, "#8884"))
        parts.append(_text(a - 8, b + 4, _short(y), "end"))
    return parts


def _short(y: float) -> str:
    if y >= 1e4:
        return f"{y / 1e3:,.0f}k"
    return f"{y:,.0f}" if y >= 100 else f"{y:.3g}"


def _colours(names: Sequence[str]) -> list[str]:
    return [COLOURS[n % len(COLOURS)] for n in range(len(names))]


def _legend(names: Sequence[str], colours: Sequence[str], y: float) -> tuple[str, float]:
    """Draw it in as many rows as it takes, and say where the last one is."""
    parts, x = [], 10.0
    for name, colour in zip(names, colours, strict=True):
        width = 30 + 6.6 * len(name)
        if x + width > _WIDTH:
            x, y = 10.0, y + 20
        parts += [_box(x, y - 10, 12, 12, colour, name), _text(x + 16, y, name)]
        x += width
    return "".join(parts), y


def _round_up(value: float) -> float:
    """Round up to a number whose quarters are round ones."""
    size = 10.0 ** math.floor(math.log10(value))
    return next(size * m for m in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if size * m >= value)


def _svg(height: float, parts: Sequence[str], name: str) -> str:
    return (
        f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img" aria-label="{escape(name)}">'
        + "".join(parts)
        + "</svg>"
    )


def _box(x: float, y: float, width: float, height: float, colour: str, title: str) -> str:
    return (
        f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(width, 0):.2f}" height="{height:.1f}" '
        f'fill="{colour}"><title>{escape(title)}</title></rect>'
    )


def _dot(x: float, y: float, colour: str, title: str) -> str:
    return (
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}">'
        f"<title>{escape(title)}</title></circle>"
    )


def _line(x: float, y: float, to_x: float, to_y: float, colour: str) -> str:
    return f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{to_x:.1f}" y2="{to_y:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
