"""The most memory a GPU needs in a step, by phase and by kind.

With P the parameters a rank holds, in fp32 as FSDP2 keeps them, and a unit's parameters gathered in
the dtype of computation:

==================  ================================================================================
phase               beside model states, the gathered root and the activations kept until then
==================  ================================================================================
loss                logits and their gradients; the last block's gather, freed when forward is over
block backward      the block, gathered; the next one, prefetched; its gradients, whole; what it
                    computes; the block before it, being reduced
end of backward     the root's gradients, whole, and being reduced; the last block, being reduced
optimizer step      model states alone, and what the optimizer computes with
==================  ================================================================================

What activations need is read from a trace (``trace.py``). Gradients are alive from the first
reduction of a step to its end. Source of the order of events: FSDP2
(``torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py``, torch 2.13), checked against torch's
``FSDPMemTracker`` in ``benchmarks/memory_model.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Literal

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.offloaded import away
from mics.anatomy.recipe import Machine, Recipe
from mics.anatomy.sizes import UnitSize
from mics.anatomy.trace import ROOT, Trace
from mics.quantities import GIB

Phase = Literal["loss", "block backward", "end of backward", "optimizer step"]
PHASES: tuple[Phase, ...] = ("loss", "block backward", "end of backward", "optimizer step")

NOT_MODELLED = "workspaces of libraries, other processes, fragmentation beyond what is added"


@dataclass(frozen=True)
class Optimizer:
    """Bytes per trained parameter of a shard: kept, needed for a moment, read and written."""

    state_bytes: int
    step_bytes: int
    moved_bytes: int


OPTIMIZERS = {
    # Reads the parameter, its gradient and two moments, writes three of them; torch's foreach form
    # takes a shard for the root, and writes and reads it.
    "adamw": Optimizer(8, 4, 36),
    "adamw-fused": Optimizer(8, 0, 28),
    "sgd-momentum": Optimizer(4, 0, 20),
    "sgd": Optimizer(0, 0, 12),
}


NOTHING_ELSE = Machine(runtime_gib=0.0, communicator_gib=0.0, fragmentation=1.0)
"""A machine on which only tensors take memory."""


@dataclass(frozen=True)
class Need:
    """What is alive at one moment, bytes by kind."""

    parameters: int
    optimizer: int
    gradients: int = 0
    unsharded_blocks: int = 0
    prefetched_blocks: int = 0
    activations: int = 0
    logits: int = 0
    communication_buffers: int = 0
    communicators: int = 0

    @property
    def total(self) -> int:
        """Bytes of all kinds together."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Memory:
    """What a GPU needs at the largest moment of every phase."""

    phases: dict[Phase, Need] = field(default_factory=dict)

    @property
    def phase(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: self.phases[phase].total)

    @property
    def peak(self) -> int:
        """Bytes that phase needs."""
        return self.phases[self.phase].total


@dataclass(frozen=True)
class _Level:
    """What is kept at a moment of a micro-step, on any number of GPUs; bytes."""

    phase: Phase
    unit: int
    activations: int
    logits: int
    gradients: int  # whole ones, not yet reduced


def memory(
    anatomy: Anatomy,
    recipe: Recipe,
    machine: Machine = NOTHING_ELSE,
    *,
    gpus: int = 0,
    gpus_per_node: int = 0,
) -> Memory:
    """Work out what a GPU needs at most, phase by phase.

    Args:
        anatomy: sizes of the units, and a trace of a micro-step.
        recipe: how the step is run.
        machine: what it takes of a GPU beside tensors; nothing by default.
        gpus: all that train, whose groups have buffers; 0 counts no groups.
        gpus_per_node: k; 0 counts no second stage of a collective.
    """
    states = _States(anatomy.blocks, anatomy.root, recipe, machine, gpus, gpus_per_node)
    trace = anatomy.trace(recipe.micro_batch, recipe.sequence)
    phases: dict[Phase, Need] = {"optimizer step": states.at_optimizer_step()}
    for level in _levels(trace, recipe.checkpointing, recipe.offload):
        need = states.at(level)
        if level.phase not in phases or need.total > phases[level.phase].total:
            phases[level.phase] = need
    return Memory({phase: phases[phase] for phase in PHASES if phase in phases})


def states_and_blocks(blocks: Sequence[UnitSize], root: UnitSize, recipe: Recipe) -> Need:
    """Add up what is known before any activation is: model states and gathered blocks.

    Args:
        blocks: sizes of the blocks.
        root: size of what is outside of them.
        recipe: how a step is run.
    """
    states = _States(blocks, root, recipe, NOTHING_ELSE)
    moments = [
        states.at(_Level("block backward", number, 0, 0, unit.trained() * recipe.compute_bytes))
        for number, unit in enumerate(blocks)
    ]
    return max([*moments, states.at_optimizer_step()], key=lambda need: need.total)


def with_fragmentation(need: Memory, machine: Machine) -> float:
    """Work out the bytes the allocator asks for; buffers of groups are not its own."""
    fixed = need.phases[need.phase].communicators
    return (need.peak - fixed) * machine.fragmentation + fixed


def num_groups(recipe: Recipe, gpus: int, gpus_per_node: int) -> int:
    """Count the groups of ranks that a rank is in and that have more than one member.

    The world is one; two stages need a group for each, of hop 1 or, below a node, of hop 2.
    """
    p = recipe.partition
    between_replicas = p < gpus_per_node < gpus and recipe.may_sum_inside_nodes
    stages = recipe.two_stages(gpus_per_node) or between_replicas
    return 1 + (p > 1) + (p < gpus) + 2 * stages


@lru_cache(maxsize=256)
def _levels(trace: Trace, checkpointing: bool, offload: bool) -> tuple[_Level, ...]:
    return tuple(_each_level(trace, checkpointing, offload))


def _each_level(trace: Trace, checkpointing: bool, offload: bool) -> Iterator[_Level]:
    blocks = len(trace.block_inputs)
    forgotten = _forgotten(trace) if checkpointing else [0] * (blocks + 1)
    if offload:
        gone = away(trace, checkpointing)
        forgotten = [freed + more for freed, more in zip(forgotten, gone, strict=True)]
    last_forward = max(n for n, s in enumerate(trace.segments) if s.direction == "forward")
    backward_begun = False
    to_come = blocks  # blocks whose backward is still to come
    for number, segment in enumerate(trace.segments):
        if segment.unit != ROOT and segment.direction == "backward":
            backward_begun = True
            to_come = segment.unit
            kept = segment.peak - segment.gradients - forgotten[segment.unit]
            yield _Level("block backward", segment.unit, kept, 0, segment.gradients)
        elif segment.unit == ROOT and backward_begun and to_come == 0:
            kept = segment.peak - segment.gradients
            yield _Level("end of backward", ROOT, kept, 0, segment.gradients)
        elif segment.unit == ROOT and number >= last_forward and not backward_begun:
            kept = segment.start - forgotten[blocks]
            logits = segment.peak - segment.start - segment.gradients
            yield _Level("loss", ROOT, kept, logits, segment.gradients)


def _forgotten(trace: Trace) -> list[int]:
    """Count what checkpointing has freed when the first n blocks have run forward, for every n."""
    blocks = len(trace.block_inputs)
    before = [0] * (blocks + 1)  # alive when block n begins, n = blocks: when all are over
    for segment, following in pairwise(trace.segments):
        if segment.unit != ROOT and segment.direction == "forward":
            before[segment.unit] = segment.start
            before[segment.unit + 1] = following.start
    # Of the last block its output stays, which is as large as what entered it.
    kept = [0, *accumulate([*trace.block_inputs[1:], trace.block_inputs[-1]])]
    return [max(now - before[0] - inputs, 0) for now, inputs in zip(before, kept, strict=True)]


_ERROR_BYTES = 4


class _States:
    """Model states and buffers of one recipe."""

    def __init__(
        self,
        blocks: Sequence[UnitSize],
        root: UnitSize,
        recipe: Recipe,
        machine: Machine,
        gpus: int = 0,
        gpus_per_node: int = 0,
    ) -> None:
        p, optimizer = recipe.partition, OPTIMIZERS[recipe.optimizer]
        units = [*blocks, root]
        trained = sum(unit.trained(p) for unit in units) // p
        self._prefetch = recipe.prefetch
        # In two stages the message between nodes has a buffer of its own, a unit's size over this.
        self._staged = gpus_per_node if recipe.two_stages(gpus_per_node) else 0
        self._gathered = [unit.numel(p) * recipe.compute_bytes for unit in units]
        buffers = recipe.reduce_bytes * machine.reductions
        reduced = [unit.trained(p) * buffers for unit in units]
        self._reduced = [size + self._buffer(size) for size in reduced]
        self._whole = [unit.trained(p) * recipe.compute_bytes for unit in units]
        shards = [unit.trained(p) // p * recipe.master_bytes for unit in units]
        self._all_shards = sum(shards)
        # Backward reduces the last block first.
        behind = list(accumulate(reversed(shards[:-1]), initial=0))[::-1]
        several = recipe.micro_steps > 1  # gradients are alive from the second forward on
        self._shards_at = [
            self._all_shards if several else behind[n + 1] for n in range(len(shards) - 1)
        ]
        self._shards_before = self._all_shards if several else 0
        self._shards_of_blocks = self._all_shards if several else behind[0]
        self._step = trained * optimizer.step_bytes
        held_back = 0  # beside the optimizer's state, of every value that hop 2 rounds
        if recipe.holds_back and gpus != p:
            held_back = sum(unit.matrices(p) for unit in units) // p * _ERROR_BYTES
        owners = gpus // p if recipe.dealt_states and gpus else 1
        groups = num_groups(recipe, gpus, gpus_per_node) if gpus else 0
        buffers_of_groups = groups * round(machine.communicator_gib * GIB)
        self._fixed = {
            "parameters": sum(unit.numel(p) for unit in units) // p * recipe.master_bytes,
            "optimizer": -(-trained // owners) * optimizer.state_bytes + held_back,
            "communicators": buffers_of_groups + round(machine.runtime_gib * GIB),
        }

    def _buffer(self, size: int) -> int:
        """Work out the buffer of the stage between nodes."""
        return size // self._staged if self._staged else 0

    def at_optimizer_step(self) -> Need:
        """Add up the moment when every gradient is reduced."""
        return Need(**self._fixed, gradients=self._all_shards, communication_buffers=self._step)

    def at(self, level: _Level) -> Need:
        """Add up a moment of the micro-step."""
        root = self._gathered[-1]
        if level.phase == "loss":
            ahead = self._gathered[-2:-1] if self._prefetch else []
            return Need(
                **self._fixed,
                gradients=self._shards_before + level.gradients,
                unsharded_blocks=root,
                prefetched_blocks=sum(ahead),
                activations=level.activations,
                logits=level.logits,
                communication_buffers=self._buffer(sum(ahead)),
            )
        if level.phase == "block backward":
            unit = level.unit
            ahead = self._gathered[max(unit - self._prefetch, 0) : unit]
            behind = self._reduced[unit + 1] if unit + 2 < len(self._reduced) else 0
            return Need(
                **self._fixed,
                gradients=self._shards_at[unit] + level.gradients,
                unsharded_blocks=root + self._gathered[unit],
                prefetched_blocks=sum(ahead),
                activations=level.activations,
                communication_buffers=behind + self._buffer(sum(ahead)),
            )
        # The root's own reduction needs its whole gradients and a buffer, but no parameters.
        reducing = max(self._reduced[-1], root + self._reduced[0])
        return Need(
            **self._fixed,
            gradients=self._shards_of_blocks + max(level.gradients, self._whole[-1]),
            unsharded_blocks=root if reducing > self._reduced[-1] else 0,
            activations=level.activations,
            communication_buffers=reducing - (root if reducing > self._reduced[-1] else 0),
        )
