"""Watches a script's own process: its modules, its optimizers and every operator it runs.

[Note: nothing is patched]
A script is observed through the places where torch lets others look: hooks of all modules, the hook
in front of all optimizers, and a dispatch mode around the whole script, which sees every collective
whoever issues it (FSDP2, DDP's reducer, DTensor, mics, the script itself), those of a backward pass
too, because autograd runs a CPU's backward in the thread, and with the modes, of its caller. A step
ends where the next forward of a root begins, so that several optimizers may step in one; of a model
without modules where the next backward pass does.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.nn.parallel import DistributedDataParallel

from mics import compat
from mics.communication.guard import watch
from mics.lab.checking.calls import call_of, meeting_of
from mics.lab.checking.prints import hash_of, local_of, print_of, shard_of
from mics.lab.checking.report import Param, RankReport, Seen, Step, When
from mics.lab.checking.standing import Trail

# What wrappers put into the names of parameters.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


class Observer(compat.TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes what a script does; entered around it.

    Args:
        report: is filled.
        steps: after so many finished ones ``enough`` is called.
        enough: ends the script, by raising.
        trail: is told of every collective before it is issued.
    """

    def __init__(
        self, report: RankReport, steps: int, enough: Callable[[], None], trail: Trail
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._report, self._steps, self._enough = report, steps, enough
        self._trail = trail
        self._threads = {threading.get_ident()}
        self._depth = 0
        self._inside = False  # a backward pass
        self._roots: list[nn.Module] = []
        self._when: When = "forward"
        self._step = Step()
        self._data: list[str] = []
        self._calls: Counter[Seen] = Counter()
        self._stepped: dict[str, torch.Tensor] = {}
        register_module_forward_pre_hook(self._before_forward)
        register_module_forward_hook(self._behind_forward, with_kwargs=True, always_call=True)
        watch(self._before_step, last=True)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # its own operators come next, collectives among them
        kwargs = kwargs or {}
        self._look_for_backward()
        meeting = meeting_of(func, args, kwargs)
        if meeting is not None:
            self._trail.issue(meeting)
        call = call_of(func, args, kwargs)
        if call is not None:
            self._calls[Seen(call, self._step.micro_steps, self._when)] += 1
        return func(*args, **kwargs)

    def _look_for_backward(self) -> None:
        begins = compat.in_backward() and not self._inside
        self._inside = compat.in_backward()
        if begins and self._when == "after" and self._stepped:  # no module's forward was seen
            self._finish_step()
        if self._inside and self._when == "forward":
            self._when = "backward"
            self._step.micro_steps += 1
            self._trail.pass_back(self._step.micro_steps)

    def _finish_step(self) -> None:
        """End a step behind which another one begins."""
        self._end_step()
        self._when = "forward"
        if len(self._report.steps) >= self._steps:
            self._enough()

    def end(self) -> None:
        """The script has ended by itself: what it has stepped is a step."""
        if self._stepped:
            self._end_step()

    def _see_this_thread(self) -> bool:
        """Dispatch modes are a thread's own; tell whether this one has been seen before."""
        thread = threading.get_ident()
        if thread in self._threads:
            return True
        self._threads.add(thread)
        self.__enter__()  # type: ignore[no-untyped-call]
        return False

    # -- modules ---------------------------------------------------------------------------------

    def _before_forward(self, module: nn.Module, _: Any) -> None:
        self._see_this_thread()
        outermost = self._depth == 0
        self._depth += 1
        if not outermost or compat.in_backward() or not torch.is_grad_enabled():
            return
        if next(module.parameters(), None) is None:
            return
        if self._stepped:
            self._depth -= 1
            self._finish_step()
            self._depth += 1
        if not any(module is inner for root in self._roots for inner in root.modules()):
            self._roots.append(module)
        self._when = "forward"
        self._trail.pass_on()

    def _behind_forward(self, module: nn.Module, args: Any, *others: Any) -> None:
        """Others are keyword arguments and result; the latter alone where the forward raised."""
        self._depth -= 1
        if self._depth == 0 and module in self._roots and torch.is_grad_enabled():
            self._data.append(hash_of((args, others[:-1])))

    # -- steps -----------------------------------------------------------------------------------

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, _: set[int]) -> None:
        if not self._see_this_thread():
            return  # nobody has seen what this step was made of
        names = self._names()
        self._when = "after"
        self._trail.step(len(self._report.steps) + 1)
        for number, group in enumerate(optimizer.param_groups):
            for index, param in enumerate(group["params"]):
                if not param.requires_grad:
                    continue
                name = names.get(id(param), f"group {number}, parameter {index}")
                local = local_of(param)
                self._stepped[name] = param
                self._step.params[name] = Param(
                    shard_of(param),
                    isinstance(param, DTensor),
                    local.numel(),
                    local.nbytes,
                    print_of(param),
                    None if param.grad is None else print_of(param.grad),
                )

    @torch.no_grad()
    def _end_step(self) -> None:
        for name, param in self._stepped.items():
            self._step.params[name].after = print_of(param)
        self._step.calls = list(self._calls.items())
        self._step.data = " ".join(self._data)
        self._report.steps.append(self._step)
        self._report.engines = self._engines()
        self._report.world = dist.get_world_size() if dist.is_initialized() else 0
        self._step, self._calls, self._stepped, self._data = Step(), Counter(), {}, []

    def _names(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for number, root in enumerate(self._roots):
            for name, param in root.named_parameters():
                own = _plain(name)
                if own in names.values() and id(param) not in names:
                    own = f"{own} of {type(root).__name__} {number}"
                names.setdefault(id(param), own)
        return names

    def _engines(self) -> list[str]:
        from mics.sharding.belonging import units_by_param

        kinds = {
            "mics": bool(units_by_param()),
            "FSDP2": self._has(FSDPModule),
            "FSDP1": self._has(FullyShardedDataParallel),
            "DDP": self._has(DistributedDataParallel),
        }
        if kinds["mics"]:
            kinds["FSDP2"] = False
        return [name for name, there in kinds.items() if there]

    def _has(self, kind: type) -> bool:
        return any(isinstance(one, kind) for root in self._roots for one in root.modules())


def _plain(name: str) -> str:
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[0] == "module" else parts)
