"""The memory model beside torch's own tracker: Llamas of 1B, 8B and 70B, no GPU needed.

    .venv/bin/python benchmarks/memory_model.py                 # all 18 cases, about 25 minutes
    .venv/bin/python benchmarks/memory_model.py --models 1b     # a minute

``FSDPMemTracker`` (torch 2.13) runs FSDP2 under fake tensors, two steps with AdamW, and sees every
tensor live and die; the model adds up what a trace of one micro-step on the meta device says. The
tracker counts tensors that DTensor makes while it works out shapes; a guard keeps it from that, and
transformers is told that sequences are whole, which it cannot find out from fake tensors.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
import transformers.models.llama.modeling_llama as modeling
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore

from mics.anatomy.memory import memory
from mics.anatomy.recipe import Recipe
from mics.planning.subject import subject

RESULT = Path(__file__).parent / "results" / "memory_model.json"
GIB = 2**30
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80},
}
HEADS = {"1b": 32, "8b": 32, "70b": 64}
PARTITIONS = {"1b": (2, 8, 32), "8b": (8, 16, 64), "70b": (32, 64, 128)}
SEQUENCE = {"1b": 4096, "8b": 8192, "70b": 4096}


def configuration(name: str) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        **SHAPES[name],
        num_attention_heads=HEADS[name],
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
        use_cache=False,
    )


class _Deaf:
    """Whether DTensor is working out shapes."""

    depth = 0


def _guarded(function: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        _Deaf.depth += 1
        try:
            return function(*args, **kwargs)
        finally:
            _Deaf.depth -= 1

    return call


class Tracker(FSDPMemTracker):
    """FSDPMemTracker that does not count DTensor's working out of shapes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _Deaf.depth:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)


def guard() -> None:
    for name in dir(ShardingPropagator):
        if name.startswith("_propagate_tensor_meta"):
            setattr(ShardingPropagator, name, _guarded(getattr(ShardingPropagator, name)))
    modeling.create_causal_mask = lambda *args, **kwargs: None


def tracked(name: str, partition: int, checkpointing: bool) -> dict[str, int]:
    """The tracker's peak, by its own kinds."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=partition)
    mesh = init_device_mesh("cpu", (partition,))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    try:
        with FakeTensorMode():
            model = transformers.AutoModelForCausalLM.from_config(
                configuration(name), dtype=torch.float32
            ).train()
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            for block in model.model.layers:
                fully_shard(block, mesh=mesh, mp_policy=policy)
            fully_shard(model, mesh=mesh, mp_policy=policy)
            optimizer = torch.optim.AdamW(model.parameters())
            ids = torch.zeros(1, SEQUENCE[name], dtype=torch.long)
            tracker = Tracker(model, optimizer)
            tracker.track_inputs((ids,))
            with tracker:
                for _ in range(2):  # optimizer states do not exist in the first
                    model(input_ids=ids, labels=ids).loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    tracker.reset_mod_stats()
        kinds: dict[str, int] = {}
        for snapshot in tracker.get_tracker_snapshot("peak").values():
            kinds |= {str(kind).split(".")[-1].lower(): size for kind, size in snapshot.items()}
        return kinds
    finally:
        dist.destroy_process_group()


def compare(name: str, partition: int, checkpointing: bool) -> dict[str, Any]:
    anatomy = subject(configuration(name))
    recipe = Recipe(partition, 1, 1, checkpointing, sequence=SEQUENCE[name])
    start = time.perf_counter()
    ours = memory(anatomy, recipe)
    middle = time.perf_counter()
    theirs = tracked(name, partition, checkpointing)
    end = time.perf_counter()
    return {
        "model": name,
        "sequence": SEQUENCE[name],
        "partition": partition,
        "checkpointing": checkpointing,
        "model_gib": ours.peak / GIB,
        "tracker_gib": theirs["total"] / GIB,
        "ratio": ours.peak / theirs["total"],
        "phase": ours.phase,
        "kinds_gib": {k: v / GIB for k, v in vars(ours.phases[ours.phase]).items() if v},
        "tracker_kinds_gib": {k: v / GIB for k, v in theirs.items() if v},
        "model_seconds": middle - start,
        "tracker_seconds": end - middle,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    guard()
    rows = []
    print(f"{'model':<6}{'p':>5}{'checkpointing':>15}{'model':>12}{'tracker':>12}{'ratio':>8}")
    for name in arguments.models:
        for checkpointing in (False, True):
            for partition in PARTITIONS[name]:
                row = compare(name, partition, checkpointing)
                rows.append(row)
                print(
                    f"{name:<6}{partition:>5}{'full' if checkpointing else 'none':>15}"
                    f"{row['model_gib']:>8.2f} GiB{row['tracker_gib']:>8.2f} GiB"
                    f"{row['ratio']:>8.4f}",
                    flush=True,
                )
    document = {
        "command": " ".join(["python", *sys.argv]),
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
