"""The ranks that one node has in one generation of the job."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from mics.agent.nursery import Nursery, Process
from mics.agent.pulse import Pulse, Wrist
from mics.agent.settings import Settings
from mics.ranks.heartbeat import VARIABLE, make_file
from mics.ranks.interfaces import interface_of
from mics.ranks.launcher import AGENT_GENERATION, FULL_WORLD

_LAST_WORDS_SECONDS = 1.0  # for a rank that has raised to end by itself


@dataclass(frozen=True)
class Meeting:
    """What all ranks of a generation are told.

    Args:
        job: its id.
        generation: from 1; larger than every one before.
        host: where the store listens.
        port: of the store.
        nodes: that have ranks, in the order in which these are numbered.
    """

    job: str
    generation: int
    host: str
    port: int
    nodes: tuple[int, ...]


class World:
    """Ranks that are running, have ended, or are being killed.

    Args:
        settings: of the agent.
        meeting: of the generation.
        nursery: starts them.
        folder: for their heartbeats.
        address: of this node.
    """

    def __init__(
        self, settings: Settings, meeting: Meeting, nursery: Nursery, folder: Path, address: str
    ) -> None:
        self.meeting = meeting
        self.began = time.monotonic()
        self.first_end: float | None = None  # of a rank that ended with 0
        self._settings = settings
        self._nursery = nursery
        self._last_words: float | None = None
        self._wrists: dict[int, Wrist] = {}
        self._files: list[Path] = []
        self.ranks: dict[int, Process] = {}
        folder.mkdir(mode=0o700, exist_ok=True)  # people clear shared memory by hand
        for local_rank in range(settings.ranks_per_node):
            rank = meeting.nodes.index(settings.node_index) * settings.ranks_per_node + local_rank
            path = folder / f"heartbeat-{meeting.generation}-{local_rank}"
            make_file(path)
            self._files.append(path)
            self._wrists[local_rank] = Wrist(path, rank, settings.node_index)
            told = _environment(settings, meeting, local_rank, address) | {VARIABLE: str(path)}
            self.ranks[local_rank] = nursery.start_rank(local_rank, f"rank {rank}", told)

    @property
    def running(self) -> list[Process]:
        """Those that have not ended."""
        return [process for process in self.ranks.values() if process.status is None]

    @property
    def have_started(self) -> bool:
        """Whether all of them are processes by now."""
        return all(process.pid for process in self.ranks.values())

    @property
    def done(self) -> bool:
        """Whether all of them have ended with 0."""
        return all(process.status == 0 for process in self.ranks.values())

    @property
    def code(self) -> int:
        """The first exit code that is not 0, as a shell has it."""
        codes = [process.status or 0 for process in self.ranks.values()]
        return next((code if code > 0 else 128 - code for code in codes if code), 0)

    def pulses(self) -> list[Pulse]:
        """What they do."""
        return [
            wrist.feel(ended=self.ranks[local_rank].status == 0)
            for local_rank, wrist in self._wrists.items()
        ]

    def pulse(self, local_rank: int) -> Pulse:
        """What one of them does."""
        return self._wrists[local_rank].feel()

    def ask_for_pause(self, *, wanted: bool) -> None:
        """Let them begin no other step, or go on."""
        for wrist in self._wrists.values():
            wrist.ask_for_pause(wanted=wanted)

    def forgive(self) -> None:
        """Begin to count anew how long they have stood still."""
        for wrist in self._wrists.values():
            wrist.forgive()

    def pass_on(self, number: int) -> None:
        """Send a signal to those that run."""
        for process in self.running:
            self._nursery.kill(process, number)

    def kill(self) -> None:
        """Kill those that run; one that has raised may end by itself, for a moment."""
        for process in self.running:
            if process.report and not process.doomed:
                self._last_words = time.monotonic() + _LAST_WORDS_SECONDS
            else:
                self._nursery.kill(process)

    def look(self) -> None:
        """Kill those whose moment is over."""
        if self._last_words is not None and time.monotonic() > self._last_words:
            self.pass_on(signal.SIGKILL)

    def describe_start(self, failed: float, cleared: float) -> str:
        """Say that they have started.

        Args:
            failed: when the generation before had, on the monotonic clock; 0 if there was none.
            cleared: when all of its ranks had gone.
        """
        words = f"generation {self.meeting.generation}: {len(self.ranks)} rank(s) started"
        if not failed:
            return words
        forked = max(process.seconds for process in self.ranks.values())
        return (
            f"{words} {time.monotonic() - failed:.2f} s after the failure (all had gone after "
            f"{cleared - failed:.2f} s; the slowest fork took {forked:.3f} s)"
        )

    def close(self) -> None:
        """Remove their files; they have all ended."""
        for wrist in self._wrists.values():
            wrist.close()
        for path in self._files:
            path.unlink(missing_ok=True)


def _environment(
    settings: Settings, meeting: Meeting, local_rank: int, address: str
) -> dict[str, str]:
    """The variables of a rank: torchrun's, and those of mics."""
    each, place = settings.ranks_per_node, meeting.nodes.index(settings.node_index)
    rank, world = place * each + local_rank, len(meeting.nodes) * each
    threads = str(max(1, (os.cpu_count() or 1) // each))
    told = {
        "RANK": rank,
        "WORLD_SIZE": world,
        FULL_WORLD: settings.world,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": each,
        "GROUP_RANK": place,
        "GROUP_WORLD_SIZE": len(meeting.nodes),
        "ROLE_NAME": "default",
        "ROLE_RANK": rank,
        "ROLE_WORLD_SIZE": world,
        "MASTER_ADDR": meeting.host,
        "MASTER_PORT": meeting.port,
        "TORCHELASTIC_RESTART_COUNT": meeting.generation - 1,
        "TORCHELASTIC_MAX_RESTARTS": settings.restarts,
        "TORCHELASTIC_RUN_ID": meeting.job,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "MICS_JOB": meeting.job,
        AGENT_GENERATION: meeting.generation,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
    }
    interface = settings.interface or interface_of(address)
    if interface is not None:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            told[name] = settings.interface or os.environ.get(name, interface)
    return {name: str(value) for name, value in told.items()}
