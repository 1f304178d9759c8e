"""Files and folders that appear whole, and errors that end all ranks."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from hatching import hatch
from ranks import errors_of_ranks, run_ranks

from mics.checkpoint.appearing import AppearingFolder, appearing
from mics.errors import DataError
from mics.ranks.files import write_whole
from mics.ranks.together import together


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_the_old_one_until_the_new_one_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "folder" / "file.json"
    write_whole(path, "old")
    write = Path.write_text

    def half(self: Path, text: str) -> int:
        write(self, text[:2])
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="full"):
        write_whole(path, "new and longer")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert names_in(path.parent) == ["file.json"]
    write_whole(path, "new")
    assert path.read_text() == "new"


def test_a_folder_appears_when_it_is_complete_and_not_before(tmp_path: Path) -> None:
    target = tmp_path / "runs" / "step"
    with appearing(target) as folder:
        (folder / "nested").mkdir()
        (folder / "nested" / "file").write_text("whole")
        assert not target.exists()
        assert folder.parent == target.parent
    assert (target / "nested" / "file").read_text() == "whole"
    assert names_in(target.parent) == ["step"]


def test_a_folder_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), appearing(tmp_path / "step") as folder:
        (folder / "file").write_text("half")
        raise ValueError("broken")
    assert names_in(tmp_path) == []


WRITER = """
import time
from pathlib import Path
from mics.checkpoint.appearing import AppearingFolder
folder = AppearingFolder(Path({target!r}))
(folder.path / "file").write_text("half")
print(folder.path, flush=True)
time.sleep(60)
"""


def test_the_next_writer_removes_what_a_dead_one_left_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "step"
    (tmp_path / "step.mine.tmp").mkdir()  # a user's own
    (tmp_path / "steps.01234567.tmp").mkdir()  # of another name
    with hatch(WRITER.format(target=str(target)), dict(os.environ)) as writer:
        assert writer.stdout is not None
        half = Path(writer.stdout.readline().strip())
        assert half.is_dir()
        with appearing(target) as folder:
            assert half.is_dir()  # its writer lives
            assert folder != half
        writer.send_signal(signal.SIGKILL)
    (target / "gone").mkdir()
    AppearingFolder(target).discard()
    assert names_in(tmp_path) == ["step", "step.mine.tmp", "steps.01234567.tmp"]


MAKERS = """
import os, sys, time
from pathlib import Path
from mics.checkpoint.appearing import AppearingFolder
children = []
for _ in range(4):
    pid = os.fork()
    if pid == 0:
        end = time.monotonic() + 1
        while time.monotonic() < end:
            AppearingFolder(Path({target!r})).discard()
        os._exit(0)
    children.append(pid)
sys.exit(max(os.waitpid(pid, 0)[1] for pid in children) != 0)
"""


def test_writers_of_one_name_at_the_same_time_do_not_fail(tmp_path: Path) -> None:
    process = hatch(MAKERS.format(target=str(tmp_path / "step")), dict(os.environ))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert names_in(tmp_path) == []


def test_a_folder_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir
    made: list[Path] = []

    def swept(self: Path, parents: bool = False) -> None:
        make(self, parents=parents)
        made.append(self)
        if len(made) == 1:
            self.rmdir()

    monkeypatch.setattr(Path, "mkdir", swept)
    with appearing(tmp_path / "step") as folder:
        assert folder == made[1]
    assert names_in(tmp_path) == ["step"]


# -- one rank's error on all -----------------------------------------------------------------------


def _group() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None
    return world


def _explain(error: Exception) -> DataError:
    return DataError("Explained.", numbers=str(error))


def _rank() -> int:
    return dist.get_rank()


def _ranks() -> list[int]:
    return together(_rank, _group(), kind=DataError, explain=_explain)


def test_what_every_rank_returns_is_gathered_in_their_order() -> None:
    assert run_ranks(_ranks, 3) == [[0, 1, 2]] * 3
    assert together(lambda: "alone", None, kind=DataError, explain=_explain) == ["alone"]
    assert together(None, None, kind=DataError, explain=_explain) == [None]


def _one_fails(kind: type[Exception]) -> None:
    def work() -> None:
        if dist.get_rank() == 1:
            raise kind("One rank failed.")

    together(work, _group(), kind=DataError, explain=_explain)


@pytest.mark.parametrize(
    ("kind", "words"), [(DataError, "One rank failed."), (KeyError, "Explained.")]
)
def test_one_ranks_error_is_raised_on_all(kind: type[Exception], words: str) -> None:
    began = time.monotonic()
    texts = errors_of_ranks(_one_fails, 3, kind)
    assert all(f"mics.errors.DataError: {words}" in text for text in texts)
    assert time.monotonic() - began < 60


def _one_is_no_json() -> None:
    def work() -> object:
        return {1, 2} if dist.get_rank() == 1 else 0

    together(work, _group(), kind=DataError, explain=_explain)


def test_a_result_that_is_no_json_is_told_to_all() -> None:
    texts = errors_of_ranks(_one_is_no_json, 3)
    assert all("mics.errors.DataError: Explained.\n  Object of type set" in text for text in texts)


def test_nothing_is_registered_at_exit_before_a_save_runs_beside_training() -> None:
    program = (
        "import atexit, mics.checkpoint.writing as w, torch, pathlib, tempfile, mics\n"
        "registered = []\n"
        "w.atexit.register = registered.append\n"
        "import importlib; importlib.reload(w)\n"
        "assert not registered, registered\n"
        "model = torch.nn.Linear(2, 2)\n"
        "folder = pathlib.Path(tempfile.mkdtemp())\n"
        "w.save(folder / 'a', model=model)\n"
        "assert not registered, registered\n"
        "for name in 'bc':\n"
        "    w.save(folder / name, model=model, asynchronous=True).wait()\n"
        "assert registered == [w._tell_at_exit], registered\n"
    )
    process = hatch(program, dict(os.environ))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
