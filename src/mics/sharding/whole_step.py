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
rank; all ranks work out the same. Nothing is sent between replicas.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics.communication.apart import Message
from mics.communication.ledger import Ledger
from mics.communication.whole import check_splits, messages_for, part_of, whole_of
from mics.errors import ConfigError, ShardError
from mics.sharding.belonging import units_by_param
from mics.sharding.tensor_parts import kind_of, values_of

_NAMES = ("params", "param_names")


class WholeStep(torch.optim.Optimizer):
    """Step whole matrices by any optimizer of torch's form, for parameters that are sharded.

    ``mics.WholeStep(model.parameters(), torch.optim.Adafactor, lr=0.01)`` is what
    ``torch.optim.Adafactor(model.parameters(), lr=0.01)`` is for one process, groups, schedulers
    and checkpoints included. A step gathers every matrix over the ranks that hold its shards, in
    hop 0 of ``ledger``; ``predict_traffic`` has it when given the optimizer.

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
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Callable[..., torch.optim.Optimizer],
        **options: Any,
    ) -> None:
        self._rule = rule
        self._options = options
        self._steppers: dict[nn.Parameter, torch.optim.Optimizer] = {}
        params = [_listed(one) for one in params]
        super().__init__(params, self._defaults(params))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; collective over partition groups."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ledgers = {key: unit.ledger for key, unit in units_by_param().items()}
        for param in self._with_gradients():
            check_splits(_values(param))
            check_splits(param.grad)  # type: ignore[arg-type]
        for group in self.param_groups:
            options = {name: value for name, value in group.items() if name not in _NAMES}
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, options, ledgers.get(id(param)))
        return loss

    def messages_for(self, param: torch.Tensor) -> list[Message]:
        """What the next step sends of a parameter that has a gradient."""
        state = [one for one in self.state.get(param, {}).values() if isinstance(one, DTensor)]
        gradient = param if param.grad is None else param.grad
        return [sent for one in (param, gradient, *state) for sent in messages_for(one)]

    def _with_gradients(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see torch's."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            self._make(param)  # for what it refuses; tools put shards in the places of parameters

    def _step(self, param: nn.Parameter, options: dict[str, Any], ledger: Ledger | None) -> None:
        if param not in self._steppers:
            self._steppers[param] = self._make(param)
        stepper = self._steppers[param]
        stepper.param_groups[0].update(options)
        (whole,) = stepper.param_groups[0]["params"]
        whole.data = _whole(_values(param), ledger)
        whole.grad = _whole(param.grad, ledger)
        if param in self.state:
            stepper.state[whole] = {
                key: _whole(value, ledger) for key, value in self.state[param].items()
            }
        stepper.step()
        _refuse_shared(stepper, options)
        param.copy_(_shard_like(param, whole.detach()))
        self.state[param] = {
            # A copy, or the shard would keep the whole in memory.
            key: _shard_like(param, value).clone() if _is_alike(param, value) else value
            for key, value in stepper.state.pop(whole, {}).items()
        }
        whole.grad, whole.data = None, _nothing(param)

    def _defaults(self, params: list[Any]) -> dict[str, Any]:
        """The options of a group that says nothing."""
        given = (p for one in params for p in (one["params"] if isinstance(one, dict) else [one]))
        for param in given:
            found = param[1] if isinstance(param, tuple) else param  # (name, parameter)
            return self._make(found).defaults
        return self._options

    def _make(self, param: torch.Tensor) -> torch.optim.Optimizer:
        """The optimizer of one parameter, of which it holds the dims and no values."""
        stepper = self._rule([nn.Parameter(_nothing(param))], **self._options)
        closure = inspect.signature(stepper.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{type(stepper).__name__} computes the loss anew inside of its step, and "
                "mics.WholeStep steps each parameter by itself, after the closure.",
                numbers="Its step has no default for closure.",
                write="a rule whose step needs gradients alone, such as torch.optim.Adafactor",
            )
        return stepper


def _listed(one: Any) -> Any:
    """A parameter, or a group whose parameters can be looked at twice."""
    if not isinstance(one, dict) or isinstance(one["params"], torch.Tensor):
        return one
    return {**one, "params": list(one["params"])}


def _nothing(param: torch.Tensor) -> torch.Tensor:
    """No values, with the dims, dtype and device of a parameter."""
    return torch.empty((0,) * param.ndim, dtype=param.dtype, device=param.device)


def _values(param: torch.Tensor) -> torch.Tensor:
    """The values of a parameter, whatever its library's type.

    Raises:
        ShardError: they are spread over several tensors.
    """
    values = values_of(param.detach())
    if values is None:
        raise ShardError(
            "mics.WholeStep cannot step a parameter whose values are not one tensor.",
            numbers=f"Shape {list(param.shape)}: {kind_of(param)}.",
            write="an optimizer of the other parameters",
        )
    return values


def _whole(value: Any, ledger: Ledger | None) -> Any:
    """All of a tensor, gathered from the ranks that hold its shards; anything else as it is."""
    return whole_of(value, ledger) if isinstance(value, DTensor) else value


def _is_alike(param: torch.Tensor, value: Any) -> bool:
    return type(value) is torch.Tensor and value.shape == param.shape


def _shard_like(param: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor that every rank has; sends nothing."""
    return part_of(whole, param) if isinstance(param, DTensor) else whole


def _refuse_shared(stepper: torch.optim.Optimizer, options: Mapping[str, Any]) -> None:
    """Raise where a step has changed the options of its group, which is of one parameter here."""
    after = {name: value for name, value in stepper.param_groups[0].items() if name not in _NAMES}
    changed = [k for k, v in after.items() if k not in options or not _same(v, options[k])]
    if changed:
        raise ConfigError(
            f"{type(stepper).__name__} keeps something for all parameters of a group, and "
            "mics.WholeStep steps each parameter by itself.",
            numbers=f"A step has changed {', '.join(map(repr, changed))} of its group.",
            write=f"{type(stepper).__name__}(model.parameters(), ...) itself, if its rule goes "
            "element by element",
        )


def _same(one: Any, other: Any) -> bool:
    return one is other or (not isinstance(one, torch.Tensor) and bool(one == other))
