"""Labs of ordinary users: the command starts again in a user namespace, where it is root.

`run` starts in a new one, which ends with it. `up` does so too and leaves a process behind that
only sleeps, so that the namespaces stay. The other verbs start again in the namespaces of the lab
that they are about. Notes of labs stay in the user's folder, outside.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from mics.errors import LabError
from mics.lab.state import FOLDER, Noted, folder

_SWITCHES = {
    "/proc/sys/user/max_user_namespaces": ("0", "sysctl -w user.max_user_namespaces=10000"),
    "/proc/sys/kernel/unprivileged_userns_clone": (
        "0",
        "sysctl -w kernel.unprivileged_userns_clone=1",
    ),
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
}
_ROOT_HERE = ["--user", "--net", "--mount"]


def check_user() -> None:
    """Check that this user may have namespaces of their own.

    Raises:
        LabError: what is missing, and how to get it.
    """
    for program in ("unshare", "nsenter"):
        if shutil.which(program) is None:
            raise LabError(
                f"The program {program!r} is missing: a lab without root needs it.",
                write="apt-get install util-linux, or sudo mics lab ...",
            )
    done = subprocess.run(
        ["unshare", "--map-root-user", *_ROOT_HERE, "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        causes = [
            f"{path.removeprefix('/proc/sys/')} is {bad} ({cure})"
            for path, (bad, cure) in _SWITCHES.items()
            if _read(path) == bad
        ]
        raise LabError(
            "This user may not make network namespaces, not even in a user namespace.",
            numbers="; ".join(causes) or done.stderr.strip(),
            write="sudo mics lab ..., or one of the sysctl commands above",
        )


def start_again_in_new(words: Sequence[str]) -> NoReturn:
    """Become the same command, as root of namespaces of its own.

    Args:
        words: the command line after ``mics lab``.
    """
    # `ip netns` keeps its names below /run, which is the real root's.
    shell = ["sh", "-c", 'mount -t tmpfs mics /run && exec "$@"', "sh"]
    _become(["unshare", "--map-root-user", *_ROOT_HERE, *shell, *_itself(words)])


def start_again_in(lab: Noted, words: Sequence[str]) -> NoReturn:
    """Become the same command, in the namespaces of a lab."""
    _become([*_enter(lab), *_itself(words)])


def show_from_within(lab: Noted, words: Sequence[str]) -> str:
    """Return what the same command prints in the namespaces of a lab."""
    words = [*_enter(lab), *_itself(words)]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env=_environment()
    ).stdout


def leave_a_holder() -> int:
    """Start the process that keeps these namespaces; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in range(3):
        os.dup2(nothing, descriptor)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        signal.pause()


def is_user_root() -> bool:
    """Tell whether this process was started again, and is root of a user namespace only."""
    return FOLDER in os.environ


def kill_ranks(name: str) -> None:
    """End what still runs of a lab whose owner was killed: its namespaces cannot be entered."""
    mark = f"MICS_LAB={name}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = process.stat().st_uid == os.getuid()
            if ours and mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue  # gone meanwhile, or not ours to read


def _enter(lab: Noted) -> list[str]:
    target = ["nsenter", "--target", str(lab.owner), "--preserve-credentials", *_ROOT_HERE]
    return [*target, f"--wd={Path.cwd()}"]


def _itself(words: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "mics", "lab", *words]


def _environment() -> Mapping[str, str]:
    return os.environ | {FOLDER: str(folder())}


def _become(words: list[str]) -> NoReturn:
    sys.stdout.flush()
    os.execvpe(words[0], words, _environment())


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
