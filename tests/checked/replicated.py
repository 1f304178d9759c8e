"""DDP, with and without no_sync; a loss is logged, and the loop ends by itself."""

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main(defer: bool) -> None:
    dist.init_process_group(init_method="env://", rank=int(os.environ["RANK"]), backend="gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(32, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(dist.get_rank())
    for _ in range(2):
        for i in range(4):
            with model.no_sync() if defer and i < 3 else contextlib.nullcontext():
                loss = model(torch.randn(4, 32)).square().mean()
                loss.backward()
                dist.all_reduce(torch.ones(20))  # metrics are no gradients
        optimizer.step()
        optimizer.zero_grad()
        dist.all_reduce(loss.detach())
    dist.destroy_process_group()


if __name__ == "__main__":
    main("defer" in sys.argv)
