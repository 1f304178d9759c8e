"""Run as a script: import every module of mics, and print what that did beside importing them.

    python tests/quiet_import.py '{"first": ["torch", ...], "then": ["mics.errors", ...]}'

``first`` are the modules of others, which may register and start what they like. The answer is a
list of sentences; empty is right.
"""

from __future__ import annotations

import atexit
import importlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp
from torch.nn.modules import module as hooks_of_modules
from torch.optim import optimizer as optimizers

FORBIDDEN = ("socket.", "subprocess.", "os.fork", "os.system", "os.posix_spawn", "os.exec")
CHANGES_FILES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.")
CLASSES = (
    torch.Tensor,
    torch.nn.Module,
    torch.nn.Parameter,
    torch.optim.Optimizer,
    torch.distributed.fsdp.FSDPModule,
    torch.distributed.tensor.DTensor,
)


def state() -> dict[str, Any]:
    """What an import may not change, by what it is called in the answer."""
    return {
        "atexit handlers": atexit._ncallbacks(),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "the process group": dist.is_initialized(),
        "hooks of all optimizers": [
            list(optimizers._global_optimizer_pre_hooks),
            list(optimizers._global_optimizer_post_hooks),
        ],
        "hooks of all modules": [
            list(hooks) for name, hooks in vars(hooks_of_modules).items() if name.endswith("_hooks")
        ],
        "torch's default dtype": torch.get_default_dtype(),
        "torch's default device": torch.get_default_device(),
        "torch's threads": torch.get_num_threads(),
        "torch's determinism": torch.are_deterministic_algorithms_enabled(),
        "torch's matmul precision": torch.get_float32_matmul_precision(),
        "whether gradients are recorded": torch.is_grad_enabled(),
        "torch's random state": torch.get_rng_state().tolist(),
        "Python's random state": random.getstate(),
        "the environment": dict(os.environ),
        "the folder": os.getcwd(),  # noqa: PTH109
        "signal handlers": [signal.getsignal(number) for number in signal.valid_signals()],
        "filters of warnings": list(warnings.filters),
        "handlers of the root logger": list(logging.root.handlers),
        "the start method of processes": multiprocessing.get_start_method(allow_none=True),
        "sys.excepthook": sys.excepthook,
    }


def names_of_torch() -> dict[tuple[str, str], Any]:
    """Every name of every module of torch that is loaded, and of its main classes."""
    homes = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torch"}
    homes |= {kind.__name__: kind for kind in CLASSES}
    return {(home, name): value for home, o in homes.items() for name, value in vars(o).items()}


def watch(events: list[str]) -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith((*FORBIDDEN, *CHANGES_FILES)):
            events.append(f"{event} {arguments}")
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            events.append(f"open {arguments[0]} to write")

    sys.addaudithook(hook)


def main() -> None:
    asked = json.loads(sys.argv[1])
    sys.dont_write_bytecode = True
    for name in asked["first"]:
        importlib.import_module(name)
    before, torchs, events = state(), names_of_torch(), []
    watch(events)
    for name in asked["then"]:
        importlib.import_module(name)
    found = list(events)
    after, names = state(), names_of_torch()
    found += [f"{what} changed" for what in before if before[what] != after[what]]
    found += [f"{'.'.join(key)} was replaced" for key in torchs if names[key] is not torchs[key]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
