"""How fast `mics tokenize` is beside `tokenizers` alone, by one process and by two.

    python benchmarks/tokenizing.py

The corpus is 5 MB of the running Python's standard library, one row of JSON for each file; the
tokenizer a byte-level BPE of 8,192 ids, trained on it. "Alone" is `encode_batch` on texts that are
in memory already, by as many threads as there are processes of mics, and writes nothing; mics reads
the rows, tokenises, takes checksums and writes shards. Each run is a process of its own, the two
take turns, and what counts is the median of the ratios inside a turn: other work on the machine
slows both. Processor time is a second measure, which other work changes little.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tokenizers

from mics.training.data.finding import find_files
from mics.training.data.tokenizing.making import make_token_folder
from mics.training.data.tokenizing.plan import Job
from mics.training.data.tokenizing.share import Share
from mics.training.data.tokens import train_bpe

RESULTS = Path(__file__).parent / "results"
TURNS = 5
MOST = 5_000_000  # bytes of text: short turns, because other work comes and goes
PROCESSES = (1, 2)


def write_corpus(folder: Path) -> int:
    """One row for each file of the standard library; the bytes of all texts."""
    size = 0
    with (folder / "rows.jsonl").open("w") as out:
        for file in find_files("stdlib"):
            text = file.read_text()
            if size > MOST:
                break
            size += len(text.encode())
            out.write(json.dumps({"text": text}) + "\n")
    return size


def train_tokenizer(folder: Path) -> None:
    with (folder / "rows.jsonl").open() as rows:
        texts = [json.loads(row)["text"].encode() for row in rows]
    train_bpe(texts, 8192).save(folder / "tokenizer")


def alone(folder: Path, processes: int) -> float:
    """Time `encode_batch` on texts in memory, by as many threads."""
    os.environ |= {"RAYON_NUM_THREADS": str(processes), "TOKENIZERS_PARALLELISM": "true"}
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    with (folder / "rows.jsonl").open() as rows:
        texts = [json.loads(row)["text"] for row in rows]
    begun = time.perf_counter()
    for first in range(0, len(texts), 64):
        backend.encode_batch(texts[first : first + 64], add_special_tokens=False)
    return time.perf_counter() - begun


def ours(folder: Path, processes: int) -> float:
    """Time the making of all parts: processes started, text read, shards on the disk."""
    job = Job(str(folder / "rows.jsonl"), tokenizer=str(folder / "tokenizer"))
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "tokens"
        return make_token_folder(job, out, Share(), processes, lambda *_: None).seconds


def apart(work: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a function returns in a process of its own, and the processor time that it took."""
    heard, said = multiprocessing.Pipe(duplex=False)

    def report() -> None:
        found = work(*arguments)
        spent = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        said.send([found, sum(one.ru_utime + one.ru_stime for one in spent)])

    process = multiprocessing.get_context("fork").Process(target=report)
    process.start()
    found, processor = heard.recv()
    process.join()
    return found, processor


def measure(folder: Path, size: int) -> dict[str, Any]:
    """Seconds and processor seconds of every run, by turn; all kinds of runs are in each turn."""
    turns = []
    for turn in range(TURNS):
        kinds = [(work, count) for count in PROCESSES for work in (alone, ours)]
        kinds = kinds if turn % 2 == 0 else kinds[::-1]
        taken = {f"{one.__name__} {n}": apart(one, folder, n) for one, n in kinds}
        print(taken, file=sys.stderr, flush=True)
        turns.append(taken)
    return {"bytes": size, "turns": turns}


def ratios(turns: list[dict[str, Any]], one: str, other: str, measure: int = 0) -> list[float]:
    """How many times as fast the second kind of run was as the first, by turn, in order."""
    return sorted(taken[one][measure] / taken[other][measure] for taken in turns)


def table(found: dict[str, Any]) -> list[str]:
    turns = found["turns"]
    lines = [
        "| processes | `encode_batch` alone | `mics tokenize` | throughput of alone (least, most) "
        "| by processor time |",
        "|---|---|---|---|---|",
    ]
    for count in PROCESSES:
        first, second = f"alone {count}", f"ours {count}"
        rates = [
            statistics.median(found["bytes"] / 1e6 / taken[kind][0] for taken in turns)
            for kind in (first, second)
        ]
        wall = ratios(turns, first, second)
        processor = statistics.median(ratios(turns, first, second, 1))
        spread = f"{statistics.median(wall):.2f} ({wall[0]:.2f}, {wall[-1]:.2f})"
        lines.append(
            f"| {count} | {rates[0]:.2f} MB/s | {rates[1]:.2f} MB/s | {spread} | {processor:.2f} |"
        )
    scaling = {kind: ratios(turns, f"{kind} 1", f"{kind} 2") for kind in ("ours", "alone")}
    words = {
        kind: f"{statistics.median(found):.2f} ({found[0]:.2f}, {found[-1]:.2f})"
        for kind, found in scaling.items()
    }
    return [
        *lines,
        "",
        f"Two processes are {words['ours']} times as fast as one; `encode_batch` alone by two "
        f"threads {words['alone']} times as fast as by one.",
        "",
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write_corpus(folder)
        apart(train_tokenizer, folder)  # whose threads would go on in the others
        found = measure(folder, size)
    lines = [
        "# Tokenising beside `tokenizers` alone",
        "",
        f"`python benchmarks/tokenizing.py`: {size / 1e6:.1f} MB of Python source in rows of JSON, "
        f"{os.cpu_count()} cores under a load of {os.getloadavg()[1]:.0f}, most of it other work; "
        f"tokenizers {tokenizers.__version__}, Python {platform.python_version()}; medians of "
        f"{TURNS} turns.",
        "",
        *table(found),
    ]
    (RESULTS / "tokenize.md").write_text("\n".join(lines))
    (RESULTS / "tokenize.json").write_text(json.dumps(found, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
