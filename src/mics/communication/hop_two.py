"""Hop 2: the all-reduce of the accumulated gradient shard over the replicas.

[Note: .grad is the accumulator]
``fully_shard`` runs on the 1-D shard mesh, so FSDP2 reduce-scatters every micro-step and adds the
result to each parameter's ``.grad``, as PyTorch always does. That is MiCS' hop 1 and its
accumulation (paper, section 3.4). FSDP2's own 2-D mesh keeps a flat partial sum beside ``.grad``
instead, which survives ``zero_grad``, is lost when a block is unused on the last micro-step, and
mixes up gradients when the set of used parameters changes. With ``.grad`` as the only place a
gradient can be, none of these can happen.

[Note: when hop 2 starts]
Before FSDP2 touches a group's ``.grad`` it asks the communication object for a buffer. That is
where a hop 2 under way is waited for, and where the backward's end is told to expect this group:
whatever way the gradient came about, it is synchronised by then. Most groups are earlier: FSDP2
runs a parameter's post-accumulate hooks right after it has added to ``.grad``, and when the last
parameter of a group has its gradient and no further use of the group is to come in this backward,
the group's ``.grad`` shards (views of one flat buffer) are all-reduced in place: on a stream of
ours on a GPU, asynchronously on Gloo, in both cases beside the rest of the backward. Groups with
unused parameters, and blocks unused in the last micro-step, are left to the end.

[Note: repeated hop 2]
When gradients that went through hop 2 are still in ``.grad`` and more are added (accumulation
without ``micro_steps``), another hop 2 must leave the old part alone. An average does: the old part
is equal on all replicas. A sum (``set_gradient_divide_factor``) would multiply it by R, so it is
divided by R first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from mics import compat
from mics.communication.backend import Issue, Program, backend_of
from mics.communication.gradients import flat_buffer, gradients_of
from mics.communication.guard import guard, optimizer_steps, watch_optimizers
from mics.communication.landing import Landing
from mics.communication.ledger import Ledger
from mics.communication.same_steps import same_steps_of
from mics.errors import MicroStepError, MicsWarning
from mics.quantities import MIB
from mics.ranks.console import speaks
from mics.ranks.mesh import Groups, ranks_of
from mics.traffic import StageMessage


@dataclass
class _Pass:
    """What one backward pass has seen of a unit; the next pass gets a new one."""

    backward: int = -1  # autograd's number of the pass, -1 before it has begun
    uses: int = 0  # forwards whose backward is still to come
    arrived: set[int] = field(default_factory=set)  # parameters that have this use's gradient
    synced: bool = False  # hop 2 has been started
    due: bool = False  # hop 2 starts when the last reduce-scatter has landed


class HopTwo:
    """Hop 2 of one parameter group.

    Args:
        group: the FSDP2 parameter group, sharded over a 1-D mesh.
        groups: of the unit, with more than one replica.
        ledger: counts the all-reduces.
        landing: of the unit's reduce-scatters, if they land beside the backward pass.
        peers: returns every HopTwo under the same root, in module order, this one included.
    """

    def __init__(
        self,
        group: Any,
        groups: Groups,
        ledger: Ledger,
        landing: Landing | None,
        peers: Callable[[], list[HopTwo]],
    ) -> None:
        assert groups.replicas is not None
        self.group = group
        self._replicas = groups.replicas
        self._ledger = ledger
        self._landing = landing
        self._peers = peers
        self._device = groups.device
        self._backend = backend_of(groups.replicas, groups.device)
        # Asked before this rank waits for the others: do they take part in this all-reduce at all?
        self._same_steps = same_steps_of(groups) if self._backend.blocks else None
        # By position in the group: the hooked parameter, and the hook's handle.
        self._hooked: dict[int, tuple[nn.Parameter, RemovableHandle]] = {}
        self._num_trainable = 0
        self._pass = _Pass()
        self._unsynced = False  # .grad holds something no other replica has seen
        self._synced_version: tuple[int, int, int] | None = None  # of .grad as hop 2 left it
        self._flight: dist.Work | None = None
        watch_optimizers()

    @property
    def has_partial_gradients(self) -> bool:
        """Whether ``.grad`` holds gradients that have not been through hop 2."""
        return self._unsynced and bool(gradients_of(self.group))

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that will not be finished."""
        self.wait()
        for param in compat.sharded_params(self.group):
            param.grad = None
        self._unsynced = False
        self._pass = _Pass()

    def start_rest(self) -> None:
        """Start hop 2 outside of a backward pass, if there is anything to synchronise."""
        if self.has_partial_gradients:
            self._start()

    def check_optimizer(self, stepped: set[int]) -> bool:
        """Refuse an optimizer of gradients that differ between replicas, see ``guard.Owner``."""
        if not self.has_partial_gradients:
            return False
        if any(id(p) in stepped for p in compat.sharded_params(self.group)):
            raise MicroStepError(
                "optimizer.step() was called before the last micro-step: the gradients are sums "
                "of this replica alone, and the replicas would drift apart.",
                numbers=f"Hop 2 has not run for the group of {_first_names(self.group)} "
                f"({self._replicas.size()} replicas).",
                write="let the loop over mics.micro_steps(...) finish, or drop the gradients with "
                "optimizer.zero_grad()",
            )
        return True

    # -- called during forward and backward ------------------------------------------------------

    def before_forward(self) -> None:
        """Count a use: with more of them to come, a gradient is not complete yet."""
        if torch.is_grad_enabled() and not compat.in_backward():  # no evaluation, no recomputation
            self._pass.uses += 1

    def before_reduce(self) -> None:
        """FSDP2 is about to add to ``.grad``: nothing of ours may be reading or writing it."""
        self.wait()
        self._expect_end_of_backward()
        self._watch_parameters()
        self._unsynced = True
        if self._synced_version is None:
            return
        version, self._synced_version = self._synced_version, None
        gradients = gradients_of(self.group)
        if not gradients:
            return
        if compat.divide_factor(self.group) is not None:  # see [Note: repeated hop 2]
            compat.divide_all(gradients, float(self._replicas.size()))
        untouched = version == self._version()
        if untouched and not self._pass.synced and self._wanted():
            _warn_once_about_repeats(self._replicas.size(), sum(g.nbytes for g in gradients))

    def landed(self) -> None:
        """The last reduce-scatter is in the gradients: start, if that is what was waited for."""
        if self._pass.due and (self._landing is None or not self._landing.pending):
            self._pass.due = False
            self._start()

    def _expect_end_of_backward(self) -> None:
        """Queue the end of this backward, once; one that raised never had its own."""
        current = compat.backward_id()
        if current == self._pass.backward:
            return
        peers = self._peers()
        for hop in peers:
            hop._begin_pass(current)
        compat.at_end_of_backward(lambda: _end_backward(peers))

    def _begin_pass(self, backward: int) -> None:
        self._pass = _Pass(backward, self._pass.uses, due=self._pass.due)

    def _watch_parameters(self) -> None:
        """See that every sharded parameter reports its gradient, and to nobody else before us."""
        params = compat.sharded_params(self.group)
        self._num_trainable = sum(param.requires_grad for param in params)
        for position, param in enumerate(params):
            ours = position in self._hooked and self._hooked[position][0] is param
            if compat.num_gradient_hooks(param) > ours:
                raise _other_hook_error(self.group, self._replicas.size())
            if param.requires_grad and compat.num_gradient_hooks(param) == 0:
                handle = param.register_post_accumulate_grad_hook(self._after_accumulation)  # type: ignore[no-untyped-call]
                self._hooked[position] = param, handle

    def _after_accumulation(self, param: torch.Tensor) -> None:
        seen = self._pass
        seen.arrived.add(id(param))
        if len(seen.arrived) < self._num_trainable:
            return
        seen.arrived.clear()
        seen.uses -= 1
        if seen.uses <= 0 and self._wanted():
            seen.due = True
            self.landed()

    def end_backward(self) -> None:
        """Start what this backward has not started, once everything has landed."""
        if self._wanted() and self.has_partial_gradients:
            self.wait()
            self._start()

    def close_pass(self) -> None:
        """Wait for hop 2; what was left out of it is kept from optimizers."""
        self.wait()
        self._pass = _Pass()
        if self._unsynced:
            guard(self)

    def land(self) -> None:
        """Wait until every reduce-scatter of the mesh has landed."""
        if self._landing is not None:
            self._landing.reductions.finish()

    def _wanted(self) -> bool:
        return compat.wants_all_reduce(self.group)

    # -- the all-reduce --------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self) -> None:
        self._unsynced = False
        self._pass.synced = True
        self._flight = self._backend.beside(self._all_reduce, self._device, "hop 2")

    def _all_reduce(self, issue: Issue) -> Program:
        gradients = gradients_of(self.group)
        message = _message(
            gradients,
            compat.reduce_dtype(self.group),
            self._device,
            compat.trainable_shard_numel(self.group),
        )
        op = self._scale_and_op(message)
        sent = StageMessage("flat", ranks_of(self._replicas), message.nbytes, 1)
        span = self._ledger.issue(2, "all_reduce", sent, self._device)
        yield from issue(
            span,
            lambda async_op: dist.all_reduce(message, op, group=self._replicas, async_op=async_op),
        )
        if message.device != gradients[0].device:
            yield  # gradients offloaded to the host are copied once the caller waits
        _copy_back(message, gradients)

    def _scale_and_op(self, message: torch.Tensor) -> compat.ReduceOp:
        """FSDP2's divide rules for the second hop: mean, or sum when a divide factor is set."""
        if compat.divide_factor(self.group) is not None:
            return dist.ReduceOp.SUM
        if compat.sums_only(self.group) or message.dtype == torch.float16:
            message.div_(self._replicas.size())  # before the sum, so that fp16 cannot overflow
            return dist.ReduceOp.SUM
        return dist.ReduceOp.AVG

    @torch.no_grad()
    def wait(self) -> None:
        """Wait for a hop 2 under way, if there is one."""
        flight, self._flight = self._flight, None
        if flight is None:
            return
        if self._same_steps is not None:
            self._same_steps.check()
        flight.wait()
        self._synced_version = self._version()

    def _version(self) -> tuple[int, int, int] | None:
        """What changes when the first gradient is zeroed, replaced or used by an optimizer.

        Editing a DTensor in place counts on the DTensor, not on its local tensor; an optimizer's
        ``zero_grad(set_to_none=False)`` counts on neither, but comes after a step.
        """
        for param in compat.sharded_params(self.group):
            if param.grad is not None:
                return id(param.grad), compat.times_written(param.grad), optimizer_steps()
        return None


def _end_backward(peers: list[HopTwo]) -> None:
    """Every group that has not been synchronised in this backward follows now, in module order."""
    for hop in peers:
        hop.land()
    for hop in peers:
        hop.end_backward()
    for hop in peers:
        hop.close_pass()


def _other_hook_error(group: Any, replicas: int) -> MicroStepError:
    return MicroStepError(
        "A post-accumulate-gradient hook (an optimizer in backward?) would see the gradient before "
        "hop 2 has averaged it over the replicas.",
        numbers=f"Group of {_first_names(group)}; {replicas} replicas.",
        write="optimizer.step() after backward, or partition=<world size>",
    )


def _first_names(group: Any) -> str:
    names = compat.param_names(group)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _message(
    gradients: list[torch.Tensor], dtype: torch.dtype, device: torch.device, padded_numel: int
) -> torch.Tensor:
    """One tensor to all-reduce: the flat buffer behind the gradients, or a copy of them.

    FSDP2 hands out the gradients of one reduction as views of one buffer. That buffer is used as
    it is unless the gradients come from several reductions (the used parameters changed), are
    offloaded, or are stored in another dtype than they are reduced in.
    """
    flat = flat_buffer(gradients, padded_numel)
    if flat is None:
        flat = torch.cat([g.reshape(-1) for g in gradients])
    return flat.to(device=device, dtype=dtype)


def _copy_back(message: torch.Tensor, gradients: list[torch.Tensor]) -> None:
    """Write a copied message back into the gradients."""
    storage = gradients[0].untyped_storage().data_ptr()
    if message.untyped_storage().data_ptr() == storage and message.numel():
        return
    flat = message.numel() != sum(g.numel() for g in gradients)
    offset = 0
    for gradient in gradients:
        start = gradient.storage_offset() if flat else offset
        gradient.copy_(message[start : start + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


_warned_about_repeats = False


def _warn_once_about_repeats(replicas: int, shard_bytes: int) -> None:
    global _warned_about_repeats
    if _warned_about_repeats or not speaks():
        return
    _warned_about_repeats = True
    cost = 2 * (replicas - 1) * shard_bytes / replicas / MIB
    warnings.warn(
        "Hop 2 runs more than once a step: in every backward of a model that mics.micro_steps was "
        "not given, and in every further one inside its last micro-step. Each extra run sends "
        f"{cost:.2f} MiB per rank for the first group alone. Write: for batch in "
        "mics.micro_steps(model, batches): ..., with one backward for each of them, and with "
        "torch.nn.ModuleList([a, b]) for model where one step trains several.",
        MicsWarning,
        stacklevel=2,
    )
