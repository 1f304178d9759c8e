"""Whose gradients are not numbers? Asked before the sum over ranks spreads them to everybody.

A loss that is not a number on one rank makes every weight on every rank one, and afterwards nobody
can tell where it came from. So each rank looks at one small gradient of every unit in every
backward pass, before it is reduced: all that follows from such a loss, or from a layer, are no
numbers. On an accelerator only the first unit of a pass is looked at. The end of the step tells the
ranks (``settling.py``), and an optimizer that would use the gradients is refused; one that is not
called, because the program drops such steps, is not.

[Note: no waiting for the device]
The answer is copied to the host beside the backward, and read when the host has issued the rest.
That of the last unit would be there only when the backward has ended, and the host would wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mics import compat
from mics.communication.guard import guard, watch
from mics.communication.shares import gradient_of
from mics.errors import MicroStepError
from mics.ranks.device import on_accelerator
from mics.ranks.mesh import PerMesh


class Finite:
    """What this rank has seen of its gradients since the last step of one mesh."""

    def __init__(self) -> None:
        self._looked = -1  # autograd's number of the backward pass
        self._seen: list[tuple[torch.Tensor, torch.Event | None]] = []
        self._ranks: tuple[int, int] | None = None  # whose were none: the first, the last
        self._params: list[torch.Tensor] = []

    def look(self, gradients: Sequence[torch.Tensor]) -> None:
        """Look at one of the gradients of a unit, on this rank alone.

        Gradients in fp16 are not looked at: a loss scaler tries how large they may become.

        Args:
            gradients: whole ones, of one unit; none if this rank has not used it. One spread over
                axes beside the data is looked at where it is here.
        """
        if not gradients:
            return
        smallest = compat.local_of(min(gradients, key=torch.Tensor.numel))
        if smallest.dtype == torch.float16:
            return
        waits, current = on_accelerator(smallest.device), compat.backward_id()
        if waits and current == self._looked:
            return
        self._looked = current
        finite = torch.isfinite(smallest.detach()).all()
        if not waits:
            self._seen.append((finite, None))
            return
        host = torch.empty((), dtype=torch.bool, pin_memory=True)
        host.copy_(finite, non_blocking=True)  # see [Note: no waiting for the device]
        self._seen.append((host, torch.accelerator.current_stream().record_event()))

    def take(self) -> bool:
        """Whether all that was looked at since the last call were numbers."""
        seen, self._seen = self._seen, []
        for _, event in seen:
            if event is not None:
                event.synchronize()
        return all(bool(finite) for finite, _ in seen)

    def blame(self, ranks: tuple[int, int] | None, params: Sequence[torch.Tensor]) -> None:
        """Know whose gradients were no numbers, until they are dropped.

        Args:
            ranks: the first and the last one; ``None`` if all were fine.
            params: what they are the gradients of.
        """
        self._ranks, self._params = ranks, list(params) if ranks is not None else []
        if ranks is not None:
            watch(_see_scaler)
            guard(self)

    def check_optimizer(self, stepped: set[int]) -> bool:
        """Refuse an optimizer of gradients that are no numbers, see ``guard.Owner``."""
        gradients = [(id(param), gradient_of(param)) for param in self._params]
        mine = [one for key, one in gradients if key in stepped and one is not None]
        if self._ranks is None or all(one is None for _, one in gradients):
            return False
        if _scaler.skips:
            return True
        shards = [compat.local_of(gradient) for gradient in mine]
        held = [shard for shard in shards if shard.numel()]
        if shards and (not held or not all(bool(torch.isfinite(one).all()) for one in held)):
            first, last = self._ranks
            whose = f"rank {first}" if first == last else f"ranks {first} and {last}"
            raise MicroStepError(
                f"Gradients that are not numbers came from the backward of {whose}, and are on "
                "every rank by now.",
                numbers="A loss there was infinite or not a number."
                if first == last
                else f"Losses from rank {first} to rank {last} were infinite or not numbers.",
                write="optimizer.zero_grad() in place of optimizer.step(), on every rank; or leave "
                "out the backward of such a loss: its rank then counts as zeros",
            )
        return True


@dataclass
class _Scaler:
    """What is known of a loss scaler around the optimizer that is about to step.

    Args:
        skips: whether the optimizer's kernel leaves out a step for it, as fused ones do.
    """

    skips: bool = False


_scaler = _Scaler()


def _see_scaler(optimizer: torch.optim.Optimizer, _: set[int]) -> None:
    """Look for what ``torch.amp.GradScaler`` lends a fused optimizer, see ``guard.Watcher``."""
    _scaler.skips = getattr(optimizer, "found_inf", None) is not None


finite_of = PerMesh(lambda _: Finite())
"""What is known of the gradients of a mesh."""
