"""How fast `mics tokenize` is beside `tokenizers` alone, by one process and by two.

    python benchmarks/tokenizing.py

The corpus is the source of the running Python's standard library, one row of JSON for each file,
without its tests; the tokenizer a byte-level BPE of 8,192 ids, trained on it.
"Alone" is `encode_batch` on texts that are in memory already, as many threads as there are
processes of mics, and writes nothing; mics reads the rows, tokenises, takes checksums and writes
shards. Each run is a process of its own, the two take turns, and what counts is the median of the
ratios of neighbours: other work on the machine slows both. Processor time is a second measure,
which other work changes little.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
TURNS = 5
PROCESSES = (1, 2)


def write_corpus(folder: Path) -> int:
    """One row for each file of the standard library; the bytes of all texts."""
    from mics.training.data.finding import find_files

    size = 0
    with (folder / "rows.jsonl").open("w") as out:
        for file in find_files("stdlib"):
            text = file.read_text()
            size += len(text.encode())
            out.write(json.dumps({"text": text}) + "\n")
    return size


def train_tokenizer(folder: Path) -> None:
    from mics.training.data.tokens import train_bpe

    with (folder / "rows.jsonl").open() as rows:
        texts = [json.loads(row)["text"].encode() for row in rows]
    train_bpe(texts, 8192).save(folder / "tokenizer")


def alone(folder: Path) -> None:
    """Time `encode_batch` on texts in memory."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    with (folder / "rows.jsonl").open() as rows:
        texts = [json.loads(row)["text"] for row in rows]
    begun, used = time.perf_counter(), _processor()
    for first in range(0, len(texts), 64):
        backend.encode_batch(texts[first : first + 64], add_special_tokens=False)
    _tell(time.perf_counter() - begun, _processor() - used)


def ours(folder: Path, processes: int) -> None:
    """Time the making of all parts: processes started, text read, shards on the disk."""
    from mics.training.data.tokenizing.making import make_token_folder
    from mics.training.data.tokenizing.plan import Job
    from mics.training.data.tokenizing.share import Share

    tokenizer = str(folder / "tokenizer")
    job = Job(str(folder / "rows.jsonl"), tokenizer=tokenizer)
    with tempfile.TemporaryDirectory() as scratch:
        used = _processor()
        out = Path(scratch) / "tokens"
        made = make_token_folder(job, out, Share(), processes, lambda *_: None)
        _tell(made.seconds, _processor() - used)


def _processor() -> float:
    spent = [resource.getrusage(of) for of in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in spent)


def _tell(seconds: float, processor: float) -> None:
    print(json.dumps([seconds, processor]))


def run(what: str, folder: Path, processes: int) -> tuple[float, float]:
    """Seconds and processor seconds of one run in a process of its own."""
    words = [sys.executable, __file__, what, str(folder), str(processes)]
    threads = {"RAYON_NUM_THREADS": str(processes), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(words, env=os.environ | threads, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    seconds, processor = json.loads(done.stdout.splitlines()[-1])
    return seconds, processor


def measure(folder: Path, size: int) -> list[dict[str, Any]]:
    rows = []
    for processes in PROCESSES:
        pairs = []
        for turn in range(TURNS):
            whats = ("alone", "ours") if turn % 2 == 0 else ("ours", "alone")
            taken = {what: run(what, folder, processes) for what in whats}
            pairs.append((taken["alone"], taken["ours"]))
            print(processes, taken, file=sys.stderr, flush=True)
        rows.append(
            {
                "processes": processes,
                "alone_mb_s": statistics.median(size / 1e6 / a[0] for a, _ in pairs),
                "mics_mb_s": statistics.median(size / 1e6 / m[0] for _, m in pairs),
                "ratio": statistics.median(a[0] / m[0] for a, m in pairs),
                "ratios": sorted(a[0] / m[0] for a, m in pairs),
                "processor_ratio": statistics.median(a[1] / m[1] for a, m in pairs),
            }
        )
    return rows


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        size = write_corpus(folder)
        train_tokenizer(folder)
        rows = measure(folder, size)
    import tokenizers

    lines = [
        "# Tokenising beside `tokenizers` alone",
        "",
        f"`python benchmarks/tokenizing.py`: {size / 1e6:.1f} MB of Python source in rows of JSON, "
        f"{os.cpu_count()} cores that other work shares, tokenizers {tokenizers.__version__}, "
        f"Python {platform.python_version()}; medians of {TURNS} turns.",
        "",
        "| processes | `encode_batch` alone | `mics tokenize` | throughput of alone (least, most) "
        "| by processor time |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['processes']} | {row['alone_mb_s']:.2f} MB/s | {row['mics_mb_s']:.2f} MB/s "
        f"| {row['ratio']:.2f} ({row['ratios'][0]:.2f}, {row['ratios'][-1]:.2f}) "
        f"| {row['processor_ratio']:.2f} |"
        for row in rows
    ]
    lines += [
        "",
        f"Two processes are {rows[1]['mics_mb_s'] / rows[0]['mics_mb_s']:.2f} times as fast as one "
        f"({rows[1]['alone_mb_s'] / rows[0]['alone_mb_s']:.2f} for `encode_batch` alone with two "
        "threads).",
        "",
    ]
    (RESULTS / "tokenize.md").write_text("\n".join(lines))
    (RESULTS / "tokenize.json").write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "alone":
        alone(Path(sys.argv[2]))
    else:
        ours(Path(sys.argv[2]), int(sys.argv[3]))
