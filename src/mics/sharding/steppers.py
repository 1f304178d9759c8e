"""A rule of torch's form that steps whole matrices one by one, each by an optimizer of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mics.communication.optimizer_options import options_of
from mics.errors import ConfigError, ShardError
from mics.sharding.tensor_parts import kind_of, values_of


class Steppers:
    """The optimizers of single parameters, which hold no values between steps.

    Args:
        whose: the name of the optimizer that steps by them, for messages.
        rule: makes an optimizer of ``[parameter]`` and ``options``.
        options: of every group that does not say otherwise.
    """

    def __init__(
        self, whose: str, rule: Callable[..., torch.optim.Optimizer], options: Mapping[str, Any]
    ) -> None:
        self._whose = whose
        self._rule = rule
        self._options = options
        self._made: dict[torch.Tensor, torch.optim.Optimizer] = {}

    def defaults(self, params: list[Any]) -> dict[str, Any]:
        """The options of a group that says nothing.

        Args:
            params: parameters, names and parameters, or groups of them.
        """
        given = (p for one in params for p in (one["params"] if isinstance(one, dict) else [one]))
        for param in given:
            found = param[1] if isinstance(param, tuple) else param  # (name, parameter)
            return self.make(found).defaults
        return dict(self._options)

    def make(self, param: torch.Tensor) -> torch.optim.Optimizer:
        """Make the optimizer of a parameter, of which it holds the dims and no values.

        Raises:
            ValueError: the rule does not take it.
            ConfigError: the rule computes the loss in its step.
        """
        stepper = self._rule([nn.Parameter(_nothing(param))], **self._options)
        closure = inspect.signature(stepper.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ConfigError(
                f"{type(stepper).__name__} computes the loss anew inside of its step, and "
                f"{self._whose} steps each parameter by itself, after the closure.",
                numbers="Its step has no default for closure.",
                write="a rule whose step needs gradients alone, such as torch.optim.Adafactor",
            )
        return stepper

    def check(self, group: Mapping[str, Any]) -> None:
        """Refuse what the rule does not take; nothing is kept, as tools replace parameters.

        Raises:
            ValueError, ConfigError: as ``make``.
        """
        for param in group["params"]:
            self.make(param)

    def step(
        self,
        param: torch.Tensor,
        weight: torch.Tensor,
        gradient: torch.Tensor,
        state: Mapping[str, Any],
        group: Mapping[str, Any],
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Step a whole matrix, in place.

        Args:
            param: whose it is.
            weight: its values, all of them.
            gradient: of its shape.
            state: of its last step, with whole tensors; nothing before the first.
            group: the parameter group that it is in.

        Returns:
            Its new values and its new state.

        Raises:
            ConfigError: the rule keeps something for all parameters of a group.
        """
        if param not in self._made:
            self._made[param] = self.make(param)
        stepper, options = self._made[param], options_of(group)
        stepper.param_groups[0].update(options)
        (whole,) = stepper.param_groups[0]["params"]
        whole.data, whole.grad = weight, gradient
        if state:
            stepper.state[whole] = dict(state)
        stepper.step()
        self._refuse_shared(stepper, options)
        new = whole.detach(), dict(stepper.state.pop(whole, {}))
        whole.grad, whole.data = None, _nothing(param)
        return new

    def try_out(self, param: torch.Tensor, group: Mapping[str, Any]) -> None:
        """Step one zero, so that what ``step`` refuses of a rule is refused on every rank.

        Args:
            param: of the group; it stays as it is.
            group: the options.

        Raises:
            ConfigError: as ``step``.
        """
        stepper, options = self.make(param), options_of(group)
        stepper.param_groups[0].update(options)
        (zero,) = stepper.param_groups[0]["params"]
        zero.data = torch.zeros((1,) * param.ndim, dtype=param.dtype, device=param.device)
        zero.grad = torch.zeros_like(zero)
        stepper.step()
        self._refuse_shared(stepper, options)

    def values(self, param: torch.Tensor) -> torch.Tensor:
        """The values of a parameter, whatever its library's type.

        Raises:
            ShardError: they are spread over several tensors.
        """
        values = values_of(param.detach())
        if values is None:
            raise ShardError(
                f"{self._whose} cannot step a parameter whose values are not one tensor.",
                numbers=f"Shape {list(param.shape)}: {kind_of(param)}.",
                write="an optimizer of the other parameters",
            )
        return values

    def _refuse_shared(self, stepper: torch.optim.Optimizer, options: Mapping[str, Any]) -> None:
        """Raise where a step has changed the options of its group, which is of one parameter."""
        after = options_of(stepper.param_groups[0])
        changed = [k for k, v in after.items() if k not in options or not _same(v, options[k])]
        if changed:
            raise ConfigError(
                f"{type(stepper).__name__} keeps something for all parameters of a group, and "
                f"{self._whose} steps each parameter by itself.",
                numbers=f"A step has changed {', '.join(map(repr, changed))} of its group.",
                write=f"{type(stepper).__name__}(model.parameters(), ...) itself, if its rule goes "
                "element by element",
            )


def as_given(params: Any) -> list[Any]:
    """Parameters, or groups whose parameters can be looked at twice."""
    return [
        {**one, "params": list(one["params"])}
        if isinstance(one, dict) and not isinstance(one["params"], torch.Tensor)
        else one
        for one in params
    ]


def is_alike(param: torch.Tensor, value: Any) -> bool:
    """Whether a state is as large as the whole parameter, so that it can be split like it."""
    return type(value) is torch.Tensor and value.shape == param.shape


def _nothing(param: torch.Tensor) -> torch.Tensor:
    """No values, with the dims, dtype and device of a parameter."""
    return torch.empty((0,) * param.ndim, dtype=param.dtype, device=param.device)


def _same(one: Any, other: Any) -> bool:
    return one is other or (not isinstance(one, torch.Tensor) and bool(one == other))
