"""A rank of a script whose steps are timed on a lab's links; run as a program.

Only optimizers, roots and ``backward`` are looked at, so that a step takes as long as without.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from mics import compat
from mics.communication.guard import watch
from mics.communication.wire import bytes_sent
from mics.lab.checking.leaving import Enough, Leaving
from mics.lab.checking.script import run_script
from mics.lab.checking.standing import frames_of


class Stepping(TorchFunctionMode):
    """Notes when steps end, what they lost, and how many bytes had left the node by then.

    Args:
        steps: after so many ``enough`` is called.
        enough: ends the script, by raising.
    """

    def __init__(self, steps: int, enough: Callable[[], None]) -> None:
        super().__init__()
        self._steps, self._enough = steps, enough
        self._stepped = False
        self._loss: float | None = None
        self.ends = [self._now()]
        self.losses: list[float | None] = []
        register_module_forward_pre_hook(self._before_forward)
        watch(self._before_step, last=True)

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.backward and args[0].numel() == 1:
            self._loss = (self._loss or 0.0) + float(args[0].detach())
        return func(*args, **(kwargs or {}))

    def end(self) -> None:
        """The script has ended by itself."""
        if self._stepped:
            self._end_step()

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        if not self._stepped or compat.in_backward() or not torch.is_grad_enabled():
            return
        if next(module.parameters(), None) is not None:
            self._end_step()
            if len(self.losses) >= self._steps:
                self._enough()

    def _before_step(self, _: torch.optim.Optimizer, __: set[int]) -> None:
        self._stepped = True

    def _end_step(self) -> None:
        self.ends.append(self._now())
        self.losses.append(self._loss)
        self._stepped, self._loss = False, None

    def _now(self) -> tuple[float, int | None]:
        return time.monotonic(), bytes_sent()


def _end_if_late(stepping: Stepping, rank: int, steps: int, seconds: float, script: str) -> None:
    """End this rank when time is over, and say where it stands; its main thread may be stuck."""

    def late() -> None:
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            frames = frames_of(file.read(), threading.main_thread().ident or 0)
        own = [line for name, line, _ in frames if name == script]
        where = f"; it stands in line {own[0]} of {script}" if own else ""
        print(
            f"mics lab: rank {rank} has taken {len(stepping.losses)} of {steps} steps in "
            f"{seconds:g} s{where}\nmics lab: write --seconds with more, or mics check {script}, "
            "which names a rank that holds up the others",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()


def main() -> None:
    """Run a script as a rank: folder of reports, steps, seconds, 1 if GPUs are the host, script."""
    folder, steps, seconds, without_gpus, *words = sys.argv[1:]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stepping: Stepping

    def text() -> str:
        return json.dumps({"ends": stepping.ends, "losses": stepping.losses})

    leaving = Leaving(Path(folder), rank, world, text)
    stepping = Stepping(int(steps), leaving.enough)
    _end_if_late(stepping, rank, int(steps), float(seconds), words[0])
    try:
        with stepping:
            run_script(words, without_gpus=without_gpus == "1")
        stepping.end()
    except Enough:
        pass
    except SystemExit as error:
        if error.code not in (None, 0):
            raise
        stepping.end()
    leaving.say()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads of Gloo may be waiting for ranks that have gone


if __name__ == "__main__":
    main()
