"""mics, and what its ledger counted in each step, into the file that is named.

Behind it may be the partition, the form of collectives, and whether all ranks get the same data.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import mics

dist.init_process_group("gloo")
partition, form, data = (*sys.argv[2:], *("2", "auto", "own")[len(sys.argv) - 2 :])
mesh = mics.init_mesh(partition=int(partition))
torch.manual_seed(0)
model = nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)])
for one in model:
    mics.fully_shard(one, mesh=mesh, collectives=form)
mics.fully_shard(model, mesh=mesh, collectives=form)
optimizer = torch.optim.AdamW(model.parameters())
torch.manual_seed(dist.get_rank() if data == "own" else 0)
counted = []
for _ in range(2):
    mics.ledger(model).reset()
    for x in mics.micro_steps(model, [torch.randn(8, 32) for _ in range(3)]):
        (model(x).square().mean() / 3).backward()
    optimizer.step()
    optimizer.zero_grad()
    traffic = mics.ledger(model).traffic()
    counted.append([[float(f.intra_bytes), float(f.inter_bytes)] for f in map(traffic.hop, (1, 2))])
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(counted))
