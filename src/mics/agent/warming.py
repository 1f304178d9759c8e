"""What the parent of ranks does once, so that no rank has to: imports, and torch's first uses.

[Note: what a fork inherits]
Ranks begin as if they had been started anew. Each has generators of random numbers with a seed of
its own, as Python, torch and numpy give it to a new process. No process group is left. Threads
there are none, which is checked at every fork, and no accelerator has been touched: where torch is
built for one, the autograd engine would ask its driver for devices, which no fork survives, so
there modules are imported and nothing is run.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
"""Variables of libraries that begin threads when they are loaded."""

_ASKS_NO_DRIVER = "PYTORCH_NVML_BASED_CUDA_CHECK"  # whether CUDA is there, without a driver's state
_MOST_SCRIPT_BYTES = 1 << 20
_USED_BY_RANKS = (
    "mics.checkpoint",
    "mics.ranks.mesh",
    "mics.sharding.clipping",
    "mics.sharding.shard",
    "mics.sharding.steps",
)


def num_threads() -> int:
    """The threads of this process."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"^Threads:\s+(\d+)", status, re.MULTILINE)
    assert found is not None
    return int(found[1])


def keep_to_one_thread() -> dict[str, str | None]:
    """Keep libraries that are loaded from now on from beginning threads, and asking drivers.

    Returns:
        The variables as they were, for the ranks.
    """
    before = {name: os.environ.get(name) for name in (*THREADS, _ASKS_NO_DRIVER)}
    os.environ.update(dict.fromkeys(before, "1"))
    return before


def warm(words: Sequence[str]) -> None:
    """Import what ranks need, and pay for first uses, see [Note: what a fork inherits].

    Args:
        words: the ranks' script or module, and its arguments.

    Raises:
        Exception: something cannot be imported or run.
    """

    from mics import compat
    from mics.ranks.device import built_for_accelerator

    for name in _USED_BY_RANKS:
        importlib.import_module(name)
    _import_what_it_asks_for(words)
    if built_for_accelerator():
        return
    compat.register_fake_backend()
    hook = sys.excepthook
    with contextlib.redirect_stderr(io.StringIO()):  # nobody wants to read of this model
        _run_toy()
    sys.excepthook = hook  # a process group's says its rank


def _import_what_it_asks_for(words: Sequence[str]) -> None:
    """Import transformers and the trainer, where the program seems to use them."""
    if words[:3] == ["-m", "mics", "train"]:
        names = ["mics.commands.train", "mics.training.loop"]
    elif words[0] != "-m" and _mentions(Path(words[0]), "transformers"):
        names = ["transformers"]
    else:
        names = []
    for name in names:
        with contextlib.suppress(ImportError):  # the program's own matter, which it will say
            importlib.import_module(name)


def _mentions(script: Path, package: str) -> bool:
    try:
        text = script.open(errors="replace").read(_MOST_SCRIPT_BYTES)
    except OSError:
        return False
    return re.search(rf"^\s*(import|from)\s+{package}\b", text, re.MULTILINE) is not None


def _run_toy() -> None:
    """Build, step and drop a sharded model on a process group whose collectives move nothing."""
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed import HashStore  # type: ignore[attr-defined]
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from mics.sharding.shard import shard

    def model() -> nn.Sequential:
        return nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2)])

    dist.init_process_group("fake", store=HashStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        toy = model()
        for block in toy:
            fully_shard(block, mesh=mesh)
        fully_shard(toy, mesh=mesh)
        optimizer = torch.optim.AdamW(toy.parameters())
        toy(torch.randn(2, 8)).sum().backward()
        torch.nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        shard(model(), mesh=mesh)
    finally:
        dist.destroy_process_group()


def become_a_rank(ranks_here: int) -> None:
    """Put right what a fork of the warmed process has, and a new one would not have.

    Args:
        ranks_here: ranks of this node, which share its cores.
    """
    from mics.ranks.heartbeat import begin_as_another_rank

    begin_as_another_rank()
    threads = os.environ.get("OMP_NUM_THREADS", "")
    count = int(threads) if threads.isdecimal() and int(threads) > 0 else 0
    if "torch" in sys.modules:
        import torch

        torch.default_generator.seed()
        torch.set_num_threads(count or max(1, (os.cpu_count() or 1) // ranks_here))
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()  # Python's own generator does so by itself
