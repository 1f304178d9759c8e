"""micro_steps and micro_step: the two-hop schedule.

Hop 1 (reduce-scatter in the partition group) runs in every micro-step, hop 2 (all-reduce over the
replicas) in the last one only, overlapped with its backward (MiCS section 3.4).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from mics.communication.step_facts import Normalise
from mics.errors import MicroStepError
from mics.sharding.open_step import OpenStep, open_step
from mics.sharding.tokens import Counted
from mics.sharding.units import units_of
from mics.sharding.unreduced import refuse_unreduced

Batch = TypeVar("Batch")


def micro_steps(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    normalise: Literal["micro_steps"] | Callable[[Any], int | torch.Tensor] | None = None,
    tokens_shared_over: DeviceMesh | None = None,
) -> Iterator[Batch]:
    """Iterate over the micro-batches of one step; hop 2 runs on the last one only.

    ::

        for batch in mics.micro_steps(model, batches):
            loss(model(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    ``batches`` may be any iterable, its length need not be known: one batch is read ahead to know
    the last. Every rank passes the same number of batches.

    Args:
        model: a model sharded by mics, or a module that contains such models.
        batches: the micro-batches of one step; at least one.
        normalise: what the accumulated gradient is divided by.
            ``None``: nothing; gradients add up as PyTorch's do, averaged over ranks.
            ``"micro_steps"``: their number, for losses that are means over a micro-batch.
            A function ``batch -> tokens`` (int or scalar tensor): the tokens of all micro-steps of
            all ranks, for losses that are *sums* over tokens. This is the exact mean per token
            however unevenly tokens are spread. Each rank counts the tokens of its own losses.
        tokens_shared_over: ``mesh["cp"]`` if the function counts whole sequences, of which each
            rank along it has a part (context parallelism): they are counted once.

    Raises:
        MicroStepError: no batch; ranks with different numbers of batches; gradient sync was
            switched off; a step of this model is open elsewhere; ``state_dict`` between
            micro-steps; ``optimizer.step`` before the loop is over, where its gradients are not
            complete or not normalised yet.
    """
    refuse_unreduced(units_of(model))
    if normalise is not None and normalise != "micro_steps" and not callable(normalise):
        raise _no_choice(normalise, 'None, "micro_steps", or a function from a batch to its tokens')
    if not callable(normalise):
        _refuse_shared(tokens_shared_over)
        kind: Normalise = None if normalise is None else "micro_steps"
        return _loop(model, iter(batches), None, kind)
    _refuse_unsummed(model, tokens_shared_over)
    count, over = normalise, tokens_shared_over
    kind = _kind_of(over)
    return _loop(model, iter(batches), lambda batch: Counted(count(batch), over), kind)


def _loop(
    model: nn.Module,
    batches: Iterator[Batch],
    count_tokens: Callable[[Any], Counted] | None,
    kind: Normalise,
) -> Iterator[Batch]:
    nothing = object()
    batch: Any = next(batches, nothing)
    if batch is nothing:
        raise MicroStepError(
            "micro_steps was given no micro-batch.",
            numbers="0 batches.",
            write="at least one batch per step on every rank",
        )
    step = OpenStep(model, normalise=kind, in_loop=True)
    try:
        while batch is not nothing:
            following: Any = next(batches, nothing)
            tokens = None if count_tokens is None else count_tokens(batch)
            with step.micro_step(model, last=following is nothing, tokens=tokens):
                yield batch
            batch = following
    except BaseException:
        step.leave()
        raise


@contextlib.contextmanager
def micro_step(
    model: nn.Module,
    *,
    last: bool | None,
    normalise: Literal["micro_steps"] | None = None,
    tokens: int | torch.Tensor | None = None,
    tokens_shared_over: DeviceMesh | None = None,
) -> Iterator[None]:
    """Run the forward and backward of one micro-batch; hop 2 runs in the last one only.

    ``micro_steps`` for loops that call a function per micro-batch::

        for i, batch in enumerate(batches):
            with mics.micro_step(model, last=i == len(batches) - 1):
                loss(model(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()

    Every rank runs the same number of micro-steps. A step that is left (an exception inside, or
    ``optimizer.zero_grad()`` before its last micro-step) is over: the next micro-step begins
    another one, and what gradients were left are dropped, with a warning.

    Args:
        model: a model sharded by mics, or a module that contains such models.
        last: whether this micro-step is the last of its step. ``None`` if nobody knows yet: hop 2
            then waits for ``finish_step``, beside nothing, and every micro-step waits for all ranks
            once, for a message of a few bytes.
        normalise: "micro_steps" divides the gradients by the number of micro-steps, for losses that
            are means over a micro-batch; ``None`` by nothing.
        tokens: tokens of this micro-batch on this rank, an int or a scalar tensor: the gradients
            are divided by the tokens of all micro-steps of all ranks, for losses that are *sums*
            over tokens. Give it to every micro-step of a step, or to none.
        tokens_shared_over: as in ``micro_steps``.

    Raises:
        MicroStepError: ranks that run different numbers of micro-steps; gradient sync was switched
            off; a micro-step inside another one; micro-steps of one step normalised in different
            ways; ``state_dict`` between micro-steps; ``optimizer.step`` before the last one has
            ended.
    """
    if normalise not in (None, "micro_steps"):
        raise _no_choice(normalise, 'None or "micro_steps"; tokens are given as tokens=')
    if normalise is not None and tokens is not None:
        raise MicroStepError(
            "Gradients are divided by micro-steps or by tokens, not by both.",
            numbers=f"normalise = {normalise!r}, and tokens were given.",
            write="one of them",
        )
    if tokens is None:
        _refuse_shared(tokens_shared_over)
    else:
        _refuse_unsummed(model, tokens_shared_over)
    kind = normalise if tokens is None else _kind_of(tokens_shared_over)
    counted = None if tokens is None else Counted(tokens, tokens_shared_over)
    step = open_step(model)
    if step is None or step.was_left or step.in_loop:
        step = OpenStep(model, normalise=kind, in_loop=False)
    step.check_normalise(kind)
    with step.micro_step(model, last=last, tokens=counted):
        yield


def finish_step(model: nn.Module) -> None:
    """End a step whose micro-steps said ``last=None``: run hop 2, and normalise.

    To be called before clipping and ``optimizer.step()``, on every rank.

    Args:
        model: as in ``micro_step``.

    Raises:
        MicroStepError: no step is open, its latest micro-step said what follows, or other ranks go
            on.
    """
    step = open_step(model)
    if step is None or step.was_left:
        raise MicroStepError(
            "finish_step was called where no step is open.",
            numbers="A step ends by itself after micro_step(last=True) and after a loop over "
            "micro_steps.",
            write="mics.finish_step(model) after micro-steps that said last=None",
        )
    step.finish(model)


def _kind_of(shared_over: DeviceMesh | None) -> Normalise:
    """What gradients are divided by where tokens are counted."""
    return "tokens" if shared_over is None else "shared tokens"


def _refuse_unsummed(model: nn.Module, shared_over: DeviceMesh | None) -> None:
    """Refuse ranks said to count the same tokens that do not add up theirs.

    Raises:
        MicroStepError: tokens are not summed over them.
    """
    if shared_over is None:
        return
    shared = set(shared_over.mesh.flatten().tolist())
    summed = [unit.groups.whole for unit in units_of(model)]
    if not any(shared <= set(mesh.mesh.flatten().tolist()) for mesh in summed):
        raise MicroStepError(
            "Tokens are not summed over the ranks of tokens_shared_over, which are in no mesh that "
            "the model is sharded and replicated over: each of them counts for itself.",
            numbers=f"Its axes are {shared_over.mesh_dim_names}, its ranks {sorted(shared)}; the "
            f"model's mesh has {summed[0].mesh_dim_names}.",
            write='nothing for mesh["tp"], where all ranks count alike; mesh["cp"] of the mesh '
            "whose other axes the model is sharded over",
        )


def _refuse_shared(shared_over: DeviceMesh | None) -> None:
    if shared_over is not None:
        raise MicroStepError(
            "tokens_shared_over was given where no tokens are counted.",
            numbers=f"Its axes are {shared_over.mesh_dim_names}.",
            write="normalise=function with it in micro_steps, tokens=number in micro_step",
        )


def _no_choice(normalise: object, choices: str) -> MicroStepError:
    return MicroStepError(
        f"normalise = {normalise!r} is not a choice.", write=f"normalise={choices}"
    )
