"""torch's collectives as mics calls them: counted per group, and waited for by ``waiting.py``.

On an accelerator they are torch's own, ordered on streams; on the host each is issued
asynchronously, and a wait can say for whom it is.
"""

from __future__ import annotations

import contextlib
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mics import compat
from mics.errors import ShardError
from mics.ranks.board import NoAnswer, board_of_job
from mics.ranks.device import on_accelerator
from mics.ranks.drawing import ranks_text
from mics.ranks.heartbeat import heart
from mics.ranks.waiting import Place, wait_for_work, wait_until
from mics.ranks.whereabouts import counted, meeting, passing, world_group

_of_host: weakref.WeakKeyDictionary[
    dist.ProcessGroup, dict[tuple[str, tuple[int, ...]], dist.ProcessGroup]
] = weakref.WeakKeyDictionary()  # by the world, whose groups end with it
_FIRST_PAUSE, _LONGEST_PAUSE = 1e-3, 5e-2  # seconds between two looks for those who have not come

Call = Callable[[bool], dist.Work | None]
"""Issues one collective of torch; with True it is asynchronous and returns its handle."""


class Pending:
    """A collective of the host that is under way; it can be used as torch's handle of one.

    Args:
        work: torch's handle.
        place: what is waited for.
        finish: what is left to do when it is over.
    """

    def __init__(
        self, work: dist.Work, place: Place, finish: Callable[[], object] | None = None
    ) -> None:
        self._work = work
        self._place = place
        self._finish = finish

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until it is over; a second wait does nothing.

        Raises:
            RankError: it can not end.
        """
        wait_for_work(self._work, self._place)
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()
        return True

    def is_completed(self) -> bool:
        """Whether a wait would return at once."""
        return self._work.is_completed()

    def get_future(self) -> torch.futures.Future[Any]:
        """torch's, which ends with the backend's part."""
        return self._work.get_future()


Handle = dist.Work | Pending
"""torch's where a device waits, ours where the host does."""


def all_gather(
    output: torch.Tensor,
    input: torch.Tensor,
    group: dist.ProcessGroup,
    async_op: bool = False,
    name: str | None = None,
) -> Handle | None:
    """All-gather ``input`` of ``group.rank()`` into row ``group.rank()`` of ``output``.

    Args:
        output: the rows of all ranks.
        input: this rank's.
        group: as torch's.
        async_op: as torch's.
        name: what people are told a rank waits for, if not its kind and size.
    """

    def call(async_op: bool) -> dist.Work | None:
        return compat.all_gather(output, input, group, async_op)

    return _issue(call, "all-gather", output, group, async_op, name=name)


def reduce_scatter(
    output: torch.Tensor,
    input: torch.Tensor,
    op: compat.ReduceOp,
    group: dist.ProcessGroup,
    async_op: bool = False,
) -> Handle | None:
    """Reduce ``input`` over the group, keep row ``group.rank()`` in ``output``.

    Gloo does so by an all-reduce of a copy, in a wait that can not be cut into slices. Here it is
    the same all-reduce of the same copy.

    Raises:
        ShardError: ``op`` is PREMUL_SUM, which Gloo has not.
    """

    def call(async_op: bool) -> dist.Work | None:
        return compat.reduce_scatter(output, input, op, group, async_op)

    if on_accelerator(input.device) or not counted(group).on_gloo:
        return _issue(call, "reduce-scatter", input, group, async_op)
    if compat.is_premul_sum(op):
        raise ShardError(
            "Gloo can not multiply gradients while it sums them, as a gradient divide factor asks.",
            numbers=f"A reduce-scatter of {input.nbytes:,} bytes over {group.size()} ranks.",
            write="module.set_force_sum_reduction_for_comms(True) for each module that has a "
            "set_gradient_divide_factor(...)",
        )
    rows = input.clone()

    def reduce(async_op: bool) -> Any:
        return dist.all_reduce(rows, op, group=group, async_op=async_op)

    def finish() -> None:
        output.copy_(rows.view(group.size(), *output.shape)[group.rank()])

    return _issue(reduce, "reduce-scatter", input, group, async_op, finish)


def all_reduce(
    tensor: torch.Tensor,
    op: compat.ReduceOp = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
    name: str | None = None,
) -> Handle | None:
    """All-reduce a tensor in place, over all ranks by default.

    Args:
        tensor: it holds the result when the call is over.
        op: as torch's.
        group: as torch's.
        async_op: as torch's.
        name: what people are told a rank waits for, if not its kind and size.
    """

    def call(async_op: bool) -> Any:
        return dist.all_reduce(tensor, op, group=group, async_op=async_op)

    return _issue(call, "all-reduce", tensor, group, async_op, name=name)


def exchange(output: torch.Tensor, input: torch.Tensor, group: dist.ProcessGroup) -> Handle:
    """Begin to send row r of ``input`` to rank r, which keeps what comes from rank s in row s."""

    def call(async_op: bool) -> Any:
        return dist.all_to_all_single(output, input, group=group, async_op=async_op)

    work = _issue(call, "exchange", input, group, async_op=True)
    assert work is not None
    return work


def broadcast(tensor: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Give every rank of a group the tensor of its first one."""

    def call(async_op: bool) -> Any:
        return dist.broadcast(compat.as_known(tensor), group=group, group_src=0, async_op=async_op)

    _issue(call, "broadcast", tensor, group, async_op=False)


def gather(
    output: list[torch.Tensor] | None, input: torch.Tensor, group: dist.ProcessGroup
) -> None:
    """Give the first rank of a group the tensors of all, which are alike in size.

    Args:
        output: what the first rank takes them into, in the group's order; others have none.
        input: this rank's.
        group: as torch's.
    """

    def call(async_op: bool) -> Any:
        return dist.gather(input, output, group=group, group_dst=0, async_op=async_op)

    _issue(call, "gathering", input, group, async_op=False)


def send(tensor: torch.Tensor, taker: int, group: dist.ProcessGroup) -> None:
    """Send a tensor of the host to a rank of a Gloo group, which takes it by ``receive``.

    Args:
        tensor: what is sent.
        taker: by its number in the job.
        group: whose connections are used.
    """
    work = dist.isend(tensor, dst=taker, group=group)
    _wait_for_passing(work, tensor, dist.get_rank(), taker)


def receive(tensor: torch.Tensor, giver: int, group: dist.ProcessGroup) -> None:
    """Take what a rank sends by ``send``; arguments alike."""
    work = dist.irecv(tensor, src=giver, group=group)
    _wait_for_passing(work, tensor, giver, dist.get_rank())


def _wait_for_passing(work: dist.Work | None, tensor: torch.Tensor, giver: int, taker: int) -> None:
    assert work is not None
    of = passing(giver, taker)
    of.issued += 1
    place = Place(of, of.issued, "sending", tensor.nbytes)
    wait_for_work(_Passing(work), place)


class _Passing:
    """A message under way, for which a wait may have a limit and be asked for again.

    Gloo ends the connection when the limit of torch's own is over; that stands in a thread without.
    """

    def __init__(self, work: dist.Work) -> None:
        self._work = work
        self._error: RuntimeError | None = None
        self._thread = threading.Thread(target=self._run, name="mics_passing", daemon=True)
        self._thread.start()

    def wait(self, timeout: timedelta) -> bool:
        """Wait for so long.

        Raises:
            RuntimeError: it is not over, or has broken.
        """
        self._thread.join(timeout.total_seconds())
        if self._error is not None:
            raise self._error
        if self._thread.is_alive():
            raise RuntimeError("The message is still under way.")
        return True

    def is_completed(self) -> bool:
        """Whether a wait would return or raise at once."""
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work.wait()
        except RuntimeError as error:
            self._error = error


def _issue(
    call: Call,
    kind: str,
    whole: torch.Tensor,
    group: dist.ProcessGroup | None,
    async_op: bool,
    finish: Callable[[], object] | None = None,
    name: str | None = None,
) -> Handle | None:
    of = counted(group or world_group())
    of.issued += 1
    mine = heart()
    if mine is not None:
        mine.issue()
    if on_accelerator(whole.device):
        return call(async_op)
    place = Place(of, of.issued, name or kind, 0 if name else whole.nbytes)
    work = call(True)
    assert work is not None
    pending = Pending(work, place, finish)
    if async_op:
        return pending
    pending.wait()
    return None


# -- groups --------------------------------------------------------------------------------------


def host_group(
    ranks: Sequence[int], name: str, timeout: timedelta | None = None
) -> dist.ProcessGroup:
    """The group of these ranks on the host, made when it is first asked for; see ``make_group``."""
    made, key = _of_host.setdefault(world_group(), {}), (name, tuple(ranks))
    if key not in made:
        made[key] = make_group(ranks, name, backend="gloo", timeout=timeout)
    return made[key]


def make_group(
    ranks: Sequence[int],
    name: str,
    *,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> dist.ProcessGroup:
    """Make a process group, on its ranks only, once all of them have come.

    torch would wait for the others in silence.

    Args:
        ranks: of the group; all of them call this, with the same arguments.
        name: tells people what it is for.
        backend: the job's by default.
        timeout: of its collectives; by default the job's.

    Raises:
        RankError: some can not come.
    """
    _meet(ranks, name)
    made: dist.ProcessGroup | None = dist.new_group(
        list(ranks),
        backend=backend,
        timeout=timeout or compat.timeout_of(world_group()),
        use_local_synchronization=True,
        group_desc=name,
    )
    assert made is not None
    counted(made, timeout)
    return made


def _meet(ranks: Sequence[int], name: str) -> None:
    board = board_of_job()
    if board is None or len(ranks) == 1:
        return
    of = meeting(ranks)
    of.issued += 1
    all_have_come = board.meet(f"{ranks_text(ranks)}/{of.issued}", len(ranks))

    def is_over(seconds: float) -> bool:
        until, pause = time.monotonic() + seconds, _FIRST_PAUSE
        while time.monotonic() < until:
            with contextlib.suppress(NoAnswer):
                if all_have_come():
                    return True
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return False

    place = Place(of, of.issued, f"making of a group ({name})")
    wait_until(is_over, place, time.monotonic())
