"""What people are told of a restart: where the state came from, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mics.errors import RecoveryError
from mics.quantities import first_of
from mics.ranks.drawing import ranks_text
from mics.ranks.launcher import takes_new_nodes
from mics.recovery.holders import Choice, Held, Seat, missing, on_one_node


def why_not(seats: Sequence[Seat], held: Sequence[Held], newer: Path | None) -> str:
    """Why nobody can go on from what is in memory; ``newer`` is a checkpoint of a later step."""
    gone = missing(seats, held)
    steps = sorted({one.step for one in held})
    why = f"{newer} is newer" if newer is not None else _why(gone, len(seats))
    return f"cannot go on from memory, which has steps {first_of(list(map(str, steps)))}: {why}"


def _why(gone: Sequence[int], ranks: int) -> str:
    if len(gone) == ranks:
        return "it is of a model that was sharded in another way, as with another partition size"
    if gone:
        return f"nobody holds the shard of rank(s) {ranks_text(gone)}"
    return "of no step is there a whole and undoubted state for every rank"


def healed(seats: Sequence[Seat], choice: Choice) -> str:
    """Who took the state from whom; empty where everybody has it."""
    givers = {
        seat.rank: choice.shards[seat.rank].place
        for seat in seats
        if (choice.shards[seat.rank].host, choice.shards[seat.rank].place) != (seat.host, seat.rank)
    }
    if not givers:
        return ""
    takers = ranks_text(sorted(givers))
    return f"; rank(s) {takers} took it from rank(s) {ranks_text(sorted(set(givers.values())))}"


def errors_lost(ranks: Sequence[int]) -> str:
    """Who took its state from another rank, which has no errors of hop 2 but its own."""
    return (
        f"what hop 2 had held back on rank(s) {ranks_text(ranks)} is lost with their memory, and "
        "begins with zeros there"
    )


def not_survived(seats: Sequence[Seat]) -> list[str]:
    """What would cost the job more than a restart, and what to write against it."""
    words = []
    if alone := on_one_node(seats):
        words.append(
            f"the shard of rank(s) {ranks_text(alone)} is in the memory of one node only: its loss "
            "needs a checkpoint. Write: a partition that leaves a replica on another node"
        )
    if not takes_new_nodes():
        words.append(
            "torchrun lets no other node join in place of a lost one, because only its first round "
            "is told where ranks meet. Write: export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 on every "
            "node, and --rdzv-backend c10d"
        )
    return words


def no_agreement_left(step: int, newest: int) -> RecoveryError:
    """Replicas differ in a step, and all that was in every rank's memory is not to be had."""
    return RecoveryError(
        f"Replicas differ in step {step}, and no state is left on which they agree.",
        numbers=f"The newest that was in every rank's memory is {newest}.",
        write="a restart, which goes on from the newest checkpoint",
    )


def differs_at_the_end(step: int, rank: int, digests: Mapping[int, int]) -> RecoveryError:
    """Replicas differ in the last step, as a rank has heard."""
    return RecoveryError(
        "SILENT CORRUPTION: replicas differ in the last step, and what was saved of it is not to "
        "be trusted.",
        numbers=f"Step {step}; rank {rank} heard {sorted(digests.items())}.",
        write="the same command again: it goes on from the step before",
    )


def exists_once(dealt: int, params: int) -> RecoveryError:
    """The refusal to keep state of which only one node would have a part."""
    return RecoveryError(
        "Optimizer state that mics.owned has dealt to the replicas exists once, so the memory of a "
        "lost node would be the only place where its part was.",
        numbers=f"{dealt} of {params} parameters are owned.",
        write="the optimizer of model.parameters(); or mics.save, more often, and no "
        "mics.Snapshots",
    )
