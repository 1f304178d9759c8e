"""A step's state into memory: copied, sealed, compared with the replicas'.

[Note: what comes first]
What a rank has of its own is written first, because no replica has it: a rank that dies while it
copies its shard is then brought back to this very step, with the shard of a replica. On the host
the copy is made at once, because it would take the cores that compute; from an accelerator it comes
beside the next step. What the replicas say is heard beside the next step everywhere.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mics import compat
from mics.quantities import size
from mics.ranks.console import say_of_this_rank
from mics.recovery.agreeing import Agreeing, Heard
from mics.recovery.job import Job, left_behind, others_of
from mics.recovery.slot import HEAD, Head, Layout, Slot
from mics.recovery.staging import Staging
from mics.recovery.state import Moment


@dataclass(frozen=True)
class Outcome:
    """How the keeping of a step ended: what was heard, and what went wrong on this rank, if any."""

    step: int
    digest: int | None
    heard: Heard
    trouble: str


def write_owns(beside: Slot, head: Mapping[str, Any], owns: Mapping[str, bytes]) -> None:
    """Write what ranks have of their own beside a slot, by rank, or by ``resting_name``.

    Raises:
        OSError: there is no room.
    """
    tensors = {
        name: torch.frombuffer(bytearray(own), dtype=torch.uint8) for name, own in owns.items()
    }
    beside.write(head, Layout(tensors), tensors, [])


def restore_owns(slot: Slot, head: Head, owns: Mapping[str, bytes]) -> None:
    """Write them beside a slot that was taken from another rank; say why not, without room.

    What is there stays whole until all of it is written: all ranks do this at once.
    """
    said = {name: getattr(head, name) for name in HEAD}
    beside = others_of(slot.path)
    unfinished = beside.with_name(f"{beside.name}.new")
    try:
        write_owns(Slot(unfinished), said, owns)
        unfinished.replace(beside)
    except OSError as error:
        why = error.strerror or error
        say_of_this_rank(f"random states of step {head.step} are not in memory: {why}")


class Writing:
    """The state of one step on its way into a slot, see [Note: what comes first].

    Args:
        slot: it is written to.
        head: what ``HEAD`` names.
        moment: the state; it may not be written before ``let_go`` returns.
        staging: brings tensors to the host.
        agreeing: asks the other ranks.
        job: of the slot.
        rests: what ranks that are away have of their own, by ``resting_name``.
    """

    def __init__(
        self,
        slot: Slot,
        head: Mapping[str, Any],
        moment: Moment,
        staging: Staging,
        agreeing: Agreeing,
        job: Job,
        rests: Mapping[str, bytes],
    ) -> None:
        self.slot, self.step = slot, int(head["step"])
        self._head, self._moment, self._job, self._rests = head, moment, job, rests
        self._staging, self._agreeing = staging, agreeing
        self._digest: int | None = None
        self._trouble = ""
        self._outcome: Outcome | None = None
        self._error: BaseException | None = None
        self._own = moment.own.to_bytes()
        self._owns = Slot(others_of(slot.path))
        self._keep_owns({int(head["rank"]): self._own})
        self._written: dict[str, int] = {}
        self._on_host = staging.begin(moment.tensors)
        if staging.under_way:
            self._written = {n: compat.times_written(t) for n, t in moment.tensors.items()}
        else:
            self._keep()
        self._thread = threading.Thread(target=self._run, name="mics-keep", daemon=True)
        self._thread.start()

    def let_go(self) -> None:
        """Let the accelerator's stream wait until the state may be written."""
        self._staging.hold_stream()

    def wait(self) -> None:
        """Wait until it has ended, well or not."""
        self._thread.join()

    def end(self) -> Outcome:
        """Wait until all ranks have been heard.

        Raises:
            RankError: a rank is gone, or cannot come.
            RecoveryError: ranks have done other numbers of steps.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        assert self._outcome is not None
        return self._outcome

    def _run(self) -> None:
        try:
            if self._staging.under_way:
                self._staging.wait()
                self._keep()
            heard = self._agreeing.ask(self.step, self._digest, self._own)
            if self._digest is not None and len(heard.owns) > 1:
                self._keep_owns(heard.owns)
            self._outcome = Outcome(self.step, self._digest, heard, self._trouble)
        except BaseException as error:
            self._error = error

    def _keep(self) -> None:
        tensors = self._moment.tensors
        others = [self._moment.names, self._moment.changing, self._own]
        try:
            digest = self.slot.write(self._head, self._moment.layout, self._on_host, others)
        except OSError as error:
            self._trouble = self._no_room(error, sum(t.nbytes for t in tensors.values()))
            return
        changed = [
            n for n, times in self._written.items() if compat.times_written(tensors[n]) != times
        ]
        if changed:
            self.slot.wipe()
            self._trouble = (
                f"{changed[0]} and {len(changed) - 1} others were written while the state of step "
                f"{self.step} was copied, by other than the optimizer: it is not kept"
            )
            return
        self._digest = digest

    def _keep_owns(self, owns: Mapping[int, bytes]) -> None:
        """What ranks have of their own, beside the slot."""
        try:
            named = {str(rank): own for rank, own in owns.items()}
            write_owns(self._owns, self._head, {**named, **self._rests})
        except OSError as error:
            self._trouble = self._no_room(error, sum(map(len, owns.values())))

    def _no_room(self, error: OSError, num_bytes: int) -> str:
        lines = [
            f"the state of step {self.step} is not in memory: {error.strerror or error}",
            f"  It has {size(num_bytes)}, and {self._job.folder} has room for "
            f"{size(self._job.free_bytes())}; two states are kept.",
        ]
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            lines.append(
                "  Write: --shm-size of the container, or MICS_MEMORY=<a larger folder in memory>"
            )
            lines += [f"  {line}" for line in left_behind(self._job)]
        return "\n".join(lines)
