"""What a trace on the meta device sees: FLOPs, bytes, what is kept; it leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from mics.anatomy.anatomy import Anatomy
from mics.anatomy.products import flops_of
from mics.anatomy.trace import ROOT, Trace, between
from mics.anatomy.trace_cache import TraceCache
from mics.anatomy.watch import trace
from mics.errors import PlanError
from mics.planning.subject import subject

ROWS, WIDTH, INNER = 6, 8, 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER, bias=False)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.down(torch.relu(self.up(x)))
        return hidden


class Stack(nn.Module):
    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


def run(model: Any, micro_batch: int, sequence: int) -> torch.Tensor:
    x = torch.zeros(micro_batch * sequence, WIDTH, device="meta")
    loss: torch.Tensor = model(x).sum()
    return loss


def stack_trace(rows: int = ROWS) -> Trace:
    with torch.device("meta"):
        model = Stack()
    return trace(model, list(model.blocks), lambda: run(model, 1, rows))


def test_flops_are_those_of_the_products() -> None:
    made = stack_trace()
    product = 2 * ROWS * WIDTH * INNER
    forward = [s for s in made.segments if s.direction == "forward" and s.unit != ROOT]
    backward = [s for s in made.segments if s.direction == "backward" and s.unit != ROOT]
    assert [s.unit for s in forward] == [0, 1, 2]
    assert [s.unit for s in backward] == [2, 1, 0]
    assert {sum(op.flops for op in s.operators) for s in forward} == {2 * product}
    assert {sum(op.flops for op in s.operators) for s in backward} == {4 * product}
    root = 2 * ROWS * WIDTH * WIDTH
    assert made.flops("forward") == 6 * product + root
    # The input wants no gradient, so the first layer's backward is one product only.
    assert made.flops("backward") == 12 * product + root


def test_experts_compute_what_their_rows_need() -> None:
    """Products of groups of rows: two experts a token is twice the FLOPs of one, of four too."""
    import transformers

    def flops(experts: int, chosen: int) -> int:
        config = transformers.MixtralConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_local_experts=experts,
            num_experts_per_tok=chosen,
            vocab_size=128,
        )
        made = subject(config).trace(1, 64)
        return made.flops("forward") + made.flops("backward")

    of_one = 2 * 3 * (3 * 2 * 64 * 64 * 128)  # layers, passes, three products of 64 tokens
    router = 2 * 3 * (2 * 64 * 64)  # per expert
    assert flops(4, 2) - flops(4, 1) == of_one
    assert flops(8, 1) - flops(4, 1) == 4 * router


@torch.library.custom_op("mics_tests::matmul_of_ones_own", mutates_args=())
def matmul_of_ones_own(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x @ y


@matmul_of_ones_own.register_fake
def _(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], y.shape[1])


def test_a_product_nobody_counts_is_refused() -> None:
    class Own(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(matmul_of_ones_own(x.detach(), self.up.weight.detach().T))

    with torch.device("meta"):
        model = nn.Sequential(Own(), Own())
    with pytest.raises(PlanError, match=r"FLOPs mics_tests.matmul(.|\n)*register_flop_formula"):
        Anatomy(model, run, blocks=Own).trace(1, ROWS)


def test_products_with_vectors_are_counted() -> None:
    a, x = torch.zeros(3, 5), torch.zeros(5)
    aten = torch.ops.aten
    assert flops_of(aten.mv.default, (a, x), {}, a @ x) == 2 * 15
    assert flops_of(aten.dot.default, (x, x), {}, x @ x) == 2 * 5
    b, c = torch.zeros(4, 3, 5), torch.zeros(4, 5, 2)
    assert flops_of(aten.addbmm.default, (torch.zeros(3, 2), b, c), {}, None) == 2 * 4 * 3 * 5 * 2
    assert flops_of(aten.relu.default, (x,), {}, x) == 0


def test_a_block_keeps_what_its_backward_needs() -> None:
    forward = [s for s in stack_trace().segments if s.direction == "forward" and s.unit == 1]
    # relu's output is kept for relu and for the second layer, once; the block's output goes on.
    assert forward[0].end - forward[0].start == 4 * ROWS * (INNER + WIDTH)


def test_gradients_of_parameters_are_in_the_peak_and_gone_at_the_end() -> None:
    made = stack_trace()
    weights = 4 * 2 * WIDTH * INNER
    for segment in made.segments:
        if segment.direction == "backward" and segment.unit != ROOT:
            assert 0 < segment.gradients <= weights
            assert segment.end < segment.start
    # Only the root's gradient is left: it is reduced when the backward pass is over.
    assert made.segments[-1].unit == ROOT
    assert made.segments[-1].end == 4 * WIDTH * WIDTH


def test_what_enters_a_block_is_counted_once() -> None:
    assert stack_trace().block_inputs == (4 * ROWS * WIDTH,) * 3


def test_a_trace_leaves_no_gradients_and_no_hooks() -> None:
    with torch.device("meta"):
        model = Stack()
    trace(model, list(model.blocks), lambda: run(model, 1, ROWS))
    assert all(p.grad is None for p in model.parameters())
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.blocks)
    again = trace(model, list(model.blocks), lambda: run(model, 1, ROWS))
    assert again == stack_trace()


class Attention(nn.Module):
    causal, grouped = True, False

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.q(x).view(1, -1, 2, WIDTH // 2).transpose(1, 2)
        key = query[:, :1] if self.grouped else query
        attended = functional.scaled_dot_product_attention(
            query, key, key, is_causal=self.causal, enable_gqa=self.grouped
        )
        return attended.transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("grouped", [False, True])
def test_attention_is_one_kernel_without_a_score_matrix(grouped: bool) -> None:
    rows, seen = 512, {}
    for causal in (False, True):
        with torch.device("meta"):
            model = nn.Sequential(Attention(), Attention())
        for layer in model:
            layer.causal, layer.grouped = causal, grouped  # type: ignore[assignment]
        seen[causal] = trace(model, list(model), lambda model=model: run(model, 1, rows))
    linear = 2 * rows * WIDTH * WIDTH
    for causal, made in seen.items():
        scores = 4 * rows * rows * WIDTH // (2 if causal else 1)
        assert made.flops("forward") == 2 * (linear + scores)
        largest = max(s.peak for s in made.segments)
        assert largest < 4 * rows * rows  # not even one head's scores


@pytest.mark.parametrize("need_weights", [False, True])
def test_attention_of_torchs_own_layers_is_fused_unless_weights_are_wanted(
    need_weights: bool,
) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            attended, _ = self.attention(x, x, x, need_weights=need_weights)
            result: torch.Tensor = attended
            return result

    rows = 512
    with torch.device("meta"):
        model = nn.Sequential(Layer(), Layer())
    made = trace(
        model, list(model), lambda: model(torch.zeros(1, rows, WIDTH, device="meta")).sum()
    )
    linear, scores = 4 * 2 * rows * WIDTH * WIDTH, 4 * rows * rows * WIDTH
    assert made.flops("forward") == 2 * (linear + scores)
    whole_scores = 2 * 4 * rows * rows  # of two heads, in fp32
    assert (max(s.peak for s in made.segments) > whole_scores) == need_weights


def test_layers_of_torchs_transformer_are_traced_without_score_matrices() -> None:
    rows = 1024
    with torch.device("meta"):
        model = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(WIDTH, 2, INNER, batch_first=True), 2
        )
    made = trace(
        model, list(model.layers), lambda: model(torch.zeros(1, rows, WIDTH, device="meta")).sum()
    )
    assert max(s.peak for s in made.segments) < 4 * rows * rows


def test_a_micro_batch_between_two_others_is_as_if_traced() -> None:
    two, four, eight = (stack_trace(64 * rows) for rows in (2, 4, 8))
    assert between(two, four, 3.0) == eight
    with pytest.raises(ValueError, match="zip"):
        between(two, Trace(four.segments[:-1], four.block_inputs), 3.0)


def test_an_anatomy_extrapolates_large_micro_batches() -> None:
    with torch.device("meta"):
        model = Stack()
    anatomy = Anatomy(model, run)
    direct = trace(model, list(model.blocks), lambda: run(model, 16, 99))
    assert anatomy.trace(16, 99) == direct
    assert anatomy.trace(16, 99) is anatomy.trace(16, 99)
    assert anatomy.blocks[0] is anatomy.blocks[2]  # equal units are one
    assert anatomy.num_parameters == WIDTH * WIDTH + 3 * 2 * WIDTH * INNER


def test_traces_are_kept_on_disk(tmp_path: Path) -> None:
    made, cache = stack_trace(), TraceCache("a model", tmp_path)
    assert cache.get(1, ROWS) is None
    cache.put(1, ROWS, made)
    assert cache.get(1, ROWS) == made
    assert TraceCache("another model", tmp_path).get(1, ROWS) is None
    (file,) = (tmp_path / "traces").rglob("*.json")
    file.write_text(file.read_text()[:100])
    assert cache.get(1, ROWS) is None  # half a file is none


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "traces").write_text("a file where a folder should be")
    cache = TraceCache("a model", tmp_path)
    cache.put(1, ROWS, stack_trace())
    assert cache.get(1, ROWS) is None


def test_a_users_module_keeps_its_values() -> None:
    model = Stack()
    before = {name: p.clone() for name, p in model.named_parameters()}
    anatomy = subject(model, loss=_in_bf16)
    anatomy.trace(1, ROWS)
    for name, param in model.named_parameters():
        assert param.dtype == torch.float32
        assert torch.equal(param, before[name])
        assert param.grad is None


def _in_bf16(model: Any, micro_batch: int, sequence: int) -> torch.Tensor:
    x = torch.zeros(micro_batch * sequence, WIDTH, device="meta", dtype=torch.bfloat16)
    loss: torch.Tensor = model(x).sum()
    return loss


def test_a_model_that_needs_values_is_refused() -> None:
    class Choosy(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[x.sum(1) > 0])

    with torch.device("meta"):
        model = Choosy()
    with pytest.raises(
        PlanError, match=r"Choosy does not run on the meta device(.|\n)*Micro-batch 1, sequence 4"
    ):
        Anatomy(model, run).trace(1, 4)


def test_a_number_that_nobody_knows_is_not_invented() -> None:
    class Cropping(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rows = int((x.sum(-1) > 0).sum().item())
            return super().forward(x[:rows])

    with torch.device("meta"):
        model = Cropping()
    with pytest.raises(PlanError, match=r"asks a torch.int64 tensor for its value"):
        Anatomy(model, run).trace(1, ROWS)


@pytest.mark.parametrize(
    ("order", "told"),
    [((2, 1, 0), "2 1 0"), ((0, 1, 2, 0, 1, 2), "0 1 2 0 1 2"), ((0, 0, 1), "0 0 1")],
)
def test_blocks_that_run_in_another_order_or_twice_are_refused(
    order: tuple[int, ...], told: str
) -> None:
    class Reordered(Stack):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number in order:
                x = self.blocks[number](x)
            return x

    with torch.device("meta"):
        model = Reordered()
    with pytest.raises(PlanError, match=rf"run once each, in the order(.|\n)*ran as {told}\."):
        Anatomy(model, run, blocks=Block).trace(1, ROWS)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda m, b, s: None, "A loss is one number; this one is NoneType"),
        (lambda m, b, s: m(torch.zeros(b * s, WIDTH, device="meta")), "this one is \\(6, 8\\)"),
        (lambda m, b, s: torch.zeros((), device="meta"), "Nothing is trained"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, words: str) -> None:
    with torch.device("meta"):
        model = Stack()
    with pytest.raises(PlanError, match=words):
        Anatomy(model, loss).trace(1, ROWS)


def test_blocks_that_run_sequences_one_by_one_are_traced_as_they_are() -> None:
    """Their kernels grow in number with the micro-batch, so that none can be extrapolated."""

    class OneByOne(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([super(OneByOne, self).forward(row) for row in x.split(ROWS)])

    with torch.device("meta"):
        model = Stack()
        model.blocks = nn.ModuleList(OneByOne() for _ in range(3))
    made, plain = Anatomy(model, run).trace(8, ROWS), stack_trace(8 * ROWS)
    assert made.flops("forward") == plain.flops("forward")
    kernels = sum(len(s.operators) for s in made.segments)
    assert kernels > 6 * sum(len(s.operators) for s in plain.segments)


def test_attention_of_another_kind_has_another_trace() -> None:
    """A configuration's own text does not name it, so the cache must."""
    import transformers

    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "vocab_size": 128}

    def peak(attention: str) -> int:
        config = transformers.GPT2Config(**shape, attn_implementation=attention)
        return max(s.peak for s in subject(config).trace(2, 256).segments)

    assert peak("eager") > 2 * peak("sdpa")
    assert peak("sdpa") == peak("sdpa")


def test_what_is_recomputed_are_the_blocks_not_the_head() -> None:
    made = stack_trace()
    assert made.recomputed_flops == made.flops("forward") - 2 * ROWS * WIDTH * WIDTH


def test_a_module_with_a_config_of_its_own_needs_its_loss() -> None:
    model = Stack()
    model.config = {"width": WIDTH}  # type: ignore[assignment]
    with pytest.raises(PlanError, match=r"How Stack is run is not known"):
        subject(model)


def test_a_module_nobody_knows_how_to_run_is_refused() -> None:
    words = r"How Stack is run is not known(.|\n)*Write: loss=(.|\n)*dtype=torch.bfloat16"
    with pytest.raises(PlanError, match=words):
        subject(Stack())


def test_what_enters_a_model_is_cast_as_it_will_be() -> None:
    """Inputs of a loss may be in fp32: FSDP2 casts them, and so does a trace."""
    cast = subject(Stack(), loss=run).trace(1, ROWS)
    made = subject(Stack(), loss=_in_bf16).trace(1, ROWS)
    # The first one casts; the loss holds what it gave.
    assert [s.operators for s in cast.segments[1:]] == [s.operators for s in made.segments[1:]]
    assert cast.segments[1].start == made.segments[1].start + 4 * ROWS * WIDTH
    whole = subject(Stack(), loss=run, dtype=torch.float32).trace(1, ROWS)
    assert whole.block_inputs[0] == 2 * cast.block_inputs[0]


def test_a_product_of_two_dtypes_is_refused() -> None:
    class Mixed(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) @ torch.zeros(WIDTH, WIDTH, device="meta")

    model = nn.Sequential(Mixed(), Mixed())
    anatomy = subject(model, loss=_in_bf16, blocks=Mixed)
    with pytest.raises(PlanError, match=r"tensors of torch.bfloat16 and torch.float32"):
        anatomy.trace(1, ROWS)


@pytest.mark.parametrize("name", ["bert-tiny", "roberta-tiny", "gpt2-tiny", "llama-tiny"])
def test_transformers_models_are_traced(name: str) -> None:
    anatomy = subject(name)
    made = anatomy.trace(2, 64)
    assert [s.unit for s in made.segments if s.unit != ROOT and s.direction == "forward"] == [
        *range(4)
    ]
    # 6 N per token, without embeddings that are only looked up: between the blocks' share and all.
    of_blocks = sum(unit.numel() for unit in anatomy.blocks)
    flops = made.flops("forward") + made.flops("backward")
    assert 6 * of_blocks * 128 < flops < 8 * anatomy.num_parameters * 128
