"""What a rank says of its micro-step, and what is wrong when ranks say different things."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from mics.errors import MicroStepError
from mics.ranks.drawing import ranks_text

Said = Literal["beforehand", "on arrival", "afterwards"]
"""When ranks say so, see [Note: who knows the last micro-step, and when] in ``open_step.py``.

All ranks say it at the same moment, or their hop 2 would cross.
"""

Normalise = Literal["micro_steps", "tokens", "shared tokens"] | None
"""What the gradients of a step are divided by: the number of micro-steps, of tokens (which several
ranks may count alike), or nothing."""

_SAID = get_args(Said)
_NORMALISE = (None, "micro_steps", "tokens", "shared tokens")
_LARGEST = 2**31 - 1


class Facts(NamedTuple):
    """What one rank says, as integers of 31 bits.

    Args:
        ran: micro-steps of the step that have ended by then.
        more: whether another one comes.
        moment: when this is said, by its place in ``Said``.
        divides: what the gradients are divided by, by its place among the choices.
        optimizer_steps: taken so far by optimizers of the mesh's models.
        optimizers: a checksum of what they stepped, in order.
        trained: a checksum of ``requires_grad``.
        hops: a checksum of the units whose hop 2 has started since a step ended, in order.
        collectives: issued so far in the partition group; equal inside of it alone.
    """

    ran: int
    more: int
    moment: int
    divides: int
    optimizer_steps: int
    optimizers: int
    trained: int
    hops: int
    collectives: int


NAMES = tuple(Facts.__annotations__)
"""Names of the facts, in their order."""


def facts(
    ran: int,
    *,
    more: bool,
    said: Said,
    normalise: Normalise,
    optimizer_steps: int,
    optimizers: int,
    trained: int,
    issued: tuple[int, int],
) -> Facts:
    """What this rank says; ``issued`` are its hops and its collectives."""
    hops, collectives = issued
    return Facts(
        ran,
        int(more),
        _SAID.index(said),
        _NORMALISE.index(normalise),
        optimizer_steps & _LARGEST,
        optimizers & _LARGEST,
        trained & _LARGEST,
        hops & _LARGEST,
        collectives & _LARGEST,
    )


@dataclass(frozen=True)
class _Wrong:
    """One fact in which ranks differ.

    Args:
        fact: its name.
        what: is wrong.
        told: what a rank has done, by its number.
        write: what to write instead.
    """

    fact: str
    what: str
    told: Callable[[int], str]
    write: str


_SAME_NUMBER = "the same number of batches on every rank; pad the last one, or drop it"
_WRONG = [
    _Wrong(
        "ran",
        "Ranks are in different micro-steps of one step.",
        lambda ran: f"{ran} micro-step(s)",
        _SAME_NUMBER,
    ),
    _Wrong(
        "more",
        "Ranks were given different numbers of micro-batches for one step.",
        lambda more: "more" if more else "no more",
        f"{_SAME_NUMBER} (for batches in mics.steps(loader, micro_steps=...) does)",
    ),
    _Wrong(
        "divides",
        "Ranks normalise the gradients of one step in different ways.",
        lambda divides: f"divided by {_NORMALISE[divides] or 'nothing'}",
        "the same normalise= on every rank, and tokens= and tokens_shared_over= on all of them or "
        "on none",
    ),
    _Wrong(
        "moment",
        "Some ranks say beforehand which micro-step is the last, and others do not.",
        lambda moment: f"said it {_SAID[moment]}",
        "the same last= on every rank, and finish_step on all of them or on none",
    ),
    _Wrong(
        "optimizer_steps",
        "Ranks have taken different numbers of optimizer steps: their shards belong to different "
        "steps by now.",
        lambda steps: f"{steps} optimizer step(s)",
        "optimizer.step() on every rank or on none, by what all ranks know (an all-reduced loss; "
        "for experts on a mesh of their own torch's ShardedGradScaler, not GradScaler)",
    ),
    _Wrong(
        "optimizers",
        "Ranks have stepped other optimizers, or the same in another order or with other options: "
        "their parameters belong to different steps by now.",
        lambda optimizers: f"the checksum {optimizers:08x}",
        "the same optimizers on every rank, in the same order, with the same options and "
        "gradients; a schedule by what all ranks know, such as an all-reduced loss",
    ),
    _Wrong(
        "trained",
        "Ranks train different parameters: requires_grad was changed on some of them only.",
        lambda trained: f"the checksum {trained:08x}",
        "param.requires_grad_(...) on every rank",
    ),
    _Wrong(
        "hops",
        "Ranks ran hop 2 of other units, or in another order: the gradients of one were averaged "
        "with those of another, and this step is wrong.",
        lambda hops: f"the checksum {hops:08x}",
        "every model of a step on every rank, with its loss times 0 where a batch does not need it",
    ),
    _Wrong(
        "collectives",
        "Ranks of a partition group have run different numbers of its collectives: one has left "
        "out a forward or a backward, and what the others sent was taken for its next one's.",
        lambda collectives: f"{collectives} collective(s)",
        "the same forward and backward passes on every rank of a partition group",
    ),
]


def in_words(fact: str) -> str:
    """What the numbers of a fact are, in the plural."""
    return {
        "optimizer_steps": "optimizer steps",
        "optimizers": "optimizers",
        "trained": "trained parameters",
        "hops": "units in hop 2",
        "collectives": "forward and backward passes",
    }.get(fact, "micro-steps")


def first_difference(said: Sequence[Facts]) -> str | None:
    """The first fact that all ranks have to agree on and do not."""
    names = [wrong.fact for wrong in _WRONG if wrong.fact != "collectives"]
    return next((n for n in names if len({getattr(one, n) for one in said}) > 1), None)


def disagreement(
    said: Mapping[int, Facts], partition: int, optimizers: str | None = None
) -> MicroStepError:
    """The error of ranks that differ in what they have to agree on.

    Args:
        said: by the ranks' numbers in the job, partition group by partition group.
        partition: p, ranks of a partition group.
        optimizers: where optimizers differ, in words, if that is known.
    """
    ranks = list(said)
    for wrong in _WRONG:
        size = partition if wrong.fact == "collectives" else len(ranks)
        for first in range(0, len(ranks), size):
            by_number: dict[int, list[int]] = {}
            for rank in ranks[first : first + size]:
                by_number.setdefault(getattr(said[rank], wrong.fact), []).append(rank)
            if len(by_number) > 1:
                told = "; ".join(
                    f"rank(s) {ranks_text(sorted(some))}: {wrong.told(number)}"
                    for number, some in sorted(by_number.items())
                )
                after = f"After {said[ranks[first]].ran} micro-step(s) of this step"
                if wrong.fact == "more":
                    after = f"After {said[ranks[first]].ran} micro-step(s) some ranks have more "
                    after += "and others have not"
                numbers = f"{after}: {told}." if wrong.fact != "ran" else f"{told}.".capitalize()
                if wrong.fact == "optimizers":
                    numbers = optimizers or numbers
                return MicroStepError(wrong.what, numbers=numbers, write=wrong.write)
    raise AssertionError("the ranks agree")
