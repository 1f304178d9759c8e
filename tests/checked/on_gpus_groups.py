"""What a script imports from its own folder."""

import os

import torch
import torch.distributed as dist


def set_up() -> int:
    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank)
    dist.init_process_group(backend="nccl", device_id=torch.device("cuda", local_rank))
    return local_rank
