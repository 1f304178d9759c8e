"""Hardware, and what a collective takes on it: by hand, fitted, and read from a measurement."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mics.errors import PlanError
from mics.hardware.catalogue_text import catalogue
from mics.hardware.cluster import GIVEN, Cluster, Gpu, Link, Node
from mics.hardware.fit import Point, fit_links
from mics.hardware.lookup import described, find_gpu, find_node, gpus, nodes
from mics.hardware.measured import measured_node
from mics.hardware.network import (
    all_reduce_seconds,
    all_reduce_stages,
    gather_stages,
    gather_terms,
)
from mics.hardware.stacks import find_stack
from mics.traffic import Form

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


def test_an_all_reduce_in_two_stages_pays_the_slow_link_for_each_row_once() -> None:
    """2 columns of 2 ranks on each of 3 nodes, and Gloo's rings: rows of 1/2 GB, four at once."""
    node = dataclasses.replace(NODE, gloo=True)
    first, between, last = all_reduce_stages(node, 6, 3, 1 * GB, 2, "hierarchical")
    assert first == last
    assert (first.link, between.link) == ("intra", "inter")
    assert first.seconds == pytest.approx(5e-6 + 1e-6 + 0.5 / 100)
    assert between.seconds == pytest.approx(5e-6 + 4 * 20e-6 + 4 * 2 * 0.5 * 2 / 3 / 10)
    (flat,) = all_reduce_stages(node, 6, 3, 1 * GB, 2, "flat")
    assert flat.seconds == all_reduce_seconds(node, 6, 3, 1 * GB, 2)
    assert flat.seconds > between.seconds + 2 * first.seconds
    for ranks, over in [(3, 3), (4, 1)]:  # a rank on each node, and one node
        assert len(all_reduce_stages(node, ranks, over, 1 * GB, 1, "hierarchical")) == 1


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


def test_a_ring_passes_every_rank_a_tree_every_node() -> None:
    rings = dataclasses.replace(NODE, gloo=True)
    ring = all_reduce_seconds(rings, 8, 2, 1 * GB)
    assert ring == pytest.approx(5e-6 + 2 * 20e-6 + 2 * 6 * 1e-6 + 2 * 7 / 8 / 10)
    tree = all_reduce_seconds(NODE, 8, 2, 1 * GB)
    assert tree == pytest.approx(5e-6 + 2 * 20e-6 + 2 * 1 / 2 / 10)


@pytest.mark.parametrize("name", ["p3dn", "p4d", "p4de", "p5", "p5en", "p6-b200"])
def test_no_link_carries_more_than_its_line(name: str) -> None:
    node = find_node(name)
    line, k, size = node.inter.line, node.gpus_per_node, 64 * GB
    assert line is not None
    for over in (2, 3, 4, 16, 256):
        leaves = size * (over - 1) / over  # of a gathered message, what the node lacks
        for form in ("flat", "hierarchical"):
            stages = gather_stages(node, k * over, size, form)  # type: ignore[arg-type]
            assert leaves / sum(s.seconds for s in stages if s.link == "inter") <= line
        for p in (1, 2, 8, 16):
            # p < k: groups of k / p ranks per node; else one rank per node; p GPUs share the link.
            replicas, sharing = over * max(k // p, 1), min(p, k)
            seconds = all_reduce_seconds(node, replicas, over, size, sharing)
            assert 2 * leaves * sharing / seconds <= line


def points_on(node: Node, partitions: Sequence[int]) -> list[Point]:
    """All-gathers on a node as the network model has them."""
    forms: tuple[Form, ...] = ("flat", "hierarchical")
    return [
        Point(
            gather_terms(node.gpus_per_node, p, size, form),
            sum(s.seconds for s in gather_stages(node, p, size, form)),
        )
        for p in partitions
        for size in (1e5, 1e7, 1e9)
        for form in forms
    ]


def test_a_fit_finds_the_links_its_points_were_made_on() -> None:
    found = fit_links(points_on(NODE, (2, 4, 8, 16, 64)))
    assert figures(found["inter"]) == pytest.approx(figures(NODE.inter))
    assert figures(found["intra"]) == pytest.approx(figures(NODE.intra))
    given = fit_links(points_on(NODE, (8, 16)), NODE.intra)
    assert list(given) == ["inter"]
    assert figures(given["inter"]) == pytest.approx(figures(NODE.inter))


def figures(link: Link) -> tuple[float, ...]:
    return (link.bandwidth, link.latency, link.fixed)


def test_one_measurement_is_no_fit() -> None:
    with pytest.raises(PlanError, match=r"1 measurement\(s\) of the link inside(.|\n)*--sizes"):
        fit_links([Point(gather_terms(8, 8, 1e6), 1e-3)])
    with pytest.raises(PlanError, match="do not follow"):  # nothing grows with the size
        fit_links([Point(gather_terms(8, 8, size), 1e-3) for size in (1e3, 2e3)])


def bench_file(path: Path, node: Node, partitions: Sequence[int], device: str = "cuda") -> Path:
    """What mics bench collectives would write on a node where the model is exact."""
    rows: list[dict[str, Any]] = []
    k = node.gpus_per_node

    def add(collective: str, form: str, ranks: int, size: int, seconds: float) -> None:
        row = {"collective": collective, "form": form, "message_bytes": size, "ranks": ranks}
        rows.append(row | {"seconds": {"median": seconds}})

    for p in partitions:
        for size in (2**16, 2**20, 2**23, 2**26):
            forms: tuple[Form, ...] = ("flat", "hierarchical") if p > k else ("flat",)
            for form in forms:
                stages = gather_stages(node, p, size, form)
                add("all_gather", form, p, size, sum(s.seconds for s in stages))
            add("all_reduce", "flat", p, size, all_reduce_seconds(node, p, max(p // k, 1), size))
    document = {"gpus_per_node": k, "device": device, "measured": rows}
    path.write_text(json.dumps(document))
    return path


MANY = Node(
    "many",
    NODE.gpu,
    4,
    NODE.intra,
    NODE.inter,
    all_reduce=Link(8 * GB, 30e-6, fixed=40e-6),
)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_node_is_read_from_a_measurement(tmp_path: Path, device: str) -> None:
    truth = dataclasses.replace(MANY, gloo=device == "cpu")
    path = bench_file(tmp_path / "links.json", truth, (2, 4, 8, 16), device)
    found = measured_node(path, find_gpu("H100"))
    assert (found.gpus_per_node, found.measured_nodes) == (4, 4)
    for link in ("intra", "inter", "all_reduce"):
        assert figures(getattr(found, link)) == pytest.approx(figures(getattr(truth, link)))
    # So it says the same of 64 nodes, which nobody measured.
    for form in ("flat", "hierarchical"):
        ahead, known = (
            [s.seconds for s in gather_stages(node, 256, 1e8, form)]  # type: ignore[arg-type]
            for node in (found, truth)
        )
        assert ahead == pytest.approx(known)
    assert all_reduce_seconds(found, 64, 64, 1e8, 4) == pytest.approx(
        all_reduce_seconds(truth, 64, 64, 1e8, 4)
    )


@pytest.mark.parametrize(
    ("backend", "gloo"), [("gloo", True), ("third", False), ("undefined", True), (None, True)]
)
def test_a_profile_is_gloos_by_its_backend_before_its_device(
    tmp_path: Path, backend: str | None, gloo: bool
) -> None:
    path = bench_file(
        tmp_path / "links.json", dataclasses.replace(MANY, gloo=True), (2, 4, 8), "cpu"
    )
    path.write_text(json.dumps(json.loads(path.read_text()) | {"backend": backend}))
    assert measured_node(path, find_gpu("H100")).gloo is gloo


def test_one_number_of_ranks_shows_no_more_than_that(tmp_path: Path) -> None:
    """What a message takes whatever its size is then latency: too slow ahead, never too good."""
    found = measured_node(bench_file(tmp_path / "links.json", MANY, (8,)), find_gpu("H100"))
    assert found.inter.fixed == found.intra.fixed == 0
    assert found.inter.latency > MANY.inter.latency
    for form in ("flat", "hierarchical"):
        for p, least in ((8, 0.95), (64, 1.0), (256, 1.0)):
            ahead, known = (
                sum(s.seconds for s in gather_stages(node, p, 2**16, form))  # type: ignore[arg-type]
                for node in (found, MANY)
            )
            assert ahead >= known * least
            # Two stages begin twice, flat once: one latency for both is between them.
            assert p > 8 or ahead == pytest.approx(known, rel=0.05)


def test_one_node_has_no_link_between_nodes(tmp_path: Path) -> None:
    alone = measured_node(bench_file(tmp_path / "inside.json", MANY, (2, 4)), find_gpu("H100"))
    assert alone.most_nodes == 1
    with pytest.raises(PlanError, match="carries between nodes was never measured"):
        Cluster(alone, 2)
    assert alone.all_reduce is None
    assert figures(alone.intra) == pytest.approx(figures(MANY.intra))


def test_what_a_shaper_lets_through_is_left_out(tmp_path: Path) -> None:
    path = bench_file(tmp_path / "links.json", MANY, (2, 4, 8, 16))
    document = json.loads(path.read_text())
    for row in document["measured"]:
        if row["message_bytes"] == 2**20 and row["ranks"] > 4:
            row["seconds"]["median"] /= 100  # a burst
    path.write_text(json.dumps(document))
    found = measured_node(path, find_gpu("H100"))
    assert found.inter.bandwidth == pytest.approx(MANY.inter.bandwidth, rel=1e-6)


ROW = (
    '{"collective": "all_gather", "form": "flat", "message_bytes": 8, "ranks": 8, '
    '"seconds": {"median": 1.0}}'
)


def document(row: str, k: float = 2) -> str:
    return f'{{"gpus_per_node": {k}, "measured": [{row}]}}'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"gpus_per_node": 2, "measured": []}',
        '{"gpus_per_node": 2, "measured": [1]}',
        *(document(ROW, k) for k in (0, -4, 1.5, 3)),
        document(ROW.replace('"form"', '"shape"')),
        document(ROW.replace('"collective"', '"name"')),
        document(ROW.replace('"ranks": 8', '"ranks": 8.5')),
        document(ROW.replace("1.0", "NaN")),
        '{"gpus_per_node": 2, "measured": [{"seconds": {"median": 0}, "ranks": 2, '
        '"message_bytes": 8}]}',
        "[" * 100_000,
    ],
)
def test_a_file_that_is_no_measurement_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "links.json"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"no result of mics bench collectives"):
        measured_node(path, find_gpu("H100"))


def test_files_that_do_not_end_are_not_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"no result of mics bench(.|\n)*it is no regular file"):
        measured_node(Path("/dev/zero"), find_gpu("H100"))
    endless, large = tmp_path / "endless.toml", tmp_path / "large.toml"
    endless.symlink_to("/dev/zero")
    with pytest.raises(PlanError, match=r"There is no .*endless\.toml"):
        find_node(str(endless))
    with large.open("w") as file:
        file.truncate(2**40)
    with pytest.raises(PlanError, match=r"large\.toml is too large for a node"):
        find_node(str(large))
    with pytest.raises(
        PlanError, match=r"no result of mics bench(.|\n)*it has more than 67,108,864"
    ):
        measured_node(large, find_gpu("H100"))


@pytest.mark.parametrize("collective", ["all_gather", "all_reduce"])
def test_a_measurement_that_lacks_a_collective_is_refused(tmp_path: Path, collective: str) -> None:
    path = bench_file(tmp_path / "links.json", MANY, (4, 8))
    document = json.loads(path.read_text())
    kept = [row for row in document["measured"] if row["collective"] != collective]
    path.write_text(json.dumps(document | {"measured": kept}))
    with pytest.raises(PlanError, match=f"has no {collective.replace('_', '-')} among"):
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
        Cluster(find_node("p6-b300"), 2)
    with pytest.raises(PlanError, match=r"no node 'p4x'(.|\n)*did you mean 'p4de?'") as caught:
        find_node("p4x")
    assert "p6-b300" in str(caught.value)
    with pytest.raises(PlanError, match=r"no GPU 'H10O'(.|\n)*'H100'"):
        find_gpu("H10O")
    with pytest.raises(PlanError, match=r"no software stack(.|\n)*eager, fused"):
        find_stack("turbo")


def test_names_are_found_whatever_their_case() -> None:
    assert find_node("P4D") == find_node("P4d.24xLarge") == find_node("p4d")
    assert find_gpu("h100") == find_gpu("H100")
    assert find_stack("Eager") == find_stack("eager")
    with pytest.raises(PlanError, match=r"no GPU 'h10o'(.|\n)*did you mean 'H100'"):
        find_gpu("h10o")


@pytest.mark.parametrize(
    ("intra", "inter", "k", "words"),
    [
        (300, 3200, 8, "inter .* a node of 8 GPUs sends: 3200 GB/s(.|\n)*800 GB/s, 6400 Gbit/s"),
        (300, 3200, 8, "Write: 400 GB/s, if 3200 are Gbit/s"),
        (300, 400, 1, "a node of 1 GPUs sends: 400 GB/s(.|\n)*Write: 50 GB/s, if 400 are Gbit/s"),
        (7200, 400, 8, "intra .* a GPU sends inside a node: 7200 GB/s(.|\n)*Write: 900 GB/s"),
    ],
)
def test_bits_for_bytes_are_refused(
    intra: float, inter: float, k: int, words: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=words):
        described(memory_gib=80, intra_gb_s=intra, inter_gb_s=inter, gpus_per_node=k)
    path = tmp_path / "ours.toml"
    text = OURS.replace("350", str(intra)).replace("180", str(inter)).replace("= 8", f"= {k}")
    path.write_text(text)
    with pytest.raises(PlanError, match=words):
        find_node(str(path))


def test_a_node_of_ones_own(tmp_path: Path) -> None:
    form = catalogue().split("a .toml file:\n")[1]
    path = tmp_path / "ours.toml"
    path.write_text("\n".join(line.strip() for line in form.splitlines()))
    node = find_node(str(path))
    assert (node.name, node.gpu.name, node.price) == ("ours", "H100", 30.0)
    link = node.inter
    assert (link.bandwidth, link.latency, link.fixed) == pytest.approx((180 * GB, 20e-6, 5e-6))
    path.write_text(path.read_text().replace('"H100"', '"ours"'))
    assert find_node(str(path)).gpu.memory == 95 * 2**30
    path.write_text(path.read_text().replace("usable = 95", "usable = 97"))
    with pytest.raises(PlanError, match=r"usable of ours is more than its memory(.|\n)*97 of 96"):
        find_node(str(path))


def test_no_card_gives_all_the_memory_it_is_sold_with() -> None:
    """What torch reports as an H100's total capacity is 79.11 GiB; plans count with no more."""
    assert find_gpu("H100").memory == 79.11 * 2**30
    for gpu in gpus().values():
        assert gpu.sold is not None
        assert GIVEN * gpu.sold <= gpu.memory < gpu.sold
        assert "usable" in gpu.source or gpu.memory == GIVEN * gpu.sold


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
        ("nodes = " + "[" * 100_000, "is no TOML"),
        ("a = 1", "must describe one node"),
        ('[ours]\ngpu = "H100"', "ours lacks gpus_per_node, inter, intra"),
        (OURS.replace("H100", "H1000"), "a GPU that is not known, 'H1000'"),
        (OURS.replace("= 8", "= 0"), "must be a positive integer, at most 131,072, got 0"),
        (OURS.replace("{ bandwidth = 350, latency = 4 }", "350"), "intra of ours must be a table"),
        (OURS.replace("180", '"fast"'), "bandwidth of inter of ours must be a number"),
        (OURS.replace("180", "-180"), "not negative, got -180"),
        (OURS.replace("180", "0"), "bandwidth of inter of ours must be positive, got 0"),
        (OURS.replace("180", "nan"), "must be a number, not negative, got nan"),
        (OURS.replace("180", "inf"), "must be a number, not negative, got inf"),
        (OURS.replace("180", "180, line = 100"), "is above its line rate(.|\n)*180 of 100"),
        (OURS.replace("bandwidth = 350", "line = 350"), "intra of ours lacks bandwidth"),
        (OURS.replace('"H100"', '["H100"]'), "a GPU that is not known"),
        (OURS + "measured_nodes = true", "measured_nodes of ours must be a positive integer"),
        (OURS + 'measured_nodes = "4"', "measured_nodes of ours must be a positive integer"),
        (OURS + "source = 5", "source of ours must be text"),
        ("gpus = 5\n" + OURS, "gpus of .* must be a table"),
        ("[gpus]\nmine = 5\n" + OURS, "gpus.mine must be a table"),
        ("[gpus.mine]\nmemory = 0\npeak = 1\n" + OURS, "memory of mine must be positive"),
        ("[gpus.mine]\nmemory = 8\npeak = 0\n" + OURS, "peak of mine must be positive"),
        ("[gpus.h100]\nmemory = 8\npeak = 1\n" + OURS, "has the name of another GPU, H100"),
        (
            "[gpus.a]\nmemory = 8\npeak = 1\n[gpus.A]\nmemory = 9\npeak = 1\n" + OURS,
            "gpus.a of .* has the name of another GPU, a",
        ),
        (OURS + "price = 0", "price of ours must be positive, got 0"),
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
    assert (node.gpu.sold, node.gpu.memory) == (48 * 2**30, GIVEN * 48 * 2**30)
    assert node.inter.bandwidth == 25 * GB
    assert math.isclose(node.inter.latency, find_node("p4d").inter.latency)
    assert "computes like A100-40GB, as none was named" in node.gpu.source
    like = described(memory_gib=48, intra_gb_s=200, inter_gb_s=25, gpu=find_gpu("H100"))
    assert like.gpu.peak == find_gpu("H100").peak
    for bad in (0, -1, math.nan, math.inf):
        with pytest.raises(PlanError, match=f"inter must be positive, got {bad}"):
            described(memory_gib=48, intra_gb_s=200, inter_gb_s=bad)
    with pytest.raises(PlanError, match="gpus_per_node must be positive, got 0"):
        described(memory_gib=48, intra_gb_s=200, inter_gb_s=25, gpus_per_node=0)
