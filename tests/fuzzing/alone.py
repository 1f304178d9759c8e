"""A case in one process with torch alone, which runs the micro-batches of all ranks."""

from __future__ import annotations

import torch
from torch import nn

from fuzzing.cases import WORLD, Case
from fuzzing.net import Record, batch, build, flip, loss_of, optimizers_of, peeked, zero


def train_alone(case: Case) -> list[Record]:
    """What every rank should have recorded. ``outputs`` are by forward, [world, rows, width]."""
    net = build(case)
    optimizers = optimizers_of(case, net)
    records = []
    for index, step in enumerate(case.steps):
        record = Record()
        if step.peek:
            record.outputs.append(_outputs(case, net, index))
        if step.ends is None:
            _backward(case, net, index)
            if step.peek_after:
                record.outputs.append(_outputs(case, net, index))
            record.gradients = {n: _copy(p.grad) for n, p in net.named_parameters()}
            if step.clip is not None:
                record.norm = float(nn.utils.clip_grad_norm_(net.parameters(), 0.1, step.clip))
            for optimizer in optimizers:
                optimizer.step()
            zero(net, optimizers, step.zero)
        else:
            net.zero_grad()
        if step.flips:
            flip(net, step.flips)
        if step.moves_to:
            net.zero_grad()
        record.weights = {n: p.detach().clone() for n, p in net.named_parameters()}
        records.append(record)
    return records


def _backward(case: Case, net: nn.Module, index: int) -> None:
    step = case.steps[index]
    places = [(m, rank) for m in range(step.micro_steps) for rank in range(WORLD)]
    divisor: float = WORLD * (step.micro_steps if step.normalise == "micro_steps" else 1)
    if step.normalise == "tokens":
        divisor = sum(case.rows(index, *place) for place in places)
    for place in places:
        if case.has_backward(index, *place):
            out = net(batch(case, index, *place), case.uses_of(index, *place))
            loss = loss_of(case, index, out) / divisor
            if loss.requires_grad:
                loss.backward()


@torch.no_grad()
def _outputs(case: Case, net: nn.Module, index: int) -> torch.Tensor:
    return torch.stack(
        [net(peeked(case, index, rank), case.uses_of(index, 9, rank)) for rank in range(WORLD)]
    )


def _copy(one: torch.Tensor | None) -> torch.Tensor | None:
    return None if one is None else one.clone()
