"""Whole models: blocks, partition size, meta device, memory, transformers."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from models import UnevenMLP, seeded
from parity import Stack, quiet, whole_weights
from ranks import errors_of_ranks, run_ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

import mics
from mics.anatomy.blocks import find_blocks, units_of_block
from mics.anatomy.memory import states_and_blocks
from mics.anatomy.recipe import Recipe
from mics.anatomy.sizes import Parameter, UnitSize
from mics.ranks import agreement, issuing
from mics.sharding.partition import PartitionChoice, choose_partition

# -- blocks ----------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))


class Attributes(nn.Module):
    """Blocks that are attributes, not in a container."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 4)
        self.block1, self.block2 = Attention(), Attention()


def names(model: nn.Module, **arguments: Any) -> list[str]:
    return list(find_blocks(model, **arguments))


def test_the_outermost_repeated_children_of_containers_are_blocks() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(4, 4), "layers": nn.ModuleList(Layer() for _ in range(3))}
    )
    assert names(model) == ["layers.0", "layers.1", "layers.2"]
    assert names(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))) == ["0", "2"]
    assert names(Attributes()) == ["block1", "block2"]


def test_encoder_and_decoder_are_both_found() -> None:
    model = nn.Transformer(8, 2, num_encoder_layers=2, num_decoder_layers=3, batch_first=True)
    assert len(names(model)) == 5


def test_blocks_can_be_named_by_class_module_or_predicate() -> None:
    model = nn.ModuleList(Layer() for _ in range(2))
    assert names(model, blocks=[Attention]) == ["0.attention", "1.attention"]
    assert names(model, blocks=[model[1]]) == ["1"]
    assert names(model, blocks=Attention) == names(model, blocks=[Attention])
    assert names(model, blocks=model[1]) == ["1"]
    assert names(nn.Sequential(layers := nn.ModuleList([model[0]])), blocks=layers) == ["0.0"]
    assert names(model, blocks=lambda m: isinstance(m, nn.Linear))[:2] == [
        "0.attention.q",
        "0.attention.k",
    ]


def test_a_block_that_shares_a_parameter_is_left_to_the_root() -> None:
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    layers[2].weight = layers[0].weight
    assert names(layers) == ["1"]


def test_blocks_that_all_share_a_parameter_are_refused_with_its_name() -> None:
    """In the root, all of them would be gathered at once: nothing would be saved."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(2)])
    model[1].bias = model[0].bias
    with pytest.raises(mics.ShardError) as error:
        find_blocks(model)
    assert "Every block of Sequential shares a parameter" in str(error.value)
    assert "0 and 1 share 0.bias" in str(error.value)


def test_block_names_that_do_not_occur_in_a_model_are_passed_over() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(2)])
    model._no_split_modules = ["OldName"]
    assert list(find_blocks(model)) == ["0", "1"]


def test_a_model_without_blocks_says_what_it_has_and_how_to_name_them() -> None:
    with pytest.raises(mics.ShardError) as error:
        find_blocks(Attention())
    assert "Attention has no repeated blocks" in str(error.value)
    assert "q (Linear), k (Linear), v (Linear)" in str(error.value)
    assert "blocks=[BlockClass]" in str(error.value)
    with pytest.raises(mics.ShardError, match="blocks names Layer, which does not occur"):
        find_blocks(Attention(), [Layer])


def test_a_module_of_another_dtype_becomes_a_unit_of_its_own() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).to(torch.bfloat16)
    block[1].float()
    assert units_of_block(block, set()) == [block[1], block]
    mixed = nn.Linear(8, 8)
    mixed.bias.data = mixed.bias.data.bfloat16()
    with pytest.raises(mics.ShardError, match="several dtypes"):
        units_of_block(nn.Sequential(mixed, nn.Linear(8, 8)), set())
    block = nn.Sequential(nn.Linear(8, 8))
    block.register_parameter("scale", nn.Parameter(torch.ones(8, dtype=torch.bfloat16)))
    with pytest.raises(mics.ShardError, match="Sequential itself holds parameters of") as error:
        units_of_block(block, set())
    assert "torch.bfloat16, most of what it contains is torch.float32" in str(error.value)


def _mixed_dtypes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.LayerNorm(8)) for _ in range(2)]
    )
    mics.shard(model, partition=2, gpus_per_node=2, mp_policy=MixedPrecisionPolicy(torch.bfloat16))
    model(torch.randn(2, 8)).float().sum().backward()
    dtypes = {p.dtype for p in model.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32}
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_a_model_of_two_dtypes_trains() -> None:
    run_ranks(_mixed_dtypes, 4)


# -- the partition size ----------------------------------------------------------------------------

GIB = 2**30


def test_the_smallest_partition_that_fits_is_chosen_and_explained() -> None:
    """10 B parameters of 16 bytes on 32 GB cards: 8 GPUs hold 18.6 GiB each (MiCS, section 3.2)."""
    choice = chosen(160 * 10**9, 32 * GIB, nodes=4, k=8)
    assert choice.partition == 8
    assert "smallest that fits (18.63 GiB of 32.00 GiB, 30% kept for activations)" in choice.reason
    assert "4 would need 37.25 GiB" in choice.reason
    assert chosen(240 * 10**9, 32 * GIB, nodes=4, k=8).partition == 16
    assert chosen(10**9, 32 * GIB, nodes=4, k=8).partition == 1


def chosen(state_bytes: int, device_bytes: int, *, nodes: int, k: int) -> PartitionChoice:
    return choose_partition(
        lambda p: state_bytes // p, device_bytes, nodes=nodes, gpus_per_node=k, share=0.7
    )


def test_a_model_that_fits_nowhere_says_how_many_ranks_it_needs() -> None:
    with pytest.raises(mics.ShardError) as error:
        chosen(100 * GIB, 8 * GIB, nodes=2, k=4)
    message = str(error.value)
    assert "with one replica over all 8 rank(s) each still needs 12.50 GiB" in message
    assert "Write: about 32 ranks" in message


def test_frozen_parameters_need_neither_gradients_nor_moments() -> None:
    frozen, trained = (UnitSize((Parameter((10, 10), trained),)) for trained in (False, True))
    recipe = Recipe(1, optimizer="adamw-fused", compute_bytes=4, micro_steps=2, prefetch=0)
    none = UnitSize(())
    both, alone = (states_and_blocks([u], none, recipe).total for u in (trained, frozen))
    # Itself and gathered; trained also its gradient (whole and its own), two moments.
    assert alone == 2 * 400
    assert both == (2 + 2 + 2) * 400


def _auto() -> tuple[int, ...]:
    model = mics.shard(Stack(), gpus_per_node=2)
    weight = model.first.weight
    return tuple(weight.device_mesh.shape)  # type: ignore[attr-defined]


def test_auto_takes_one_rank_for_a_model_that_fits_one() -> None:
    assert run_ranks(_auto, 4) == [(1,)] * 4


def _mesh_and_partition() -> None:
    mics.shard(Stack(), mesh=mics.init_mesh(partition=2), partition=2)


def test_mesh_and_partition_together_are_refused() -> None:
    for text in errors_of_ranks(_mesh_and_partition, 4):
        assert "mesh and partition were both given" in text


# -- everything starts equal -----------------------------------------------------------------------


def _differently_seeded(meta: bool) -> list[torch.Tensor]:
    torch.manual_seed(100 + dist.get_rank())
    with torch.device("meta" if meta else "cpu"):
        model = Stack()
    if meta:
        model.scale = torch.tensor(0.5)
    quiet(lambda: mics.shard(model, partition=2, gpus_per_node=2))
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return list(whole_weights(model).values())


@pytest.mark.parametrize("meta", [False, True])
def test_replicas_start_from_the_same_weights_whatever_the_seeds(meta: bool) -> None:
    first, *others = run_ranks(_differently_seeded, 4, meta)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    if not meta:
        torch.manual_seed(100)
        for ours, plain in zip(first, Stack().parameters(), strict=True):
            assert torch.equal(ours, plain)


def _meta_weights(partition: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    with torch.device("meta"):
        model = Stack(tied=True)
    model.scale = torch.tensor(0.5)
    quiet(lambda: mics.shard(model, partition=partition, gpus_per_node=2))
    assert model.first.weight is model.last.weight
    return whole_weights(model)


def test_meta_initialisation_does_not_depend_on_the_partition_size() -> None:
    one, two, four = (run_ranks(_meta_weights, 4, p)[0] for p in (1, 2, 4))
    for name in one:
        assert torch.equal(one[name], two[name]) and torch.equal(one[name], four[name])
        assert one[name].std() > 0
    assert not torch.equal(one["blocks.0.up.weight"], one["blocks.1.up.weight"])


class Forgotten(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.gate = nn.Parameter(torch.empty(4))


def _forgotten() -> None:
    with torch.device("meta"):
        model = Forgotten()
    mics.shard(model, partition=2)


def test_a_meta_parameter_nobody_initialises_is_named() -> None:
    for text in errors_of_ranks(_forgotten, 2):
        assert "gate was on the meta device and nothing set its values" in text
        assert "initialise=" in text


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("positions", torch.arange(4))
        self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=False)


def _integers(initialise: Any) -> list[Any]:
    with torch.device("meta"):
        model = Positions()
    model.register_buffer("real", torch.tensor(7))  # has its value: nobody need set it
    quiet(lambda: mics.shard(model, partition=2, initialise=initialise))
    return [model.positions.tolist(), model.mask.sum().item()]


def test_a_meta_buffer_of_integers_or_bools_nobody_initialises_is_named() -> None:
    """There is no integer that says "not set": zeros would train, wrongly."""
    for text in errors_of_ranks(_integers, 2, None):
        assert "positions was on the meta device and nothing set its values" in text

    def initialise(module: nn.Module) -> None:
        if isinstance(module, Positions):
            module.positions.copy_(torch.arange(4))
        elif isinstance(module, nn.Linear):
            module.reset_parameters()

    for text in errors_of_ranks(_integers, 2, initialise):
        assert "mask was on the meta device and nothing set its values" in text

    def initialise_all(module: nn.Module) -> None:
        initialise(module)
        if isinstance(module, Positions):
            module.mask = torch.ones(4, 4, dtype=torch.bool).tril()

    assert run_ranks(_integers, 2, initialise_all) == [[[0, 1, 2, 3], 10]] * 2


def _own_initialiser() -> float:
    with torch.device("meta"):
        model = Forgotten()

    @torch.no_grad()
    def initialise(module: nn.Module) -> None:
        for param in module.parameters(recurse=False):
            param.fill_(3.0)

    mics.shard(model, partition=2, initialise=initialise)
    return min(w.min().item() for w in whole_weights(model).values())


def test_an_initialiser_of_the_users_own_is_used() -> None:
    assert run_ranks(_own_initialiser, 2) == [3.0, 3.0]


# -- memory ----------------------------------------------------------------------------------------

SIDE, NUM_BLOCKS = 2048, 16  # 16 MiB a block, 256 MiB in all


class Matrix(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(SIDE, SIDE))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


def _stack_of_matrices(num_blocks: int) -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(*[Matrix() for _ in range(num_blocks)])


def _peak_resident() -> int:
    """Bytes, the high-water mark since the last reset."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) * 1024


def _materialise() -> tuple[int, int]:
    # Return freed tensors to the system at once, so that resident memory is what is in use.
    ctypes.CDLL("libc.so.6").mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    quiet(lambda: mics.shard(_stack_of_matrices(2), partition=8))  # connections, code
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _peak_resident()
    model = _stack_of_matrices(NUM_BLOCKS)
    quiet(lambda: mics.shard(model, partition=8))
    share = sum(p.to_local().nbytes for p in model.parameters())  # type: ignore[attr-defined]
    return _peak_resident() - before, share


def test_a_model_8_times_its_share_materialises_within_its_share_and_two_blocks() -> None:
    block = SIDE * SIDE * 4
    for peak, share in run_ranks(_materialise, 8):
        assert share == NUM_BLOCKS * block // 8
        print(f"peak {peak / 2**20:.1f} MiB, share {share / 2**20:.1f}")
        assert peak <= share + 2 * block, f"{peak / 2**20:.1f} MiB, share {share / 2**20:.1f}"


# -- transformers ----------------------------------------------------------------------------------


def _bert(**sizes: int) -> Any:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(BertConfig(**sizes))


def test_bert_of_the_papers_10b_shape_counts_10_08_b_parameters_in_127_blocks() -> None:
    with torch.device("meta"):
        model = _bert(
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=127,
            num_attention_heads=40,
            vocab_size=32008,
            max_position_embeddings=512,
        )
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == 10.08
    assert len(find_blocks(model)) == 127


def _transformers_model(kind: str) -> Any:
    import transformers as hf

    common = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 0}
    if kind == "bert":
        return _bert(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=96,
            max_position_embeddings=16,
        )
    if kind == "gpt2":
        config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, **common)
        config.loss_type = "ForCausalLM"
        return hf.GPT2LMHeadModel(config)
    config = hf.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        **common,
    )
    return hf.LlamaForCausalLM(config)


def _train_transformer(kind: str, partition: int) -> tuple[list[float], int]:
    torch.manual_seed(3 + dist.get_rank())
    with torch.device("meta"):
        model = _transformers_model(kind)
    model.eval()  # no dropout: ranks and partition sizes then agree to rounding
    plain = MixedPrecisionPolicy()
    quiet(lambda: mics.shard(model, partition=partition, gpus_per_node=2, mp_policy=plain))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(0, 96, (2, 12), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(3):
        for batch in mics.micro_steps(model, [tokens, tokens], normalise="micro_steps"):
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, sum(isinstance(m, FSDPModule) for m in model.modules())


# transformers' models return views, of which FSDP2 warns; nothing here edits an output in place.
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view tensor:UserWarning")
@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_transformers_models_train_from_the_meta_device(kind: str) -> None:
    one = run_ranks(_train_transformer, 4, kind, 1)
    four = run_ranks(_train_transformer, 4, kind, 4)
    for losses, units in (*one, *four):
        assert units == 3  # two blocks and the root
        assert losses == pytest.approx(one[0][0], rel=1e-5)
    assert one[0][0][-1] < one[0][0][0]


# -- what ranks compare before they shard ----------------------------------------------------------


def _comparisons(num_blocks: int, how: str) -> int:
    """All-gathers that compare the ranks of one ``shard`` call."""
    calls = 0

    def counting(*args: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        return issuing.all_gather(*args, **keywords)

    keywords: dict[str, Any] = {"gpus_per_node": 2}
    if how == "mesh":
        keywords["mesh"] = mics.init_mesh(partition=2, gpus_per_node=2)
    elif how != "auto":
        keywords["partition"] = 2
    with torch.device("meta" if how == "meta" else "cpu"):
        model = Stack(num_blocks=num_blocks)
    agreement.all_gather = counting  # this forked process only
    quiet(lambda: mics.shard(model, collectives="flat", initialise=_ones, **keywords))
    return calls


def _ones(module: nn.Module) -> None:
    for tensor in [*module.parameters(recurse=False), *module.buffers(recurse=False)]:
        nn.init.ones_(tensor)


@pytest.mark.parametrize("how", ["auto", "partition", "mesh", "meta"])
def test_ranks_compare_what_they_shard_once_for_any_number_of_blocks(how: str) -> None:
    few = run_ranks(_comparisons, 4, 2, how)
    many = run_ranks(_comparisons, 4, 30, how)
    assert few == many
    assert 0 < many[0] <= 4


def test_the_output_dtype_is_the_models_and_not_the_blocks() -> None:
    def rank() -> list[torch.dtype]:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, output_dtype=torch.float32)
        model = mics.shard(seeded(UnevenMLP), partition=1, mp_policy=policy)
        seen: list[torch.dtype] = []
        for block in model.blocks:
            block.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
        output = model(model.example(0)[0])
        return [*seen, output.dtype]

    assert run_ranks(rank, 1) == [[torch.bfloat16, torch.bfloat16, torch.float32]]
