"""Hardware, and what a collective takes on it: by hand, fitted, and read from a measurement."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from mics.errors import PlanError
from mics.simulation.catalogue_text import catalogue
from mics.simulation.fit import Fit, Point, fit_all_gather, fit_all_reduce, predicted
from mics.simulation.hardware import Gpu, Link, Node, described, find_gpu, find_node, gpus, nodes
from mics.simulation.measured import measured_node
from mics.simulation.network import all_reduce_seconds, gather_stages
from mics.simulation.stacks import find_stack

GB = 1e9
NODE = Node(
    "test",
    Gpu("test", 1e9, 1e12, 1e11),
    gpus_per_node=4,
    intra=Link(100 * GB, 1e-6, fixed=5e-6),
    inter=Link(10 * GB, 20e-6, fixed=5e-6),
)


def test_a_gather_inside_a_node() -> None:
    (stage,) = gather_stages(NODE, 4, 1 * GB)
    assert stage.link == "intra"
    assert stage.seconds == pytest.approx(5e-6 + 3 * 1e-6 + 0.75 / 100)
    assert gather_stages(NODE, 1, 1 * GB) == ()


def test_a_flat_gather_pays_the_slow_link_for_nearly_all_of_it() -> None:
    (stage,) = gather_stages(NODE, 8, 1 * GB)
    assert stage.link == "inter"
    assert stage.seconds == pytest.approx(5e-6 + 20e-6 + 6 * 1e-6 + 7 / 8 / 10)


def test_two_stages_pay_it_for_what_the_node_lacks() -> None:
    inter, intra = gather_stages(NODE, 8, 1 * GB, "hierarchical")
    assert inter.seconds == pytest.approx(5e-6 + 20e-6 + 1 / 2 / 10)
    assert intra.seconds == pytest.approx(5e-6 + 3e-6 + 0.75 / 100)
    # MiCS section 3.3: (p - k) / (p - 1) of the bytes.
    flat = gather_stages(NODE, 8, 1 * GB)[0].seconds
    assert (inter.seconds - 25e-6) / (flat - 31e-6) == pytest.approx(4 / 7)


def test_replicas_share_a_nodes_link() -> None:
    alone = all_reduce_seconds(NODE, 4, 4, 1 * GB, sharing=1)
    assert alone == pytest.approx(5e-6 + 4 * 20e-6 + 2 * 0.75 / 10)
    shared = all_reduce_seconds(NODE, 4, 4, 1 * GB, sharing=4)
    assert shared - 85e-6 == pytest.approx(4 * (alone - 85e-6))
    assert all_reduce_seconds(NODE, 1, 1, 1 * GB, sharing=1) == 0


def test_bandwidth_falls_with_nodes_where_it_was_seen_to() -> None:
    p3dn = find_node("p3dn").inter
    assert p3dn.over(2) == pytest.approx(10 * GB)
    assert 6 * GB < p3dn.over(32) < p3dn.over(8) < 8.1 * GB  # measured: 6 to 8 at 8 to 32 nodes


def test_a_fit_finds_the_figures_it_was_made_from() -> None:
    made = Fit("all_gather", 10e-6, 3e-6, 40 * GB)
    points = [
        Point(n, n // 8, size, size * (n - 1) / n / predicted(made, Point(n, n // 8, size, 1)))
        for n in (16, 32)
        for size in (1e6, 1e8, 1e9)
    ]
    found = fit_all_gather(points)
    assert found.fixed == pytest.approx(10e-6)
    assert found.latency == pytest.approx(3e-6)
    assert found.bandwidth == pytest.approx(40 * GB)


def test_a_fit_of_all_reduces_finds_how_bandwidth_falls() -> None:
    made = Fit("all_reduce", 50e-6, 20e-6, 40 * GB, falls=0.2)
    points = [
        Point(n, n // 8, size, 2 * size * (n - 1) / n / predicted(made, Point(n, n // 8, size, 1)))
        for n in (16, 32, 64)
        for size in (1e7, 1e9)
    ]
    found = fit_all_reduce(points)
    assert found.falls == pytest.approx(0.2)
    assert found.bandwidth == pytest.approx(40 * GB)
    assert found.latency == pytest.approx(20e-6)


def test_one_measurement_is_no_fit() -> None:
    with pytest.raises(PlanError, match=r"do not follow(.|\n)*several --sizes"):
        fit_all_gather([Point(8, 1, 1e6, 1e9)])


def bench_file(path: Path, k: int, ranks: int) -> Path:
    """What mics bench collectives would write on ``NODE``, but for its k."""
    rows: list[dict[str, Any]] = []

    def add(collective: str, form: str, size: int, seconds: float) -> None:
        row = {"collective": collective, "form": form, "message_bytes": size, "ranks": ranks}
        rows.append(row | {"seconds": {"median": seconds}})

    over = max(ranks // k, 1)
    for size in (2**20, 2**23, 2**26):
        flat = 1e-3 + size * (ranks - 1) / ranks / (10 * GB)
        add("all_gather", "flat", size, flat)
        add("all_reduce", "flat", size, 2 * flat)
        if over > 1:
            inter = size * (over - 1) / over / (10 * GB)
            add("all_gather", "hierarchical", size, inter + 2e-3 + size * (k - 1) / k / (50 * GB))
    path.write_text(json.dumps({"gpus_per_node": k, "measured": rows}))
    return path


def test_a_node_is_read_from_a_measurement(tmp_path: Path) -> None:
    node = measured_node(bench_file(tmp_path / "links.json", 4, 8), find_gpu("H100"))
    assert node.gpus_per_node == 4
    assert node.inter.bandwidth == pytest.approx(10 * GB, rel=1e-6)
    assert node.intra.bandwidth == pytest.approx(50 * GB, rel=1e-3)
    assert node.all_reduce is not None
    assert node.all_reduce.bandwidth == pytest.approx(10 * GB, rel=1e-6)
    alone = measured_node(bench_file(tmp_path / "inside.json", 8, 8), find_gpu("H100"))
    assert alone.intra == alone.inter


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"gpus_per_node": 2, "measured": []}'])
def test_a_file_that_is_no_measurement_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "links.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"no result of mics bench collectives"):
        measured_node(path, find_gpu("H100"))


def test_the_catalogue_has_every_figure_it_promises() -> None:
    assert list(nodes()) == ["p3dn", "p4d", "p4de", "p5", "p5en", "p6-b200", "p6-b300"]
    wanted = {"V100-32GB", "A100-40GB", "A100-80GB", "H100", "H200", "B200", "B300"}
    assert set(gpus()) == wanted
    for node in nodes().values():
        assert node.source
        assert node.gpu.source
        assert node.gpus_per_node == 8
        assert node.inter.line is not None
        assert node.inter.bandwidth <= node.inter.line
    text = catalogue()
    assert "n/a" in text  # nobody has published a V100's largest product
    for name in [*nodes(), *gpus(), "mics-paper"]:
        assert name in text


def test_an_unknown_node_names_the_nearest() -> None:
    assert find_node("p4d.24xlarge") == find_node("p4d")
    with pytest.raises(PlanError, match=r"no node 'p4d\.large'"):
        find_node("p4d.large")
    with pytest.raises(PlanError, match=r"p6-b300 carries between nodes was never(.|\n)*800 GB/s"):
        find_node("p6-b300")
    with pytest.raises(PlanError, match=r"no node 'p4x'(.|\n)*did you mean 'p4de?'") as caught:
        find_node("p4x")
    assert "p6-b300" in str(caught.value)
    with pytest.raises(PlanError, match=r"no GPU 'H10O'(.|\n)*'H100'"):
        find_gpu("H10O")
    with pytest.raises(PlanError, match=r"no software stack(.|\n)*eager, fused"):
        find_stack("turbo")


def test_a_node_of_ones_own(tmp_path: Path) -> None:
    form = catalogue().split("a .toml file:\n")[1]
    path = tmp_path / "ours.toml"
    path.write_text("\n".join(line.strip() for line in form.splitlines()))
    node = find_node(str(path))
    assert (node.name, node.gpu.name, node.price) == ("ours", "H100", 30.0)
    link = node.inter
    assert (link.bandwidth, link.latency, link.fixed) == pytest.approx((180 * GB, 20e-6, 5e-6))
    path.write_text(path.read_text().replace('"H100"', '"ours"'))
    assert find_node(str(path)).gpu.memory == 96 * 2**30


OURS = """[ours]
gpu = "H100"
gpus_per_node = 8
intra = { bandwidth = 350, latency = 4 }
inter = { bandwidth = 180, latency = 20 }
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nodes = [", "is no TOML"),
        ("a = 1", "must describe one node"),
        ('[ours]\ngpu = "H100"', "ours lacks gpus_per_node, inter, intra"),
        (OURS.replace("H100", "H1000"), "a GPU that is not known, 'H1000'"),
        (OURS.replace("= 8", "= 0"), "gpus_per_node of ours must be a positive integer, got 0"),
        (OURS.replace("{ bandwidth = 350, latency = 4 }", "350"), "intra of ours must be a table"),
        (OURS.replace("180", '"fast"'), "bandwidth of inter of ours must be a number"),
        (OURS.replace("180", "-180"), "not negative, got -180"),
        (OURS.replace("latency = 20", "latency = 20, fals = 0.1"), "unknown fals"),
    ],
)
def test_a_file_that_describes_no_node_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "ours.toml"
    path.write_text(text)
    with pytest.raises(PlanError, match=words):
        find_node(str(path))
    with pytest.raises(PlanError, match=r"There is no"):
        find_node(str(tmp_path / "missing.toml"))


def test_three_numbers_describe_a_node() -> None:
    node = described(memory_gib=48, intra_gb_s=200, inter_gb_s=25, gpus_per_node=4)
    assert node.gpu.memory == 48 * 2**30
    assert node.inter.bandwidth == 25 * GB
    assert math.isclose(node.inter.latency, find_node("p4d").inter.latency)
    with pytest.raises(PlanError, match="inter must be positive, got 0"):
        described(memory_gib=48, intra_gb_s=200, inter_gb_s=0)
