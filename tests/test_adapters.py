"""Adapters on a frozen base: trained beside one process, counted, and kept alone as peft does."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import run_ranks
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import mics
from mics.__main__ import main
from mics.errors import CheckpointError
from mics.traffic import Key

WORLD, PARTITION, WIDTH, RANK, MICRO_STEPS, STEPS = 4, 2, 8, 3, 2, 5
FULL = MixedPrecisionPolicy()


class Adapted(nn.Module):
    """A frozen layer with two small matrices beside it, computed in their own dtype."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(WIDTH, RANK, bias=False)
        self.up = nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        extra = self.up(self.down(x.to(self.down.weight.dtype)))
        return self.base(x) + extra.to(x.dtype)


class Block(nn.Module):
    def __init__(self, base: torch.dtype, *, norm: bool) -> None:
        super().__init__()
        self.layer = Adapted(nn.Linear(WIDTH, WIDTH, dtype=base))
        self.norm = nn.LayerNorm(WIDTH, dtype=base).requires_grad_(norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.norm(self.layer(x)))


class Net(nn.Module):
    """Frozen but for its adapters; and for its norms, in the base's dtype, if wished."""

    def __init__(self, base: torch.dtype, *, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(base, norm=norm) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3, dtype=base).requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)  # type: ignore[no-any-return]


def _data(step: int, micro_step: int, rank: int, dtype: torch.dtype) -> torch.Tensor:
    seed = torch.Generator().manual_seed(100 * step + 10 * micro_step + rank)
    return torch.randn(4, WIDTH, generator=seed).to(dtype)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def _alone(dtype: torch.dtype, *, norm: bool) -> nn.Module:
    model = Net(dtype, norm=norm)
    optimizer = torch.optim.SGD(_trained(model), lr=0.5)
    for step in range(STEPS):
        for micro_step, rank in itertools.product(range(MICRO_STEPS), range(WORLD)):
            model(_data(step, micro_step, rank, dtype)).float().square().mean().backward()
        for param in _trained(model):
            param.grad.div_(WORLD * MICRO_STEPS)  # type: ignore[union-attr]
        optimizer.step()
        optimizer.zero_grad()
    return model


def _errors(dtype: torch.dtype, norm: bool) -> list[str]:
    wrong = []
    model = mics.shard(Net(dtype, norm=norm), partition=PARTITION, mp_policy=FULL)
    frozen = {n: _full(p) for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(_trained(model), lr=0.5)
    view = mics.ledger(model)
    for step in range(STEPS):
        view.reset()
        batches = [_data(step, m, dist.get_rank(), dtype) for m in range(MICRO_STEPS)]
        for batch in mics.micro_steps(model, batches, normalise="micro_steps"):
            model(batch).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    counted = view.traffic()
    if counted != mics.predict_traffic(model, micro_steps=MICRO_STEPS):
        wrong.append(f"counted {counted}")
    moved = counted.counts[Key(2, "all_reduce", "flat")].message_bytes
    shards = sum(p.to_local().nbytes for p in _trained(model))  # type: ignore[attr-defined]
    padding = 4 * WIDTH * len(model.blocks)  # 3 rows over 2 ranks
    if not norm and not shards <= moved <= shards + padding:
        wrong.append(f"hop 2 moves {moved} bytes, and the adapters have {shards}")
    right = dict(_alone(dtype, norm=norm).named_parameters())
    tolerance = 2e-2 if norm else 1e-6  # a norm that trains in the base's dtype rounds to it
    for name, param in model.named_parameters():
        if name in frozen and not torch.equal(frozen[name], _full(param)):
            wrong.append(f"{name} is frozen and has changed")
        apart = (_full(param).float() - right[name].float()).abs().max()
        if apart > tolerance * right[name].float().abs().max():
            wrong.append(f"{name} is {apart} off")
    return wrong


def _full(param: torch.Tensor) -> torch.Tensor:
    whole = param.full_tensor() if isinstance(param, DTensor) else param
    return whole.detach().clone()  # type: ignore[no-any-return]


def _all_errors() -> list[str]:
    cases = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
    return [f"{case}: {error}" for case in cases for error in _errors(*case)]


@pytest.mark.slow
def test_adapters_train_as_in_one_process_and_hop_2_moves_nothing_else() -> None:
    """fp32 adapters on a base in fp32 and bf16, and beside norms that are trained in bf16."""
    assert run_ranks(quiet, WORLD, _all_errors) == [[]] * WORLD


# -- peft's format ---------------------------------------------------------------------------------


def _llama() -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).to(torch.bfloat16)


def _adapted(seed: int, **options: Any) -> Any:
    import peft

    torch.manual_seed(seed)
    given = {"r": 3, "target_modules": ["q_proj", "down_proj"], "modules_to_save": ["lm_head"]}
    config = peft.LoraConfig(**(given | options), init_lora_weights=False)
    return peft.get_peft_model(_llama(), config)


def _of_adapter(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: _full(p) for n, p in model.named_parameters() if p.requires_grad}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _error_of(work: Any) -> str:
    with pytest.raises(CheckpointError) as raised:
        work()
    return str(raised.value)


def _round(folder: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    import peft

    found: dict[str, Any] = {}
    model = mics.shard(_adapted(1), partition=2)
    optimizer = torch.optim.AdamW(_trained(model), lr=0.1)
    batch = torch.arange(16).view(2, 8) + dist.get_rank()
    for one in mics.micro_steps(model, [batch]):
        model(input_ids=one, labels=one).loss.backward()
    optimizer.step()
    mics.save_adapters(folder / "kept", model=model)
    saved = _of_adapter(model)
    read = peft.PeftModel.from_pretrained(_llama(), folder / "kept", is_trainable=True)
    found["peft reads"] = _same(saved, _of_adapter(read))
    found["scale"] = read.peft_config["default"].lora_alpha
    other = mics.shard(_adapted(2), partition=4)
    found["starts otherwise"] = _same(saved, _of_adapter(other))
    mics.load_adapters(folder / "kept", model=other)
    found["mics reads"] = _same(saved, _of_adapter(other))
    plain = _adapted(2)
    mics.load_adapters(folder / "kept", model=plain)
    found["unsharded"] = _same(saved, _of_adapter(plain))
    found["exists"] = _error_of(lambda: mics.save_adapters(folder / "kept", model=model))
    found["no such"] = _error_of(lambda: mics.save_adapters(folder / "x", model=model, adapter="b"))
    found["no peft"] = _error_of(lambda: mics.save_adapters(folder / "x", model=_llama()))
    before = _of_adapter(plain)
    for name, options in {
        "rank": {"r": 2},
        "scale of": {"lora_alpha": 5},
        "targets": {"target_modules": ["q_proj"]},
    }.items():
        to_load = _adapted(1, **options)
        found[name] = _error_of(
            lambda to_load=to_load: mics.load_adapters(folder / "kept", model=to_load)
        )
    if dist.get_rank() == 0:
        (folder / "bare").mkdir()
        (folder / "bare" / "adapter_model.safetensors").write_bytes(
            (folder / "kept" / "adapter_model.safetensors").read_bytes()
        )
    dist.barrier()
    found["bare"] = _error_of(lambda: mics.load_adapters(folder / "bare", model=plain))
    found["unchanged"] = _same(before, _of_adapter(plain))
    found |= _exported(folder, model, saved)
    found |= _resized(folder)
    next(p for n, p in plain.named_parameters() if "norm" in n).requires_grad_(True)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        mics.save_adapters(folder / "less", model=plain)
    found["left out"] = said.getvalue()
    found["files"] = sorted(path.name for path in (folder / "kept").iterdir())
    return found


def _exported(folder: Path, model: Any, saved: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Checkpoints with and without the base, whose adapters the command line writes."""
    import peft

    found: dict[str, Any] = {}
    model.set_adapter("default")
    mics.save(folder / "whole", model=model)
    mics.save(folder / "trained", model=model, frozen=False)
    mics.save(folder / "plain", model=_llama())
    if dist.get_rank() == 0:
        for name in ("whole", "trained"):
            out = folder / f"{name} out"
            assert main(["export", str(folder / name), str(out), "--adapters"]) == 0
            read = peft.PeftModel.from_pretrained(_llama(), out, is_trainable=True)
            found[f"exported {name}"] = _same(saved, _of_adapter(read))
        made, kept = (read_config(folder / name) for name in ("trained out", "kept"))
        found["one config"] = made == kept and made["inference_mode"] is True
        for name, words in {
            "base left out": ["trained"],
            "adapted": ["whole"],
            "no adapters": ["plain", "--adapters"],
            "checked": ["whole", "--adapters", "--check"],
        }.items():
            with contextlib.redirect_stderr(io.StringIO()) as said:
                at, *options = words
                assert main(["export", str(folder / at), str(folder / "n"), *options]) != 0
            found[name] = said.getvalue()
    dist.barrier()
    return found


def read_config(folder: Path) -> Any:
    table = json.loads((folder / "adapter_config.json").read_bytes())
    return {n: sorted(v) if isinstance(v, list) else v for n, v in table.items()}


def _resized(folder: Path) -> dict[str, Any]:
    """An embedding that has another size than that of the base in its folder, and is frozen."""
    import peft

    base = _llama()
    if dist.get_rank() == 0:
        base.save_pretrained(folder / "base")
    dist.barrier()
    base.config.name_or_path = base.name_or_path = str(folder / "base")
    options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False}

    def adapted(model: Any) -> Any:
        return mics.shard(peft.get_peft_model(model, peft.LoraConfig(**options)), partition=2)

    found: dict[str, Any] = {}
    with contextlib.redirect_stderr(io.StringIO()) as said:
        mics.save_adapters(folder / "same size", model=adapted(base))
    found["same size"] = said.getvalue()
    larger = _llama()
    larger.config.name_or_path = larger.name_or_path = str(folder / "base")
    larger.resize_token_embeddings(52, mean_resizing=False)
    model = adapted(larger)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        mics.save_adapters(folder / "resized", model=model)
    found["resized"] = said.getvalue()
    rows = _full(model.get_input_embeddings().weight)
    again = _llama()
    again.resize_token_embeddings(52, mean_resizing=False)
    with torch.no_grad():
        again.get_input_embeddings().weight[48:] += 1
    read = peft.PeftModel.from_pretrained(copy.deepcopy(again), folder / "resized")
    found["peft reads rows"] = torch.equal(read.get_input_embeddings().weight, rows)
    other = adapted(again)
    mics.load_adapters(folder / "resized", model=other)
    found["mics reads rows"] = torch.equal(_full(other.get_input_embeddings().weight), rows)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        mics.save_adapters(folder / "no base", model=other)
    return found | {"no base": said.getvalue()}


@pytest.mark.slow
def test_adapters_are_kept_alone_as_peft_reads_them_and_load_into_shards(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for rank, found in enumerate(run_ranks(quiet, WORLD, lambda: _round(tmp_path))):
        assert found["files"] == ["adapter_config.json", "adapter_model.safetensors"]
        assert found["peft reads"] and found["mics reads"] and found["unsharded"]
        assert found["scale"] == 8
        assert found["unchanged"] and not found["starts otherwise"]
        assert "exists; nothing is written over" in found["exists"]
        assert "The model has no adapter 'b'" in found["no such"]
        assert "It has 'default'" in found["no such"]
        assert "adapter='default'" in found["no such"]
        assert "LlamaForCausalLM has no adapters of peft" in found["no peft"]
        assert "the model that peft.get_peft_model returned" in found["no peft"]
        for name, first in (("rank", "is [3, 16] there, [2, 16] here"), ("scale of", "lora_alpha")):
            assert "is of another adapter: shapes or options differ" in found[name]
            assert first in found[name]
            assert "peft.PeftConfig.from_pretrained(" in found[name]
        assert "is of another adapter: names differ" in found["targets"]
        assert "with the target_modules that it was made with" in found["targets"]
        assert "There is no adapter_config.json in" in found["bare"]
        assert "a folder that mics.save_adapters wrote" in found["bare"]
        assert found["peft reads rows"] and found["mics reads rows"]
        if rank == 0:
            assert found["exported whole"] and found["exported trained"] and found["one config"]
            assert "was saved without its frozen parameters" in found["base left out"]
            assert "Write: mics export --adapters" in found["base left out"]
            assert "Write: mics export --adapters" in found["adapted"]
            assert "does not say which of its tensors are an adapter's" in found["no adapters"]
            assert "--check is for whole models" in found["checked"]
            assert "embeddings" not in found["same size"]
            assert "kept with the adapter: they have 52 rows, and 48 in" in found["resized"]
            assert "the 52 rows of the embeddings are those of the base cannot" in found["no base"]
            assert "1 trained parameter(s) are not of the adapter" in found["left out"]
            assert "modules_to_save=[...]" in found["left out"]
