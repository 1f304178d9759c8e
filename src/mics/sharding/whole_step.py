"""An optimizer whose rule needs whole matrices, over parameters that are sharded.

Most rules go element by element and give the same on a shard. Others take products, norms or means
of a whole matrix: Muon, Adafactor, SOAP. On sharded parameters torch works out some of them, with
rounding of its own, and raises on others; a kernel that sees only the shard is wrong in silence.

[Note: one matrix at a time]
Parameter by parameter, the ranks that hold its shards gather the weight, its gradient and the state
of its shape, each of them steps the whole matrix, and keeps its own shard. Those ranks are a
partition group, and with tensor or expert parallelism the ranks of these axes too. So there is one
whole matrix in memory at any time, state is sharded as the parameter is, and a checkpoint loads at
any partition size. State of another shape, as Adafactor's rows and columns, stays whole on every
rank; all ranks work out the same. Replicas send each other nothing but the small message that
compares what they step ([Note: who compares with whom] in ``same_matrices.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics.communication.apart import Message
from mics.communication.ledger import Ledger
from mics.communication.whole import check_splits, messages_for, part_of, whole_of
from mics.sharding.belonging import units_by_param
from mics.sharding.same_matrices import check_same_matrices
from mics.sharding.steppers import Steppers, as_given, is_alike


class WholeStep(torch.optim.Optimizer):
    """Step whole matrices by any optimizer of torch's form, for parameters that are sharded.

    ``mics.WholeStep(model.parameters(), torch.optim.Adafactor, lr=0.01)`` is what
    ``torch.optim.Adafactor(model.parameters(), lr=0.01)`` is for one process, groups, schedulers
    and checkpoints included. A step gathers every matrix over the ranks that hold its shards, in
    hop 0 of ``ledger``; ``predict_traffic`` has it when given the optimizer.

    Before that ranks compare which parameters they step, in which order, which of them have a
    gradient, the dtypes of what is gathered, and options that are numbers or words: all ranks of a
    mesh that mics has sharded parameters over, and ranks that have other parts of a parameter, on
    whatever mesh. Each compares its own parameters. Plain tensors are not compared, nor are copies
    on meshes that mics does not know, nor values.

    Args:
        params: parameters or groups of them, sharded or whole.
        rule: makes the optimizer of one parameter, from ``[parameter]`` and ``options``. It steps
            each parameter by itself: what one parameter's step tells the next is not supported.
        options: of every group that does not say otherwise.

    Raises:
        ValueError: the rule does not take one of the parameters.
        ConfigError: the rule computes the loss in its step; or, at the first step, before a
            parameter is changed: it keeps something for all parameters of a group.
        ShardError: in a step, before a parameter is changed: a weight or gradient cannot be
            gathered.
        DisagreementError: in a step, on every rank that compares, before anything is sent: ranks
            have other parameters or gradients, another order of them, or other options.
        MicroStepError: in a step, likewise: ranks have stepped something else before.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Callable[..., torch.optim.Optimizer],
        **options: Any,
    ) -> None:
        self._steppers = Steppers("mics.WholeStep", rule, options)
        params = as_given(params)
        super().__init__(params, self._steppers.defaults(params))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; collective over all ranks that compare."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        units = units_by_param()
        sent = {param: self._sent(param) for param in self._with_gradients()}
        for tensors in sent.values():
            for tensor in tensors.values():
                check_splits(tensor)
        in_order = [param for group in self.param_groups for param in group["params"]]
        check_same_matrices("mics.WholeStep", self, in_order, sent, units)
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    unit = units.get(id(param))
                    self._step(param, group, None if unit is None else unit.ledger)
        return loss

    def messages_for(self, param: torch.Tensor) -> list[Message]:
        """What the next step sends of a parameter that has a gradient."""
        state = [one for one in self.state.get(param, {}).values() if isinstance(one, DTensor)]
        gradient = param if param.grad is None else param.grad
        return [sent for one in (param, gradient, *state) for sent in messages_for(one)]

    def _sent(self, param: nn.Parameter) -> dict[str, torch.Tensor]:
        """What a step gathers of a parameter, in order: weight, gradient, and state of its shape.

        Raises:
            ShardError: its values are not one tensor.
        """
        assert param.grad is not None
        state = {key: v for key, v in self.state.get(param, {}).items() if isinstance(v, DTensor)}
        return {"weight": self._steppers.values(param), "gradient": param.grad, **state}

    def _with_gradients(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see torch's."""
        super().add_param_group(param_group)
        self._steppers.check(self.param_groups[-1])

    def _step(self, param: nn.Parameter, group: dict[str, Any], ledger: Ledger | None) -> None:
        whole, state = self._steppers.step(
            param,
            _whole(self._steppers.values(param), ledger),
            _whole(param.grad, ledger),
            {key: _whole(value, ledger) for key, value in self.state.get(param, {}).items()},
            group,
        )
        param.copy_(_shard_like(param, whole))
        self.state[param] = {
            # A copy, or the shard would keep the whole in memory.
            key: _shard_like(param, value).clone() if is_alike(param, value) else value
            for key, value in state.items()
        }


def _whole(value: Any, ledger: Ledger | None) -> Any:
    """All of a tensor, gathered from the ranks that hold its shards; anything else as it is."""
    return whole_of(value, ledger) if isinstance(value, DTensor) else value


def _shard_like(param: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that every rank has; sends nothing."""
    return part_of(whole, param) if isinstance(param, DTensor) else whole
