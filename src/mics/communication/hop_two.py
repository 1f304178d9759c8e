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

import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mics import compat
from mics.communication.gradients import flat_buffer, gradients_of
from mics.communication.landing import Later
from mics.communication.ledger import Ledger, Span
from mics.errors import MicroStepError, MicsWarning
from mics.ranks.mesh import ranks_of
from mics.traffic import StageMessage


@dataclass
class _Flight:
    """A hop 2 under way."""

    message: torch.Tensor  # what is all-reduced
    gradients: list[torch.Tensor]  # where it goes, if the message is a copy of them
    work: dist.Work | None  # on the CPU
    event: torch.Event | None  # on a GPU
    span: Span


class HopTwo:
    """Hop 2 of one parameter group.

    Args:
        group: the FSDP2 parameter group, sharded over a 1-D mesh.
        replicas: the process group of the ranks that hold the same shard; more than one.
        ledger: counts the all-reduces.
        device: where communication happens.
        peers: every HopTwo under the same root, in module order, this one included.
    """

    def __init__(
        self,
        group: Any,
        replicas: dist.ProcessGroup,
        ledger: Ledger,
        device: torch.device,
        peers: Callable[[], list[HopTwo]],
    ) -> None:
        self.group = group
        self._replicas = replicas
        self._ledger = ledger
        self._device = device
        self._peers = peers
        self._hooked: dict[int, nn.Parameter] = {}  # position in the group -> hooked parameter
        self._num_trainable = 0
        self._backward = -1  # the backward pass the next three belong to
        self._uses = 0  # forwards whose backward is still to come
        self._arrived: set[int] = set()  # parameters that have this use's gradient
        self._synced_in_this_backward = False
        self._unsynced = False  # .grad holds something no other replica has seen
        self._synced_version: tuple[int, int, int] | None = None  # of .grad as hop 2 left it
        self._flight: _Flight | None = None
        self._due = False  # starts when the last reduce-scatter has landed
        self.later: Later | None = None  # with reduce-scatters beside the backward
        # Asked before this rank waits for the others: do they take part in this all-reduce at all?
        self.confirm: Callable[[], None] | None = None
        _guard_optimizers()

    @property
    def has_partial_gradients(self) -> bool:
        """Whether ``.grad`` holds gradients that have not been through hop 2."""
        return self._unsynced and bool(gradients_of(self.group))

    def drop_gradients(self) -> None:
        """Forget the gradients of a step that will not be finished."""
        self._wait()
        for param in compat.sharded_params(self.group):
            param.grad = None
        self._unsynced = False
        self._reset_backward()

    def synchronise(self) -> None:
        """Run hop 2 now if there is anything to synchronise, and wait for it."""
        if self.has_partial_gradients:
            self._start()
        self._wait()

    # -- called during forward and backward ------------------------------------------------------

    def before_forward(self) -> None:
        """Count a use: with more of them to come, a gradient is not complete yet."""
        if torch.is_grad_enabled() and not compat.in_backward():  # no evaluation, no recomputation
            self._uses += 1

    def before_reduce(self) -> None:
        """FSDP2 is about to add to ``.grad``: nothing of ours may be reading or writing it."""
        self._wait()
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
            torch._foreach_div_(gradients, float(self._replicas.size()))
        untouched = version == self._version()
        if untouched and not self._synced_in_this_backward and self._wanted():
            _warn_once_about_repeats(self._replicas.size(), sum(g.nbytes for g in gradients))

    def _expect_end_of_backward(self) -> None:
        """Queue the end of this backward, once; one that raised never had its own."""
        current = compat.backward_id()
        if current == self._backward:
            return
        peers = self._peers()
        for hop in peers:
            hop._backward = current
            hop._arrived.clear()
            hop._synced_in_this_backward = False
        compat.at_end_of_backward(lambda: _end_backward(peers))

    def _watch_parameters(self) -> None:
        """See that every sharded parameter reports its gradient, and to nobody else before us."""
        params = compat.sharded_params(self.group)
        self._num_trainable = sum(param.requires_grad for param in params)
        for position, param in enumerate(params):
            ours = self._hooked.get(position) is param
            if compat.num_gradient_hooks(param) > ours:
                raise _other_hook_error(self.group, self._replicas.size())
            if param.requires_grad and compat.num_gradient_hooks(param) == 0:
                param.register_post_accumulate_grad_hook(self._after_accumulation)  # type: ignore[no-untyped-call]
                self._hooked[position] = param

    def _after_accumulation(self, param: torch.Tensor) -> None:
        self._arrived.add(id(param))
        if len(self._arrived) < self._num_trainable:
            return
        self._arrived.clear()
        self._uses -= 1
        if self._uses <= 0 and self._wanted():
            self._due = True
            self.start_if_due()

    def start_if_due(self) -> None:
        """Start, once the gradients are complete and have landed."""
        if self._due and (self.later is None or not self.later.pending):
            self._due = False
            self._start()

    def _land(self) -> None:
        if self.later is not None:
            self.later.finish()

    def _wanted(self) -> bool:
        return compat.wants_all_reduce(self.group)

    # -- the all-reduce --------------------------------------------------------------------------

    @torch.no_grad()
    def _start(self) -> None:
        self._unsynced = False
        self._synced_in_this_backward = True
        gradients = gradients_of(self.group)
        if self._device.type == "cpu":
            self._flight = self._issue(gradients, async_op=True)
            return
        # Side stream: ordered behind the accumulation (current stream), awaited in _wait.
        stream = _hop_two_stream(self._device)
        stream.wait_stream(torch.accelerator.current_stream(self._device))
        with stream:
            self._flight = self._issue(gradients, async_op=False)
            if self._flight.message.device == gradients[0].device:
                _copy_back(self._flight)
            self._flight.event = stream.record_event()

    def _issue(self, gradients: list[torch.Tensor], *, async_op: bool) -> _Flight:
        message = _message(
            gradients,
            compat.reduce_dtype(self.group),
            self._device,
            compat.trainable_shard_numel(self.group),
        )
        op = self._scale_and_op(message)
        sent = StageMessage("flat", ranks_of(self._replicas), message.nbytes, 1)
        span = self._ledger.issue(2, "all_reduce", sent, self._device)
        if not async_op:
            with span:
                dist.all_reduce(message, op, group=self._replicas)
            return _Flight(message, gradients, None, None, span)
        work = dist.all_reduce(message, op, group=self._replicas, async_op=True)
        assert work is not None
        span.follow(work)
        return _Flight(message, gradients, work, None, span)

    def _scale_and_op(self, message: torch.Tensor) -> compat.ReduceOp:
        """FSDP2's divide rules for the second hop: mean, or sum when a divide factor is set."""
        if compat.divide_factor(self.group) is not None:
            return dist.ReduceOp.SUM
        if compat.sums_only(self.group) or message.dtype == torch.float16:
            message.div_(self._replicas.size())  # before the sum, so that fp16 cannot overflow
            return dist.ReduceOp.SUM
        return dist.ReduceOp.AVG

    @torch.no_grad()
    def _wait(self) -> None:
        flight, self._flight = self._flight, None
        if flight is None:
            return
        if flight.work is not None:
            if self.confirm is not None:
                self.confirm()
            flight.span.wait(flight.work)
            _copy_back(flight)
        elif flight.event is not None:
            torch.accelerator.current_stream(self._device).wait_event(flight.event)
            if flight.message.device != flight.gradients[0].device:  # offloaded to the CPU
                _copy_back(flight)
        self._synced_version = self._version()

    def _version(self) -> tuple[int, int, int] | None:
        """What changes when the first gradient is zeroed, replaced or used by an optimizer.

        Editing a DTensor in place counts on the DTensor, not on its local tensor; an optimizer's
        ``zero_grad(set_to_none=False)`` counts on neither, but comes after a step.
        """
        for param in compat.sharded_params(self.group):
            if param.grad is not None:
                return id(param.grad), param.grad._version, _optimizer_steps
        return None

    def _reset_backward(self) -> None:
        self._uses = 0
        self._due = False
        self._arrived.clear()
        self._synced_in_this_backward = False
        self._backward = -1


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


def _end_backward(peers: list[HopTwo]) -> None:
    """Every group that has not been synchronised in this backward follows now, in module order."""
    for hop in peers:
        hop._land()
    for hop in peers:
        if hop._wanted() and hop.has_partial_gradients:
            hop._wait()
            hop._start()
    for hop in peers:
        hop._wait()
        hop._reset_backward()
        if hop._unsynced:
            _open.add(hop)


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


def _copy_back(flight: _Flight) -> None:
    """Write a copied message back into the gradients."""
    message, gradients = flight.message, flight.gradients
    storage = gradients[0].untyped_storage().data_ptr()
    if message.untyped_storage().data_ptr() == storage and message.numel():
        return
    flat = message.numel() != sum(g.numel() for g in gradients)
    offset = 0
    for gradient in gradients:
        start = gradient.storage_offset() if flat else offset
        gradient.copy_(message[start : start + gradient.numel()].view_as(gradient))
        offset += gradient.numel()


@functools.cache
def _hop_two_stream(device: torch.device) -> torch.Stream:
    return torch.Stream(device)


# -- guards --------------------------------------------------------------------------------------

_open: weakref.WeakSet[HopTwo] = weakref.WeakSet()
_optimizer_steps = 0


@functools.cache
def _guard_optimizers() -> None:
    """Once per process: no optimizer may step on gradients that differ between replicas."""
    register_optimizer_step_pre_hook(_refuse_partial_gradients)


def _refuse_partial_gradients(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    global _optimizer_steps
    _optimizer_steps += 1
    if not _open:
        return
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for hop in list(_open):
        if not hop.has_partial_gradients:
            _open.discard(hop)
        elif any(id(p) in stepped for p in compat.sharded_params(hop.group)):
            raise MicroStepError(
                "optimizer.step() was called before the last micro-step: the gradients are sums "
                "of this replica alone, and the replicas would drift apart.",
                numbers=f"Hop 2 has not run for the group of {_first_names(hop.group)} "
                f"({hop._replicas.size()} replicas).",
                write="let the loop over mics.micro_steps(...) finish, or drop the gradients with "
                "optimizer.zero_grad()",
            )


_warned_about_repeats = False


def _warn_once_about_repeats(replicas: int, shard_bytes: int) -> None:
    global _warned_about_repeats
    if _warned_about_repeats:
        return
    _warned_about_repeats = True
    cost = 2 * (replicas - 1) * shard_bytes / replicas / 2**20
    warnings.warn(
        "Gradients are accumulated without mics.micro_steps: hop 2 runs on every backward instead "
        f"of once a step. Each extra run sends {cost:.2f} MiB per rank for the first group alone. "
        "Write: for batch in mics.micro_steps(model, batches): ...",
        MicsWarning,
        stacklevel=2,
    )
