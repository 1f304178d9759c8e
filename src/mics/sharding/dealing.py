"""The micro-batches of a step, dealt to however many ranks there are.

[Note: a micro-batch that does not count]
Ranks run the same number of micro-steps, because they gather and reduce together. Where that does
not come out even, some have nothing left to do in the last one. They compute a micro-batch again
that another rank has, and the backward that ``Dealt`` runs gives it no gradient: the same shapes,
the same collectives, zeros. A loop in which it were the caller's business to leave such a
micro-batch out would go wrong for the first time on the day when a node is lost, without a word;
one that does not call ``Dealt.backward`` is refused in its first step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from mics.errors import MicroStepError
from mics.quantities import first_of
from mics.ranks.drawing import ranks_text
from mics.sharding.open_deal import OpenDeal
from mics.sharding.open_step import OpenStep
from mics.sharding.other_axes import axes_beside_data
from mics.sharding.same_number import SameNumber, check_number, compare_numbers
from mics.sharding.tokens import Counted
from mics.sharding.units import Unit

_ATTRIBUTE = "_mics_dealt"


class Dealt:
    """One micro-batch of a step: which, and whether it counts.

    Args:
        index: which micro-batch of the step, from 0.
        counts: whether it is this rank's to count; its ``backward`` gives no gradient otherwise.
        weigh: what its loss is multiplied by, given its tokens.
    """

    def __init__(
        self, index: int, *, counts: bool, weigh: Callable[[float | torch.Tensor | None], float]
    ) -> None:
        self.index = index
        self.counts = counts
        self._weigh = weigh
        self._done = False

    def backward(
        self, loss: torch.Tensor, *, tokens: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the backward of the micro-batch. To be called once, instead of ``loss.backward()``.

        Args:
            loss: shape (); the mean over the micro-batch, or with ``tokens`` the sum over them.
            tokens: how many the loss is a sum over: gradients then are divided by those of all
                micro-batches of the step, so that each token weighs the same. In all micro-batches
                or in none, and for models sharded by mics.

        Returns:
            The loss, detached; zero where it does not count. The sum of these over the loop and all
            ranks is that of the step's micro-batches; how many of them a rank has is no matter.
            ``verdicts.agree(total, norm, summed_over=micro_batches)`` makes their mean.

        Raises:
            MicroStepError: it was called already; a loss of another shape; or tokens in some
                micro-batches only, or of a model that mics has not sharded.
        """
        if self._done:
            raise MicroStepError(
                "backward was called twice for one micro-batch.",
                numbers=f"It is micro-batch {self.index} of the step.",
                write="one loss per micro-batch: micro.backward(loss + other_loss)",
            )
        if loss.dim() != 0:  # a gradient of ones would make it a sum
            raise MicroStepError(
                "backward takes one number; of several the sum would be taken, without a word.",
                numbers=f"The loss has the shape {tuple(loss.shape)}.",
                write="micro.backward(loss.mean()), or loss.sum() with tokens=",
            )
        self._done = True
        weight = self._weigh(tokens)
        loss.backward(torch.full_like(loss, weight if self.counts else 0.0))  # type: ignore[no-untyped-call]
        return loss.detach() if self.counts else torch.zeros_like(loss.detach())

    def check_done(self) -> None:
        """Refuse a micro-step without ``backward``.

        Raises:
            MicroStepError: it was left out.
        """
        if not self._done:
            raise MicroStepError(
                "A micro-batch was dealt, and its backward was not called, so with fewer ranks one "
                "that does not count would count.",
                numbers=f"It is micro-batch {self.index} of the step.",
                write="micro.backward(loss) instead of loss.backward(), for every one of "
                "mics.deal(...)",
            )


def deal(
    model: nn.Module, micro_batches: int, *, over: DeviceMesh | None = None
) -> Iterator[Dealt]:
    """Iterate over this rank's share of a step's micro-batches, whatever the number of ranks.

    ::

        for micro in mics.deal(model, 16):                 # of a step, on all ranks together
            x, y = batch(step, micro.index)                # the same for an index on any rank
            micro.backward(loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()

    With 8 ranks each has 2 of these 16, with 6 it has 3, two of which do not count. The
    gradient is the mean over the 16 all the same, up to the order in which it is summed. Stands in
    the place of ``micro_steps`` for models sharded by mics, and works for FSDP2's and DDP's too.

    Args:
        model: sharded by mics or FSDP2, a DDP module, or any module of a single rank.
        micro_batches: of one step, over all ranks; all of one size if losses are means. The same
            number on every rank.
        over: the mesh whose ranks see other data, where the model's mesh has axes beside it
            (``mesh["dp"]``); by default the ranks that its gradients are averaged over: of DDP's
            ``process_group``, of the mesh that parameters are on. Each such set of ranks, if there
            are several, sees all micro-batches.

    Raises:
        MicroStepError: not a number of micro-batches; a model whose gradients nobody reduces, or
            whose mesh does not tell which ranks see other data; a loop that leaves out
            ``backward``; and as of ``micro_steps``.
        DisagreementError: ranks give other numbers of micro-batches; it is raised on all of them
            by the first ``backward`` of a step.
    """
    units = [u for module in model.modules() for u in module.__dict__.get("_mics_units", [])]
    here, ranks = _place(model, units, over)
    if not is_dealt(model):
        compare_numbers(micro_batches, ranks)
    check_number(micro_batches)
    remember_dealt(model, micro_batches)
    rank, turns = ranks.index(here), -(-micro_batches // len(ranks))
    mine = [turn * len(ranks) + rank for turn in range(turns)]
    if units:
        return _of_mics(model, units, mine, micro_batches, ranks)
    return _of_torch(model, mine, micro_batches, ranks)


def is_dealt(model: nn.Module) -> bool:
    """Whether the micro-batches of a model's steps have been dealt."""
    return _ATTRIBUTE in model.__dict__


def remember_dealt(model: nn.Module, micro_batches: int) -> None:
    """Take note that they are, by a loop that does it by itself."""
    model.__dict__[_ATTRIBUTE] = micro_batches


def _of_mics(
    model: nn.Module, units: list[Unit], mine: list[int], micro_batches: int, ranks: list[int]
) -> Iterator[Dealt]:
    step = OpenStep(model, normalise="tokens", in_loop=True)
    weighed = _Weighed(SameNumber(micro_batches, ranks))
    try:
        for number in mine:
            count = torch.zeros((), dtype=torch.float64, device=units[0].groups.device)
            counts = number < micro_batches
            kinds = torch.zeros(2, dtype=count.dtype, device=count.device)
            weigh = weighed.into(count if counts else torch.zeros_like(count), kinds)
            micro = Dealt(number % micro_batches, counts=counts, weigh=weigh)
            with step.micro_step(
                model, last=number == mine[-1], tokens=Counted(count, None, kinds)
            ):
                yield micro
                micro.check_done()
    except BaseException:
        step.leave()
        raise


class _Weighed:
    """What the losses of one step are means over: micro-batches, or tokens.

    Args:
        number: asks whether all ranks deal the same one.
    """

    def __init__(self, number: SameNumber) -> None:
        self._number = number
        self._by_tokens: bool | None = None

    def into(
        self, count: torch.Tensor, kinds: torch.Tensor
    ) -> Callable[[float | torch.Tensor | None], float]:
        """A function that writes what a micro-batch weighs, and whether it is tokens."""

        def weigh(tokens: float | torch.Tensor | None) -> float:
            self._number.check()
            by_tokens = tokens is not None
            if self._by_tokens not in (None, by_tokens):
                raise MicroStepError(
                    "Some micro-batches of one step were given tokens, and some were not.",
                    write="micro.backward(loss, tokens=...) for all of them, or for none",
                )
            self._by_tokens = by_tokens
            kinds[0 if by_tokens else 1].fill_(1.0)
            count.copy_(torch.as_tensor(1 if tokens is None else tokens), non_blocking=True)
            return 1.0

        return weigh


def _of_torch(
    model: nn.Module, mine: list[int], micro_batches: int, ranks: list[int]
) -> Iterator[Dealt]:
    """The micro-batches for a model that averages over its ranks by itself."""

    def weigh(tokens: float | torch.Tensor | None) -> float:
        if tokens is not None:
            raise MicroStepError(
                "tokens were given, and mics has not sharded the model, so it does not divide its "
                "gradients.",
                write="mics.shard(model) or mics.fully_shard; or losses that are means, without "
                "tokens",
            )
        same.check()
        return len(ranks) / micro_batches

    step = OpenDeal(model)
    same = SameNumber(micro_batches, ranks)
    for number in mine:
        micro = Dealt(number % micro_batches, counts=number < micro_batches, weigh=weigh)
        with step.micro_step(model, last=number == mine[-1]):
            yield micro
            micro.check_done()


def _place(model: nn.Module, units: list[Unit], over: DeviceMesh | None) -> tuple[int, list[int]]:
    """This rank, and the ranks that see other data, which it is one of.

    Raises:
        MicroStepError: nobody knows.
    """
    ranks = _ranks_averaged(model, units) if over is None else over.mesh.flatten().tolist()
    if not dist.is_initialized():
        return 0, [0]
    if dist.get_rank() not in ranks:
        raise MicroStepError(
            "This rank is none of those that micro-batches are dealt to.",
            numbers=f"It is rank {dist.get_rank()}; over has {first_of(list(map(str, ranks)))}.",
            write='over=mesh["dp"] of the mesh of all ranks',
        )
    return dist.get_rank(), ranks


def _ranks_averaged(model: nn.Module, units: list[Unit]) -> list[int]:
    """The ranks that the gradients of a model are averaged over, as it tells itself."""
    if units:
        whole = max((unit.groups.whole for unit in units), key=lambda mesh: mesh.size())
        _refuse_other_axes(axes_beside_data(whole, parts=False))
        return _ranks_of(whole)
    if isinstance(model, DistributedDataParallel):
        return dist.get_process_group_ranks(model.process_group)
    meshes = [param.device_mesh for param in model.parameters() if isinstance(param, DTensor)]
    for mesh in meshes:
        _refuse_other_axes(axes_beside_data(mesh, parts=True))
    if meshes:
        ranks = _ranks_of(max(meshes, key=lambda mesh: mesh.size()))
        beside = sorted({rank for mesh in meshes for rank in _ranks_of(mesh)} - set(ranks))
        if beside:
            raise MicroStepError(
                "The model's parameters are averaged over different ranks.",
                numbers=f"Some over ranks {ranks_text(sorted(ranks))}, some also over "
                f"{ranks_text(beside)}.",
                write='over=mesh["dp"], the ranks that see other micro-batches',
            )
        return ranks
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise MicroStepError(
            "Micro-batches would be dealt to ranks whose gradients nobody reduces.",
            numbers=f"{type(model).__name__} is sharded by nobody, and {dist.get_world_size()} "
            "ranks run.",
            write="model = mics.shard(model)",
        )
    return [0]


def _ranks_of(mesh: DeviceMesh) -> list[int]:
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def _refuse_other_axes(names: list[str]) -> None:
    if names:
        raise MicroStepError(
            "The model's mesh has axes whose ranks see the same micro-batches, or parts of them.",
            numbers=f"They are {', '.join(names)}.",
            write='over=mesh["dp"], the ranks that see other micro-batches',
        )
