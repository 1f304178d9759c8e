"""A script that names GPUs everywhere, and never the host; its groups are made elsewhere."""

from __future__ import annotations

import torch
import torch.distributed as dist
from on_gpus_groups import set_up
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))

    def forward(self, *, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        for block in self.blocks:
            inputs = checkpoint(block, inputs, use_reentrant=False)
        return {"loss": inputs.float().square().mean()}


local_rank = set_up()
device = torch.device(f"cuda:{local_rank}")
k = torch.cuda.device_count()
shape = (dist.get_world_size() // k, k)
mesh = init_device_mesh("cuda", shape, mesh_dim_names=("dp_replicate", "dp_shard"))
model = Model().cuda().to(local_rank)
for number, one in enumerate(model.blocks):
    model.blocks[number] = torch.compile(one)
policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
for one in (*model.blocks, model):
    fully_shard(one, mesh=mesh, mp_policy=policy)
optimizer = torch.optim.AdamW(model.parameters())
torch.manual_seed(dist.get_rank())
while True:
    for _ in range(2):
        x = torch.randn(4, 32, device=device).to("cuda:0", non_blocking=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(inputs=x)["loss"]
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    print(torch.cuda.max_memory_allocated())
