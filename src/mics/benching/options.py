"""What ``mics bench`` can be asked to compare: engines and what they train; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from mics.anatomy.recipe import MOST_MICRO_BATCH, MOST_MICRO_STEPS, MOST_SEQUENCE
from mics.quantities import Within

_Own = Literal[
    "mics",
    "mics p=1",
    "fsdp2",
    "hsdp every micro-step",
    "hsdp deferred",
    "ddp",
    "computation",
]

_Mode = Literal["mics bf16", "mics fp8", "mics int8", "mics owned"]

Name = Literal[_Own, _Mode, "zero2", "zero3", "hpz", "deepspeed mics"]
"""The last four are DeepSpeed's, each a process of its own (``deepspeed_parent.py``)."""

OWN_ENGINES: tuple[Name, ...] = get_args(_Own)
"""The engines that need no environment of their own."""

MODES: tuple[Name, ...] = get_args(_Mode)
"""mics with hop 2 in fewer bits, and with optimizer states dealt to the replicas."""

ROUNDED: dict[str, float] = {"mics bf16": 0.02, "mics fp8": 0.05, "mics int8": 0.05}
"""How far losses may be from those of engines that do not round what replicas exchange: relative,
over the few steps of a comparison. Whether a model trains as well is for
``benchmarks/hop_two_losses.py``."""


@dataclass(frozen=True)
class Workload:
    """A small model, its text and its batches; ids are bytes."""

    kind: Literal["gpt", "bert"] = "gpt"
    """The family of the model."""

    hidden: Annotated[int, Within(1, 1 << 16)] = 256
    """Width of the model."""

    layers: Annotated[int, Within(1, 1 << 10)] = 6
    """Blocks of the model."""

    rows: Annotated[int, Within(1, MOST_MICRO_BATCH)] = 2
    """Sequences per rank and micro-step."""

    length: Annotated[int, Within(1, 1 << 16)] = 64
    """Bytes per sequence."""

    micro_steps: Annotated[int, Within(1, MOST_MICRO_STEPS)] = 4
    """Micro-steps per optimizer step."""


@dataclass(frozen=True)
class Dilation:
    """A large model on a real cluster, and the blocks that stand for it."""

    model: str = "bert-10b"
    """A preset of `mics train --models` whose blocks are all alike."""

    cluster: Literal["p3dn", "p4d"] = "p3dn"
    """The nodes that are stood for."""

    micro_batch: Annotated[int, Within(1, MOST_MICRO_BATCH)] = 8
    """Sequences per GPU and micro-step of the model."""

    sequence: Annotated[int, Within(1, MOST_SEQUENCE)] = 512
    """Tokens per sequence of the model."""

    micro_steps: Annotated[int, Within(1, MOST_MICRO_STEPS)] = 4
    """Micro-steps per optimizer step."""

    blocks: Annotated[int, Within(1, 1 << 10)] = 6
    """Blocks of the stand-in."""

    block_bytes: Annotated[int, Within(1, 1 << 40)] = 2**21
    """Size of one of them in fp32, in bytes."""
