"""What a step costs, failures included."""

from __future__ import annotations

from dataclasses import dataclass

from mics.hardware.cluster import Cluster


@dataclass(frozen=True)
class Reliability:
    """How often something breaks, and what that loses.

    Args:
        failures: unexpected interruptions per GPU and hour. Llama 3: 419 in 54 days on 16,384 H100
            (Grattafiori et al., 2024), one per 50,000 GPU hours.
        restart: seconds until the job computes again.
        save: seconds a checkpoint holds the step up.
        every: seconds between two checkpoints.

    But for the first these are assumptions, and told wherever a price is.
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
    """Share of the time that becomes steps: what saving, lost work and restarts leave.

    On average a failure loses half of what was computed since the last checkpoint.
    """
    per_second = reliability.failures * cluster.gpus / 3600
    lost = per_second * (reliability.every / 2 + reliability.restart)
    return max(0.0, 1 - lost - reliability.save / (reliability.every + reliability.save))


def wall_seconds(cluster: Cluster, seconds: float) -> float | None:
    """How long so many seconds of steps take; ``None`` where failures leave no time for any."""
    share = goodput(cluster)
    return seconds / share if share else None


def dollars(cluster: Cluster, seconds: float) -> float | None:
    """Price of so many seconds of steps, with failures; ``None`` where a node's is not known."""
    spent, price = wall_seconds(cluster, seconds), cluster.node.price
    return None if spent is None or price is None else spent / 3600 * cluster.nodes * price
