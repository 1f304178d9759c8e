"""Manifests with checksums made new: values are checked first, what never ends is refused."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_checkpoint_damage import forge
from test_checkpoint_optimizers import everything, mlp, same, step
from torch import optim as O

import mics
from mics.checkpoint.disk import write_manifest
from mics.checkpoint.manifest import (
    CHECKSUM,
    MANIFEST,
    Chunk,
    Entry,
    FileFacts,
    Manifest,
    read_manifest,
)
from mics.hardware.lookup import gpus
from mics.hardware.measured import measured_node
from mics.models.interchange.exporting import find_checkpoint
from mics.ranks.files import read_small
from mics.training.data.cache import read_meta
from mics.training.settings import read_settings

W = "optimizer/param_groups.0.weight."
S = "optimizer/state.0.weight."
RANDOM = "random/rank-00000/cpu"


def every(option: str, value: Any) -> Callable[[Any], object]:
    """Give an option a value for all parameters of the group."""
    return lambda t: t["values"].update(
        {name: value for name in t["values"] if name.endswith(f".{option}")}
    )


def value(name: str, new: Any) -> Callable[[Any], object]:
    return lambda t: t["values"].update({name: new})


def tensor(name: str, **new: Any) -> Callable[[Any], object]:
    return lambda t: t["tensors"][name].update(new)


def moved(name: str, to: str) -> Callable[[Any], object]:
    return lambda t: t["tensors"].update({to: t["tensors"].pop(name)})


def nested(depth: int) -> Any:
    made: Any = 1
    for _ in range(depth):
        made = [made]
    return made


NEVER = "has a value that was never saved"
FORGED: dict[str, tuple[Callable[[Any], object], str]] = {
    "a tuple of no list": (every("betas", {"tuple": 5}), NEVER),
    "an unknown object": (every("betas", {"x": 1}), "an object {'x': int}"),
    "an object of two keys": (every("betas", {"tuple": [1, 2], "x": 1}), "an object of 2 keys"),
    "pairs that are none": (every("betas", {"dict": [1, 2]}), "a dict whose entries are no pairs"),
    "bytes that are none": (every("eps", {"bytes": "?"}), NEVER),
    "a tensor that is not there": (every("lr", {"tensor": "x"}), "there is no tensor x"),
    "a rate that is no number": (every("lr", float("nan")), "It is nan there, 0.001 here"),
    "an endless rate": (every("lr", float("inf")), "It is inf there"),
    "a rate in words": (every("lr", "abc"), "It is 'abc' there"),
    "a list of rates": (every("lr", [0.1]), "It is [0.1] there"),
    "a rate that is a yes": (every("lr", True), "It is True there"),
    "no rate": (every("lr", None), "It is None there"),
    "a rate of many": (
        lambda t: (
            [t["values"].pop(name) for name in list(t["values"]) if name.endswith(".lr")],
            t["tensors"].update(
                {
                    name.replace(".eps", ".lr"): t["tensors"]["model/0.bias"]
                    for name in t["values"]
                    if name.endswith(".eps")
                }
            ),
        ),
        "0.001 here",
    ),
    "a negative rate": (every("lr", -1.0), "It is -1.0 there"),
    "a beta of one": (every("betas", {"tuple": [0.9, 1.0]}), "It is (0.9, 1.0) there"),
    "a negative beta": (every("betas", {"tuple": [-0.9, 0.9]}), "It is (-0.9, 0.9) there"),
    "a negative decay": (every("weight_decay", -1.0), "It is -1.0 there"),
    "a negative epsilon": (every("eps", -1e-8), "It is -1e-08 there"),
    "training upwards": (every("maximize", True), "It is True there, False here"),
    "no step": (lambda t: t["tensors"].pop(S + "step"), "step"),
    "no steps": (
        lambda t: [t["tensors"].pop(n) for n in list(t["tensors"]) if n.endswith(".step")],
        "It has exp_avg and no step",
    ),
    "one beta": (every("betas", {"tuple": [0.9]}), NEVER),
    "betas in words": (every("betas", {"tuple": ["a", "b"]}), NEVER),
    "foreach in words": (every("foreach", "abc"), "It is 'abc' there, None here"),
    "amsgrad in numbers": (every("amsgrad", 3), "It is 3 there, False here"),
    "an option nested deep": (every("eps", nested(100)), "nested too deep"),
    "a step in words": (
        lambda t: (t["tensors"].pop(S + "step"), t["values"].update({S + "step": "abc"})),
        "It is 'abc'",
    ),
    "a step of many": (
        lambda t: t["tensors"].update({S + "step": t["tensors"][S + "exp_avg"]}),
        "the step of 0.weight has a value that was never saved",
    ),
    "a moment of another shape": (
        lambda t: t["tensors"].update({S + "exp_avg": t["tensors"]["model/0.bias"]}),
        "It is [6], and the parameter is [6, 4]",
    ),
    "a moment in words": (
        lambda t: (t["tensors"].pop(S + "exp_avg"), t["values"].update({S + "exp_avg": "a"})),
        "exp_avg of 0.weight",
    ),
    "a moment that is lost": (
        lambda t: t["tensors"].pop(S + "exp_avg_sq"),
        "exp_avg_sq",
    ),
    "state of nobody": (value("optimizer/state.9.weight.x", 1), "No parameter has this name"),
    "an unknown form": (tensor(S + "exp_avg", form="x"), "form 'x'"),
    "a short random state": (
        lambda t: t["tensors"].update({RANDOM: t["tensors"]["model/0.bias"]}),
        "It is float32 [6], not uint8 [5056]",
    ),
    "another dtype of the same size": (
        tensor("model/0.weight", dtype="int32"),
        "model/0.weight is int32 [6, 4] there",
    ),
    "weights as a value": (
        lambda t: (t["tensors"].pop("model/0.weight"), t["values"].update({"model/0.weight": 1})),
        "It is a tensor here, and none there",
    ),
    "tables that are lists": (lambda t: t.update(values=[]), "a list where a table should be"),
    "one chunk for many": (
        lambda t: t["tensors"].update(
            {f"extra/{at}": t["tensors"]["model/0.weight"] for at in range(300)}
        ),
        "all files together",
    ),
    "more chunks than files": (
        lambda t: t["tensors"]["model/0.weight"]["chunks"].extend(
            t["tensors"]["model/0.weight"]["chunks"] * 9
        ),
        "in 10 chunks, of 1 files",
    ),
}


def saved(path: Path) -> None:
    model = mlp()
    optimizer = O.AdamW(model.parameters())
    step(model, optimizer)
    mics.save(path, model=model, optimizer=optimizer)


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_value_is_refused_before_anything_is_changed(name: str, tmp_path: Path) -> None:
    change, words = FORGED[name]
    saved(tmp_path / "c")
    forge(tmp_path / "c", change)
    model = mlp(1)
    optimizer = O.AdamW(model.parameters())
    step(model, optimizer)
    before = everything(model, optimizer)
    with pytest.raises(mics.CheckpointError) as caught:
        mics.load(tmp_path / "c", model=model, optimizer=optimizer)
    assert words in str(caught.value)
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize("optimizer", [O.Adafactor, O.Adadelta, O.ASGD, O.NAdam, O.RMSprop])
def test_options_of_torchs_other_optimizers_load(optimizer: Any, tmp_path: Path) -> None:
    """Adafactor's epsilons are a pair, of which one may be None."""
    for again in (False, True):
        model = mlp()
        one = optimizer(model.parameters())
        step(model, one)
        if again:
            mics.load(tmp_path / "c", model=model, optimizer=one)
        else:
            mics.save(tmp_path / "c", model=model, optimizer=one)


def test_files_that_are_not_what_the_manifest_says_are_refused_unchanged(tmp_path: Path) -> None:
    """A file of valid checksum: another dtype, a random state that no generator takes."""
    for at, (key, new, words) in enumerate(
        [
            ("model/0.weight@0,0", torch.ones(6, 4, dtype=torch.int32), "is torch.int32 [6, 4]"),
            (f"{RANDOM}", torch.zeros(5056, dtype=torch.uint8), "Invalid mt19937 state"),
        ]
    ):
        path = tmp_path / str(at)
        saved(path)
        file = path / "rank-00000.safetensors"
        save_file(load_file(file) | {key: new}, file)
        data = file.read_bytes()
        facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        forge(path, lambda t, facts=facts: t["files"].update({"rank-00000.safetensors": facts}))  # type: ignore[misc]
        model = mlp(1)
        optimizer = O.AdamW(model.parameters())
        before = everything(model, optimizer)
        for verify in (True, False):
            with pytest.raises(mics.CheckpointError) as caught:
                mics.load(path, model=model, optimizer=optimizer, verify=verify)
            assert words in str(caught.value)
        assert same(everything(model, optimizer), before)


# -- what never ends -------------------------------------------------------------------------------


@pytest.fixture
def in_time() -> Any:
    """Fail a test that takes long or much memory."""
    began, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000  # KiB


@pytest.mark.parametrize("name", [MANIFEST, CHECKSUM, "rank-00000.safetensors"])
@pytest.mark.parametrize("kind", ["device", "pipe", "large"])
def test_a_file_that_never_ends_is_refused_at_once(
    name: str, kind: str, tmp_path: Path, in_time: None
) -> None:
    saved(tmp_path / "c")
    file = tmp_path / "c" / name
    if name.startswith("rank"):  # a size that a pipe and a device have
        facts = {"bytes": 0, "sha256": ""}
        forge(tmp_path / "c", lambda t: t["files"].update({"more.safetensors": facts}))
        file = tmp_path / "c" / "more.safetensors"
    file.unlink(missing_ok=True)
    if kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        with file.open("wb") as sparse:
            sparse.truncate(1 << 40)
    with pytest.raises(mics.CheckpointError) as caught:
        mics.load(tmp_path / "c", model=mlp())
    wanted = ("more than", "another size") if kind == "large" else ("it is no regular file",)
    assert any(words in str(caught.value) for words in wanted)


def test_a_checkpoint_behind_links_is_read(tmp_path: Path) -> None:
    saved(tmp_path / "there")
    (tmp_path / "c").mkdir()
    for file in (tmp_path / "there").iterdir():
        (tmp_path / "c" / file.name).symlink_to(file)
    (tmp_path / "link").symlink_to(tmp_path / "c")
    mics.load(tmp_path / "link", model=mlp())
    assert find_checkpoint(tmp_path / "link") == tmp_path / "link"


def test_a_small_file_is_read_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "f"
    file.write_bytes(b"12345")
    assert read_small(file, 5) == b"12345"
    with pytest.raises(OSError, match="it has more than 4 bytes"):
        read_small(file, 4)
    with pytest.raises(OSError, match="it is no regular file"):
        read_small(tmp_path, 4)


def test_other_small_files_that_never_end_are_refused_at_once(
    tmp_path: Path, in_time: None
) -> None:
    endless = Path("/dev/zero")
    with pytest.raises(mics.MicsError, match="is too long"):
        read_settings(endless)
    with pytest.raises(mics.MicsError, match="it is no regular file"):
        measured_node(endless, next(iter(gpus().values())))
    (tmp_path / "meta.json").symlink_to(endless)
    assert read_meta(tmp_path) is None


def grid(rows: int, columns: int, files: int) -> Manifest:
    """One tensor in many chunks."""
    chunks = [
        Chunk((row, column), (1, 1), f"f{(row * columns + column) % files}", "k")
        for row in range(rows)
        for column in range(columns)
    ]
    facts = {f"f{at}": FileFacts(8 * rows * columns, "") for at in range(files)}
    entry = Entry("float32", (rows, columns), chunks)
    return Manifest(1, 1, {"model/x": entry}, {}, {}, {}, facts)


@pytest.mark.parametrize("rows", [1, 100, 9_000])
def test_a_manifest_of_many_chunks_is_read_or_refused_at_once(
    rows: int, tmp_path: Path, in_time: None
) -> None:
    """9,000 chunks of one tensor: as many files are read, one chunk laid over another is not."""
    columns = 9_000 // rows
    write_manifest(tmp_path, grid(rows, columns, 9_000))
    assert len(read_manifest(tmp_path).tensors["model/x"].chunks) == 9_000

    def overlap(table: Any) -> None:
        chunks = table["tensors"]["model/x"]["chunks"]
        chunks[0]["offset"], chunks[0]["shape"] = chunks[-1]["offset"], chunks[-1]["shape"]

    forge(tmp_path, overlap)
    with pytest.raises(mics.CheckpointError, match="do not make up the tensor"):
        read_manifest(tmp_path)
    write_manifest(tmp_path, grid(rows, columns, 2))
    with pytest.raises(mics.CheckpointError, match="in 9000 chunks, of 2 files"):
        read_manifest(tmp_path)


def test_chunks_that_overlap_in_a_corner_are_seen(tmp_path: Path) -> None:
    """A pinwheel of the right size, with a hole in its middle and an overlap elsewhere."""
    boxes = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((0, 0), (1, 1)),
    ]
    manifest = grid(3, 3, 5)
    entry = manifest.tensors["model/x"]
    entry.chunks[:] = [Chunk(at, size, f"f{n}", "k") for n, (at, size) in enumerate(boxes)]
    write_manifest(tmp_path, manifest)
    with pytest.raises(mics.CheckpointError, match="do not make up the tensor"):
        read_manifest(tmp_path)
    assert json.loads((tmp_path / MANIFEST).read_text())["format"] == 1


def test_a_chunk_that_lies_on_the_end_of_a_long_one_is_seen(tmp_path: Path) -> None:
    """Behind a short one; of the right size, with a hole at the end of the second column."""
    boxes = [((0, 0), (5, 1)), ((0, 1), (3, 1)), ((3, 0), (2, 1))]
    manifest = grid(5, 2, 3)
    entry = manifest.tensors["model/x"]
    entry.chunks[:] = [Chunk(at, size, f"f{n}", "k") for n, (at, size) in enumerate(boxes)]
    write_manifest(tmp_path, manifest)
    with pytest.raises(mics.CheckpointError, match="do not make up the tensor"):
        read_manifest(tmp_path)
