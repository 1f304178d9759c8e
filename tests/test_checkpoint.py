"""A checkpoint holds the state once, and loads into any layout bit for bit."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import FrozenBlock, TiedTransformer, UnevenMLP, full, loss_of, seeded, shard_blocks
from parity import quiet
from ranks import errors_of_ranks, mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard
from torch.distributed.tensor import DTensor

import mics
from mics.checkpoint import writing
from mics.checkpoint.contents import contents_of
from mics.checkpoint.peers import Peers

Whole = tuple[dict[str, torch.Tensor], dict[str, Any]]
FP32 = MixedPrecisionPolicy()


class WithDropout(UnevenMLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.dropout(x, 0.5))


class InBf16(UnevenMLP):
    def __init__(self) -> None:
        super().__init__()
        self.to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(torch.bfloat16))


def build(kind: Callable[[], Any], partition: int, seed: int = 0) -> tuple[Any, Any]:
    model = seeded(kind, seed)
    quiet(
        lambda: mics.shard(
            model,
            mesh=mesh_of_rank(partition, 2),
            blocks=list(model.blocks),
            mp_policy=FP32,
            collectives="flat",
        )
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trainable, lr=0.01)


def train(model: Any, optimizer: Any, first: int, last: int) -> list[float]:
    losses = []
    for step in range(first, last):
        example = model.example(100 * step + dist.get_rank())
        for batch in mics.micro_steps(model, [example]):
            loss = loss_of(model, batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(model: Any, optimizer: Any) -> Whole:
    contents = contents_of(model, optimizer)
    return {name: full(tensor) for name, tensor in contents.tensors.items()}, contents.values


def equal(one: Whole, other: Whole) -> bool:
    return (
        one[0].keys() == other[0].keys()
        and all(torch.equal(one[0][name], other[0][name]) for name in one[0])
        and one[1] == other[1]
    )


def _save(
    path: Path, kind: Callable[[], Any], partition: int, keywords: dict[str, Any] | None = None
) -> Whole:
    model, optimizer = build(kind, partition)
    train(model, optimizer, 0, 2)
    saved = whole(model, optimizer)
    trained = threading.Event()
    write = writing.write_tensors

    def after_training(*args: Any) -> Any:
        assert not (keywords or {}).get("asynchronous") or trained.wait(60)
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_tensors", after_training)
        pending = mics.save(
            path, model=model, optimizer=optimizer, extra={"step": 2}, **(keywords or {})
        )
        train(model, optimizer, 2, 3)  # an asynchronous save must not see this
        trained.set()
        pending.wait()
    return saved


def _load(path: Path, kind: Callable[[], Any], partition: int) -> tuple[Whole, Any]:
    model, optimizer = build(kind, partition, seed=7)
    train(model, optimizer, 5, 6)
    loaded = mics.load(path, model=model, optimizer=optimizer)
    for param, state in optimizer.state.items():  # as shards, not as a whole on every rank
        shards = [value for value in state.values() if isinstance(value, DTensor)]
        assert len(shards) == 2 and all(one.placements == param.placements for one in shards)
    return whole(model, optimizer), loaded.extra


KINDS = [UnevenMLP, TiedTransformer, FrozenBlock, InBf16]


def _save_kinds(path: Path) -> list[Whole]:
    return [_save(path / kind.__name__, kind, 4) for kind in KINDS]


def _load_kinds(path: Path, partition: int) -> list[tuple[Whole, Any]]:
    return [_load(path / kind.__name__, kind, partition) for kind in KINDS]


def test_saved_at_8_by_4_it_loads_at_any_layout_bit_for_bit(tmp_path: Path) -> None:
    """Uneven shapes, tied and frozen parameters, buffers, a model in bf16."""
    saved = run_ranks(_save_kinds, 8, tmp_path)[0]
    for world, partition in [(8, 2), (4, 4), (2, 1)]:
        for of_rank in run_ranks(_load_kinds, world, tmp_path, partition):
            for kind, (loaded, extra), before in zip(KINDS, of_rank, saved, strict=True):
                assert equal(loaded, before), (kind, world, partition)
                assert extra == {"step": 2}


def test_an_asynchronous_save_holds_the_values_of_its_call(tmp_path: Path) -> None:
    saved = run_ranks(_save, 4, tmp_path / "c", UnevenMLP, 2, {"asynchronous": True})[0]
    for loaded, _ in run_ranks(_load, 4, tmp_path / "c", UnevenMLP, 2):
        assert equal(loaded, saved)


def _two_asynchronous_saves(path: Path) -> tuple[Whole, Whole]:
    model, optimizer = build(UnevenMLP, 2)
    train(model, optimizer, 0, 1)
    first = whole(model, optimizer)
    mics.save(path / "first", model=model, optimizer=optimizer, asynchronous=True)
    train(model, optimizer, 1, 2)
    second = mics.save(path / "second", model=model, optimizer=optimizer, asynchronous=True)
    second.wait()
    assert second.done()
    mics.load(path / "first", model=model, optimizer=optimizer)
    return first, whole(model, optimizer)


def test_a_second_save_waits_for_the_first(tmp_path: Path) -> None:
    for first, loaded in run_ranks(_two_asynchronous_saves, 4, tmp_path):
        assert equal(first, loaded)


def _save_plain_fsdp2(path: Path) -> Whole:
    model = seeded(UnevenMLP)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    shard_blocks(torch_fully_shard, model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for step in range(2):
        loss_of(model, model.example(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    mics.save(path, model=model, optimizer=optimizer)
    return whole(model, optimizer)


def test_a_model_of_plain_fsdp2_is_saved_as_well_and_once(tmp_path: Path) -> None:
    saved = run_ranks(_save_plain_fsdp2, 4, tmp_path / "c")[0]
    for loaded, _ in run_ranks(_load, 4, tmp_path / "c", UnevenMLP, 4):
        assert equal(loaded, saved)
    assert stored_bytes(tmp_path / "c") == bytes_of(saved)


def _save_and_load_alone(path: Path) -> bool:
    model = seeded(UnevenMLP)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    loss_of(model, model.example(0)).backward()
    optimizer.step()
    saved = whole(model, optimizer)
    mics.save(path, model=model, optimizer=optimizer)
    other = seeded(UnevenMLP, 3)
    adam = torch.optim.AdamW(other.parameters(), lr=0.5)
    mics.load(path, model=other, optimizer=adam)
    return equal(whole(other, adam), saved)


def test_one_process_without_torch_distributed_saves_and_loads(tmp_path: Path) -> None:
    assert _save_and_load_alone(tmp_path / "c")


# -- who writes what ---------------------------------------------------------------------------


def manifest(path: Path) -> Any:
    return json.loads((path / "manifest.json").read_text())


def chunks_of_state(path: Path) -> list[dict[str, Any]]:
    tensors = manifest(path)["tensors"].items()
    return [
        c | {"dtype": t["dtype"]}
        for name, t in tensors
        if "/rank-" not in name
        for c in t["chunks"]
    ]


def size_of(chunk: dict[str, Any]) -> int:
    itemsize = getattr(torch, chunk["dtype"]).itemsize
    return int(torch.tensor(chunk["shape"] or [1]).prod()) * itemsize


def stored_bytes(path: Path) -> int:
    return sum(size_of(chunk) for chunk in chunks_of_state(path))


def bytes_of(saved: Whole) -> int:
    return sum(tensor.nbytes for tensor in saved[0].values())


def test_only_one_replica_writes_and_the_replicas_share_the_work(tmp_path: Path) -> None:
    saved = run_ranks(_save, 8, tmp_path / "c", UnevenMLP, 2)[0]  # 4 replicas
    assert stored_bytes(tmp_path / "c") == bytes_of(saved)
    per_rank = dict.fromkeys(range(8), 0)
    for chunk in chunks_of_state(tmp_path / "c"):
        per_rank[int(chunk["file"][5:10])] += size_of(chunk)
    assert max(per_rank.values()) < 2 * bytes_of(saved) / 8


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    run_ranks(_save, 2, tmp_path / "c", TiedTransformer, 2)
    stored = manifest(tmp_path / "c")
    assert stored["aliases"] == {"model/head.weight": "model/embedding.weight"}
    assert "model/head.weight" not in stored["tensors"]


def test_assets_are_kept_and_nothing_is_pickle(tmp_path: Path) -> None:
    run_ranks(_save, 2, tmp_path / "c", UnevenMLP, 2, {"assets": {"a/b.json": b"{}"}})
    assert (tmp_path / "c" / "assets" / "a" / "b.json").read_bytes() == b"{}"
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == [
        "assets",
        "manifest.json",
        "manifest.json.sha256",
        "rank-00000.safetensors",
        "rank-00001.safetensors",
    ]


# -- going on ------------------------------------------------------------------------------------


def _uninterrupted() -> tuple[list[float], Whole]:
    model, optimizer = build(WithDropout, 2)
    torch.manual_seed(dist.get_rank())
    losses = train(model, optimizer, 0, 6)
    return losses, whole(model, optimizer)


def _first_half(path: Path) -> None:
    model, optimizer = build(WithDropout, 2)
    torch.manual_seed(dist.get_rank())
    train(model, optimizer, 0, 3)
    mics.save(path, model=model, optimizer=optimizer)


def _second_half(path: Path) -> tuple[list[float], Whole, bool]:
    model, optimizer = build(WithDropout, 2, seed=5)
    loaded = mics.load(path, model=model, optimizer=optimizer)
    return train(model, optimizer, 3, 6), whole(model, optimizer), loaded.random_restored


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    """With dropout: the random state of every rank comes back too."""
    straight = run_ranks(_uninterrupted, 4)
    run_ranks(_first_half, 4, tmp_path / "c")
    for (losses, end), (more, resumed, random) in zip(
        straight, run_ranks(_second_half, 4, tmp_path / "c"), strict=True
    ):
        assert random
        assert more == losses[3:]
        assert equal(resumed, end)


def _trained_from_scratch(path: Any, how: str) -> Whole:
    model, optimizer = build(UnevenMLP, 2)
    if how == "saved":
        mics.save(path, model=model, optimizer=optimizer)
    if how == "loaded":
        mics.load(path, model=model, optimizer=optimizer)
    train(model, optimizer, 0, 3)
    return whole(model, optimizer)


def test_a_save_before_the_first_step_changes_nothing(tmp_path: Path) -> None:
    """Neither the run that goes on, nor the one that starts from the checkpoint."""
    plain = run_ranks(_trained_from_scratch, 2, None, "plain")
    for how in ("saved", "loaded"):
        for one, other in zip(
            plain, run_ranks(_trained_from_scratch, 2, tmp_path / "c", how), strict=True
        ):
            assert equal(one, other)


def test_a_rank_without_random_state_in_the_checkpoint_is_told(tmp_path: Path) -> None:
    run_ranks(_first_half, 2, tmp_path / "c")
    assert [random for *_, random in run_ranks(_second_half, 4, tmp_path / "c")] == [
        True,
        True,
        False,
        False,
    ]


# -- what is refused -----------------------------------------------------------------------------


def _load_other(path: Path, kind: Callable[[], Any], optimizer: str) -> None:
    model, adam = build(kind, 2)
    made = adam if optimizer == "adamw" else torch.optim.SGD(model.parameters(), momentum=0.9)
    before = whole(model, made)
    try:
        mics.load(path, model=model, optimizer=made)
    finally:
        assert equal(whole(model, made), before), "refused, but something was changed"


class Wider(UnevenMLP):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(13, 6)


@pytest.mark.parametrize(
    ("kind", "optimizer", "words"),
    [
        (TiedTransformer, "adamw", ["of another model: names differ", "only there", "only here"]),
        (Wider, "adamw", ["shapes or dtypes differ", "out.weight is float32 [5, 13] there"]),
        (InBf16, "adamw", ["shapes or dtypes differ", "bfloat16"]),
        (
            UnevenMLP,
            "sgd",
            ["of another optimizer: names differ", "bias.amsgrad", "a scheduler of your own adds"],
        ),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_name(
    kind: Any, optimizer: str, words: list[str], tmp_path: Path
) -> None:
    run_ranks(_save, 2, tmp_path / "c", UnevenMLP, 2)
    for text in errors_of_ranks(_load_other, 2, tmp_path / "c", kind, optimizer):
        assert "CheckpointError" in text
        for word in words:
            assert word in text


def test_a_checkpoint_without_an_optimizer_is_named(tmp_path: Path) -> None:
    model = seeded(UnevenMLP)
    mics.save(tmp_path / "c", model=model)
    with pytest.raises(mics.CheckpointError, match="holds no optimizer"):
        mics.load(tmp_path / "c", model=model, optimizer=torch.optim.AdamW(model.parameters()))


def test_an_existing_folder_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for text in errors_of_ranks(_save, 2, tmp_path / "c", UnevenMLP, 2):
        assert f"{tmp_path / 'c'} exists; a checkpoint is never written over" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]


def test_a_file_of_another_length_than_its_rank_wrote_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network's folder that shows a rank's file to rank 0 before its end is there."""
    write = writing.write_tensors

    def without_the_end(path: Path, *rest: Any) -> Any:
        facts = write(path, *rest)
        os.truncate(path, facts.bytes - 1)
        return facts

    monkeypatch.setattr(writing, "write_tensors", without_the_end)
    with pytest.raises(mics.CheckpointError, match=r"Rank 0 sees another rank-00000\.safetensors"):
        mics.save(tmp_path / "c", model=seeded(UnevenMLP))
    assert list(tmp_path.iterdir()) == []


def test_a_value_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    model = seeded(UnevenMLP)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.param_groups[0]["friend"] = object()
    with pytest.raises(mics.CheckpointError, match="friend cannot be kept"):
        mics.save(tmp_path / "c", model=model, optimizer=optimizer)
    assert list(tmp_path.iterdir()) == []


def _save_what_cannot_be_kept(path: Path, given: dict[str, Any]) -> None:
    mics.save(path, model=seeded(UnevenMLP), asynchronous=True, **given).wait()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"extra": {"x": torch.ones(1)}}, "extra cannot be kept: it is not JSON"),
        ({"extra": {"x": {1: 2, "b": 3}}}, "dicts whose keys are text"),
        ({"assets": {"model card.md": b""}}, "'model card.md' cannot be kept under this name"),
        ({"assets": {"../out.md": b""}}, "'../out.md' cannot be kept under this name"),
        ({"assets": {"card.md": "text"}}, "'card.md' cannot be kept: it is not bytes"),
    ],
)
def test_what_could_not_be_read_back_is_refused_on_every_rank(
    given: dict[str, Any], words: str, tmp_path: Path
) -> None:
    for text in errors_of_ranks(_save_what_cannot_be_kept, 2, tmp_path / "c", given):
        assert "CheckpointError" in text
        assert words in text
    assert list(tmp_path.iterdir()) == []


def _one_rank_has_a_bug() -> None:
    peers = Peers()
    peers.together(lambda: 1 // (peers.rank - 1))


def test_a_bug_on_one_rank_is_an_error_on_all(tmp_path: Path) -> None:
    for text in errors_of_ranks(_one_rank_has_a_bug, 2):
        assert "CheckpointError: Rank 1 failed at a checkpoint" in text
        assert "ZeroDivisionError" in text


def _load_while_a_save_is_under_way(root: Path) -> bool:
    model, optimizer = build(UnevenMLP, 2)
    mics.save(root / "a", model=model, optimizer=optimizer)
    before = whole(model, optimizer)
    train(model, optimizer, 0, 1)
    write = writing.write_tensors

    def slowly(*args: Any) -> Any:
        time.sleep(1 + dist.get_rank())
        return write(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "write_tensors", slowly)
        pending = mics.save(root / "b", model=model, optimizer=optimizer, asynchronous=True)
        mics.load(root / "a", model=model, optimizer=optimizer)
        assert pending.done()
    pending.wait()
    mics.load(root / "b", model=model, optimizer=optimizer)
    mics.load(root / "a", model=model, optimizer=optimizer)
    return equal(whole(model, optimizer), before)


def test_a_load_waits_for_a_save_that_is_under_way(tmp_path: Path) -> None:
    """Both compare notes between the ranks, which would mix up what they say."""
    assert run_ranks(_load_while_a_save_is_under_way, 2, tmp_path) == [True, True]
