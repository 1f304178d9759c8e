"""Checkpoints beside what is in memory: a user's own things in them, and which of both is newer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mics.checkpoint.folder import (
    newest_intact,
    set_aside_newer,
    step_folder,
    step_of,
    steps_of,
)
from mics.checkpoint.manifest import Json
from mics.checkpoint.peers import Peers
from mics.errors import CheckpointError
from mics.ranks.console import alarm, say
from mics.recovery.holders import Choice, Held, disputed_after
from mics.recovery.newcomers import differing, on_extras, prints_of
from mics.recovery.own import Own, extras_now, own_of, restore_extras


def extras_to_save(extras: Mapping[str, Any], peers: Peers) -> Json:
    """The states of the extras of every rank, one where they are alike. Collective.

    Raises:
        CheckpointError: on every rank: one cannot be kept.
    """
    texts = peers.together(lambda: Own({}, {}, {}, extras_now(extras)).to_bytes().decode())
    return [texts[0]] if len(set(texts)) == 1 else list(texts)


def restore_saved(
    found: Path, extra: Mapping[str, Json], extras: Mapping[str, Any], peers: Peers
) -> int:
    """Give the extras the states that a checkpoint has of them. Collective.

    Of ranks that are others in number, those that differ from rank to rank go to the rank of their
    number, and stay as the program made them where it has none, which is said aloud; see
    [Note: what a newcomer gets] in ``newcomers.py``.

    Returns:
        How many steps had been done.

    Raises:
        CheckpointError: on every rank: it was not written by ``Snapshots.save``.
    """
    step: list[int] = []
    differ: list[str] = []

    def restore() -> None:
        try:
            number, texts = extra["step"], extra["extras"]
            if not isinstance(number, int) or not isinstance(texts, list) or not texts:
                raise TypeError("no step, or no list")
            of_ranks = [own_of(json.loads(str(text))) for text in texts]
            mine = of_ranks[peers.rank if peers.rank < len(texts) else 0].extras
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{found} was not written by Snapshots.save: it does not say what else was kept.",
                numbers=f"{type(error).__name__}: {error}.",
                write="mics.load in a loop of your own",
            ) from None
        if len(texts) not in (1, peers.world):
            differ.extend(differing([prints_of(own) for own in of_ranks]))
        left = set(differ) if peers.rank >= len(texts) > 1 else set()
        kept = {name: state for name, state in mine.items() if name not in left}
        restore_extras(extras, kept, left)
        step.append(number)

    peers.together(restore)
    if differ:
        then = len(cast("list[Json]", extra["extras"]))
        new, away = list(range(then, peers.world)), list(range(peers.world, then))
        alarm("\n".join(on_extras(sorted(differ), new, away, {})))
    return step[0]


def newer_than(
    choice: Choice | None, held: Sequence[Held], root: Path | None, peers: Peers
) -> Path | None:
    """An intact checkpoint of a later step than can be had of memory, if there is one. Collective.

    What is in memory may be old: where there was no more room, nothing was kept. Where replicas
    differ in a later step, what was saved of that step is not to be trusted.
    """
    if root is None or choice is None or disputed_after(choice.step, held):
        return None
    newest = choice.step

    def is_ahead() -> bool:
        return any(step > newest for step in steps_of(root))

    if not peers.together(is_ahead, only=0)[0]:
        return None
    found = newest_intact(root)
    return found if found is not None and (step_of(found) or 0) > newest else None


def set_aside(root: Path | None, step: int, peers: Peers) -> None:
    """Rename the checkpoints of steps that will be done again. Collective.

    What was saved of a step in which replicas differ is not to be trusted.
    """
    if root is None:
        return

    def rename() -> list[str]:
        return [str(path) for path in set_aside_newer(root, step_folder(root, step))]

    for path in peers.together(rename, only=0)[0]:
        say(f"set aside as {path}: it is newer than the step that all go on from")
