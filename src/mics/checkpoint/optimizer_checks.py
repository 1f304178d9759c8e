"""Are values of a checkpoint such as an optimizer could have had? Asked before they are loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mics.checkpoint.differences import not_to_be

_NO_NUMBERS = ("foreach", "fused", "capturable", "differentiable", "maximize")

_LEAST_0 = ("lr", "eps", "weight_decay", "momentum")

_LIKE_PARAMETER = frozenset(
    (
        *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer", "square_avg"),
        *("grad_avg", "acc_delta", "sum", "prev", "step_size", "ax"),
    )
)
"""What torch's own optimizers keep in the shape of the parameter."""


def check_options(
    folder: Path, prefix: str, there: Mapping[str, Any], here: Mapping[str, Any]
) -> None:
    """Check the options of a group that is to be loaded against those at hand.

    Raises:
        CheckpointError: one is of another kind than here, is not finite, or cannot be.
    """
    for option, value in there.items():
        name = f"{prefix}.{option}"
        if option in _NO_NUMBERS:
            fits = value is None or isinstance(value, bool)
        elif option in here:
            fits = _fits(value, here[option])
        else:
            fits = _is_finite(value)
        if option == "lr":
            fits = fits and (isinstance(value, torch.Tensor) or _is_number(value))
        if option in _LEAST_0 and _is_number(value):  # Adafactor's epsilons are two
            fits = fits and value >= 0
        if option == "betas" and isinstance(value, list | tuple):
            fits = fits and all(0 <= beta < 1 for beta in value if _is_number(beta))
        if option == "maximize":  # another sign is another training
            fits = fits and bool(value) == bool(here.get(option))
        if not fits:
            raise not_to_be(folder, name, f"It is {value!r} there, {here.get(option)!r} here")


def _fits(there: Any, here: Any) -> bool:
    """Whether a value may take the place of another."""
    if isinstance(here, bool):
        return there is None or isinstance(there, bool)
    if isinstance(here, int | float | torch.Tensor):
        if isinstance(there, torch.Tensor):
            return there.shape == (here.shape if isinstance(here, torch.Tensor) else ())
        return _is_number(there) and (math.isfinite(there) or _same(there, here))
    if isinstance(here, str):
        return there is None or isinstance(there, str)
    if isinstance(here, list | tuple):
        if not isinstance(there, list | tuple) or len(there) != len(here):
            return False
        return all(_fits(a, b) for a, b in zip(there, here, strict=True))
    if isinstance(here, Mapping):
        return isinstance(there, Mapping) and all(
            _fits(value, here[key]) for key, value in there.items() if key in here
        )
    return _is_finite(there)


def _is_finite(value: Any) -> bool:
    """Whether there is no number in a value that is not one."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    if isinstance(value, Mapping):
        return all(map(_is_finite, value.values()))
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(there: float, here: Any) -> bool:
    return there == here or (there != there and here != here)


def check_state(
    folder: Path,
    optimizer: torch.optim.Optimizer,
    states: Mapping[str, tuple[nn.Parameter, Mapping[Any, Any]]],
) -> None:
    """Check the states of a group's parameters, as far as it is known what they must be.

    Args:
        folder: the checkpoint, for messages.
        optimizer: whose states they are; of torch's own more is known.
        states: parameter and state by name, of parameters that have one.

    Raises:
        CheckpointError: one cannot be.
    """
    of_torch = type(optimizer).__module__.startswith("torch.optim")
    for name, (param, state) in states.items():
        step = state.get("step", 0)
        counts = step.numel() == 1 if isinstance(step, torch.Tensor) else _is_count(step)
        if not counts:
            raise not_to_be(folder, f"the step of {name}", f"It is {step!r}")
        if not of_torch:
            continue
        if "exp_avg" in state and "step" not in state:
            raise not_to_be(folder, f"the state of {name}", "It has exp_avg and no step")
        for key in _LIKE_PARAMETER & state.keys():
            value = state[key]
            if value is not None and getattr(value, "shape", None) != param.shape:
                shown = list(getattr(value, "shape", [])) or repr(value)
                why = f"It is {shown}, and the parameter is {list(param.shape)}"
                raise not_to_be(folder, f"{key} of {name}", why)
    if of_torch and not isinstance(optimizer, torch.optim.Adafactor | torch.optim.LBFGS):
        asked = _LIKE_PARAMETER | {"step"}
        known = {name: set(asked & state.keys()) for name, (_, state) in states.items()}
        _check_same_keys(folder, {name: keys for name, keys in known.items() if keys})


def _check_same_keys(folder: Path, keys: Mapping[str, set[Any]]) -> None:
    """Parameters of one group that have a state have the same; none has lost a part of it."""
    if not keys:
        return
    first = next(iter(keys))
    for name, mine in keys.items():
        if mine != keys[first]:
            why = f"It has {sorted(mine)}, {first} has {sorted(keys[first])}"
            raise not_to_be(folder, f"the state of {name}", why)


def _is_count(value: Any) -> bool:
    return value is None or (_is_number(value) and math.isfinite(value) and value >= 0)
