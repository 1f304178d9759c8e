"""Do all ranks mean the same thing? Compared before the first step, so that nothing hangs.

Only plain text crosses between ranks (UTF-8 in uint8 tensors), never pickle.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist

from mics import compat
from mics.errors import DisagreementError
from mics.ranks.drawing import ranks_text
from mics.ranks.issuing import all_gather

_MOST_NAMED = 8
_NOTHING = "nothing of the kind"


def gather_text(text: str, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """All-gather one text per rank, in group-rank order."""
    data = text.encode()
    size = torch.tensor([len(data)], dtype=torch.int64, device=device)
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    all_gather(sizes, size, group)
    widths = [int(n) for n in sizes.tolist()]
    width = max(1, *widths)
    mine = torch.zeros(width, dtype=torch.uint8, device=device)
    if data:
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = torch.empty(group.size() * width, dtype=torch.uint8, device=device)
    all_gather(rows, mine, group)
    table = rows.view(group.size(), width).cpu()
    return [bytes(row[:n].tolist()).decode() for row, n in zip(table, widths, strict=True)]


def first_word(name: str, mine: str) -> str:
    """The word of the first rank of the job that has one to say under a name; nobody waits."""
    return bytes(compat.job_store().compare_set(name, "", mine)).decode()


def where_they_differ(
    lines: Sequence[str], ranks: Sequence[int], group: dist.ProcessGroup
) -> str | None:
    """The first of some lines in which ranks differ, and who has which; collective.

    Args:
        lines: of this rank.
        ranks: whose numbers are told, in their order.
        group: of them all; it communicates on the host.

    Returns:
        ``None`` where the lines are alike.
    """
    texts = gather_text(json.dumps(list(lines)), group, torch.device("cpu"))
    told = zip(dist.get_process_group_ranks(group), map(json.loads, texts), strict=True)
    said: dict[int, list[str]] = dict(told)
    for entries in zip_longest(*(said[rank] for rank in ranks), fillvalue=_NOTHING):
        by_entry: dict[str, list[int]] = {}
        for rank, entry in zip(ranks, entries, strict=True):
            by_entry.setdefault(entry, []).append(rank)
        if len(by_entry) > 1:
            each = [f"rank(s) {ranks_text(some)}: {entry}" for entry, some in by_entry.items()]
            text = "; ".join(each)
            return f"{text[0].upper()}{text[1:]}."
    return None


def check_agreement(
    facts: Mapping[str, Sequence[str]], groups: Sequence[dist.ProcessGroup], device: torch.device
) -> None:
    """Raise on every rank when any rank's facts differ from the first rank's.

    Args:
        facts: for each subject ("version", "model"), its lines in order.
        groups: one group, or the groups of a mesh's axes, innermost first; together they reach
            every rank that is compared, so that all of them see the same and none is left waiting.
        device: where the groups' backend communicates.

    Raises:
        DisagreementError: names the subject, the ranks that differ, and the first line that does.
    """
    mine = torch.tensor([dist.get_rank(), *map(_digest, facts.values())], device=device)
    table = mine.unsqueeze(0)  # [ranks, 1 + subjects]
    for group in groups:
        rows = table.new_empty(group.size() * table.numel())
        all_gather(rows, table.reshape(-1), group)
        table = rows.view(-1, mine.numel())
    ranks, digests = table[:, 0].tolist(), table[:, 1:]
    for column, subject in enumerate(facts):
        same = (digests[:, column] == digests[0, column]).tolist()
        if not all(same):
            odd = [rank for rank, equal in zip(ranks, same, strict=True) if not equal]
            ours, theirs = _lines_of([ranks[0], odd[0]], facts[subject], groups, device)
            raise _disagreement(subject, ranks[0], odd, ours, theirs)


def _lines_of(
    ranks: list[int],
    mine: Sequence[str],
    groups: Sequence[dist.ProcessGroup],
    device: torch.device,
) -> list[list[str]]:
    """The lines of some ranks, on every rank. Collective."""
    rank = dist.get_rank()
    known: dict[str, list[str]] = {str(rank): list(mine)} if rank in ranks else {}
    for group in groups:
        for text in gather_text(json.dumps(known), group, device):
            known |= json.loads(text)
    return [known[str(rank)] for rank in ranks]


def _disagreement(
    subject: str, first: int, odd: list[int], ours: list[str], theirs: list[str]
) -> DisagreementError:
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    named = ", ".join(map(str, odd[:_MOST_NAMED]))
    more = f" and {len(odd) - _MOST_NAMED} more" if len(odd) > _MOST_NAMED else ""
    return DisagreementError(
        f"Ranks disagree on {subject}: rank(s) {named}{more} differ from rank {first}.",
        numbers=f"Entry {at}: rank {first} has {_entry(ours, at)}, rank {odd[0]} has "
        f"{_entry(theirs, at)} (of {len(ours)} and {len(theirs)} entries).",
        write=f"the same {subject} on every rank",
    )


def _entry(lines: list[str], at: int) -> str:
    return repr(lines[at]) if at < len(lines) else "nothing"


def _digest(lines: Sequence[str]) -> int:
    """63 bits of a hash, so that it fits an int64 tensor."""
    text = "\n".join([str(len(lines)), *lines])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
