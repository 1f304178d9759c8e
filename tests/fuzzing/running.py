"""Many seeds in few launches of ranks; a refusal ends a launch, the next seed begins another."""

from __future__ import annotations

import json
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from parity import quiet
from ranks import collect_ranks

from fuzzing.alone import train_alone
from fuzzing.cases import WORLD, draw_case
from fuzzing.net import Record
from fuzzing.sharded import Sharded
from mics import MicsError

PER_LAUNCH = 25  # groups stay open until their ranks end
GRACE = 20.0  # seconds in which every rank raises once one has


@dataclass(frozen=True)
class Verdict:
    """What came of one seed."""

    seed: int
    kind: str  # "right", "refused", "wrong"
    words: str = ""


def verdicts(seeds: Sequence[int]) -> Iterator[Verdict]:
    """Run the cases of some seeds, those with few ranks per node first."""
    # One process keeps to one gpus_per_node.
    left = sorted(seeds, key=lambda seed: draw_case(seed).layout.gpus_per_node)
    while left:
        per_node = draw_case(left[0]).layout.gpus_per_node
        alike = [seed for seed in left if draw_case(seed).layout.gpus_per_node == per_node]
        launch = alike[:PER_LAUNCH]
        right = {seed: train_alone(draw_case(seed)) for seed in launch}
        with tempfile.TemporaryDirectory() as folder:
            ends = collect_ranks(_run, WORLD, right, folder)
            for seed in launch:
                said = [_read(Path(folder), seed, rank) for rank in range(WORLD)]
                if said == [None] * WORLD:
                    break
                left.remove(seed)
                yield _judge(seed, said)
            if left[:1] == launch[:1]:
                yield Verdict(left.pop(0), "wrong", "\n".join(words for _, words in ends))


def _judge(seed: int, said: Sequence[list[str] | None]) -> Verdict:
    by_words: dict[str, list[int]] = {}
    for rank, one in enumerate(said):
        words = "said nothing" if one is None else "\n  ".join(one) or "right"
        by_words.setdefault(words, []).append(rank)
    words = "\n".join(f"ranks {ranks}: {words}" for words, ranks in by_words.items())
    kinds = [None if one is None else one[0] if one else "" for one in said]
    if kinds == [""] * WORLD:
        return Verdict(seed, "right")
    return Verdict(seed, "refused" if kinds == ["refused"] * WORLD else "wrong", words)


def _run(right: dict[int, list[Record]], folder: str) -> None:
    for seed, records in right.items():
        try:
            said = quiet(lambda: Sharded(draw_case(seed), folder).differences(records))  # noqa: B023
            stops = False
        except MicsError as error:
            said, stops = ["refused", f"{type(error).__name__}: {error}"], True
        except Exception:
            said, stops = ["raised", "".join(traceback.format_exc(limit=-6))], True
        _write(Path(folder), seed, said)
        if stops:
            _wait_for_others(Path(folder), seed)
            raise RuntimeError("end of this launch")


def _place(folder: Path, seed: int, rank: int) -> Path:
    return folder / f"{seed}.{rank}.json"


def _write(folder: Path, seed: int, said: list[str]) -> None:
    place = _place(folder, seed, dist.get_rank())
    unfinished = place.with_suffix(".part")
    unfinished.write_text(json.dumps(said))
    unfinished.rename(place)


def _read(folder: Path, seed: int, rank: int) -> list[str] | None:
    place = _place(folder, seed, rank)
    return json.loads(place.read_text()) if place.exists() else None


def _wait_for_others(folder: Path, seed: int) -> None:
    until = time.monotonic() + GRACE
    while time.monotonic() < until:
        if all(_place(folder, seed, rank).exists() for rank in range(WORLD)):
            return
        time.sleep(0.05)
