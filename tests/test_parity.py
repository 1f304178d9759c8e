"""The same seed and data give the same training, whatever the layout."""

from __future__ import annotations

import pytest
import torch
from parity import Outcome, Run, distance, identical, quiet, train_alone, train_sharded
from ranks import run_ranks
from torch.distributed.fsdp import MixedPrecisionPolicy

from mics.topology import possible_partitions

WORLD = 8


def _train_all(runs: list[Run]) -> list[Outcome]:
    return [quiet(lambda run=run: train_sharded(run)) for run in runs]


def assert_parity(runs: list[Run], tolerance: float) -> None:
    by_rank = run_ranks(_train_all, WORLD, runs)
    for position, run in enumerate(runs):
        outcomes = [outcomes[position] for outcomes in by_rank]
        assert all(identical(outcomes[0], other) for other in outcomes), f"ranks differ: {run}"
        apart = distance(outcomes[0], train_alone(run, WORLD))
        assert apart <= tolerance, f"{apart:.2e} apart: {run}"


def layouts(gpus_per_node: int) -> list[tuple[int, str]]:
    """Every legal p, and both forms where there are two."""
    return [
        (p, form)
        for p in possible_partitions(WORLD // gpus_per_node, gpus_per_node)
        for form in ("flat", "hierarchical")
        if form == "flat" or p > gpus_per_node > 1
    ]


@pytest.mark.parametrize(
    "gpus_per_node",
    [2, *(pytest.param(k, marks=pytest.mark.extra) for k in (1, 4, 8))],
)
def test_sgd_equals_single_process_for_every_layout(gpus_per_node: int) -> None:
    runs = [
        Run(p, gpus_per_node, micro_steps=s, collectives=form)
        for p, form in layouts(gpus_per_node)
        for s in (1, 3)
    ]
    assert_parity(runs, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "gpus_per_node", [4, *(pytest.param(k, marks=pytest.mark.extra) for k in (1, 2, 8))]
)
def test_adamw_equals_single_process_for_every_layout(gpus_per_node: int) -> None:
    runs = [
        Run(p, gpus_per_node, micro_steps=s, collectives=form, optimizer="adamw")
        for p, form in layouts(gpus_per_node)
        for s in (1, 3)
    ]
    assert_parity(runs, 1e-5)


ODDITIES = {
    "clipping": {"clip": 0.01},
    "tied": {"model": {"tied": True}},
    "frozen": {"model": {"frozen": True}, "clip": 0.01},
    "layer used three times": {"model": {"uses": 3}},
    "activation checkpointing": {"shard": {"activation_checkpointing": True}},
    "reshard_after_forward True": {"shard": {"reshard_after_forward": True}},
    "reshard_after_forward False": {"shard": {"reshard_after_forward": False}},
    "reshard_after_forward 2": {"shard": {"reshard_after_forward": 2}},
    "everything at once": {
        "clip": 0.01,
        "model": {"tied": True, "frozen": True, "uses": 3},
        "shard": {"activation_checkpointing": True, "reshard_after_forward": False},
    },
}


# Of these, "everything at once" has all but what it is called.
IN_EVERYTHING = [
    "tied",
    "layer used three times",
    "activation checkpointing",
    "reshard_after_forward False",
]


@pytest.mark.parametrize(
    "oddities",
    [
        [oddity for oddity in ODDITIES if oddity not in IN_EVERYTHING],
        pytest.param(IN_EVERYTHING, marks=pytest.mark.extra),
    ],
    ids=["one by one and all", "those that all has"],
)
def test_oddities_equal_single_process(oddities: list[str]) -> None:
    runs = [
        Run(p, 2, collectives=form, micro_steps=2, **ODDITIES[oddity])
        for oddity in oddities
        for p, form in [(2, "flat"), (4, "hierarchical"), (8, "hierarchical")]
        if oddity != "reshard_after_forward 2" or p > 2
    ]
    assert_parity(runs, 1e-6)


# dynamo looks at .grad of non-leaf tensors itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.extra
def test_compiled_blocks_equal_single_process() -> None:
    compiled = {"compile": {"backend": "aot_eager"}}
    runs = [
        Run(4, 2, 2, "hierarchical", steps=2, shard=compiled),
        Run(2, 2, 2, "flat", steps=2, shard=compiled | {"activation_checkpointing": True}),
    ]
    assert_parity(runs, 1e-6)


def test_bf16_stays_within_bf16_rounding() -> None:
    """Compute in bf16 (8 bits of mantissa), reduce in fp32: losses within 2 ** -7 of fp32's."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    runs = [Run(p, 2, collectives=form, mp_policy=policy, micro_steps=2) for p, form in layouts(2)]
    by_rank = run_ranks(_train_all, WORLD, runs)
    reference = train_alone(runs[0], WORLD)
    for position, run in enumerate(runs):
        outcomes = [outcomes[position] for outcomes in by_rank]
        assert all(identical(outcomes[0], other) for other in outcomes)
        for ours, exact in zip(outcomes[0].losses, reference.losses, strict=True):
            assert abs(ours - exact) <= 2**-7 * exact, run


@pytest.mark.extra
def test_partition_size_changes_only_the_rounding_of_the_reduction_order() -> None:
    """Layouts agree with each other in bf16 too, far closer than bf16 rounds."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    runs = [Run(p, 2, collectives="flat", mp_policy=policy) for p in (1, 2, 4, 8)]
    outcomes = run_ranks(_train_all, WORLD, runs)[0]
    for other in outcomes[1:]:
        assert distance(other, outcomes[0]) <= 2**-9
