"""One optimizer step: micro-steps, the global norm, one verdict that all ranks share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from mics.checkpoint.randomness import random_state, restore_random_state
from mics.errors import MicsError
from mics.models.experts import router_loss_weight
from mics.ranks.issuing import all_reduce
from mics.ranks.skips import SkipRule, Verdict
from mics.sharding.micro_steps import micro_steps
from mics.training.config import OptimizerConfig
from mics.training.data import Batch
from mics.training.optimisation import clip_gradients, set_learning_rate
from mics.training.schedules import learning_rate

Counter = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Outcome:
    """What one step did; the same on every rank.

    ``loss`` is the mean over all predicted tokens of all micro-steps and ranks, in nats; ``None``
    where no token was to be predicted, as may be in a small batch of a masked model. Where the
    ``verdict`` was not to take it, every rank has left weights, optimizer and generators as they
    were. ``sums`` is what the caller had summed over the ranks, by its names. ``router_loss`` is
    the loss that balances experts before its weight, a mean like ``loss`` and no part of it;
    ``None`` where the model trains without it.
    """

    loss: float | None
    targets: int
    norm: float
    learning_rate: float
    verdict: Verdict
    sums: Mapping[str, float]
    router_loss: float | None = None


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    config: OptimizerConfig,
    *,
    step: int,
    steps: int,
    count: Counter,
    rule: SkipRule,
) -> Outcome:
    """Train on the micro-batches of one step.

    Losses are sums over tokens, divided once by the tokens of all micro-steps and ranks, so that
    the gradient is the mean per token however unevenly tokens are spread. One all-reduce carries
    the loss, the norm and the caller's sums; every rank decides by the same numbers. A step that is
    skipped has its number and its learning rate all the same.

    Args:
        model: a sharded transformers model.
        optimizer: the optimizer of its parameters.
        batches: one per micro-step, on the model's device.
        config: clipping and the learning rate.
        step: which step this is, from 1.
        steps: steps of the whole run.
        count: called when communication of the gradients has ended; what it returns is summed
            over the ranks, name by name.
        rule: says whether the step is taken; as many steps old on every rank.
    """
    random = random_state(dist.get_rank())
    total, router, targets = _accumulate(model, batches)
    norm = clip_gradients(model, config.clip)
    counted = count()
    mine = {"targets": float(targets), **counted}
    tensors = {"loss": total, "router": router, "norms": norm.to(total)}
    sums = _sum_over_ranks(tensors, mine, same={"norm": norm})
    mean = _mean(sums, "loss")
    rate = learning_rate(config, step, steps)
    # Of norms that ought to be equal the mean is: ranks must not differ by a rounding either.
    verdict = rule.judge(mean, sums["norms"] / dist.get_world_size())
    if verdict.take:
        set_learning_rate(optimizer, rate)
        optimizer.step()
    else:
        restore_random_state(dist.get_rank(), random)
    optimizer.zero_grad()
    return Outcome(
        loss=mean,
        targets=int(sums["targets"]),
        norm=sums["norm"],
        learning_rate=rate,
        verdict=verdict,
        sums={name: sums[name] for name in counted},
        router_loss=_mean(sums, "router") if _weight_of(model) else None,
    )


def _accumulate(
    model: nn.Module, batches: Iterable[Batch]
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Run the micro-steps; return this rank's sums of both losses, and of predicted tokens."""
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    router, targets, weight = torch.zeros_like(total), 0, _weight_of(model)
    for batch in micro_steps(model, batches, normalise=_num_targets):
        loss, balance = losses(model, batch)
        minimised = loss if balance is None else loss + weight * balance
        minimised.backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
        router += 0 if balance is None else balance.detach()
        targets += batch.num_targets
    return total, router, targets


def _mean(sums: Mapping[str, float], name: str) -> float | None:
    return sums[name] / sums["targets"] if sums["targets"] else None


def _sum_over_ranks(
    tensors: Mapping[str, torch.Tensor],
    numbers: Mapping[str, float],
    same: Mapping[str, torch.Tensor],
) -> dict[str, float]:
    """Sum over the ranks by one all-reduce, and wait for the device once. Names in, names out.

    Args:
        tensors: this rank's, of shape () and float64, on the device that communicates.
        numbers: this rank's numbers on the host.
        same: tensors of shape () that are alike on every rank; they come along to the host.
    """
    parts = torch.stack(list(tensors.values()))
    mine = torch.tensor(list(numbers.values()), dtype=parts.dtype, device=parts.device)
    sums = torch.cat([parts, mine])
    all_reduce(sums)
    values = torch.cat([sums, torch.stack(list(same.values()))]).tolist()
    return dict(zip([*tensors, *numbers, *same], values, strict=True))


def token_loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy in nats, summed over the tokens that ``batch`` predicts. Shape ()."""
    return _cross_entropy(model(**batch.model_inputs()), batch)


def losses(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``token_loss``, and the loss that balances experts times the tokens that are predicted.

    The second is ``None`` where the model's configuration does not ask for it. It
    is that of one rank's micro-batch: the same micro-batches give the same gradient on any number
    of ranks and micro-steps, micro-batches of another size another one.

    Raises:
        MicsError: the configuration asks for it, and the model has none.
    """
    output = model(**batch.model_inputs())
    loss = _cross_entropy(output, batch)
    if not _weight_of(model):
        return loss, None
    balance = getattr(output, "aux_loss", None)
    if not isinstance(balance, torch.Tensor):
        raise MicsError(
            f"{type(model).__name__} returns no loss that balances experts, although its "
            "configuration asks for one (output_router_logits).",
            write="--model.router-loss 0",
        )
    return loss, balance.float() * batch.num_targets


def _cross_entropy(output: Any, batch: Batch) -> torch.Tensor:
    logits = output.logits  # [sequences, length, vocabulary]
    return F.cross_entropy(
        logits.flatten(0, 1).float(), batch.labels.flatten(), ignore_index=-100, reduction="sum"
    )


def _weight_of(model: nn.Module) -> float:
    """Return the weight of the loss that balances experts; 0 where there is none."""
    config: Any = getattr(model, "config", None)
    return (router_loss_weight(config) if config is not None else None) or 0.0


def _num_targets(batch: Batch) -> int:
    return batch.num_targets
