"""The catalogue as text, every figure with its source."""

from __future__ import annotations

from mics.hardware.cluster import UNMEASURED, Link, Node
from mics.hardware.lookup import dated, gpus, nodes
from mics.hardware.stacks import stacks
from mics.quantities import GIB
from mics.ranks.columns import fitted


def catalogue() -> str:
    """GPUs, nodes and software stacks; what nobody published is "n/a"."""
    lines = [
        f"GPUs ({dated('gpus')})",
        f"  {'name':<12}{'memory':>10}{'usable':>14}{'peak':>14}{'achieved':>14}{'its memory':>13}",
    ]
    for gpu in gpus().values():
        achieved = "n/a (1)" if gpu.achieved is None else f"{gpu.achieved / 1e12:.1f} TFLOPS"
        rate = "n/a" if gpu.bandwidth is None else f"{gpu.bandwidth / 1e9:,.0f} GB/s"
        lines.append(
            f"  {gpu.name:<12}{(gpu.sold or gpu.memory) / GIB:>6.0f} GiB"
            f"{gpu.memory / GIB:>10.2f} GiB{gpu.peak / 1e12:>7.0f} TFLOPS"
            f"{achieved:>14}{rate:>13}"
        )
        lines.append(f"    {gpu.source}")
    lines.append(f"  (1) reckoned with as {UNMEASURED} of the peak")
    lines += ["", f"Nodes ({dated('nodes')}; dollars per hour on demand, us-east-1)"]
    lines.append(
        f"  {'name':<9}{'GPUs':>14}{'inside':>12}{'between':>12}{'hop inside':>12}"
        f"{'between':>10}{'$/h':>9}"
    )
    for node in nodes().values():
        price = "n/a" if node.price is None else f"{node.price:.2f}"
        lines.append(
            f"  {node.name:<9}{f'{node.gpus_per_node} x {node.gpu.name}':>14}"
            f"{_rate(node.intra):>12}{_rate(node.inter):>12}{_latency(node.intra):>12}"
            f"{_latency(node.inter):>10}{price:>9}"
        )
        lines.append(f"    {_host(node)}; {node.source}")
    lines += ["", f"Software stacks ({dated('stacks')}; factor on the modelled rate)"]
    lines += [f"  {s.name:<12}{s.factor:>6.3f}  {s.calibrated}" for s in stacks().values()]
    return "\n".join(
        [fitted("\n".join(lines)), "", "A node of your own, a .toml file:", "", *_FORM]
    )


_FORM = (
    "  [ours]",
    '  gpu = "H100"',
    "  gpus_per_node = 8",
    "  price = 30.0                                  # optional",
    "  fixed = 5                                     # microseconds of any collective",
    "  intra = { bandwidth = 350, latency = 4 }      # GB/s of a ring, us of a hop",
    "  inter = { bandwidth = 180, latency = 20 }",
    "  host = { memory = 1152, bandwidth = 25 }      # GiB, GB/s of a GPU; optional",
    "",
    "  [gpus.ours]                                   # for a GPU that is not listed",
    "  memory = 96                                   # GiB it is sold with",
    "  usable = 95                                   # GiB torch reports; optional",
    "  peak = 500                                    # TFLOPS, 16 bits",
    "  bandwidth = 4000                              # GB/s",
)


def _host(node: Node) -> str:
    host = node.host
    if host is None:
        return "host n/a"
    memory = "n/a" if host.memory is None else f"{host.memory / GIB:,.0f} GiB"
    return f"host {memory}, {host.bandwidth / 1e9:.1f} GB/s for a GPU"


def _rate(link: Link) -> str:
    return f"{link.bandwidth / 1e9:.1f} GB/s" if link.bandwidth else "n/a"


def _latency(link: Link) -> str:
    return f"{link.latency * 1e6:.0f} us"
