"""Which job this is, and where its states are in the memory of this node.

[Note: whose memory]
A state in memory must never be taken for that of another job. Where the launcher gives the job a
name (``MICS_JOB``, Slurm, ``torchrun --rdzv-id``) that is the job, and it is found again however
often it is started. Where it gives none, the launcher's own process is the job: its restarts are,
and a new start is not. A process that nobody launched is a job of its own: the shell it comes from
starts others too.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mics.errors import RecoveryError
from mics.quantities import size

MEMORY = "MICS_MEMORY"
"""The environment variable that says where the memory of this node is, if not ``/dev/shm``."""

SLOTS = 2
_SECONDS = 30.0  # for the ranks of the attempt before to be gone
_PAUSE = 0.05
_NAMED = 4
_LOCK = "lock"
_UNNAMED = "process-"
_OWN = ".own"


@dataclass(frozen=True)
class Job:
    """A job's folder in the memory of this node.

    Args:
        name: of the job.
        folder: where its slots are.
    """

    name: str
    folder: Path

    @property
    def host(self) -> str:
        """The memory that this folder is in, the same for all that can read it."""
        facts = self.folder.stat()
        return f"{socket.gethostname()} {facts.st_dev}:{facts.st_ino}"

    def slots(self, key: str, rank: int) -> list[Path]:
        """The files of the states that a rank keeps, and beside each the one of others' own."""
        return [self.folder / f"{key}.{rank}.{number}" for number in range(SLOTS)]

    def files(self) -> list[Path]:
        """All slots in the folder, also those that have only a file beside them."""
        names = {file.name.removesuffix(_OWN) for file in self.folder.iterdir()}
        return [self.folder / name for name in sorted(names) if _SLOT.fullmatch(name)]

    def remove_all_but(self, names: Collection[str]) -> None:
        """Remove every slot but those of these names, with what is beside them."""
        for path in self.files():
            if path.name not in names:
                for file in (others_of(path), path):
                    _remove(file)

    def remove_strange(self) -> None:
        """Remove links, folders and pipes with the names of slots, which nobody could write."""
        for path in self.files():
            for file in (others_of(path), path):
                if os.path.lexists(file) and not stat.S_ISREG(file.lstat().st_mode):
                    _remove(file)

    def free_bytes(self) -> int:
        """Room that is left."""
        facts = os.statvfs(self.folder)
        return facts.f_bavail * facts.f_frsize


_SLOT = re.compile(r"[0-9a-f]{16}\.\d+\.\d")


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):  # it is gone
        shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()


def others_of(slot: Path) -> Path:
    """The file beside a slot with what the other replicas' ranks have of their own."""
    return slot.with_name(f"{slot.name}{_OWN}")


def open_job(name: str | None) -> Job:
    """Make the folder of a job, for this user only, or find it.

    Args:
        name: of the job; ``None`` is the launcher's, see [Note: whose memory].

    Raises:
        RecoveryError: the folder is somebody else's, or cannot be made.
    """
    name = name or job_name()
    root = _root()
    folder = root / f"mics-{os.geteuid()}-{_file_name(name)}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        facts = folder.lstat()
    except OSError as error:
        raise RecoveryError(
            f"The memory of this node cannot be used: {folder} cannot be made.",
            numbers=f"{error.strerror}, on {socket.gethostname()}.",
            write=f"{MEMORY}=<a folder in memory that this user can write to>",
        ) from None
    if folder.is_symlink() or facts.st_uid != os.geteuid() or facts.st_mode & 0o077:
        raise RecoveryError(
            f"{folder} is not a folder of this user alone, so what is in it may be anybody's.",
            numbers=f"It belongs to user {facts.st_uid}, mode {facts.st_mode & 0o777:o}.",
            write=f"{MEMORY}=<another folder in memory>, or remove it",
        )
    _collect(root)
    return Job(name, folder)


def _collect(root: Path) -> None:
    """Remove what nobody can find again: states of jobs named by a process that is gone."""
    for folder in root.glob(f"mics-{os.geteuid()}-{_UNNAMED}*"):
        _, _, rest = folder.name.partition(_UNNAMED)
        process, began, space = [*rest.split("-"), "", ""][:3]
        is_here = process.isdecimal() and space == _space()
        gone = is_here and _began(int(process)) != began
        if gone and not folder.is_symlink() and not _in_use(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _root() -> Path:
    """The memory of this node."""
    return Path(os.environ.get(MEMORY, "/dev/shm"))


def why_unusable() -> str:
    """Why there is no memory to keep states in on this node; empty where there is."""
    root = _root()
    if not root.is_dir():
        return f"{root} is no folder on {socket.gethostname()}"
    if not os.access(root, os.W_OK | os.X_OK) or os.statvfs(root).f_flag & os.ST_RDONLY:
        return f"{root} cannot be written on {socket.gethostname()}"
    return ""


def job_name(environment: Mapping[str, str] | None = None) -> str:
    """The name of this job, see [Note: whose memory]."""
    env = os.environ if environment is None else environment
    if env.get("MICS_JOB"):
        return env["MICS_JOB"]
    if env.get("TORCHELASTIC_RUN_ID", "none") != "none":
        return f"torchrun-{env['TORCHELASTIC_RUN_ID']}"
    if env.get("SLURM_JOB_ID"):  # which may run several trainings, one behind the other
        command = hashlib.sha256("\0".join(sys.argv).encode()).hexdigest()[:8]
        return f"slurm-{env['SLURM_JOB_ID']}-{command}"
    launched = "TORCHELASTIC_RUN_ID" in env or env.get("WORLD_SIZE", "1") != "1"
    process = os.getppid() if launched else os.getpid()
    return f"{_UNNAMED}{process}-{_began(process)}-{_space()}"


def has_name(environment: Mapping[str, str] | None = None) -> bool:
    """Whether a launcher has given the job a name, which outlives the launcher's process."""
    return not job_name(environment).startswith(_UNNAMED)


def _began(process: int) -> str:
    """When a process began, in ticks since the machine did: its number alone is used again."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return "0"


def _space() -> str:
    """Where numbers of processes are ours: containers may share memory, and not these."""
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return "0"


def _file_name(name: str) -> str:
    """A name that is a part of a path; no two jobs have the same one."""
    plain = re.sub(r"[^A-Za-z0-9_.-]", "_", name)[:100]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


class Hold:
    """A rank's lock on its slots: no two processes are one rank of a job on a node.

    The kernel's, so it ends with the process however that ends.
    """

    def __init__(self, job: Job, rank: int) -> None:
        self._path = job.folder / f"{_LOCK}.{rank}"
        self._rank = rank
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)

    def take(self) -> None:
        """Wait for a process of the attempt before to be gone, and take its place.

        Raises:
            RecoveryError: it is not.
        """
        until = time.monotonic() + _SECONDS
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise self._taken() from None
            time.sleep(_PAUSE)
        os.truncate(self._file, 0)
        with contextlib.suppress(OSError):  # no room: only a message would have said it
            os.pwrite(self._file, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Let go, and remove what was held."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
        os.close(self._file)

    def _taken(self) -> RecoveryError:
        process = os.pread(self._file, 32, 0).decode(errors="replace")
        return RecoveryError(
            f"Another process is rank {self._rank} of this job on {socket.gethostname()}.",
            numbers=f"Process {process} holds {self._path}, and did for {_SECONDS:g} s.",
            write=f"kill {process} if an attempt has left it behind, or another name for the "
            "second job: MICS_JOB=<name>",
        )


def left_behind(job: Job) -> Iterator[str]:
    """Lines about memory that dead jobs of this user have left here, largest first."""
    found = []
    for folder in job.folder.parent.glob(f"mics-{os.geteuid()}-*"):
        if folder == job.folder or not folder.is_dir() or folder.is_symlink() or _in_use(folder):
            continue
        found.append((sum(f.stat().st_blocks * 512 for f in folder.iterdir()), folder))
    for held, folder in sorted(found, reverse=True)[:_NAMED]:
        yield f"{folder} has {size(held)} of a job that does not run: rm -r {folder}"


def _in_use(folder: Path) -> bool:
    for lock in folder.glob(f"{_LOCK}.*"):
        with contextlib.suppress(OSError):
            file = os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            finally:
                os.close(file)
    return False


def remove(job: Job) -> None:
    """Remove the folder of a job that has ended well, when nobody of it is left here."""
    if not _in_use(job.folder):
        shutil.rmtree(job.folder, ignore_errors=True)
