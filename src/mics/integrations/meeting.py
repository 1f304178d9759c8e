"""Where the ranks of a tool meet, so that none of them waits for one that goes elsewhere.

A tool's own collectives are not seen by mics: a rank with one batch less would wait in one of them
for ever, for ranks that wait for it in another. Here every rank says where it is, and is told.
"""

from __future__ import annotations

from mics.checkpoint.peers import Peers
from mics.errors import MicroStepError
from mics.ranks.drawing import ranks_text
from mics.ranks.whereabouts import during

_GROUP = "mics_tools"
_EVEN = (
    'accelerator_config={"even_batches": True} (the default), dataloader_drop_last=True, or '
    "loaders of one length; a callback that stops a run stops it on every rank"
)
_EVERYWHERE = (
    "the same calls on every rank: what saves, gathers or waits stands outside of "
    "if is_main_process: and its like"
)


@during("the other ranks, at a call that all of them make")
def meet(call: str) -> None:
    """Wait for all ranks; where one waits elsewhere all are told. Collective.

    Args:
        call: what all of them are in, as the tool names it.

    Raises:
        MicroStepError: on every rank: some are in another call, or begin a step.
    """
    _alike(f"in {call}", _EVERYWHERE)


@during("the question how many micro-batches the next step has")
def same_batches(count: int, write: str = _EVEN) -> None:
    """Compare how many micro-batches the next step has on each rank. Collective.

    Args:
        count: of this rank; 0 where its epoch is over.
        write: what to write in the tool instead.

    Raises:
        MicroStepError: on every rank: they differ, or some are in a call of ``meet``.
    """
    _alike(count, write)


def _alike(mine: int | str, write: str) -> None:
    """Compare where ranks are: how much is left, or in which call."""
    found = Peers(_GROUP).gather(mine)
    if len(set(found)) == 1:
        return
    ranks: dict[int | str, list[int]] = {}
    for rank, one in enumerate(found):
        ranks.setdefault(one, []).append(rank)
    calls = any(isinstance(one, str) for one in ranks)
    unit = " micro-batch(es) left" if calls else ""
    told = [
        f"rank(s) {ranks_text(ranks[one])}: {one if isinstance(one, str) else f'{one}{unit}'}"
        for one in sorted(ranks, key=lambda one: (isinstance(one, str), one))
    ]
    raise MicroStepError(
        "Ranks are in different calls, each of which waits for all ranks."
        if calls
        else "Ranks have different numbers of micro-batches left for the next step.",
        numbers=f"{'; '.join(told)}.",
        write=_EVERYWHERE if calls else write,
    )
