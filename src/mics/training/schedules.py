"""The learning rate as a function of the step alone, so that resuming needs no state."""

from __future__ import annotations

import math
from collections.abc import Callable

from mics.training.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of one step.

    It rises linearly over ``warmup`` steps, then is what ``decay`` says:

    - "cosine", "linear": it falls along half a cosine or a line to ``final`` times the peak, which
      it reaches at the last step;
    - "wsd": it stays at the peak, and falls along a line to the same end in the last ``decayed``
      of the steps (warm-up, stable, decay: Hu et al., "MiniCPM", 2024, section 4);
    - "inverse-sqrt": it falls with the square root of the step, from the end of the warm-up on
      (Vaswani et al., 2017, section 5.3), but not below ``final`` times the peak;
    - "none": it stays.

    Args:
        config: the peak and the shape.
        step: 1 to ``steps``.
        steps: steps of the whole run.
    """
    if step <= config.warmup:
        return config.learning_rate * step / config.warmup
    share = _SHAPES[config.decay](config, step, steps)
    return config.learning_rate * share


def _cosine(config: OptimizerConfig, step: int, steps: int) -> float:
    done = _done(config.warmup, step, steps)
    return _between(config, (1 + math.cos(math.pi * done)) / 2)


def _linear(config: OptimizerConfig, step: int, steps: int) -> float:
    return _between(config, 1 - _done(config.warmup, step, steps))


def _wsd(config: OptimizerConfig, step: int, steps: int) -> float:
    # The last step of the plateau is where the line begins.
    begin = max(steps - max(1, round(config.decayed * steps)), config.warmup)
    return _between(config, 1 - max(0.0, (step - begin) / max(1, steps - begin)))


def _inverse_sqrt(config: OptimizerConfig, step: int, steps: int) -> float:
    return max(config.final, math.sqrt(max(1, config.warmup) / step))


def _none(config: OptimizerConfig, step: int, steps: int) -> float:
    return 1.0


def _done(warmup: int, step: int, steps: int) -> float:
    """How far it is between the step behind the warm-up and the last one."""
    return (step - warmup - 1) / (steps - warmup - 1) if steps > warmup + 1 else 0.0


def _between(config: OptimizerConfig, left: float) -> float:
    return config.final + (1 - config.final) * left


_SHAPES: dict[str, Callable[[OptimizerConfig, int, int], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "inverse-sqrt": _inverse_sqrt,
    "none": _none,
}
