"""``make fuzz``: random models and schedules on four ranks against one process.

``python tests/fuzz.py --seeds 300`` runs seeds 0 to 299; ``--first 42 --seeds 1`` one of them.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from fuzzing.cases import draw_case
from fuzzing.running import verdicts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=300, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    asked = parser.parse_args()
    began, counts = time.monotonic(), Counter[str]()
    for verdict in verdicts(range(asked.first, asked.first + asked.seeds)):
        counts[verdict.kind] += 1
        if verdict.kind != "right":
            print(f"{verdict.kind}: {draw_case(verdict.seed)}\n{verdict.words}", flush=True)
        if counts.total() % 10 == 0:
            print(f"{counts.total()} of {asked.seeds}: {dict(counts)}", flush=True)
    seconds = time.monotonic() - began
    print(f"{counts.total()} seeds in {seconds:.0f} s: {dict(counts)}")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
