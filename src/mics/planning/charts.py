"""Figures of a plan: memory, a step's time and its timeline, scaling, price against speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mics.planning.pages import colours
from mics.planning.pages.document import Figure
from mics.planning.plan import Plan
from mics.quantities import GIB
from mics.simulation.rank import Span

_SPLIT = {
    "computation": colours.COMPUTE,
    "waits for hop 1": colours.HOP_1,
    "waits for hop 2": colours.HOP_2,
    "gathers after the update": colours.TEAL,
    "waits for the host": colours.SAVE,
}
_BESIDE = 5  # blocks on either side of the turn that a timeline shows first


def memory_bars(plans: Sequence[Plan]) -> Figure:
    """Draw one bar per plan: the largest moment, by kind, against what a GPU has; GiB."""
    capacity = plans[0].cluster.node.gpu.memory / GIB
    names = _names(plans)
    kinds = [kind for kind in vars(plans[0].need) if any(vars(p.need)[kind] for p in plans)]
    sizes = {kind: [vars(plan.need)[kind] / GIB for plan in plans] for kind in kinds}
    sizes["fragmentation"] = [(plan.needed - plan.need.total) / GIB for plan in plans]
    traces = [
        _bars(kind.replace("_", " "), values, names, colours.of_memory(kind), "%{x:.2f} GiB")
        for kind, values in sizes.items()
    ]
    most = max(capacity, *(plan.needed / GIB for plan in plans))
    edge = {"color": colours.LIMIT, "width": 2, "dash": "dot"}
    layout = _stacked(" GiB") | {
        "shapes": [{"type": "line", "x0": capacity, "x1": capacity, "yref": "paper"}
                   | {"y0": 0, "y1": 1, "line": edge}],
    }  # fmt: skip
    layout["xaxis"] = layout["xaxis"] | {"range": [0, 1.03 * most]}
    return Figure(traces, 170 + 30 * len(plans), layout)


def step_bars(plans: Sequence[Plan]) -> Figure:
    """Draw one bar per plan: what a step's time goes to; seconds."""
    traces = []
    for kind, colour in _SPLIT.items():
        seconds = [_split(plan)[kind] for plan in plans]
        if any(seconds):
            traces.append(_bars(kind, seconds, _names(plans), colour, "%{x:.4g} s"))
    return Figure(traces, 130 + 30 * len(plans), _stacked(" s"))


def _split(plan: Plan) -> dict[str, float]:
    exposed = plan.simulated.step.exposed
    waits = {
        "waits for hop 1": exposed.get(1, 0.0),
        "waits for hop 2": exposed.get(2, 0.0),
        "gathers after the update": exposed.get(0, 0.0),
        "waits for the host": exposed.get(3, 0.0),
    }
    return {"computation": max(0.0, plan.seconds - sum(waits.values())), **waits}


def step_timeline(spans: Sequence[Span], end: float) -> Figure:
    """Draw the streams of one rank, one row each, from the step's start to a moment (seconds).

    What is seen first is the turn from forward to backward: of hundreds of blocks nothing would be
    seen. Buttons show the rest.
    """
    seen = [span for span in spans if span.start < end]
    streams = sorted({span.stream for span in seen}, key=lambda name: (name != "compute", name))
    traces = []
    for stream in streams:
        row = [span for span in seen if span.stream == stream]
        words = [
            f"{escape(span.name)}: {(span.end - span.start) * 1e3:.3g} ms "
            f"at {span.start * 1e3:.4g} ms"
            for span in row
        ]
        look = {"color": colours.of_stream(stream), "line": {"color": "#fff8", "width": 1}}
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "showlegend": False,
                "name": stream,
                "y": [stream] * len(row),
            }
            | {"base": [span.start * 1e3 for span in row], "hovertext": words, "hoverinfo": "text"}
            | {"x": [(span.end - span.start) * 1e3 for span in row], "marker": look}
            | {"text": [escape(span.name) for span in row], "textposition": "inside"}
            | {"insidetextanchor": "middle", "constraintext": "inside", "textangle": 0}
        )
    first = _turn(seen, end)
    buttons = [
        {"label": label, "method": "relayout", "args": [{"xaxis.range": given}]}
        for label, given in (("the turn", first), ("the whole micro-step", [0, end * 1e3]))
    ]
    menu = {"type": "buttons", "direction": "right", "showactive": True, "buttons": buttons}
    menu |= {"x": 0, "xanchor": "left", "y": 1.05, "yanchor": "bottom", "pad": {"b": 4}}
    layout = {
        "barmode": "overlay",
        "bargap": 0.25,
        "uniformtext": {"mode": "hide", "minsize": 9},
        "updatemenus": [menu | {"bgcolor": "#8882", "bordercolor": "#8886"}],
        "xaxis": {"range": first, "ticksuffix": " ms", "nticks": 6},
        "yaxis": {"autorange": "reversed", "fixedrange": True},
    }
    return Figure(traces, 110 + 42 * len(streams), layout)


def _turn(spans: Sequence[Span], end: float) -> list[float]:
    """Choose what is seen first: some blocks around the one that takes the loss, ms."""
    computed = [span for span in spans if span.stream == "compute"]
    at = next((n for n, span in enumerate(computed) if span.name == "loss"), len(computed) // 2)
    some = computed[max(0, at - _BESIDE) : at + _BESIDE + 1]
    return [some[0].start * 1e3, min(some[-1].end, end) * 1e3]


def curves(series: Mapping[str, Sequence[tuple[float, float]]]) -> Figure:
    """Draw lines over numbers of GPUs, each in its engine's colour.

    Args:
        series: points by engine.
    """
    traces = [
        {"type": "scatter", "mode": "lines+markers", "name": escape(name)}
        | {"x": [x for x, _ in line], "y": [y for _, y in line]}
        | {"line": {"color": colours.of_engine(name), "width": 2.2}}
        | {"hovertemplate": "%{x} GPUs: %{y:,.4~g}"}
        for name, line in series.items()
    ]
    xs = sorted({x for line in series.values() for x, _ in line})
    shown = xs[:: -(-len(xs) // 7)]
    across = {"type": "log", "tickvals": shown, "ticktext": [f"{x:,.0f}" for x in shown]}
    layout = {"xaxis": across | {"title": {"text": "GPUs"}}}
    return Figure(traces, 340, layout | {"yaxis": {"rangemode": "tozero", "fixedrange": True}})


def pareto(plans: Sequence[Plan]) -> Figure | None:
    """Draw plans as points of tokens per second and dollars per billion tokens, the best marked."""
    best = pareto_set(plans)
    groups: dict[str, tuple[str, list[tuple[float, float, str]]]] = {
        "others": (colours.GREY, []),
        "no other is faster and cheaper": (colours.BLUE, []),
    }
    for plan in plans:
        price = plan.dollars_per_billion_tokens
        if price is not None:
            words = f"{plan.cluster.nodes} nodes, {escape(str(plan.way))}"
            words += f"<br>{plan.tokens_per_second:,.0f} tokens/s, ${price:,.4g} a billion"
            which = "no other is faster and cheaper" if plan in best else "others"
            groups[which][1].append((plan.tokens_per_second, price, words))
    if not best:
        return None
    traces = [
        {"type": "scatter", "mode": "markers", "name": name}
        | {"x": [x for x, _, _ in points], "y": [y for _, y, _ in points]}
        | {"hovertext": [words for _, _, words in points], "hoverinfo": "text"}
        | {"marker": {"color": colour, "size": 9 if name == "others" else 12}}
        for name, (colour, points) in groups.items()
        if points
    ]
    layout = {
        "xaxis": {"title": {"text": "tokens per second"}, "rangemode": "tozero", "nticks": 6},
        "yaxis": {"tickprefix": "$", "rangemode": "tozero", "fixedrange": True},
    }
    return Figure(traces, 340, layout)


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


def _names(plans: Sequence[Plan]) -> list[str]:
    """Name plans in few letters: a phone has no room for more, the table has the rest."""
    return [f"p = {plan.way.partition}, b = {plan.way.micro_batch}" for plan in plans]


def _bars(
    name: str, values: Sequence[float], rows: Sequence[str], colour: str, hover: str
) -> dict[str, Any]:
    return {"type": "bar", "orientation": "h", "name": name, "x": list(values), "y": list(rows)} | {
        "marker": {"color": colour},
        "hovertemplate": f"%{{y}}: {hover}",
    }


def _stacked(suffix: str) -> dict[str, Any]:
    return {
        "barmode": "stack",
        "bargap": 0.25,
        "xaxis": {"ticksuffix": suffix, "nticks": 6},
        "yaxis": {"autorange": "reversed", "fixedrange": True},
    }
