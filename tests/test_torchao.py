"""torchao's own weights on four ranks beside one process: float8 training, and a frozen NF4 base.

Products of float8 are emulated, because a CPU has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import mesh_of_rank, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

import mics
from mics.errors import ShardError
from mics.traffic import Key

pytest.importorskip("torchao")
# torchao and torch warn of each other's changes when it is imported.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

WORLD, WIDTH, STEPS, MICRO_STEPS = 4, 64, 2, 2
FULL = MixedPrecisionPolicy()


class Block(nn.Module):
    """A norm and two linear layers; the second is not used when asked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, WIDTH)
        self.down = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, down: bool = True) -> torch.Tensor:
        y = torch.tanh(self.up(self.norm(x)))
        return x + (self.down(y) if down else y)


class Model(nn.Module):
    """Two blocks between two layers; one rank leaves out a layer of the second block."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.last = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, down: bool = True) -> torch.Tensor:
        return self.last(self.blocks[1](self.blocks[0](self.first(x)), down))


class OnNf4(nn.Module):
    """An adapter beside a frozen base."""

    def __init__(self) -> None:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

        super().__init__()
        base = to_nf4(torch.randn(WIDTH, WIDTH), block_size=32, scaler_block_size=2)
        self.weight = nn.Parameter(base, requires_grad=False)
        self.down = nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.Linear(4, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4

        return x + 0.1 * linear_nf4(x, self.weight) + self.up(self.down(x))


def _float8(*, gathered: bool) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=gathered, emulate=True)
    return convert_to_float8_training(Model(), config=config)


def _adapters() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(OnNf4(), OnNf4(), nn.Linear(WIDTH, WIDTH))


def _batch(step: int, micro_step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * step + 10 * micro_step + rank)
    return torch.randn(4, WIDTH, generator=generator)


def _loss(model: nn.Module, x: torch.Tensor, rank: int) -> torch.Tensor:
    y = model(x, rank != 1) if isinstance(model, Model) else model(x)
    value: torch.Tensor = y.square().mean() / MICRO_STEPS
    return value


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: param for name, param in model.named_parameters() if param.requires_grad}


def _whole(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in _trained(model).items()
    }


def _by_mics(model: nn.Module, partition: int, precompute: bool, **options: Any) -> Any:
    blocks = [m for m in model.modules() if isinstance(m, Block | OnNf4)]
    mics.shard(model, mesh=mesh_of_rank(partition, 2), blocks=blocks, mp_policy=FULL, **options)
    optimizer = torch.optim.SGD(_trained(model).values(), lr=0.1)
    equal, rank = [], dist.get_rank()
    if precompute:
        mics.precompute_scales(model)
    for step in range(STEPS):
        mics.ledger(model).reset()
        predicted = mics.predict_traffic(model, micro_steps=MICRO_STEPS)
        batches = [_batch(step, m, rank) for m in range(MICRO_STEPS)]
        for x in mics.micro_steps(model, batches):
            _loss(model, x, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        if precompute:
            mics.precompute_scales(model)
        counted = mics.ledger(model).traffic()
        equal.append(
            counted == predicted and _scales(counted) == _scales_by_hand(model, precompute)
        )
    return _whole(model), equal


def _scales(traffic: mics.traffic.Traffic) -> tuple[int, int]:
    """Calls of hop 0 and the bytes of their messages."""
    counts = [count for key, count in traffic.counts.items() if key.hop == 0]
    return sum(one.calls for one in counts), sum(one.message_bytes for one in counts)


def _scales_by_hand(model: nn.Module, precompute: bool) -> tuple[int, int]:
    """Four bytes for each weight: in one message a step, or in one for each gather."""
    weights = [p for p in model.parameters() if hasattr(p.to_local(), "fsdp_pre_all_gather")]  # type: ignore[attr-defined]
    if precompute:
        return 1, 4 * len(weights)
    if not isinstance(model, Model):
        return 0, 0  # adapters' bases have scales of their own
    in_blocks = len(weights) - 2  # which are gathered in backward too
    calls = MICRO_STEPS * (2 * in_blocks + 2)
    return calls, 4 * calls


def _alone(model: nn.Module) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(_trained(model).values(), lr=0.1)
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            for rank in range(WORLD):
                (_loss(model, _batch(step, micro_step, rank), rank) / WORLD).backward()
        optimizer.step()
        optimizer.zero_grad()
    return _whole(model)


def test_float8_weights_and_their_optimizer_are_kept_at_another_layout(tmp_path: Path) -> None:
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    def sharded(partition: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = _float8(gathered=True)
        mesh = mesh_of_rank(partition, 2)
        mics.shard(model, mesh=mesh, blocks=Block, mp_policy=FULL)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def both() -> None:
        x = torch.ones(2, WIDTH)
        model, optimizer = sharded(2)
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        precompute_float8_dynamic_scale_for_fsdp(model)
        mics.save(tmp_path / "kept", model=model, optimizer=optimizer)
        other, later = sharded(4)
        mics.load(tmp_path / "kept", model=other, optimizer=later)
        precompute_float8_dynamic_scale_for_fsdp(other)
        assert torch.equal(model(x), other(x))
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(one.full_tensor(), two.full_tensor())
            state = optimizer.state[one]["exp_avg"], later.state[two]["exp_avg"]
            assert torch.equal(state[0].full_tensor(), state[1].full_tensor())
            assert type(state[1].to_local()) is torch.Tensor

    run_ranks(both, WORLD, ranks_per_node=2)


def test_float8_and_nf4_train_as_one_process_and_are_counted_as_predicted() -> None:
    def all_ways() -> list[Any]:
        return [
            _by_mics(_float8(gathered=True), 4, False, collectives="hierarchical"),
            _by_mics(_float8(gathered=True), 2, True, overlap=False),
            _by_mics(_adapters(), 4, False, collectives="hierarchical"),
            _by_mics(_adapters(), 2, False, reshard_after_forward=False),
        ]

    float8, adapters = _alone(_float8(gathered=False)), _alone(_adapters())
    for rank in run_ranks(all_ways, WORLD, ranks_per_node=2):
        for (weights, equal), alone in zip(rank, 2 * [float8] + 2 * [adapters], strict=True):
            assert all(equal)
            assert weights.keys() == alone.keys()
            for name, weight in alone.items():
                assert float((weights[name] - weight).norm() / weight.norm()) < 1e-6, name


def _on_tp(precompute: bool, folder: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights after two steps of two replicas, and what was not counted as predicted, or kept."""
    from torchao.float8.float8_tensor_parallel import (
        Float8ColwiseParallel,
        Float8RowwiseParallel,
    )

    mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("replicate", "shard", "tp"))
    model: Any = _float8(gathered=True)
    for block in model.blocks:
        plan = {"up": Float8ColwiseParallel(), "down": Float8RowwiseParallel()}
        parallelize_module(block, mesh["tp"], plan)
    for module in (*model.blocks, model):
        mics.fully_shard(module, mesh=mesh["replicate", "shard"], mp_policy=FULL)
    optimizer = mics.WholeStep(model.parameters(), torch.optim.SGD, lr=0.1)
    replica, wrong = mesh.get_local_rank("shard"), []
    if precompute:
        mics.precompute_scales(model)
    for step in range(STEPS):
        mics.ledger(model).reset()
        predicted = mics.predict_traffic(model, micro_steps=MICRO_STEPS, optimizer=optimizer)
        for x in mics.micro_steps(model, [_batch(step, m, replica) for m in range(MICRO_STEPS)]):
            (model(x).square().mean() / MICRO_STEPS).backward()
        optimizer.step()
        optimizer.zero_grad()
        if precompute:
            mics.precompute_scales(model)
        counted = mics.ledger(model).traffic()
        if counted != predicted:
            wrong.append(f"counted\n{counted}\npredicted\n{predicted}")
        # Two weights on the mesh of shards, four on that of two axes, which each have a message.
        found = counted.counts[Key(0, "all_reduce", "flat")]
        scales = found.calls, found.message_bytes
        if precompute and scales != (3, 4 * 2 + 2 * 4 * 4):
            wrong.append(f"{scales} scales")
    mics.save(folder, model=model, optimizer=optimizer)
    other = mics.shard(
        _float8(gathered=True), mesh=mesh_of_rank(4, 2), blocks=Block, mp_policy=FULL
    )
    mics.load(folder, model=other)
    weights = _whole(model)
    wrong += [
        name for name, whole in _whole(other).items() if not torch.equal(whole, weights[name])
    ]
    return weights, wrong


def test_float8_beside_tensor_parallelism_is_counted_as_predicted_and_kept(tmp_path: Path) -> None:
    def both() -> list[Any]:
        return [_on_tp(False, tmp_path / "each"), _on_tp(True, tmp_path / "beforehand")]

    alone = _float8(gathered=False)
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for step in range(STEPS):
        for micro_step in range(MICRO_STEPS):
            for replica in range(2):
                y = alone(_batch(step, micro_step, replica))
                (y.square().mean() / MICRO_STEPS / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    right = _whole(alone)
    for rank in run_ranks(both, WORLD, ranks_per_node=2):
        for weights, wrong in rank:
            assert not wrong, wrong[0]
            for name, weight in right.items():
                # Pieces of activations, and of weights as well, have scales of their own. Biases
                # began at zero and are sums of gradients of few bits.
                most = 5e-3 if weight.ndim == 2 else 0.3
                assert float((weights[name] - weight).norm() / weight.norm()) < most, name


def test_mxfp8_weights_are_gathered_in_bf16_and_train_as_one_process() -> None:
    def weights() -> nn.Sequential:
        from torchao.prototype.moe_training.config import MXFP8TrainingOpConfig
        from torchao.prototype.moe_training.tensor import MXFP8TrainingWeightWrapperTensor
        from torchao.quantization.quantize_.common import KernelPreference

        config = MXFP8TrainingOpConfig(kernel_preference=KernelPreference.EMULATED)
        torch.manual_seed(0)
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2)))
        for layer in model.to(torch.bfloat16):
            layer.weight = nn.Parameter(  # type: ignore[union-attr]
                MXFP8TrainingWeightWrapperTensor(layer.weight.detach(), config)  # type: ignore[union-attr,operator]
            )
        return model

    def rows(rank: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(rank)
        return torch.randn(32, WIDTH, generator=generator).to(torch.bfloat16)

    def gradients() -> tuple[list[torch.Tensor], int]:
        model = weights()
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mics.shard(model, mesh=mesh_of_rank(2, 2), blocks=list(model), mp_policy=policy)
        predicted = mics.predict_traffic(model)
        mics.ledger(model).reset()
        for x in mics.micro_steps(model, [rows(dist.get_rank())]):
            model(x).square().mean().backward()
        counted = mics.ledger(model).traffic()
        assert counted == predicted
        sent = counted.counts[Key(1, "all_gather", "flat")]
        found = [param.grad.full_tensor().float() for param in model.parameters()]  # type: ignore[union-attr]
        return found, sent.message_bytes // sent.calls

    alone = weights()
    for rank in range(WORLD):
        (alone(rows(rank)).square().mean() / WORLD).backward()
    right = [param.grad.float() for param in alone.parameters()]  # type: ignore[union-attr]
    for found, nbytes in run_ranks(gradients, WORLD, ranks_per_node=2):
        assert nbytes == 2 * WIDTH * WIDTH
        for ours, theirs in zip(found, right, strict=True):
            assert float((ours - theirs).norm() / theirs.norm()) < 1e-2


def _peft_on_nf4(seed: int) -> Any:
    """LoRA of peft on weights in NF4 and on others."""
    import peft

    model = _llama_in_nf4()
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return peft.get_peft_model(model, peft.LoraConfig(**options, init_lora_weights=False))


def _llama_in_nf4() -> Any:
    """A small Llama with some weights in NF4."""
    import transformers
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    for layer in model.model.layers:
        for linear in (layer.self_attn.q_proj, layer.mlp.down_proj):
            base = to_nf4(linear.weight.detach(), block_size=32, scaler_block_size=2)
            linear.weight = nn.Parameter(base, requires_grad=False)
    return model


def test_adapters_of_peft_train_on_nf4_and_are_kept_alone_and_with_their_optimizer(
    tmp_path: Path,
) -> None:
    peft = pytest.importorskip("peft")

    def sharded(seed: int, partition: int) -> tuple[Any, torch.optim.Optimizer]:
        model = mics.shard(_peft_on_nf4(seed), mesh=mesh_of_rank(partition, 2), mp_policy=FULL)
        return model, torch.optim.AdamW(_trained(model).values(), lr=0.1)

    def loss(model: Any) -> torch.Tensor:
        ids = torch.arange(16).view(2, 8) + dist.get_rank()
        return model(input_ids=ids, labels=ids).loss  # type: ignore[no-any-return]

    def both() -> None:
        import warnings

        warnings.simplefilter("ignore")
        model, optimizer = sharded(1, 4)
        for _ in mics.micro_steps(model, [None]):
            loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
        mics.save_adapters(tmp_path / "alone", model=model)
        mics.save(tmp_path / "kept", model=model, optimizer=optimizer, frozen=False)
        other, later = sharded(2, 2)
        assert not torch.equal(loss(model), loss(other))
        mics.load_adapters(tmp_path / "alone", model=other)
        weights = _whole(model)
        assert all(torch.equal(w, weights[name]) for name, w in _whole(other).items())
        other, later = sharded(2, 2)
        mics.load(tmp_path / "kept", model=other, optimizer=later)
        assert torch.equal(loss(model), loss(other))
        for one, two in zip(_trained(model).values(), _trained(other).values(), strict=True):
            state = optimizer.state[one]["exp_avg"], later.state[two]["exp_avg"]
            assert torch.equal(state[0].full_tensor(), state[1].full_tensor())
        read = peft.PeftModel.from_pretrained(
            _llama_in_nf4(), tmp_path / "alone", is_trainable=True
        )
        assert all(torch.equal(w, weights[name]) for name, w in _whole(read).items())

    run_ranks(both, WORLD, ranks_per_node=2)


def test_scales_of_older_weights_are_refused_and_those_of_today_change_nothing() -> None:
    def losses(calls: str) -> list[float]:
        model = _float8(gathered=True)
        mics.shard(model, mesh=mesh_of_rank(2, 2), blocks=Block, mp_policy=FULL)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        found = []
        for step in range(3):
            for x in mics.micro_steps(model, [_batch(step, 0, dist.get_rank())]):
                loss = model(x).square().mean()
                loss.backward()
            if calls == "before":
                mics.precompute_scales(model)
            optimizer.step()
            if calls == "always" or (calls == "once" and step == 0):
                mics.precompute_scales(model)
            optimizer.zero_grad()
            found.append(float(loss.detach()))
        if calls == "always":
            with torch.no_grad():
                model.get_parameter("first.weight").mul_(2)
                for param in model.parameters():
                    param.mul_(2)
            with pytest.raises(ShardError, match="was written after its scale had been"):
                model(x)
        return found

    def rank() -> None:
        assert losses("never") == losses("always")
        for calls in ("once", "before"):
            with pytest.raises(ShardError) as raised:
                losses(calls)
            assert "gathered by the scale of its old values" in str(raised.value)
            assert "mics.precompute_scales(model) behind every optimizer.step()" in str(
                raised.value
            )

    run_ranks(rank, 2)
