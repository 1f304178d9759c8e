"""One rank of DeepSpeed, in an environment of its own: ``python -m mics.benching.deepspeed_child``.

Reads JSON lines from standard input: first what to train and how (``Order``), then one line per
step; answers each, on what was standard output, with its mean loss. Everything else that is printed
goes to standard error. Ends when its input does.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mics.benching.dilated import Stretched
from mics.benching.options import Dilation, Workload
from mics.benching.workloads import Language
from mics.ranks.device import HOST
from mics.ranks.joining import JOIN_SECONDS, backend_on, join, make_world
from mics.ranks.launcher import read_launch

WORK_AROUND = (
    "Gloo cannot coalesce: every all-gather of DeepSpeed's MiCS is issued for one tensor at a time"
)


@dataclass(frozen=True)
class Order:
    """What a child is to train.

    ``work`` has the fields of a ``Workload``, or of a ``Dilation`` if ``link_bits`` is given.
    """

    name: str  # zero2, zero3, hpz or deepspeed mics
    work: dict[str, Any]
    link_bits: float | None
    partition: int
    gpus_per_node: int
    scale: float = 1.0  # parameters of the stand-in per parameter of what it stands for


_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG, linux/prctl.h

SIZES: dict[str, float] = {
    "reduce_bucket_size": 5e8,
    "allgather_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
}
"""DeepSpeed's defaults that are numbers of parameters (``runtime/zero/config.py``, both releases).

A stand-in that is a thousand times smaller would be wholly below them: stage 3 would keep every
parameter between forward and backward, as no model of that size does. They are scaled as it is.
"""


def configuration(order: Order, micro_batch: int, micro_steps: int) -> dict[str, Any]:
    """DeepSpeed's defaults in fp32, without clipping, but for what the engine's name says."""
    zero: dict[str, Any] = {"stage": 2 if order.name == "zero2" else 3}
    if order.scale != 1.0:
        # Even ones: stage 2 wants its buckets aligned.
        zero |= {name: max(int(value * order.scale / 2), 1) * 2 for name, value in SIZES.items()}
    if order.name == "hpz":
        zero["zero_hpz_partition_size"] = order.gpus_per_node
    if order.name == "deepspeed mics":
        zero["mics_shard_size"] = order.partition
        zero["mics_hierarchical_params_gather"] = order.partition > order.gpus_per_node
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # 0.19.8 clips at 1.0 by default, 0.19.2 does not
    }


def main() -> None:
    """Serve steps until standard input ends."""
    # A rank that is killed takes its child with it: Gloo would wait for half an hour.
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever prints, prints to standard error
    order = Order(**json.loads(sys.stdin.readline()))
    work: Any
    if order.link_bits is None:
        options = Workload(**order.work)
        work = Language(options)
        micro_batch, micro_steps = options.rows, options.micro_steps
    else:
        dilation = Dilation(**order.work)
        work = Stretched(dilation, order.link_bits)
        micro_batch, micro_steps = dilation.micro_batch, dilation.micro_steps
    engine = _engine(order, work, configuration(order, micro_batch, micro_steps))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for step, _ in enumerate(sys.stdin):
        total = torch.zeros(())
        batches = work.batches(dist.get_rank(), step)
        for batch in batches:
            loss = work.loss(engine, batch)
            engine.backward(loss)  # divides by the micro-steps
            engine.step()  # takes a step on the last one
            total += loss.detach()
        dist.all_reduce(total)
        mean = float(total) / len(batches) / dist.get_world_size()
        print(json.dumps({"loss": mean}), file=answers, flush=True)


def _engine(order: Order, work: Any, settings: dict[str, Any]) -> Any:
    os.environ["NDEV_PER_NODE"] = str(order.gpus_per_node)  # what its MiCS takes for a node
    deepspeed = importlib.import_module("deepspeed")
    # Its shared-memory collectives are compiled on first use; a killed build hangs the next.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    _join()
    deepspeed.init_distributed(dist_backend="gloo")  # takes the group that is there
    if order.name == "deepspeed mics":
        deepspeed.comm.all_gather_coalesced = _all_gather_one_by_one
    model = work.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def _join() -> None:
    """Meet the other children as ranks of mics do: torch's own store listens everywhere."""
    launch = read_launch()
    assert launch is not None
    store = join(launch, HOST, JOIN_SECONDS)
    make_world(store, launch, backend_on(HOST), None)


def _all_gather_one_by_one(
    outputs: Sequence[torch.Tensor],
    inputs: Sequence[torch.Tensor],
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> _Works | None:
    """Gather each tensor by a call of its own, see ``WORK_AROUND``."""
    works = [
        dist.all_gather_into_tensor(output, input, group=group, async_op=True)
        for output, input in zip(outputs, inputs, strict=True)
    ]
    if async_op:
        return _Works(works)
    _Works(works).wait()
    return None


class _Works:
    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


if __name__ == "__main__":
    main()
