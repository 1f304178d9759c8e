"""Nothing is lost: kills, full disks, flipped bits, foreign pickles, two jobs in one folder."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import UnevenMLP, full, seeded
from ranks import errors_of_ranks, run_ranks
from test_checkpoint import build, train

import mics
from mics.checkpoint import hold_folder, newest_intact, prune, step_folder, step_of
from mics.checkpoint.manifest import checksum_line
from mics.checkpoint.peers import Peers
from mics.checkpoint.verifying import verified_manifest


def _save_steps(root: Path, steps: list[int]) -> None:
    model, optimizer = build(UnevenMLP, 2)
    for step in steps:
        train(model, optimizer, step, step + 1)
        mics.save(step_folder(root, step), model=model, optimizer=optimizer, extra={"step": step})


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    run_ranks(_save_steps, 4, root, [10, 20])
    return root


@pytest.fixture
def root(two_steps: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    shutil.copytree(two_steps, tmp_path / "run")
    return tmp_path / "run"


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(file for file in checkpoint.rglob("*") if file.is_file())


# -- damage ----------------------------------------------------------------------------------------


def test_of_50_flipped_bits_50_are_refused_with_the_file_named(root: Path) -> None:
    choose = random.Random(0)
    checkpoint = root / "step-00000020"
    for _ in range(50):
        file = choose.choice(files_of(checkpoint))
        intact = file.read_bytes()
        data = bytearray(intact)
        bit = choose.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.raises(mics.CheckpointError) as caught:
            verified_manifest(checkpoint)
        named = file.name.removesuffix(".sha256")
        assert named in str(caught.value), f"bit {bit} of {file.name}: {caught.value}"
        file.write_bytes(intact)
    verified_manifest(checkpoint)


def test_the_older_checkpoint_is_used_and_the_damaged_file_named(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = root / "step-00000020" / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert newest_intact(root) == root / "step-00000010"
    said = capsys.readouterr().err
    assert f"skipping a checkpoint: {file} is damaged: its checksum is not the one" in said


def _newest(root: Path) -> Path | None:
    return newest_intact(root)


def test_all_ranks_agree_on_the_newest(root: Path) -> None:
    (root / "step-00000020" / "rank-00000.safetensors").unlink()
    assert run_ranks(_newest, 3, root) == [root / "step-00000010"] * 3


@pytest.mark.parametrize("damage", ["truncated", "missing", "swapped"])
def test_a_file_that_is_not_what_was_written_is_named(root: Path, damage: str) -> None:
    checkpoint = root / "step-00000020"
    file, other = checkpoint / "rank-00000.safetensors", checkpoint / "rank-00002.safetensors"
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "missing":
        file.unlink()
    else:
        mine, theirs = file.read_bytes(), other.read_bytes()
        file.write_bytes(theirs)
        other.write_bytes(mine)
    with pytest.raises(mics.CheckpointError, match=r"rank-0000[02].safetensors is damaged"):
        verified_manifest(checkpoint)


def test_when_none_is_intact_that_is_an_error_and_not_a_new_start(root: Path) -> None:
    for step in (10, 20):
        (step_folder(root, step) / "manifest.json").write_text("{}")
    with pytest.raises(mics.CheckpointError, match="None of the checkpoints"):
        newest_intact(root)


def test_a_folder_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert newest_intact(tmp_path) is None
    assert newest_intact(tmp_path / "nothing") is None


# -- manifests that lie ----------------------------------------------------------------------------


def forge(checkpoint: Path, change: Callable[[Any], object]) -> None:
    table = json.loads((checkpoint / "manifest.json").read_text())
    change(table)
    data = json.dumps(table).encode()
    (checkpoint / "manifest.json").write_bytes(data)
    (checkpoint / "manifest.json.sha256").write_bytes(checksum_line(data))


def _first_tensor(table: Any) -> Any:
    return next(t for n, t in table["tensors"].items() if n.startswith("model/") and t["chunks"])


LIES: dict[str, tuple[Callable[[Any], object], str]] = {
    "another format": (lambda t: t.update(format=9), "format 9"),
    "a file outside": (
        lambda t: t["files"].update({"../x": {"bytes": 1, "sha256": ""}}),
        "no file",
    ),
    "an absolute file": (
        lambda t: t["files"].update({"/etc/passwd": {"bytes": 1, "sha256": ""}}),
        "no file",
    ),
    "an absurd shape": (lambda t: _first_tensor(t).update(shape=[2**40, 2**20]), "all files"),
    "a negative size": (lambda t: _first_tensor(t)["chunks"][0].update(shape=[-1]), "no size"),
    "an unknown dtype": (lambda t: _first_tensor(t).update(dtype="object"), "dtype 'object'"),
    "a chunk left out": (lambda t: _first_tensor(t)["chunks"].pop(), "do not make up"),
    "a chunk twice": (
        lambda t: _first_tensor(t)["chunks"].append(_first_tensor(t)["chunks"][0]),
        "do not make up",
    ),
    "a file not listed": (
        lambda t: _first_tensor(t)["chunks"][0].update(file="other"),
        "which is not listed",
    ),
    "an alias of nothing": (lambda t: t["aliases"].update(a="b"), "which is not there"),
    "a table missing": (lambda t: t.pop("tensors"), "KeyError"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused_before_anything_is_read(root: Path, lie: str) -> None:
    change, words = LIES[lie]
    checkpoint = root / "step-00000020"
    forge(checkpoint, change)
    with pytest.raises(mics.CheckpointError, match=r"manifest\.json is damaged") as caught:
        verified_manifest(checkpoint)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', "[" * 100_000, "[]", "\xff\xfe", '{"format": 1}', ""]
)
def test_what_is_no_manifest_is_refused(root: Path, text: str) -> None:
    data = text.encode("latin-1")
    (root / "step-00000020" / "manifest.json").write_bytes(data)
    (root / "step-00000020" / "manifest.json.sha256").write_bytes(checksum_line(data))
    with pytest.raises(mics.CheckpointError, match=r"manifest\.json is damaged"):
        verified_manifest(root / "step-00000020")


class Malicious:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.proof}",)


def test_a_malicious_pickle_in_place_of_any_file_executes_nothing(
    root: Path, tmp_path: Path
) -> None:
    proof = tmp_path / "executed"
    checkpoint = root / "step-00000020"
    poison = pickle.dumps(Malicious(proof))
    files = [*files_of(checkpoint), checkpoint / ".metadata"]
    model = seeded(UnevenMLP)
    for file in files:
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(poison)

        def lists_the_poison(table: Any, name: str = file.name) -> None:
            """Even where the checksums were made to fit."""
            if name in table["files"]:
                digest = checksum_line(poison).split()[0].decode()
                table["files"][name] = {"bytes": len(poison), "sha256": digest}

        if file.suffix == ".safetensors":
            forge(checkpoint, lists_the_poison)
        if before is not None:
            with pytest.raises(mics.CheckpointError):
                mics.load(checkpoint, model=model)
            shutil.rmtree(checkpoint)
            shutil.copytree(root / "step-00000010", checkpoint)
        else:
            mics.load(checkpoint, model=model)
    assert not proof.exists()
    pickle.loads(poison)  # the test's own: it would have
    assert proof.exists()


# -- saves that do not come to their end -----------------------------------------------------------


def _save_forever(root: Path, said: Connection) -> None:
    # OpenMP's threads do not survive a fork: a child that waits for one waits for ever.
    torch.set_num_threads(1)
    model = torch.nn.Linear(700, 700)
    for step in range(1, 10_000):
        with torch.no_grad():
            model.weight.fill_(step)
        mics.save(step_folder(root, step), model=model, extra={"step": step})
        said.send(step)


def test_kill_9_at_20_random_moments_of_a_save_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """Each time the newest one loads, and is at least the last one that was said to be there."""
    choose = random.Random(1)
    fork = multiprocessing.get_context("fork")
    for number in range(20):
        folder = tmp_path / str(number)
        listen, speak = fork.Pipe(duplex=False)
        process = fork.Process(target=_save_forever, args=(folder, speak))
        process.start()
        last = listen.recv()
        time.sleep(choose.random() * 0.05)
        process.kill()
        process.join()
        while listen.poll():
            last = listen.recv()
        newest = newest_intact(folder)
        assert newest is not None
        model = torch.nn.Linear(700, 700)
        loaded = mics.load(newest, model=model)
        assert step_of(newest) == loaded.extra["step"] >= last
        assert (model.weight == float(loaded.extra["step"])).all()


def _save_with_little_room(root: Path, rank: int, limit: int) -> None:
    model, optimizer = build(UnevenMLP, 2)
    mics.save(step_folder(root, 1), model=model, optimizer=optimizer)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == rank:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        mics.save(step_folder(root, 2), model=model, optimizer=optimizer)
    finally:
        assert newest_intact(root) == step_folder(root, 1)
        mics.load(step_folder(root, 1), model=model, optimizer=optimizer)


@pytest.mark.parametrize(("rank", "limit"), [(2, 1000), (0, 6000)])
def test_a_disk_that_is_full_is_an_error_on_every_rank_and_the_last_good_one_stays(
    tmp_path: Path, rank: int, limit: int
) -> None:
    for text in errors_of_ranks(_save_with_little_room, 4, tmp_path, rank, limit):
        assert f"CheckpointError: Rank {rank} cannot write" in text
        assert "with room for a checkpoint" in text
    assert sorted(f.name for f in tmp_path.iterdir()) == ["step-00000001"], "leftovers"


def _save_asynchronously_with_little_room(root: Path) -> str:
    model, optimizer = build(UnevenMLP, 2)
    train(model, optimizer, 0, 1)
    Peers()  # the ranks of a test meet in a file, which a limit would forbid
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    pending = mics.save(root / "c", model=model, optimizer=optimizer, asynchronous=True)
    train(model, optimizer, 0, 2)  # goes on
    with pytest.raises(mics.CheckpointError) as caught:
        pending.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    mics.save(root / "c", model=model, optimizer=optimizer)
    return str(caught.value)


def test_a_failed_asynchronous_save_is_told_by_wait_and_the_next_one_works(tmp_path: Path) -> None:
    texts = run_ranks(_save_asynchronously_with_little_room, 4, tmp_path)
    assert all("Rank 1 cannot write" in text for text in texts)
    verified_manifest(tmp_path / "c")


FORGOTTEN = """
import os, sys, torch, mics
mics.save(sys.argv[1], model=torch.nn.Linear(9, 9), asynchronous=True)
"""


def test_the_interpreter_does_not_end_before_a_pending_save(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", FORGOTTEN, str(tmp_path / "c")], check=True, timeout=60)
    verified_manifest(tmp_path / "c")


def _unwritable(path: Path) -> None:
    Peers()  # the ranks of a test meet in a file
    os.setgid(65534)
    os.setuid(65534)
    mics.save(path / "c", model=seeded(UnevenMLP))


@pytest.mark.skipif(os.geteuid() != 0, reason="gives up root's rights")
def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    for text in errors_of_ranks(_unwritable, 2, tmp_path):
        assert "CheckpointError: Rank 0 cannot write" in text
        assert "Permission denied" in text or "cannot write" in text


# -- a run's folder --------------------------------------------------------------------------------


def test_prune_keeps_the_newest(root: Path) -> None:
    prune(root, 0)
    assert len(list(root.iterdir())) == 2
    prune(root, 1)
    assert [f.name for f in root.iterdir()] == ["step-00000020"]


def _hold(folder: Path) -> None:
    with hold_folder(folder):
        pass


def test_a_second_job_in_a_folder_is_refused_on_every_rank(tmp_path: Path) -> None:
    with hold_folder(tmp_path):
        for text in errors_of_ranks(_hold, 2, tmp_path):
            assert f"{tmp_path} is in use by another job" in text
            assert f"process {os.getpid()} on " in text
    assert run_ranks(_hold, 2, tmp_path) == [None, None]


def test_what_dead_saves_left_is_removed_by_the_next_job(root: Path) -> None:
    (root / "step-00000030.abcd1234.tmp").mkdir()
    (root / "step-00000005.trash").mkdir()
    with hold_folder(root):
        names = sorted(f.name for f in root.iterdir())
    assert names == [".lock", "step-00000010", "step-00000020"]


def test_loading_gives_the_values_of_the_older_one(root: Path) -> None:
    model = seeded(UnevenMLP)
    loaded = mics.load(root / "step-00000010", model=model)
    assert loaded.extra == {"step": 10}
    assert full(model.out.weight).shape == (5, 13)


def test_no_checkpoint_at_all_is_named(tmp_path: Path) -> None:
    with pytest.raises(mics.CheckpointError, match=r"is not a whole checkpoint: manifest\.json"):
        mics.load(tmp_path, model=seeded(UnevenMLP))
