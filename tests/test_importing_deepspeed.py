"""Checkpoints that DeepSpeed wrote, read to the bit; forged ones, which execute nothing.

`written_by_deepspeed/` holds what `deepspeed_writer.py` made: by 0.19.8 on CPUs, `mics` by 0.19.2.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed_writer import Tiny, groups
from ranks import run_ranks
from safetensors.torch import load_file

import mics
from mics.__main__ import main
from mics.checkpoint.manifest import read_manifest
from mics.errors import CheckpointError, MicsError
from mics.models.building import build, load_config
from mics.models.interchange.deepspeed import archives, pickles, tables
from mics.models.interchange.deepspeed import states as places
from mics.models.interchange.deepspeed.folder import is_deepspeed
from mics.models.interchange.deepspeed.importing import import_deepspeed
from mics.models.interchange.deepspeed.pickles import Made, read_pickle

WRITTEN = Path(__file__).parent / "written_by_deepspeed"
KINDS = sorted(path.name for path in WRITTEN.iterdir())
FILE = "rank-00000.safetensors"


def silent(what: str, done: int, total: int) -> None:
    pass


def imported(folder: Path, out: Path, dtype: torch.dtype | None = None) -> Any:
    return import_deepspeed(folder, out, dtype=dtype, told=silent)


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {key.split("@")[0]: value for key, value in load_file(checkpoint / FILE).items()}


def refused(folder: Path, out: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        imported(folder, out)
    assert not out.exists()
    return str(caught.value)


# -- what DeepSpeed wrote --------------------------------------------------------------------------


def check_against_expected(folder: Path, out: Path) -> None:
    found = tensors_of(out)
    for name, value in load_file(folder / "expected.safetensors").items():
        param, _, key = name.partition(":")
        mine = found[f"optimizer/state.{param}.{key}" if key else f"model/{param}"]
        assert (mine.shape, mine.dtype) == (value.shape, value.dtype), name
        assert torch.equal(mine.view(torch.uint8), value.view(torch.uint8)), name
    trained = {n for n, p in Tiny().named_parameters() if p.requires_grad}
    steps = {n: found[f"optimizer/state.{n}.step"].item() for n in trained}
    assert set(steps.values()) == {3.0}
    assert read_manifest(out).aliases == {"model/head.weight": "model/embed.weight"}
    assert read_manifest(out).extra["step"] == 3


@pytest.mark.parametrize("kind", KINDS)
def test_every_weight_and_moment_is_read_to_the_bit(kind: str, tmp_path: Path) -> None:
    folder = WRITTEN / kind
    assert is_deepspeed(folder) and is_deepspeed(folder / "global_step3")
    left, states = imported(folder, tmp_path / "out")
    assert (left.unused, left.not_finite, states.step) == ([], [], 3)
    check_against_expected(folder, tmp_path / "out")


@pytest.mark.parametrize("kind", KINDS)
def test_an_own_loop_goes_on_with_weights_and_optimizer(kind: str, tmp_path: Path) -> None:
    imported(WRITTEN / kind, tmp_path / "out", torch.float32)
    model = Tiny()
    optimizer = torch.optim.AdamW(groups(model))
    loaded = mics.load(tmp_path / "out", model=model, optimizer=optimizer)
    assert loaded.extra["step"] == 3
    options = [(g["lr"], g["betas"], g["weight_decay"]) for g in optimizer.param_groups]
    assert options == [(1e-2, (0.8, 0.9), 0.1), (1e-2, (0.8, 0.9), 0.0)]
    expected = load_file(WRITTEN / kind / "expected.safetensors")
    for name, param in model.named_parameters():
        assert torch.equal(param.detach(), expected[name].float())
        if param.requires_grad:
            assert torch.equal(optimizer.state[param]["exp_avg_sq"], expected[f"{name}:exp_avg_sq"])


@pytest.mark.slow
def test_it_loads_into_a_sharded_model(tmp_path: Path) -> None:
    imported(WRITTEN / "zero3", tmp_path / "out")

    def load_on_rank() -> bool:
        model = Tiny()
        mics.fully_shard(model, mesh=mics.init_mesh(partition=2))
        optimizer = torch.optim.AdamW(groups(model))
        mics.load(tmp_path / "out", model=model, optimizer=optimizer)
        expected = load_file(WRITTEN / "zero3" / "expected.safetensors")
        return all(
            torch.equal(param.detach().full_tensor(), expected[name])
            for name, param in model.named_parameters()
        ) and all(
            torch.equal(optimizer.state[param]["exp_avg"].full_tensor(), expected[f"{n}:exp_avg"])
            for n, param in model.named_parameters()
            if param.requires_grad
        )

    assert all(run_ranks(load_on_rank, 2))


def test_the_command_says_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", str(WRITTEN / "mics"), str(tmp_path / "out")]) == 0
    assert "DeepSpeed stage 3, 2 ranks, step 3" in capsys.readouterr().out
    assert main(["import", str(WRITTEN / "mics"), str(tmp_path / "out")]) == 1
    assert "exists" in capsys.readouterr().err


@pytest.mark.extra
@pytest.mark.parametrize("stage", [2, 3])
def test_what_deepspeed_writes_today_is_read_to_the_bit(stage: int, tmp_path: Path) -> None:
    python = Path(__file__).parents[1] / ".venv-deepspeed-0.19.8" / "bin" / "python"
    if not python.exists():
        pytest.skip("make bench-environments makes the environment of DeepSpeed")
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    script = str(Path(__file__).parent / "deepspeed_writer.py")
    ours = {"WORLD_SIZE": "2", "MICS_TEST_STORE": str(tmp_path / "store")}
    ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29519", "DS_ACCELERATOR": "cpu"}
    ranks = [
        subprocess.Popen(
            [python, script, str(tmp_path / "theirs"), str(tmp_path / "settings.json")],
            env=os.environ | ours | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=250) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    imported(tmp_path / "theirs", tmp_path / "out")
    check_against_expected(tmp_path / "theirs", tmp_path / "out")


# -- with a model beside it ------------------------------------------------------------------------


def forge_zero2(folder: Path, weights: dict[str, torch.Tensor], ranks: int = 2) -> None:
    """What stage 2 writes of some weights, after no step."""
    flat = torch.cat([value.flatten() for value in weights.values()])
    flat = torch.cat([flat, torch.zeros(-flat.numel() % (2 * ranks))])
    shapes = OrderedDict((name, value.shape) for name, value in weights.items())
    inside = folder / "global_step0"
    inside.mkdir(parents=True)
    (folder / "latest").write_text("global_step0\n")
    model = {"module": {}, "buffer_names": [], "param_shapes": [shapes], "global_steps": 0}
    torch.save(model, inside / "mp_rank_00_model_states.pt")
    for rank, part in enumerate(flat.chunk(ranks)):
        inner = {
            "zero_stage": 2,
            "partition_count": [ranks],
            "single_partition_of_fp32_groups": [part.clone()],
            "base_optimizer_state": {"state": {}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        torch.save({"optimizer_state_dict": inner}, inside / name)


def test_small_files_of_a_model_come_along_and_names_are_compared(tmp_path: Path) -> None:
    model: Any = build(load_config("llama-tiny", vocabulary=96, separator=0), device="cpu")
    theirs = tmp_path / "checkpoint-0"
    forge_zero2(theirs, {n: p.detach() for n, p in model.named_parameters()})
    model.config.save_pretrained(theirs)
    left, _ = imported(theirs, tmp_path / "out")
    assert left.unused == [] and (tmp_path / "out/assets/model/config.json").is_file()
    other: Any = build(load_config("llama-tiny", vocabulary=96, separator=0), device="cpu")
    mics.load(tmp_path / "out", model=other)
    for mine, one in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, one)
    forge_zero2(tmp_path / "less", {"lm_head.weight": torch.zeros(96, 4)})
    model.config.save_pretrained(tmp_path / "less")
    assert "another model" in refused(tmp_path / "less", tmp_path / "none")


def test_weights_that_are_no_numbers_are_said(tmp_path: Path) -> None:
    forge_zero2(tmp_path / "theirs", {"a": torch.tensor([1.0, float("nan")])})
    left, _ = imported(tmp_path / "theirs", tmp_path / "out")
    assert left.not_finite == ["a"]


# -- folders that lack something -------------------------------------------------------------------


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    return Path(shutil.copytree(WRITTEN / "zero3", tmp_path / "copy"))


def states(folder: Path, rank: int, kind: str) -> Path:
    return folder / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"


def lose_last_rank(folder: Path) -> None:
    states(folder, 2, "optim").unlink()
    states(folder, 2, "model").unlink()


def lose_a_rank(folder: Path) -> None:
    states(folder, 1, "optim").unlink()


def mix_saves(folder: Path) -> None:
    shutil.copy(states(WRITTEN / "mics", 1, "model"), states(folder, 1, "model"))


def mix_optimizers(folder: Path) -> None:
    shutil.copy(states(WRITTEN / "mics", 1, "optim"), states(folder, 1, "optim"))


def add_tensor_parallelism(folder: Path) -> None:
    file = states(folder, 0, "model")
    shutil.copy(file, file.with_name(file.name.replace("mp_rank_00", "mp_rank_01")))


def add_experts(folder: Path) -> None:
    file = states(folder, 0, "optim")
    shutil.copy(file, file.with_name("expp_rank_0_mp_rank_00_optim_states.pt"))


def lead_outside(folder: Path) -> None:
    (folder / "latest").write_text("../zero3/global_step3")


def lead_nowhere(folder: Path) -> None:
    (folder / "latest").write_text("global_step9")


def be_a_pipe(folder: Path) -> None:
    states(folder, 0, "optim").unlink()
    os.mkfifo(states(folder, 0, "optim"))


def cut_short(folder: Path) -> None:
    file = states(folder, 0, "optim")
    file.write_bytes(file.read_bytes()[:-100])


def cut_half(folder: Path) -> None:
    file = states(folder, 0, "optim")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(folder: Path) -> None:
    file = states(folder, 0, "optim")
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data/1"))
        start = data.index(archive.read(name))
    data[start] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lose_last_rank, "one of 3 pieces"),
        (lose_a_rank, "rank 1 of 3 are missing"),
        (mix_saves, "of another save"),
        (mix_optimizers, "one of 2 pieces"),
        (add_tensor_parallelism, "tensor parallelism"),
        (add_experts, "parts of experts"),
        (lead_outside, "outside of it"),
        (lead_nowhere, "no folder in it"),
        (be_a_pipe, "no regular file"),
        (cut_short, "cannot be read"),
        (cut_half, "cannot be read"),
        (flip_a_bit, "not those that were saved"),
    ],
)
def test_a_folder_that_lacks_something_is_refused_in_words(
    spoil: Callable[[Path], None], words: str, copy: Path, tmp_path: Path
) -> None:
    spoil(copy)
    assert words in refused(copy, tmp_path / "out")


# -- forged files ----------------------------------------------------------------------------------


def rewritten(file: Path, change: Callable[[dict[str, bytes]], None], compress: int = 0) -> None:
    """Write an archive anew with other entries."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(file, "w", compress) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def with_pickle(data: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(entries: dict[str, bytes]) -> None:
        entries[next(name for name in entries if name.endswith("data.pkl"))] = data

    return change


class Evil:
    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.mark}",)


def evil_pickles(mark: str) -> dict[str, bytes]:
    touch = f"touch {mark}".encode()
    text = b"X" + struct.pack("<I", len(touch)) + touch
    name = "zero_stage"
    return {
        "reduce": pickle.dumps({name: Evil(mark)}, 2),
        "protocol 4": pickle.dumps({name: Evil(mark)}, 4),
        "instance": b"(" + text + b"ios\nsystem\n.",
        "object": b"(cos\nsystem\n" + text + b"o.",
        "new": b"cos\nsystem\n" + text + b"\x85\x81.",
        "known eval": b"c__builtin__\neval\n" + text + b"\x85R.",
        "getattr": b"c__builtin__\ngetattr\n" + text + b"\x85R.",
        "build": b"ctorch\nTensor\n)R}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb.",
        "dotted": b"\x80\x04\x8c\x05torch\x8c\x11os.system\n" + b".",
        "subprocess": b"csubprocess\nPopen\n" + text + b"\x85R.",
        "torch.load": b"ctorch.serialization\nload os\n" + text + b"\x85R.",
        "extension": b"\x82\x01.",
        "persistent": b"Pstorage\n.",
        "no stop": b"}",
        "no stack": b"R.",
        "no mark": b"u.",
        "memo": b"h\x05.",
        "huge memo": b"}r\xff\xff\xff\x7f.",
        "huge text": b"X\xff\xff\xff\x7fabc.",
        "huge text 8": b"\x8d" + b"\xff" * 7 + b"\x7fabc.",
        "huge number": b"L" + b"9" * 5000 + b"L\n.",
        "call of a text": text + b")R.",
        "nested keys": b"}" + b"K\x01" + b"\x85" * 1000 + b"K\x01s.",
        "list as a key": b"}]K\x01s.",
        "deep": b"]" * 100_000 + b"a" * 99_999 + b".",
        "other": b"\xff\xff",
        "none": b"N.",
        "empty": b"",
    }


@pytest.mark.parametrize("kind", ["optim", "model"])
def test_a_malicious_checkpoint_executes_nothing(kind: str, copy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    for name, data in evil_pickles(str(mark)).items():
        shutil.rmtree(copy)
        shutil.copytree(WRITTEN / "zero3", copy)
        rewritten(states(copy, 1, kind), with_pickle(data))
        assert refused(copy, tmp_path / "out"), name
        assert not mark.exists(), name
    # The pickle does what it says where it is unpickled.
    with zipfile.ZipFile(io.BytesIO(), "w"):
        pickle.loads(evil_pickles(str(mark))["reduce"])
    assert mark.exists()


def test_a_name_that_is_refused_is_said(copy: Path, tmp_path: Path) -> None:
    rewritten(states(copy, 0, "optim"), with_pickle(evil_pickles("x")["reduce"]))
    assert "system" in refused(copy, tmp_path / "out")


def test_calls_of_known_names_stay_records() -> None:
    value = read_pickle(b"ctorch\nhub\n(X\x01\x00\x00\x00atR}X\x01\x00\x00\x00bK\x01sb.")
    assert isinstance(value, Made) and value.state == {"b": 1} and value.arguments == ("a",)
    assert value.named.name == "torch hub"
    assert "deepspeed" not in sys.modules


def edit(folder: Path, rank: int, kind: str, change: Callable[[Any], None]) -> None:
    """Change what was saved, in a file of torch.save."""
    file = states(folder, rank, kind)
    value = torch.load(file, weights_only=False) if kind == "model" else None
    assert value is not None
    change(value)
    torch.save(value, file)


LIES: tuple[tuple[str, Callable[[Any], None]], ...] = (
    ("param_shapes", lambda v: v.update(param_shapes=None)),
    ("param_shapes", lambda v: v.update(param_shapes=[{"a": (-1,)}])),
    ("param_shapes", lambda v: v.update(param_shapes=[{"a": (2**62, 2**62)}])),
    ("no parameter's name", lambda v: v.update(param_shapes=[{"../a": (1,)}])),
    ("no parameter's name", lambda v: v.update(param_shapes=[{3: (1,)}])),
    ("no parameter's name", lambda v: v.update(param_shapes=[{"a": [True]}])),
    ("two groups", lambda v: v.update(param_shapes=[{"a": (1,)}, {"a": (1,)}])),
    ("values, its parameters", lambda v: v["param_shapes"][0].update(more=(50,))),
    ("values, its parameters", lambda v: v["param_shapes"][0].pop("up.weight")),
    ("global_steps", lambda v: v.update(global_steps=-1)),
    ("global_steps", lambda v: v.update(global_steps=float("nan"))),
    ("frozen", lambda v: v["frozen_param_shapes"].update({"frozen.bias": (500,)})),
    ("frozen", lambda v: v["frozen_param_shapes"].update({"up.weight": (7, 5)})),
    ("no name", lambda v: v["module"].update({"a\nb": torch.zeros(1)})),
    ("module is no table", lambda v: v.update(module=[])),
)


@pytest.mark.parametrize(("words", "change"), LIES)
def test_a_table_that_lies_is_refused(
    words: str, change: Callable[[Any], None], copy: Path, tmp_path: Path
) -> None:
    for rank in range(3):
        edit(copy, rank, "model", change)
    message = refused(copy, tmp_path / "out")
    assert words in message or "values, its parameters" in message


def replaced(old: bytes, new: bytes) -> Callable[[dict[str, bytes]], None]:
    def change(entries: dict[str, bytes]) -> None:
        name = next(name for name in entries if name.endswith("data.pkl"))
        assert old in entries[name]
        entries[name] = entries[name].replace(old, new)

    return change


def shorten_storage(entries: dict[str, bytes]) -> None:
    name = next(name for name in entries if name.endswith("data/1"))
    entries[name] = entries[name][:-4]


def lose_storage(entries: dict[str, bytes]) -> None:
    del entries[next(name for name in entries if name.endswith("data/1"))]


def big_endian(entries: dict[str, bytes]) -> None:
    entries[next(name for name in entries if name.endswith("byteorder"))] = b"big"


def lose_pickle(entries: dict[str, bytes]) -> None:
    del entries[next(name for name in entries if name.endswith("data.pkl"))]


def go_outside(entries: dict[str, bytes]) -> None:
    entries["../../outside"] = b"x"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (shorten_storage, "bytes and says"),
        (lose_storage, "is not there"),
        (big_endian, "byte order"),
        (lose_pickle, "no data.pkl"),
        (go_outside, "in one folder, each once"),
        (replaced(b"FloatStorage", b"QInt8Storage"), "a tensor of"),
        (replaced(b"FloatStorage", b"DoubleStorage"), "bytes and says"),
        (replaced(b"partition_count", b"partition_counT"), "partition_count is no count"),
        (replaced(b"zero_stage", b"zero_stagE"), "none of 1, 2 and 3"),
        (replaced(b"fp32_flat_groups", b"fp32_flat_groupS"), "is no list"),
        (replaced(b"param_groups", b"param_groupS"), "no param_groups"),
        (replaced(b"exp_avg_sq", b"exp_avg/sq"), "is called"),
    ],
)
def test_an_archive_that_lies_is_refused(
    change: Callable[[dict[str, bytes]], None], words: str, copy: Path, tmp_path: Path
) -> None:
    for rank in range(3):
        rewritten(states(copy, rank, "optim"), change)
    assert words in refused(copy, tmp_path / "out")
    assert not (tmp_path.parent / "outside").exists()


def test_compressed_and_old_files_are_refused(copy: Path, tmp_path: Path) -> None:
    rewritten(states(copy, 0, "optim"), lambda entries: None, zipfile.ZIP_DEFLATED)
    assert "compressed" in refused(copy, tmp_path / "out")
    torch.save({}, states(copy, 0, "optim"), _use_new_zipfile_serialization=False)
    assert "not a zip file" in refused(copy, tmp_path / "out")


def test_a_pickle_that_is_too_long_is_not_read(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "MOST_BYTES", 100)
    assert "at most" in refused(copy, tmp_path / "out")
    monkeypatch.setattr(pickles, "_MOST_OPCODES", 10)
    with pytest.raises(ValueError, match="opcodes"):
        read_pickle(b"}" * 20 + b".")


def test_small_files_that_say_to_hold_much_are_refused(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "_SHARED_BYTES", 0)

    def repeat(value: Any) -> None:
        one = torch.zeros(1000)
        value["module"].update({f"buffer.{n}": one for n in range(50)})
        value["buffer_names"] += [f"buffer.{n}" for n in range(50)]

    edit(copy, 0, "model", repeat)
    assert "all files" in refused(copy, tmp_path / "out")


def test_an_archive_whose_entries_are_larger_than_it_takes_no_memory(
    copy: Path, tmp_path: Path
) -> None:
    file = states(copy, 0, "optim")
    data = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith("data/1"))
    at = data.index(b"PK\x01\x02", archive.start_dir)
    while data[at + 46 : at + 46 + len(info.filename)] != info.filename.encode():
        at = data.index(b"PK\x01\x02", at + 4)
    data[at + 16 : at + 28] = struct.pack("<III", 0, 2**32 - 4, 2**32 - 4)
    file.write_bytes(data)
    assert "more bytes than it has" in refused(copy, tmp_path / "out")


def test_records_of_any_depth_and_numbers_of_any_size_are_refused_in_time() -> None:
    laughs = b"c__builtin__\nset\n)R" + b"q\x00h\x00\x86" * 60
    table = b"}c__builtin__\nset\n(" + laughs + b"tRK\x01s."
    file = archives.TorchFile.__new__(archives.TorchFile)
    file.path = Path("x")
    with pytest.raises(CheckpointError, match="a Made"):
        tables.shapes_in(file, read_pickle(table), "param_shapes")
    big = b"}X\x02\x00\x00\x00lr\x8b" + struct.pack("<i", 5000) + b"\x11" * 5000 + b"s."
    with pytest.raises(CheckpointError, match="no number"):
        tables._options(file, read_pickle(big))


def test_a_short_pickle_that_copies_much_is_refused_in_time() -> None:
    pairs = b"(" + b"K\x01K\x02\x86" * 30_000 + b"l"
    again = b"ccollections\nOrderedDict\nh\x00\x85R0" * 30_000
    with pytest.raises(ValueError, match="copies more than"):
        read_pickle(pairs + b"q\x000" + again + b"N.")
    key = b"(" + b"K\x01" * 30_000 + b"tq\x000"
    with pytest.raises(ValueError, match="a tuple as a key"):
        read_pickle(key + b"}h\x00Ns.")


def test_random_damage_is_refused_or_read_and_never_anything_else(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    for number in range(60):
        folder = Path(shutil.copytree(WRITTEN / "zero3", tmp_path / f"copy-{number}"))
        file = states(folder, number % 3, "optim" if number % 2 else "model")
        data = bytearray(file.read_bytes())
        for _ in range(4):
            at = int(torch.randint(len(data), (), generator=generator))
            data[at] = int(torch.randint(256, (), generator=generator))
        file.write_bytes(data)
        try:
            imported(folder, tmp_path / f"out-{number}")
        except MicsError:
            assert not (tmp_path / f"out-{number}").exists()
