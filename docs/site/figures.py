"""Draw the figures of the documents from the code: who holds what, who talks to whom, how much.

    python docs/site/figures.py        # writes docs/figures/

Positions and groups are those of ``mics.Topology``, bytes those of ``mics.traffic``. A test
compares the files with what is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

from mics import traffic
from mics.planning.pages.colours import CYAN, HOP_1, HOP_2, INDIGO, YELLOW, of_engine
from mics.topology import Ranks, Topology, possible_partitions

FOLDER = Path(__file__).parents[1] / "figures"
SHARDS = (CYAN, YELLOW, "#99cc99", "#ddaacc", "#bbbbdd", "#e0b090", "#a8d8d0", "#cccccc")
INK, PALE, LINE = "#222222", "#f4f4f4", "#888888"
GPU, GAP, PAD = 62, 14, 14  # sides of a rank's box, what lies between boxes, the margin
WORDS = 14  # pixels of the text
SHOWN = {
    "mics": "mics",
    "hsdp every micro-step": "HSDP, every micro-step",
    "fsdp2": "full sharding",
}


class Drawing:
    """A picture that grows by elements, on a card of its own so that dark pages show it too."""

    def __init__(self, width: float, height: float, about: str) -> None:
        self.width, self.height, self.about = width, height, about
        self.elements: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = LINE
    ) -> None:
        """Draw a rectangle with round corners; lengths are in pixels."""
        self.elements.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" '
            f'fill="{fill}" stroke="{stroke}"/>'
        )

    def text(
        self, x: float, y: float, words: str, *, at: str = "middle", bold: bool = False
    ) -> None:
        """Write words whose baseline is y; ``at`` is start, middle or end."""
        weight = ' font-weight="bold"' if bold else ""
        words = words.replace("&", "&amp;").replace("<", "&lt;")
        self.elements.append(f'<text x="{x:g}" y="{y:g}" text-anchor="{at}"{weight}>{words}</text>')

    def line(self, path: str, colour: str, width: float = 3) -> None:
        """Draw a path of SVG."""
        self.elements.append(
            f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"/>'
        )

    def svg(self) -> str:
        """Return the file's text."""
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} '
                f'{self.height:g}" width="{self.width:g}" height="{self.height:g}" role="img" '
                f'font-family="system-ui, sans-serif" font-size="{WORDS}" fill="{INK}">',
                f"<title>{self.about}</title>",
                f'<rect width="{self.width:g}" height="{self.height:g}" rx="8" fill="white"/>',
                *self.elements,
                "</svg>",
                "",
            ]
        )


class Row:
    """The GPUs of a cluster side by side, in their nodes; draws groups of them as arcs."""

    def __init__(self, drawing: Drawing, topology: Topology, top: float, left: float = PAD) -> None:
        self.drawing, self.topology, self.top, self.left = drawing, topology, top, left
        self.node = topology.gpus_per_node * (GPU + GAP) + GAP

    def x(self, rank: int) -> float:
        """The middle of a rank's box."""
        node, place = divmod(rank, self.topology.gpus_per_node)
        return self.left + node * (self.node + GAP) + GAP + place * (GPU + GAP) + GPU / 2

    @property
    def right(self) -> float:
        """Where the last node ends."""
        return self.left + self.topology.nodes * (self.node + GAP) - GAP

    def nodes(self, *, label: bool = True) -> None:
        """Draw nodes, ranks, and which shard each holds."""
        for node in range(self.topology.nodes):
            x = self.left + node * (self.node + GAP)
            self.drawing.box(x, self.top, self.node, GPU + 2 * GAP + (18 if label else 0), PALE)
            if label:
                self.drawing.text(x + self.node / 2, self.top + GPU + 2 * GAP + 10, f"node {node}")
        for rank in range(self.topology.world):
            shard = rank % self.topology.partition
            x, y = self.x(rank), self.top + GAP
            self.drawing.box(x - GPU / 2, y, GPU, GPU, SHARDS[shard % len(SHARDS)], INK)
            self.drawing.text(x, y + 26, f"GPU {rank}", bold=True)
            self.drawing.text(x, y + 46, f"shard {shard}")

    def brackets(self, groups: Sequence[Ranks], y: float, name: Callable[[int], str]) -> None:
        """Draw a bracket under each group of neighbours, with its name."""
        for number, ranks in enumerate(groups):
            a, b = self.x(ranks[0]) - GPU / 2, self.x(ranks[-1]) + GPU / 2
            self.drawing.line(f"M{a:g} {y:g} v8 H{b:g} v-8", INDIGO)
            self.drawing.text((a + b) / 2, y + 24, name(number))

    def combs(self, groups: Sequence[Ranks], y: float, end: float, colour: str) -> None:
        """Join the ranks of each group by a line at y, with teeth that end at their boxes."""
        for ranks in groups:
            self.drawing.line(f"M{self.x(ranks[0]):g} {y:g} H{self.x(ranks[-1]):g}", colour)
            for rank in ranks:
                self.drawing.line(f"M{self.x(rank):g} {end:g} V{y:g}", colour)

    def arcs(self, groups: Sequence[Ranks], y: float, colour: str, lift: float = 30) -> None:
        """Join the neighbours of each group by arcs above (lift > 0) or below y."""
        for ranks in groups:
            for a, b in pairwise(ranks):
                self.drawing.line(
                    f"M{self.x(a):g} {y:g} Q{(self.x(a) + self.x(b)) / 2:g} {y - lift:g} "
                    f"{self.x(b):g} {y:g}",
                    colour,
                )


def replicas() -> str:
    """Draw 4 nodes of 2 GPUs with p = 4: partition groups, shards, hop 1 and hop 2."""
    topology = Topology(nodes=4, gpus_per_node=2, partition=4)
    drawing = Drawing(774, 326, "4 nodes of 2 GPUs, p = 4: two replicas, hop 1 and hop 2")
    row = Row(drawing, topology, 100)
    drawing.text(PAD, 24, "hop 2, once per step: the GPUs that hold the same shard", at="start")
    row.nodes()
    for shard, group in enumerate(topology.replication_groups()):
        row.combs([group], 38 + 13 * (topology.partition - 1 - shard), row.top + GAP, HOP_2)
    row.combs(topology.partition_groups(), 226, row.top + GAP + GPU, HOP_1)
    drawing.text(
        PAD, 254, "hop 1, in every micro-step: the GPUs of one partition group", at="start"
    )
    row.brackets(
        topology.partition_groups(), 272, lambda g: f"partition group {g}: replica {g} of the model"
    )
    return drawing.svg()


def partitions() -> str:
    """Draw what each p makes of 2 nodes of 4 GPUs."""
    sizes = possible_partitions(2, 4)
    drawing = Drawing(960, 30 + 112 * len(sizes), "2 nodes of 4 GPUs at every partition size")
    for number, p in enumerate(sizes):
        topology = Topology(nodes=2, gpus_per_node=4, partition=p)
        row = Row(drawing, topology, 20 + 112 * number, left=280)
        row.nodes(label=False)
        y = row.top + 30
        copies = f"{topology.replicas} replicas" if topology.replicas > 1 else "1 replica"
        drawing.text(PAD, y, f"p = {p}: {copies}", at="start", bold=True)
        drawing.text(PAD, y + 20, f"a GPU holds 1/{p} of the states", at="start")
        slow = "hop 1 on the slow network" if topology.spans_nodes else "hop 1 inside the node"
        alone = "no hop 1: DDP's memory" if p == 1 else slow
        drawing.text(PAD, y + 40, alone, at="start")
    return drawing.svg()


def two_stages() -> str:
    """Draw the two stages of a hierarchical gather in a partition group of 2 nodes."""
    topology = Topology(nodes=2, gpus_per_node=2, partition=4)
    drawing = Drawing(400, 330, "A hierarchical all-gather: between nodes, then inside nodes")
    stages = (
        ("1. inter: equal places of both nodes, 1/k of the bytes", topology.inter_groups(), HOP_2),
        ("2. intra: inside each node, all of the bytes", topology.intra_groups(), HOP_1),
    )
    for number, (name, groups, colour) in enumerate(stages):
        top = 60 + 160 * number
        row = Row(drawing, topology, top, left=30)
        drawing.text(PAD, top - 36, name, at="start")
        row.nodes(label=number == 1)
        row.arcs(groups, top + GAP, colour, 46)
    return drawing.svg()


def bytes_between_nodes() -> str:
    """Draw what a node sends to others in one step, by the number of micro-steps."""
    topology = Topology(nodes=8, gpus_per_node=8, partition=8)
    counts = (1, 4, 16)
    weights, gradients = 2 * topology.world, 4 * topology.world  # bytes: bf16, and fp32
    size = traffic.UnitBytes(weights, gradients, gradients // topology.partition)
    ways = {
        "mics": lambda s, r: traffic.mics(topology, [size], s, rank=r),
        "hsdp every micro-step": lambda s, r: traffic.hsdp(
            topology, [size], s, deferred=False, rank=r
        ),
        "fsdp2": lambda s, r: traffic.fsdp(topology, [size], s, rank=r),
    }
    sent = {
        (name, s): float(
            traffic.node_inter_bytes([way(s, r) for r in range(topology.gpus_per_node)])
        )
        / weights
        for name, way in ways.items()
        for s in counts
    }
    return _bars(sent, counts, list(ways))


def _bars(sent: dict[tuple[str, int], float], counts: Sequence[int], names: list[str]) -> str:
    most = max(sent.values())
    drawing = Drawing(680, 60 + len(counts) * 96 + 10, "Bytes that a node sends to others per step")
    drawing.text(
        PAD, 26, "What a node sends to others in one step, in sizes of the model (bf16)", at="start"
    )
    for group, s in enumerate(counts):
        y = 50 + 96 * group
        drawing.text(PAD, y + 14, f"{s} micro-step{'s' if s > 1 else ''}", at="start", bold=True)
        for place, name in enumerate(names):
            top, value = y + 22 * place, sent[name, s]
            width = max(2.0, 330 * value / most)
            drawing.text(PAD + 262, top + 14, SHOWN[name], at="end")
            drawing.box(PAD + 270, top + 1, round(width, 1), 17, of_engine(name))
            drawing.text(PAD + 278 + round(width, 1), top + 14, f"{value:.1f}", at="start")
    return drawing.svg()


FIGURES: dict[str, Callable[[], str]] = {
    "replicas": replicas,
    "partitions": partitions,
    "two-stages": two_stages,
    "bytes": bytes_between_nodes,
}


def main() -> None:
    """Write every figure."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        (FOLDER / f"{name}.svg").write_text(draw())


if __name__ == "__main__":
    main()
