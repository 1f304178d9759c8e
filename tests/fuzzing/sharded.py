"""A case on the ranks of mics, compared step by step with what one process recorded."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

import mics
from fuzzing.cases import Case, Layout, Step
from fuzzing.net import (
    Block,
    Interrupted,
    Named,
    Record,
    batch,
    build,
    flip,
    loss_of,
    optimizers_of,
    peeked,
    plain,
    zero,
)

TOLERANCE = 1e-6


class Sharded:
    """This rank's part of a case. Collective.

    Args:
        case: what to train.
        folder: where all ranks may save.
    """

    def __init__(self, case: Case, folder: str) -> None:
        self.case, self.folder = case, folder
        self.rank = dist.get_rank()
        self.net: Any = _shard(build(case, seed=self.rank), case.layout)
        self.optimizers = self._optimizers() if case.early_optimizer else None

    def differences(self, right: list[Record]) -> list[str]:
        """What is wrong, in the first step in which something is."""
        for index, record in enumerate(right):
            wrong = list(self._step(index, record))
            if _anywhere(bool(wrong)):
                return [f"step {index}: {one}" for one in wrong] or ["wrong on another rank"]
        return []

    def _step(self, index: int, right: Record) -> Iterator[str]:
        step = self.case.steps[index]
        outputs = iter(right.outputs)
        if step.peek:
            yield from self._peek(index, step.peek, next(outputs))
        if self.optimizers is None:
            self.optimizers = self._optimizers()
        self._train(index, step)
        if step.ends is None:
            if step.peek_after:
                yield from self._peek(index, step.peek or "no_grad", next(outputs))
            assert right.gradients is not None
            if not self.case.dealt:  # what is owned has parts of them
                ours = {n: p.grad for n, p in self.net.named_parameters()}
                yield from _apart("gradient of ", ours, right.gradients)
            if step.clip is not None:
                norm = mics.clip_grad_norm_(self.net.parameters(), 0.1, step.clip)
                if abs(float(norm) - right.norm) > TOLERANCE * max(1.0, right.norm):
                    yield f"norm {float(norm)} for {right.norm}"
            for optimizer in self.optimizers:
                optimizer.step()
            zero(self.net, self.optimizers, step.zero)
            if self.case.dealt:
                self.net.state_dict()  # waits for the new shards
        elif step.loop == "by hand" or self._is_next_by_hand(index):
            self.net.zero_grad()
        self._afterwards(index, step)
        yield from _apart("", dict(self.net.named_parameters()), right.weights)

    def _optimizers(self) -> list[torch.optim.Optimizer]:
        of = partial(mics.owned, self.net) if self.case.dealt else list
        return optimizers_of(self.case, self.net, of)

    def _is_next_by_hand(self, index: int) -> bool:
        following = self.case.steps[index + 1 : index + 2]
        return not following or following[0].loop == "by hand"

    # -- training --------------------------------------------------------------------------------

    def _train(self, index: int, step: Step) -> None:
        def body(micro_step: int) -> None:
            self._micro_step(index, step, micro_step)

        with contextlib.suppress(Interrupted), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=mics.MicsWarning)
            LOOPS[step.loop](self, index, step, body)

    def _micro_step(self, index: int, step: Step, micro_step: int) -> None:
        end, at = step.ends or ("", -1)
        ends = end if at == micro_step else ""
        if ends == "raise before forward":
            raise Interrupted
        place = index, micro_step, self.rank
        data, uses = batch(self.case, *place), self.case.uses_of(*place)
        out = self.net(data, uses, fails=ends == "raise in forward")
        if ends == "raise before backward":
            raise Interrupted
        loss = loss_of(self.case, index, out)
        if self.case.has_backward(*place) and loss.requires_grad:
            loss.backward()
        if ends == "raise after backward":
            raise Interrupted

    def _tokens(self, index: int, micro_step: int) -> int:
        return self.case.rows(index, micro_step, self.rank)

    def _in_loop(self, index: int, step: Step, body: Callable[[int], None]) -> None:
        normalise: Any = step.normalise
        if normalise == "tokens":

            def normalise(micro_step: int) -> int:
                return self._tokens(index, micro_step)

        micro_steps = range(step.micro_steps)
        for micro_step in mics.micro_steps(self.net, micro_steps, normalise=normalise):
            body(micro_step)
            if step.ends == ("break", micro_step):
                break

    def _one_by_one(self, index: int, step: Step, body: Callable[[int], None]) -> None:
        knows = step.loop == "micro_step"
        by_tokens = step.normalise == "tokens"
        for micro_step in range(step.micro_steps):
            how: dict[str, Any] = {"normalise": None if by_tokens else step.normalise}
            if by_tokens:
                how["tokens"] = self._tokens(index, micro_step)
            last = micro_step == step.micro_steps - 1 if knows else None
            with mics.micro_step(self.net, last=last, **how):
                body(micro_step)
            if step.ends == ("break", micro_step):
                for one in self.optimizers if self.case.dealt else [self.net]:
                    one.zero_grad()  # nothing else says that the step is over
                return
        if not knows:
            mics.finish_step(self.net)

    def _by_hand(self, index: int, step: Step, body: Callable[[int], None]) -> None:
        for micro_step in range(step.micro_steps):
            self.net.set_requires_all_reduce(micro_step == step.micro_steps - 1)
            body(micro_step)
            if step.ends == ("break", micro_step):
                return

    # -- around it -------------------------------------------------------------------------------

    def _peek(self, index: int, how: str, right: torch.Tensor) -> Iterator[str]:
        modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
        with modes.get(how, contextlib.nullcontext)():
            uses = self.case.uses_of(index, 9, self.rank)
            out = self.net(peeked(self.case, index, self.rank), uses).detach()
        if (out - right[self.rank]).abs().max() > TOLERANCE:
            yield f"output {how} off by {(out - right[self.rank]).abs().max():.1e}"

    def _afterwards(self, index: int, step: Step) -> None:
        if step.flips:
            flip(self.net, step.flips)
        if step.state_dict and step.ends is None:
            self.net.load_state_dict(self.net.state_dict())
        if step.moves_to is None:
            return
        self.net.zero_grad()
        path = f"{self.folder}/{self.case.seed}-{index}"
        mics.save(path, model=self.net, optimizer=self.optimizers)
        trains = {plain(n): p.requires_grad for n, p in self.net.named_parameters()}
        self.net = build(self.case, seed=7)
        for name, param in self.net.named_parameters():
            param.requires_grad_(trains[name])
        _shard(self.net, step.moves_to)
        self.optimizers = self._optimizers()
        mics.load(path, model=self.net, optimizer=self.optimizers)


LOOPS: dict[str, Callable[[Sharded, int, Step, Callable[[int], None]], None]] = {
    "micro_steps": Sharded._in_loop,
    "micro_step": Sharded._one_by_one,
    "finish_step": Sharded._one_by_one,
    "by hand": Sharded._by_hand,
}


def _shard(net: nn.Module, layout: Layout) -> nn.Module:
    how: dict[str, Any] = dataclasses.asdict(layout)
    return mics.shard(net, blocks=Block, mp_policy=MixedPrecisionPolicy(), **how)


def _apart(what: str, ours: Named, right: Named) -> list[str]:
    """What differs: who has no tensor, and else by how much. Collective."""
    mine = {plain(name): one for name, one in ours.items()}
    wrong = [
        f"{what}{name}: {'None' if mine[name] is None else 'not None'}"
        for name, one in right.items()
        if (mine[name] is None) is not (one is None)
    ]
    if _anywhere(bool(wrong)):
        return wrong
    for name, one in right.items():
        whole: Any = mine[name]
        if one is not None:
            off = float((whole.full_tensor().detach() - one).abs().max())
            if not off <= TOLERANCE:
                wrong.append(f"{what}{name}: off by {off:.1e}")
    return wrong


def _anywhere(here: bool) -> bool:
    flag = torch.tensor(float(here))
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)
