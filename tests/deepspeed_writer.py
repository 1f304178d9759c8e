"""Write a checkpoint by DeepSpeed itself, and what it holds: run by an environment that has it.

``python deepspeed_writer.py FOLDER CONFIG.json`` under RANK, WORLD_SIZE and MICS_TEST_STORE trains
a tiny model for three steps, saves it as FOLDER/global_step3, and writes what DeepSpeed says its
parameters and their Adam moments are to FOLDER/expected.safetensors.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Tiny(nn.Module):
    """Odd sizes, a tied head, a frozen part, a buffer, sizes that no number of ranks divides."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 6)
        self.norm = nn.LayerNorm(6)
        self.register_buffer("seen", torch.zeros(2))
        self.frozen = nn.Linear(6, 5)
        self.frozen.requires_grad_(False)
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 6, bias=False)
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(6, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        hidden = self.norm(self.embed(tokens))
        hidden = self.down(torch.relu(self.up(self.frozen(hidden)))) * self.scale
        return self.head(hidden).float().logsumexp(-1).mean()


def groups(model: nn.Module) -> list[dict[str, Any]]:
    trained = [param for param in model.parameters() if param.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def one_by_one(outputs: Any, inputs: Any, group: Any = None, async_op: bool = False) -> Any:
    """Gloo cannot coalesce, which DeepSpeed's MiCS wants."""
    pairs = zip(outputs, inputs, strict=True)
    works = [dist.all_gather_into_tensor(o, i, group=group, async_op=True) for o, i in pairs]

    class Works:
        def wait(self) -> None:
            for work in works:
                work.wait()

    if async_op:
        return Works()
    Works().wait()
    return None


def main(folder: Path, config: dict[str, Any]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    deepspeed = importlib.import_module("deepspeed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    store = dist.FileStore(os.environ["MICS_TEST_STORE"], world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    deepspeed.init_distributed(dist_backend="gloo")
    if config["zero_optimization"].get("mics_shard_size", -1) > 0:
        deepspeed.comm.all_gather_coalesced = one_by_one
    torch.manual_seed(5)
    model = Tiny()
    optimizer = torch.optim.AdamW(groups(model), lr=1e-2, betas=(0.8, 0.9))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(3):
        torch.manual_seed(step * world + rank)
        engine.backward(engine(torch.randint(13, (8,))))
        engine.step()
    engine.save_checkpoint(str(folder), client_state={"epoch": 1, "note": "tiny"})
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        # It links the state of all groups when the first one of them has stepped.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    tensors = importlib.import_module("deepspeed.utils")
    expected: dict[str, torch.Tensor] = {}
    for name, param in engine.module.named_parameters():
        if not param.requires_grad and not hasattr(param, "ds_id"):
            expected[name] = param.detach().cpu().clone()
            continue
        if not param.requires_grad:
            with deepspeed.zero.GatheredParameters([param]):
                expected[name] = param.detach().cpu().clone()
            continue
        expected[name] = tensors.safe_get_full_fp32_param(param).cpu().clone()
        for key in ("exp_avg", "exp_avg_sq"):
            state = tensors.safe_get_full_optimizer_state(param, key)
            expected[f"{name}:{key}"] = state.cpu().clone().reshape(expected[name].shape)
    for name, buffer in engine.module.named_buffers():
        expected[name] = buffer.detach().cpu().clone()
    if rank == 0:
        from safetensors.torch import save_file

        save_file({n: t.contiguous() for n, t in expected.items()}, folder / "expected.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
