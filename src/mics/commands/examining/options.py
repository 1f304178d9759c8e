"""What ``mics doctor`` can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mics.anatomy.recipe import MOST_RANKS as MOST_RANKS_OF_A_JOB
from mics.quantities import Within
from mics.ranks.launcher import MOST_RANKS, Launch, more_ranks


@dataclass(frozen=True)
class Config:
    """Report versions, nodes, groups, link speeds, and any rank that disagrees with the others.

    Under torchrun, Slurm or MPI every rank takes part; otherwise ranks are started here.
    """

    ranks: Annotated[int | None, Within(1, MOST_RANKS)] = None
    """Ranks to start here, where no launcher has: one per accelerator by default, or 1."""

    gpus_per_node: Annotated[int | None, Within(1, MOST_RANKS_OF_A_JOB)] = None
    """Ranks joined by the fast link; what the launcher says by default. Smaller simulates nodes."""

    partition: Annotated[int | Literal["auto"], Within(1, MOST_RANKS_OF_A_JOB)] = "auto"
    """Ranks that together hold one replica of the model states; a whole node by default."""

    device: str = "auto"
    """"cpu", "cuda", ...; by default the accelerator, if every rank can have one."""

    timeout: Annotated[float, Within(0.001, 86_400)] = 60.0
    """Seconds to wait for a rank that does not answer."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON document instead of text."""


def nonsense(config: Config, launch: Launch | None) -> str | None:
    """Say which options make no sense here; ``None`` if all do."""
    if config.ranks is not None and launch is not None:
        started = f"{launch.source} has started {launch.world} ranks already"
        if config.ranks == launch.world:
            return f"leave out --ranks: {started}."
        return f"leave out --ranks: {started}. For others write {more_ranks(launch, config.ranks)}"
    from mics.ranks.device import default_device_type

    accelerator = default_device_type()
    if config.device not in ("auto", "cpu", accelerator):
        possible = " or ".join(dict.fromkeys(["cpu", accelerator]))
        return f"--device {config.device} is not on this machine; write --device {possible}."
    return None
