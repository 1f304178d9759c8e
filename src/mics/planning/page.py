"""A plan as one page of HTML that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape

from mics.anatomy.memory import NOT_MODELLED
from mics.hardware.cluster import extrapolated
from mics.hardware.stacks import find_stack
from mics.planning.charts import curves, memory_bars, pareto, step_timeline
from mics.planning.plan import Plan, best_of_partitions
from mics.planning.table import COLUMNS, cells
from mics.planning.weighing import simulate_recipe
from mics.version import __version__

_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1160px; margin: 2rem auto; }
body { padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
svg { width: 100%; height: auto; } svg text { font-size: 12px; fill: currentColor; }
table { border-collapse: collapse; font-size: 12.5px; width: 100%; }
td { white-space: nowrap; }
th, td { text-align: right; padding: 3px 6px; border-bottom: 1px solid #8884; }
.reason { border-left: 4px solid #4477aa; padding-left: .8rem; }
.wide { overflow-x: auto; } small { opacity: .75; }
"""


def page(
    title: str,
    plans: Sequence[Plan],
    swept: Sequence[Plan],
    scaling: Mapping[str, Sequence[tuple[float, float]]],
) -> str:
    """Write the page.

    Args:
        title: model and cluster.
        plans: of the cluster asked for, with reasons, the best first.
        swept: the best plan of every number of nodes that was tried.
        scaling: tokens per second over GPUs, by engine.
    """
    best = plans[0]
    # Two micro-steps show the first, however many there are.
    way = replace(best.way, micro_steps=min(best.way.micro_steps, 2))
    simulated = simulate_recipe("mics", best.anatomy, best.cluster, way, timeline=True)
    spans = simulated.step.timeline
    computed = [span for span in spans if span.stream == "compute"]
    first = computed[: len(computed) // way.micro_steps]
    stack = find_stack(best.way.stack)
    sections = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="reason">{escape(best.reason)}</p>',
        "<h2>Plans</h2>",
        _table(plans[:12]),
        "<h2>Memory of a GPU, the best plan of every partition</h2>",
        memory_bars(best_of_partitions(plans)),
        "<h2>First micro-step of the best plan</h2>",
        step_timeline(spans, 0.0, first[-1].end),
        "<h2>Scaling, every GPU with the same work</h2>",
        curves(_per_gpu(scaling), "GPUs", "tokens per second and GPU"),
    ]
    if swept:
        sections += ["<h2>The best plan on other numbers of nodes</h2>", _table(swept)]
    priced = pareto([*plans, *swept])
    if priced:
        sections += ["<h2>Speed against price</h2>", priced]
    note = extrapolated(best.cluster.node, max(p.cluster.nodes for p in [*plans, *swept]))
    sections.append(
        f"<p><small>{escape(note)} mics {__version__}. Simulated, nothing was run. "
        f"Software stack {stack.name}: {escape(stack.calibrated)}. "
        f"Not modelled: {escape(NOT_MODELLED)}.</small></p>"
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(sections)
        + "</body></html>\n"
    )


def _per_gpu(
    scaling: Mapping[str, Sequence[tuple[float, float]]],
) -> dict[str, list[tuple[float, float]]]:
    return {name: [(x, y / x) for x, y in line] for name, line in scaling.items()}


def _table(plans: Sequence[Plan]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("nodes", *COLUMNS))
    rows = "".join(
        "<tr>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in (f"{plan.cluster.nodes}", *cells(plan)))
        + "</tr>"
        for plan in plans
    )
    return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
