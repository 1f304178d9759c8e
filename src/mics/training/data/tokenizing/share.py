"""Which parts are this task's: what a launcher, an array of Slurm or an option says."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mics.errors import ConfigError
from mics.ranks.launcher import read_launch

_MOST = 2**20


@dataclass(frozen=True)
class Share:
    """One of ``count`` tasks, of which ``here`` run on this machine."""

    index: int = 0
    count: int = 1
    here: int = 1

    def has(self, part: int) -> bool:
        """Whether a part is this task's."""
        return part % self.count == self.index


def find_share(asked: str, environment: Mapping[str, str] | None = None) -> Share:
    """The share that is asked for, or that this task has in its job.

    Args:
        asked: "2/8", counted from 0, or "" for the launcher's.
        environment: of this process.

    Raises:
        ConfigError: it is no such share, or a scheduler says which one this is and not of how many.
        TopologyError: a launcher's variables make no sense.
    """
    env = os.environ if environment is None else environment
    if asked:
        match = re.fullmatch(r"(\d{1,7})/(\d{1,7})", asked)
        if match is None or not int(match[1]) < int(match[2]) <= _MOST:
            raise ConfigError(
                f"--share {asked!r} is no share.",
                numbers="It is the number of this task, from 0, and how many there are.",
                write="--share 0/4 on the first of four machines, --share 3/4 on the last",
            )
        return Share(int(match[1]), int(match[2]))
    launch = read_launch(env)
    if launch is not None and launch.world > 1:
        return Share(launch.rank, launch.world, launch.ranks_per_node)
    pod = env.get("JOB_COMPLETION_INDEX", "")
    if pod.isascii() and pod.isdecimal() and int(pod[:9]) > 0:
        raise ConfigError(
            "Pods of an Indexed Job of Kubernetes are not told how many there are: each would "
            "tokenise everything.",
            numbers=f"JOB_COMPLETION_INDEX = {pod[:9]}.",
            write='--share "$JOB_COMPLETION_INDEX/<pods>", or unset JOB_COMPLETION_INDEX',
        )
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
    texts = [env.get(name, "") for name in names]
    if not all(text.isdecimal() for text in texts) or int(texts[2]) < 2:
        return Share()
    number, least, count = (int(text) for text in texts)
    most = int(env.get("SLURM_ARRAY_TASK_MAX", "0") or 0)
    if most - least + 1 != count:
        raise ConfigError(
            "The tasks of this Slurm array are not numbered one by one.",
            numbers=f"There are {count} of them, from {least} to {most}.",
            write="--array 0-<tasks - 1>, or --share <number of the task>/<tasks>",
        )
    return Share(number - least, count)
