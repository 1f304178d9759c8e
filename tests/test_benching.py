"""Engines side by side: the same training, honest arithmetic, DeepSpeed in processes of its own."""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import errors_of_ranks, run_ranks

from mics.__main__ import main
from mics.benching import side_by_side
from mics.benching.collectives import keep_choices, measure_collectives
from mics.benching.contestants import Contestant, Layout
from mics.benching.deepspeed_child import Order, configuration
from mics.benching.deepspeed_parent import RELEASES, DeepSpeed, find_python
from mics.benching.dilated import CLUSTERS, Stretched, arithmetic
from mics.benching.options import MODES, OWN_ENGINES, Dilation, Workload
from mics.benching.picture import plot_comparison
from mics.benching.side_by_side import Compared, agree, compare
from mics.benching.spread import Spread
from mics.benching.workloads import Language
from mics.communication.forms import Choice, choices_of, measure
from mics.errors import MicsError
from mics.ranks.mesh import groups_of, init_mesh, ranks_of

SMALL = Workload(hidden=16, layers=2, rows=1, length=16, micro_steps=2)
ROOT = Path(__file__).parents[1]


def _compared(work: Language | Stretched) -> list[Compared]:
    torch.set_num_threads(1)
    # FSDP2 of BERT's outputs, of which nothing is changed in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    engines = [Contestant(name, work, Layout(2, 2)) for name in (*OWN_ENGINES, *MODES)]
    return compare(engines, 2, told=lambda *_: None)


@pytest.mark.parametrize("kind", ["gpt", pytest.param("bert", marks=pytest.mark.extra), "dilated"])
def test_all_engines_have_the_same_losses(kind: str) -> None:
    work: Language | Stretched = Language(Workload(kind, 16, 2, 1, 16, 2))
    if kind == "dilated":
        work = Stretched(Dilation(micro_steps=2, blocks=2, block_bytes=2**12), 1e9)
    for found in run_ranks(_compared, 4, work):
        assert [one.engine for one in found] == [*OWN_ENGINES, *MODES]
        assert agree(found)
        assert len({*found[0].losses}) == 3  # it trains


class _Counting:
    """An engine that keeps what it was called for."""

    name = "counting"

    def __init__(self) -> None:
        self.calls: list[str] = []

    def step(self) -> float:
        self.calls.append("step")
        return float(len(self.calls))

    def land(self) -> None:
        self.calls.append("land")


def _turns() -> tuple[Compared, list[str]]:
    def timed(turn: Callable[[], object], _: torch.device) -> float:
        turn()
        return 0.6

    side_by_side.slowest_seconds = timed  # of this process, which is a rank
    engine = _Counting()
    (found,) = compare([engine], 2, 3, told=lambda *_: None)
    return found, engine.calls


def test_an_engine_lands_once_in_a_turn_and_times_are_a_steps() -> None:
    for found, calls in run_ranks(_turns, 2):
        assert calls == ["step", "step", "step", "land"] * 3
        assert found.losses == [1.0, 2.0, 3.0, 5.0, 6.0, 7.0, 9.0, 10.0, 11.0]
        assert found.seconds.low == found.seconds.high == pytest.approx(0.2)


def _one(engine: str, losses: list[float], seconds: float = 1.0, sent: int | None = 10) -> Compared:
    spread = Spread(seconds, seconds, seconds)
    return Compared(engine, spread, Spread(1.0, 1.0, 1.0), sent, losses)


def test_an_engine_with_other_losses_is_noticed() -> None:
    same = [_one("mics", [2.0, 1.0]), _one("fsdp2", [2.0, 1.00005]), _one("computation", [9.0])]
    assert agree(same)
    assert not agree([*same, _one("ddp", [2.0, 1.001])])
    assert agree([*same, _one("mics fp8", [2.0, 1.001])])
    assert not agree([*same, _one("mics fp8", [2.0, 1.1])])


def test_the_limit_is_the_larger_of_computation_and_bytes_over_the_rate() -> None:
    one = _one("mics", [1.0], sent=25_000_000)
    assert one.limit(computation=0.5, link_bits=200e6) == 1.0
    assert one.limit(computation=2.0, link_bits=200e6) == 2.0
    assert one.limit(computation=2.0, link_bits=None) is None
    assert _one("mics", [1.0], sent=None).limit(2.0, 200e6) is None


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_stretching_keeps_the_ratio_of_communication_to_computation(cluster: str) -> None:
    times = arithmetic(Dilation(cluster=cluster, block_bytes=2**20), link_bits=100e6)
    assert times.block_on_link == 2**20 / 12.5e6
    assert times.forward / times.block_on_link == pytest.approx(
        times.real_forward / times.real_block_on_link
    )
    assert times.factor == pytest.approx(times.forward / times.real_forward)
    assert times.backward == pytest.approx(3 * times.forward)


def test_the_real_times_are_those_of_the_model() -> None:
    """BERT 10B: 12 h^2 + 13 h parameters a layer, 2 FLOPs per weight and token, attention.

    On 8 nodes the catalogue's p3dn carries 10 GB/s (8 / 2) ** -0.17 between them.
    """
    times = arithmetic(Dilation("bert-10b", "p3dn"), link_bits=100e6)
    parameters = 12 * 2560**2 + 13 * 2560
    assert times.real_block_bytes == 2 * parameters
    assert times.real_block_on_link == pytest.approx(2 * parameters / (10e9 * 4**-0.17))
    tokens = 8 * 512
    flops = tokens * (2 * 12 * 2560**2 + 4 * 512 * 2560)
    assert times.real_forward == pytest.approx(flops / 62.5e12)


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    compared = [_one("mics", [1.0], 1.0), _one("fsdp2", [1.0], 3.0), _one("computation", [], 0.8)]
    for link_bits in (200e6, None):
        plot_comparison(compared, tmp_path / "picture.png", "a title", link_bits)
        assert (tmp_path / "picture.png").stat().st_size > 10_000


def _chosen_by_measurement() -> dict[Choice, str]:
    groups = groups_of(init_mesh(partition=4, gpus_per_node=2))
    found = measure_collectives(groups, [2**16], repeats=1, link_bits=None, told=lambda _: None)
    keep_choices(groups, found)
    return dict(choices_of(groups))


_ASKED = ("all_gather", 16, "float32")


def _chosen_by_profile() -> dict[Choice, str]:
    groups = groups_of(init_mesh(partition=4, gpus_per_node=2))
    ranks = ranks_of(groups.shard)
    measure(groups, groups.shard, ranks, "all_gather", 2**16, torch.float32)
    return dict(choices_of(groups))


def test_what_bench_collectives_measures_is_what_later_runs_choose(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MICS_PROFILE", str(tmp_path / "profile.json"))
    measured, *others = run_ranks(_chosen_by_measurement, 4)
    assert all(other == measured for other in others)
    kinds = {"all_gather", "reduce_scatter", "all_reduce"}
    assert {choice.collective for choice in measured} == kinds
    written = (tmp_path / "profile.json").read_text()
    asked = {c: form for c, form in measured.items() if c[:1] + c[3:] == _ASKED}
    assert len(asked) == 1
    assert run_ranks(_chosen_by_profile, 4) == [asked] * 4
    assert (tmp_path / "profile.json").read_text() == written  # nothing was measured again


# -- DeepSpeed ------------------------------------------------------------------------------------


def test_a_missing_environment_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICS_BENCH_ENVIRONMENTS", str(tmp_path))
    with pytest.raises(MicsError, match=r"DeepSpeed 0\.19\.2(.|\n)*make bench-environments"):
        find_python("deepspeed mics")


def test_what_deepspeed_is_told() -> None:
    def zero(name: str, partition: int = 2) -> object:
        order = Order(name, {}, None, partition, gpus_per_node=2)
        return configuration(order, micro_batch=1, micro_steps=4)["zero_optimization"]

    assert zero("zero2") == {"stage": 2}
    assert zero("zero3") == {"stage": 3}
    assert zero("hpz") == {"stage": 3, "zero_hpz_partition_size": 2}
    for partition, two_stages in ((2, False), (4, True)):
        assert zero("deepspeed mics", partition) == {
            "stage": 3,
            "mics_shard_size": partition,
            "mics_hierarchical_params_gather": two_stages,
        }


def test_computation_alone_is_nobodys_reference() -> None:
    spread = Spread.of([1.0])
    alone = Compared("computation", spread, spread, None, [3.0])
    ours, theirs = (Compared(name, spread, spread, None, [2.0]) for name in ("mics", "fsdp2"))
    assert agree([alone, ours, theirs])
    assert not agree([alone, ours, dataclasses.replace(theirs, losses=[2.1])])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "nope"}, "no model 'nope'"),
        ({"block_bytes": 100}, r"rows of 256 bytes(.|\n)*--dilation.block-bytes 256"),
        ({"micro_steps": 0}, "micro_steps must be at least 1"),
    ],
)
def test_a_dilation_that_cannot_be_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(MicsError, match=words):
        arithmetic(Dilation(**change), link_bits=100e6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            ["train", "--partition", "1", "--steps", "0"],
            "--steps must be a whole number from 1",
        ),
        (
            ["collectives", "--repeats", "0"],
            "--repeats must be a whole number from 1",
        ),
        (["collectives", "--sizes", "0KiB"], "'0KiB' is no size"),
        (
            ["collectives", "--sizes", "9999999999GiB"],
            "at most 1,024 GiB, got 9999999999GiB",
        ),
    ],
)
def test_mics_bench_refuses_what_makes_no_sense(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *options]) == 1
    assert words in capsys.readouterr().err


def test_sizes_of_deepspeed_are_scaled_as_the_stand_in_is() -> None:
    order = Order("zero3", {}, None, 2, gpus_per_node=2, scale=0.01)
    zero = configuration(order, micro_batch=1, micro_steps=4)["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == 10_000_000
    assert zero["stage3_param_persistence_threshold"] == 1_000
    # 6 blocks of 2 MiB in fp32 for 127 blocks of a 10B model.
    scale = arithmetic(Dilation("bert-10b", "p3dn"), link_bits=100e6).scale
    assert 1e10 * scale == pytest.approx(6 * 2**19, rel=0.01)


STAND_IN = """
import torch, torch.distributed as dist
print("a library that prints to standard output")
class ops:
    __compatible_ops__ = {}
class comm:
    pass
def init_distributed(dist_backend):
    assert dist.is_initialized() and dist.get_backend() == dist_backend
class Engine:
    def __init__(self, model, optimizer, config):
        self.model, self.optimizer, self.left = model, optimizer, 0
        self.micro_steps = config["gradient_accumulation_steps"]
    def __call__(self, **inputs):
        return self.model(**inputs)
    def backward(self, loss):
        (loss / self.micro_steps).backward()
    def step(self):
        self.left += 1
        if self.left % self.micro_steps == 0:
            for param in self.model.parameters():
                dist.all_reduce(param.grad)
                param.grad /= dist.get_world_size()
            self.optimizer.step()
            self.optimizer.zero_grad()
def initialize(model, optimizer, config):
    if config["zero_optimization"]["stage"] == 2:
        raise RuntimeError("stage 2 is broken here")
    return Engine(model, optimizer, config), None
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Environments whose DeepSpeed is a few lines: what is tested is everything around it."""
    for release in set(RELEASES.values()):
        place = tmp_path / f".venv-deepspeed-{release}" / "bin"
        place.mkdir(parents=True)
        start = f'#!/bin/sh\nexec "{sys.executable}" "$@"\n'
        (place / "python").write_text(start)
        (place / "python").chmod(0o755)
    (tmp_path / "deepspeed.py").write_text(STAND_IN)
    monkeypatch.setenv("MICS_BENCH_ENVIRONMENTS", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def _fields(work: Workload) -> dict[str, object]:
    return dict(vars(work))


def _beside(names: tuple[str, ...], ranks_per_node: int = 2) -> list[Compared]:
    torch.set_num_threads(1)
    engines: list[Contestant | DeepSpeed] = [
        Contestant("mics", Language(SMALL), Layout(2, ranks_per_node)),
        *(DeepSpeed(Order(name, _fields(SMALL), None, 2, ranks_per_node)) for name in names),
    ]
    return compare(engines, 1, told=lambda *_: None)


@pytest.mark.slow
@pytest.mark.extra
def test_a_child_steps_in_turn_with_the_same_losses(stand_in: Path) -> None:
    for found in run_ranks(_beside, 2, ("zero3",), 1):
        assert [one.engine for one in found] == ["mics", "zero3"]
        assert agree(found)


def _broken() -> None:
    DeepSpeed(Order("zero2", _fields(SMALL), None, 1, 1))


@pytest.mark.slow
@pytest.mark.extra
def test_a_child_that_ends_says_why(stand_in: Path) -> None:
    for text in errors_of_ranks(_broken, 2):
        assert "DeepSpeed's zero2 ended" in text
        assert "stage 2 is broken here" in text


@pytest.mark.extra
def test_deepspeed_trains_as_mics_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICS_BENCH_ENVIRONMENTS", str(ROOT))
    try:
        for name in RELEASES:
            find_python(name)
    except MicsError:
        pytest.skip("DeepSpeed's environments are not there: make bench-environments")
    for found in run_ranks(_beside, 4, tuple(RELEASES)):
        assert agree(found)
