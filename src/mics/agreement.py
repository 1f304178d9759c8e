"""Do all ranks mean the same thing? Compared before the first step, so that nothing hangs.

Only plain text crosses between ranks (UTF-8 in uint8 tensors), never pickle.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from mics import compat
from mics.errors import DisagreementError


def gather_text(text: str, group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """All-gather one text per rank, in group-rank order."""
    data = text.encode()
    size = torch.tensor([len(data)], dtype=torch.int64, device=device)
    sizes = torch.empty(group.size(), dtype=torch.int64, device=device)
    compat.all_gather(sizes, size, group)
    widths = [int(n) for n in sizes.tolist()]
    width = max(1, *widths)
    mine = torch.zeros(width, dtype=torch.uint8, device=device)
    if data:
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    rows = torch.empty(group.size() * width, dtype=torch.uint8, device=device)
    compat.all_gather(rows, mine, group)
    table = rows.view(group.size(), width).cpu()
    return [bytes(row[:n].tolist()).decode() for row, n in zip(table, widths, strict=True)]


def check_agreement(
    facts: Mapping[str, Sequence[str]], group: dist.ProcessGroup, device: torch.device
) -> None:
    """Raise on every rank of the group when any rank's facts differ from the first rank's.

    Args:
        facts: for each subject ("torch version", "model"), its lines in order.
        group: the ranks to compare.
        device: where the group's backend communicates.

    Raises:
        DisagreementError: names the subject, the first line that differs, and the ranks.
    """
    if group.size() == 1:
        return
    digest = hashlib.sha256("\n".join(f"{s}:{_digest(facts[s])}" for s in facts).encode())
    mine = torch.tensor(list(digest.digest()), dtype=torch.uint8, device=device)
    all_digests = torch.empty(group.size() * mine.numel(), dtype=torch.uint8, device=device)
    compat.all_gather(all_digests, mine, group)
    rows = all_digests.view(group.size(), -1)
    if bool((rows == rows[0]).all()):
        return
    # Every rank sees the same rows, so every rank comes here and raises the same error.
    texts = [
        gather_text("\n".join([str(len(lines)), *lines]), group, device) for lines in facts.values()
    ]
    ranks = dist.get_process_group_ranks(group)
    for subject, by_rank in zip(facts, texts, strict=True):
        if len(set(by_rank)) > 1:
            raise _disagreement(subject, by_rank, ranks)
    raise DisagreementError(
        "Ranks compare different subjects.",
        numbers=f"This rank compares {', '.join(facts)}.",
        write="the same script and the same version of mics on every rank",
    )


def _disagreement(subject: str, by_rank: list[str], ranks: list[int]) -> DisagreementError:
    lines = [text.split("\n")[1:] for text in by_rank]
    odd = [i for i, text in enumerate(by_rank) if text != by_rank[0]]
    ours, theirs = lines[0], lines[odd[0]]
    at = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b),
        min(len(ours), len(theirs)),
    )
    return DisagreementError(
        f"Ranks disagree on {subject}: rank(s) {', '.join(str(ranks[i]) for i in odd)} differ from "
        f"rank {ranks[0]}.",
        numbers=f"Entry {at}: rank {ranks[0]} has {_entry(ours, at)}, rank {ranks[odd[0]]} has "
        f"{_entry(theirs, at)} (of {len(ours)} and {len(theirs)} entries).",
        write=f"the same {subject} on every rank",
    )


def _entry(lines: list[str], at: int) -> str:
    return repr(lines[at]) if at < len(lines) else "nothing"


def _digest(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join([str(len(lines)), *lines]).encode()).hexdigest()
