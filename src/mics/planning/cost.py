"""What a step costs, failures included."""

from __future__ import annotations

from dataclasses import dataclass

from mics.hardware.cluster import Cluster
from mics.quantities import count


@dataclass(frozen=True)
class Price:
    """What a plan costs in US dollars, failures included; ``None`` where nobody knows the price.

    Args:
        step: of one step.
        billion_tokens: of so many.
        lost: share of the time that goes to checkpoints and failures.
        tokens: of a whole run, if it was asked for.
        run: of these tokens.
        days: that they take; ``None`` where failures leave no time for any step.
    """

    step: float | None
    billion_tokens: float | None
    lost: float
    tokens: float | None = None
    run: float | None = None
    days: float | None = None

    def __str__(self) -> str:
        text = f"A step costs {as_dollars(self.step)}, a billion tokens "
        text += as_dollars(self.billion_tokens)
        if self.tokens is not None:
            days = "n/a" if self.days is None else f"{self.days:,.1f} days"
            text += f", {count(round(self.tokens))} tokens {as_dollars(self.run)} in {days}"
        return f"{text}; {self.lost:.1%} of the time goes to checkpoints and failures."


@dataclass(frozen=True)
class Reliability:
    """How often something breaks, and what that loses.

    Args:
        failures: unexpected interruptions per GPU and hour. Llama 3: 419 in 54 days on 16,384 H100
            (Grattafiori et al., 2024), one per 50,000 GPU hours.
        restart: seconds until the job computes again.
        save: seconds a checkpoint holds the step up.
        every: seconds between two checkpoints.

    But for the first these are assumptions, and shown wherever a price is.
    """

    failures: float = 2.0e-5
    restart: float = 600.0
    save: float = 20.0
    every: float = 1800.0

    def __str__(self) -> str:
        return (
            f"a failure in {1 / self.failures:,.0f} GPU hours, {self.restart / 60:.0f} minutes to "
            f"restart, a checkpoint every {self.every / 60:.0f} minutes that takes "
            f"{self.save:.0f} seconds"
        )


def goodput(cluster: Cluster, reliability: Reliability = Reliability()) -> float:
    """Work out the share of the time that becomes steps: what saving and failures leave.

    On average a failure loses half of what was computed since the last checkpoint.
    """
    per_second = reliability.failures * cluster.gpus / 3600
    lost = per_second * (reliability.every / 2 + reliability.restart)
    return max(0.0, 1 - lost - reliability.save / (reliability.every + reliability.save))


def wall_seconds(cluster: Cluster, seconds: float) -> float | None:
    """Work out how long so many seconds of steps take; ``None`` where failures leave no time."""
    share = goodput(cluster)
    return seconds / share if share else None


def dollars(cluster: Cluster, seconds: float) -> float | None:
    """Price so many seconds of steps, with failures; ``None`` where a node's price is not known."""
    spent, price = wall_seconds(cluster, seconds), cluster.node.price
    return None if spent is None or price is None else spent / 3600 * cluster.nodes * price


def price_of(
    cluster: Cluster, seconds: float, step_tokens: float, tokens: float | None = None
) -> Price:
    """Price a plan's step, and a run of so many tokens.

    Args:
        cluster: it runs on.
        seconds: of a step.
        step_tokens: of a step, on all GPUs.
        tokens: of a whole run.
    """
    spent = None if tokens is None else seconds * tokens / step_tokens
    wall = None if spent is None else wall_seconds(cluster, spent)
    return Price(
        dollars(cluster, seconds),
        dollars(cluster, seconds * 1e9 / step_tokens),
        1 - goodput(cluster),
        tokens,
        None if spent is None else dollars(cluster, spent),
        None if wall is None else wall / 86400,
    )


def as_dollars(value: float | None) -> str:
    """Write a price; cents only where they count."""
    if value is None:
        return "n/a"
    if value < 0.01:
        return f"${value:.2g}"
    return f"${value:,.2f}" if value < 100 else f"${value:,.0f}"
