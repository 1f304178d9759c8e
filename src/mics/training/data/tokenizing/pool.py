"""Processes that make the parts of a share, and what is shown meanwhile.

They ask nobody: the next part is a number that they count up together, what is made is on the disk.
A process whose parent has gone ends by itself, so a killed command leaves nobody behind.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mics.errors import DataError
from mics.ranks.console import ShowBytes
from mics.training.data.tokenizing.plan import Job, Part, Plan
from mics.training.data.tokenizing.work import make_part
from mics.training.data.tokens import Tokenizer

_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Task:
    """What every process is given.

    Args:
        folder: that is made.
        job: the options.
        plan: all parts.
        numbers: of the parts that are to be made here.
        tokenizer: of all parts.
    """

    folder: Path
    job: Job
    plan: Plan
    numbers: Sequence[int]
    tokenizer: Tokenizer


def make_parts(task: Task, processes: int, done: int, total: int, progress: ShowBytes) -> None:
    """Make parts by so many processes.

    Args:
        task: which ones.
        processes: at most.
        done: bytes that were done before.
        total: bytes that there are.
        progress: is shown bytes of parts, those of before too.

    Raises:
        DataError: of the first process that failed.
        OSError: the shards cannot be written.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is a core
    methods = multiprocessing.get_all_start_methods()
    context: Any = multiprocessing.get_context("fork" if "fork" in methods else "spawn")
    count = min(processes, len(task.numbers))
    following = context.Value("q", 0)
    shown = [context.Value("q", 0, lock=False) for _ in range(count)]
    words = [context.Pipe(duplex=False) for _ in range(count)]
    workers = [
        context.Process(target=_work, args=(task, following, mine, said, os.getpid()), daemon=True)
        for mine, (_, said) in zip(shown, words, strict=True)
    ]
    try:
        for worker in workers:
            worker.start()
        while any(worker.exitcode is None for worker in workers):
            progress("tokenising", done + sum(mine.value for mine in shown), total)
            if any(worker.exitcode for worker in workers):
                break
            time.sleep(_LOOK_SECONDS)
        if any(worker.exitcode for worker in workers):
            raise _failure(workers, [heard for heard, _ in words])
        progress("tokenising", done + sum(mine.value for mine in shown), total)
    finally:
        for worker in workers:
            if worker.pid is not None and worker.exitcode is None:
                worker.kill()
        for worker in workers:
            if worker.pid is not None:
                worker.join()


def _work(task: Task, following: Any, mine: Any, said: Any, parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of the terminal: the parent ends this process
    finished = 0

    def tell(weight: int) -> None:
        if os.getppid() != parent:
            os._exit(1)
        mine.value = finished + weight

    try:
        while (number := _next(following, task.numbers)) is not None:
            part: Part = task.plan.parts[number]
            make_part(task.folder, number, part, task.job, task.plan.share, task.tokenizer, tell)
            finished += sum(span.weight for span in part)
    except DataError as error:
        said.send_bytes(json.dumps(["data", error.what, error.numbers, error.write]).encode())
        os._exit(1)
    except OSError as error:
        said.send_bytes(json.dumps(["disk", str(error), "", ""]).encode())
        os._exit(1)


def _next(following: Any, numbers: Sequence[int]) -> int | None:
    with following.get_lock():
        at = following.value
        following.value += 1
    return numbers[at] if at < len(numbers) else None


def _failure(workers: Sequence[Any], words: Sequence[Any]) -> Exception:
    """What a process said before it ended, or how it ended."""
    for heard in words:
        if heard.poll():
            kind, what, numbers, write = json.loads(heard.recv_bytes())
            disk = kind == "disk"
            return OSError(what) if disk else DataError(what, numbers=numbers, write=write)
    codes = [worker.exitcode for worker in workers if worker.exitcode]
    ended = signal.Signals(-codes[0]).name if codes[0] < 0 else f"exit code {codes[0]}"
    return DataError(
        "A process that tokenised has ended.",
        numbers=f"It was one of {len(workers)}, and ended by {ended}; SIGKILL is often the "
        "kernel's, where memory is short.",
        write="the same command again, which goes on; fewer --processes where memory is short",
    )
