"""A case of the fuzzer: everything that is drawn, and nothing else, from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, fields, replace
from typing import Any

WORLD = 4

LEFT_AFTER_BACKWARD = ["raise after backward", "break"]

Uses = dict[int, str]
"""By block that runs, the experts it uses."""


@dataclass(frozen=True)
class Layout:
    """How the model is sharded; arguments of ``mics.shard``."""

    partition: int
    gpus_per_node: int
    collectives: str
    overlap: bool
    reshard_after_forward: bool | None
    activation_checkpointing: bool


@dataclass(frozen=True)
class Shape:
    """The model."""

    inner: tuple[int, ...]  # the width inside each block
    biases: bool
    tied: bool
    repeats: tuple[int, ...]  # how often each block runs in a forward, on all ranks
    frozen: tuple[str, ...]  # beginnings of parameters' names


@dataclass(frozen=True)
class Step:
    """One optimizer step, and what happens around it."""

    micro_steps: int = 1
    loop: str = "micro_steps"
    normalise: str | None = None
    uses: str = "all"
    unused: tuple[str, ...] = ()  # "2b": the second expert of block 2, by no rank
    leaves_out: bool = False  # ranks leave out backwards
    peek: str | None = None  # a forward without backward, before the step
    peek_after: bool = False  # and once more between backward and optimizer step
    ends: tuple[str, int] | None = None  # how the step is left, and in which micro-step
    clip: float | None = None  # the order of the norm
    zero: str = "to none"  # or "to zeros", by the "model", or "kept"
    flips: str | None = None  # parameters whose requires_grad changes after the step
    state_dict: bool = False  # taken and loaded again after the step
    moves_to: Layout | None = None  # saved, and loaded into a model of this layout


@dataclass(frozen=True)
class Case:
    """A model and how it is trained."""

    seed: int
    layout: Layout
    shape: Shape
    steps: tuple[Step, ...]
    optimizers: int
    sgd: dict[str, Any] = field(default_factory=dict)
    early_optimizer: bool = True  # made before the first forward
    dealt: bool = False  # its state, to the replicas

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {_spelled(self.layout)}", f"  {_spelled(self.shape)}"]
        lines += [f"  step {i}: {_spelled(step, Step())}" for i, step in enumerate(self.steps)]
        made = "before" if self.early_optimizer else "after"
        dealt = ", of mics.owned" if self.dealt else ""
        made += " the first forward"
        lines += [f"  {self.optimizers} optimizer(s) made {made}{dealt}: {self.sgd}"]
        return "\n".join(lines)

    def uses_of(self, step: int, micro_step: int, rank: int) -> Uses:
        """What a rank's data uses in a micro-step."""
        how = self.steps[step].uses
        who = {"rank": rank, "replica": rank // self.layout.partition}.get(how.split()[-1], 0)
        draw = random.Random(f"{self.seed} {step} {micro_step} {who}")
        uses: Uses = {}
        for block in range(len(self.shape.inner)):
            runs = "blocks" not in how or draw.random() < 0.65
            experts = draw.choice(["a", "b", "ab", ""]) if "experts" in how else "ab"
            if runs:
                unused = self.steps[step].unused
                uses[block] = "".join(e for e in experts if f"{block}{e}" not in unused)
        return uses

    def has_backward(self, step: int, micro_step: int, rank: int) -> bool:
        """Whether a rank runs the backward of a micro-step."""
        draw = random.Random(f"backward {self.seed} {step} {micro_step} {rank}")
        return not self.steps[step].leaves_out or draw.random() < 0.7

    def rows(self, step: int, micro_step: int, rank: int) -> int:
        """Rows of a rank's micro-batch, the tokens of a loss that is a sum."""
        draw = random.Random(f"rows {self.seed} {step} {micro_step} {rank}")
        return draw.randint(1, 4) if self.steps[step].normalise == "tokens" else 3


def draw_case(seed: int) -> Case:
    """Draw the case of a seed."""
    draw = random.Random(seed)
    gpus_per_node = draw.choice([1, 2, 2, 2, 4])
    layout = _layout(draw, gpus_per_node)
    shape = _shape(draw)
    count = draw.randint(2, 4)
    steps = [_step(draw, layout, shape, is_last=index == count - 1) for index in range(count)]
    for index in range(count - 1):
        # What is kept would be divided once more.
        if steps[index + 1].normalise is None and draw.random() < 0.2:
            steps[index] = replace(steps[index], zero="kept")
    sgd: dict[str, Any] = {"lr": 0.1}
    if draw.random() < 0.6:
        sgd |= {"momentum": 0.9, "dampening": draw.choice([0.0, 0.3])}
    if draw.random() < 0.5:
        sgd["weight_decay"] = 0.1
    case = Case(seed, layout, shape, tuple(steps), draw.choice([1, 1, 2]), sgd, draw.random() < 0.5)
    case = _in_two_stages(case) if random.Random(f"stages {seed}").random() < 0.7 else case
    return _dealt(case) if random.Random(f"deals {seed}").random() < 0.3 else case


def _in_two_stages(case: Case) -> Case:
    """Run hop 2 in two stages, where nodes have several replicas each."""
    layout = case.layout
    if (layout.partition, layout.gpus_per_node) != (1, 2):
        return case
    return replace(case, layout=replace(layout, collectives="hierarchical"))


def _dealt(case: Case) -> Case:
    """Deal the optimizers' state of a case, and leave out of it what is refused then."""
    steps = [
        replace(
            step,
            loop="micro_steps" if step.loop == "by hand" else step.loop,
            peek="no_grad" if step.peek == "with gradients" else step.peek,
            zero="to none",
            flips=None,
        )
        for step in case.steps
    ]
    return replace(case, steps=tuple(steps), dealt=True)


def _layout(draw: random.Random, gpus_per_node: int) -> Layout:
    partition = draw.choice([1, 2, 2, 4])
    hierarchical = partition == 4 and gpus_per_node == 2 and draw.random() < 0.7
    return Layout(
        partition,
        gpus_per_node,
        collectives="hierarchical" if hierarchical else "flat",
        overlap=draw.random() < 0.6,
        reshard_after_forward=draw.choice([None, None, True, False]),
        activation_checkpointing=draw.random() < 0.25,
    )


def _shape(draw: random.Random) -> Shape:
    blocks = draw.randint(1, 4)
    parts = [f"blocks.{i}.{part}" for i in range(blocks) for part in ("norm", "a", "b", "")]
    frozen = draw.sample([*parts, "first"], k=draw.choice([0, 0, 1, 2]))
    repeats = draw.choice([1, 1, 1, 2])
    return Shape(
        inner=tuple(draw.randint(3, 7) for _ in range(blocks)),
        biases=draw.random() < 0.7,
        tied=draw.random() < 0.3,
        repeats=tuple(draw.randint(1, repeats) for _ in range(blocks)),
        frozen=tuple(frozen),
    )


def _step(draw: random.Random, layout: Layout, shape: Shape, *, is_last: bool) -> Step:
    micro_steps = draw.randint(1, 3)
    loop = draw.choice(["micro_steps", "micro_steps", "micro_step", "finish_step", "by hand"])
    by_hand = loop == "by hand"
    uses = ["all", "experts per rank"]
    if max(shape.repeats) == 1:
        uses += ["blocks per rank", "blocks per replica", "blocks and experts per rank"]
    blocks = range(len(shape.inner))
    parts = [f"blocks.{i}.{part}" for i in blocks for part in ("a", "b", "")]
    how = draw.choice(uses)
    ends = _end(draw, micro_steps, skips="blocks" in how)
    # Of a backward that a rank leaves out, the others know when the micro-step has ended.
    may_leave_out = not by_hand and (ends is None or ends[0] not in LEFT_AFTER_BACKWARD)
    moves = not is_last and draw.random() < 0.25
    return Step(
        micro_steps,
        loop,
        normalise=None if by_hand else draw.choice([None, "micro_steps", "tokens"]),
        uses=how,
        unused=tuple(f"{i}{e}" for i in blocks for e in "ab" if draw.random() < 0.15),
        leaves_out=may_leave_out and draw.random() < 0.3,
        peek=draw.choice([None, None, "no_grad", "inference_mode", "with gradients"]),
        peek_after=draw.random() < 0.2,
        ends=ends,
        clip=draw.choice([None, None, 2.0, float("inf")]),
        zero=draw.choice(["to none", "to none", "model", "to zeros"]),
        flips=draw.choice(parts) if draw.random() < 0.25 else None,
        state_dict=draw.random() < 0.15,
        moves_to=_layout(draw, layout.gpus_per_node) if moves else None,
    )


def _end(draw: random.Random, micro_steps: int, *, skips: bool) -> tuple[str, int] | None:
    """A step that is left before its last micro-step is complete, sometimes."""
    if draw.random() > 0.2:
        return None
    kinds = ["raise before forward", "raise before backward"]
    if not skips:  # a rank that skips the last block would leave the others alone in it
        kinds += ["raise in forward"]
    at = draw.randrange(micro_steps)
    if at < micro_steps - 1:
        kinds += LEFT_AFTER_BACKWARD
    return draw.choice(kinds), at


def _spelled(one: Any, usual: Any = None) -> str:
    said = []
    for part in fields(one):
        value = getattr(one, part.name)
        if usual is None or value != getattr(usual, part.name):
            inner = f"({_spelled(value)})" if isinstance(value, Layout) else repr(value)
            said.append(f"{part.name}={inner}")
    return ", ".join(said) or "nothing unusual"
