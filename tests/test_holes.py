"""The holes in accumulating gradients under FSDP2's HSDP, and that mics has none of them.

Each test shows the hole with plain ``torch.distributed.fsdp.fully_shard`` on a 2-D mesh first, so
that it fails when torch closes it, then the same steps with mics.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from parity import quiet
from ranks import errors_of_ranks, run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp import fully_shard as torch_fully_shard

import mics
from mics import compat

WIDTH = 8


class Branches(nn.Module):
    """Two equal blocks and a head; each forward says which of them it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(WIDTH, WIDTH, bias=False)
        self.b = nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor, uses: str = "ab") -> torch.Tensor:
        for name in uses:
            x = getattr(self, name)(x)
        return self.head(x)


def _model() -> Branches:
    torch.manual_seed(0)
    return Branches()


def _data(step: int) -> torch.Tensor:
    """All ranks' micro-batches of one micro-step: [world, rows, width]."""
    return torch.randn(4, 2, WIDTH, generator=torch.Generator().manual_seed(step))


def _sharded(fully_shard: Callable[..., Any], *, one_unit: bool = False, **keywords: Any) -> Any:
    """On 4 ranks: 2 replicas of a partition of 2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = _model()
    if not one_unit:
        for block in (model.a, model.b):
            fully_shard(block, mesh=mesh, **keywords)
    return fully_shard(model, mesh=mesh, **keywords)


def _backward(model: Any, step: int, uses: str = "ab") -> None:
    (model(_data(step)[dist.get_rank()], uses).float() ** 2).mean().backward()


def _gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: None if p.grad is None else _full(p.grad) for name, p in model.named_parameters()}


def _full(gradient: Any) -> torch.Tensor:
    return (gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient).clone()


def _alone(*micro_steps: tuple[int, str]) -> dict[str, torch.Tensor | None]:
    """The gradients of one process over the same micro-steps."""
    model = _model()
    for step, uses in micro_steps:
        (model(_data(step).flatten(0, 1), uses) ** 2).mean().backward()
    return _gradients(model)


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(
        (a[n] is None) == (b[n] is None)
        and (a[n] is None or torch.allclose(a[n], b[n], rtol=1e-5, atol=1e-7))
        for n in a
    )


def _two_hops_by_hand(model: Any, *micro_steps: tuple[int, str]) -> None:
    """What FSDP2's documentation says: all-reduce on the last micro-step only."""
    for i, (step, uses) in enumerate(micro_steps):
        model.set_requires_all_reduce(i == len(micro_steps) - 1)
        _backward(model, step, uses)


def _two_hops(model: Any, *micro_steps: tuple[int, str]) -> None:
    for step, uses in mics.micro_steps(model, micro_steps):
        _backward(model, step, uses)


def _in_ranks(function: Callable[[], Any]) -> Any:
    return run_ranks(_quietly, 4, function)[0]


def _quietly(function: Callable[[], Any]) -> Any:
    return quiet(function)


# -- a ---------------------------------------------------------------------------------------------


def _hole_a() -> None:
    for fully_shard, leaks in ((torch_fully_shard, True), (mics.fully_shard, False)):
        model = _sharded(fully_shard)
        model.set_requires_all_reduce(False)
        _backward(model, step=1)
        model.zero_grad()  # the step is given up
        model.set_requires_all_reduce(True)
        _backward(model, step=2)
        assert _same(_gradients(model), _alone((2, "ab"))) != leaks, fully_shard.__module__


def test_hole_a_a_zeroed_partial_gradient_does_not_leak_into_the_next_step() -> None:
    _in_ranks(_hole_a)


# -- b ---------------------------------------------------------------------------------------------


def _hole_b() -> None:
    steps = ((1, "ab"), (2, "a"))  # b has no part in the last micro-step
    model = _sharded(torch_fully_shard)
    _two_hops_by_hand(model, *steps)
    assert model.b.weight.grad is None, "torch now keeps the gradient of an unused block"

    for run in (_two_hops, _two_hops_by_hand):
        model = _sharded(mics.fully_shard)
        run(model, *steps)
        assert _same(_gradients(model), _alone(*steps))


def test_hole_b_a_block_unused_in_the_last_micro_step_keeps_its_gradient() -> None:
    _in_ranks(_hole_b)


# -- c, d ------------------------------------------------------------------------------------------


def _hole_c() -> None:
    steps = ((1, "ab"), (2, "a"))  # one unit: three parameters with gradients, then two
    model = _sharded(torch_fully_shard, one_unit=True)
    with pytest.raises(RuntimeError, match="size of tensor"):
        _two_hops_by_hand(model, *steps)
    dist.barrier()

    model = _sharded(mics.fully_shard, one_unit=True)
    _two_hops(model, *steps)
    assert _same(_gradients(model), _alone(*steps))


def test_hole_c_the_parameters_in_use_may_change_between_micro_steps() -> None:
    _in_ranks(_hole_c)


def _hole_d() -> None:
    steps = ((1, "a"), (2, "b"))  # equal sizes: torch cannot tell a's gradient from b's
    model = _sharded(torch_fully_shard, one_unit=True)
    _two_hops_by_hand(model, *steps)
    torch_gradients = _gradients(model)
    assert torch_gradients["a.weight"] is None and torch_gradients["b.weight"] is not None
    assert not _same(torch_gradients, _alone(*steps))

    model = _sharded(mics.fully_shard, one_unit=True)
    _two_hops(model, *steps)
    assert _same(_gradients(model), _alone(*steps))


def test_hole_d_gradients_of_equal_size_are_never_swapped() -> None:
    _in_ranks(_hole_d)


# -- e ---------------------------------------------------------------------------------------------


def _hole_e() -> str:
    model = _sharded(torch_fully_shard)
    model.set_requires_all_reduce(False)
    _backward(model, step=1)
    assert all(p.grad is None for p in model.parameters())  # nowhere a checkpoint could find it
    model.state_dict()

    model = _sharded(mics.fully_shard)
    message = ""
    for index, step in enumerate(mics.micro_steps(model, [1, 2])):
        if index == 1:
            assert all(p.grad is not None for p in model.parameters())
            with pytest.raises(mics.MicroStepError) as error:
                model.state_dict()
            message = str(error.value)
            model.eval()
            with torch.no_grad():
                model(_data(9)[dist.get_rank()])
            model.train()
        _backward(model, step)
    assert _same(_gradients(model), _alone((1, "ab"), (2, "ab")))
    model.state_dict()  # after the loop
    return message


def test_hole_e_a_checkpoint_between_micro_steps_is_refused_and_evaluation_changes_nothing() -> (
    None
):
    message = _in_ranks(_hole_e)
    assert "state_dict() was called between micro-steps" in message
    assert "1 micro-step(s) of this step have run" in message
    assert "Write: save after the loop" in message


# -- f ---------------------------------------------------------------------------------------------


def _hole_f() -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model = _sharded(torch_fully_shard, one_unit=True, mp_policy=policy)
    model.set_requires_gradient_sync(False)
    _backward(model, 1, "a")  # kept unsharded, in fp32
    model.set_requires_gradient_sync(True)
    with (
        pytest.raises(AssertionError, match="uniform gradient dtype"),
        warnings.catch_warnings(),
    ):
        _backward(model, 2, "ab")  # b's gradient is bf16
    dist.barrier()

    model = _sharded(mics.fully_shard, one_unit=True, mp_policy=policy)
    _two_hops(model, (1, "a"), (2, "ab"))
    for name, gradient in _gradients(model).items():
        assert gradient is not None and gradient.dtype == torch.float32
        exact = _alone((1, "a"), (2, "ab"))[name]
        assert torch.allclose(gradient, exact, rtol=0.05, atol=0.02 * exact.abs().max().item())


def test_hole_f_mixed_precision_accumulates_when_the_parameters_in_use_change() -> None:
    _in_ranks(_hole_f)


# -- g ---------------------------------------------------------------------------------------------


def _hole_g() -> dict[str, str]:
    # Plain FSDP2: the loop ends before anyone knew that this micro-step was the last.
    model = _sharded(torch_fully_shard)
    model.set_requires_all_reduce(False)
    _backward(model, step=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.a.weight.full_tensor().clone()
    optimizer.step()
    assert torch.equal(model.a.weight.full_tensor(), before)  # the step did nothing, silently

    # An iterable without a length, and an exception in the middle.
    model = _sharded(mics.fully_shard)
    _two_hops(model, *((i, "ab") for i in range(1, 4)))
    assert _same(_gradients(model), _alone((1, "ab"), (2, "ab"), (3, "ab")))
    for step in mics.micro_steps(model, itertools.takewhile(lambda n: n < 3, itertools.count(1))):
        if step == 1:
            model.zero_grad()
        _backward(model, step)
    assert _same(_gradients(model), _alone((1, "ab"), (2, "ab")))

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    optimizer.zero_grad()
    for step in mics.micro_steps(model, [1, 2, 3]):
        _backward(model, step)
        if step == 2:
            break
    with pytest.raises(mics.MicroStepError) as left_early:
        optimizer.step()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _two_hops(model, (5, "ab"))
    assert _same(_gradients(model), _alone((5, "ab"))), "gradients of a left step leaked"

    optimizer.zero_grad()
    with pytest.raises(ZeroDivisionError):
        for step in mics.micro_steps(model, [1, 2]):
            _backward(model, step)
            raise ZeroDivisionError
    optimizer.zero_grad()
    _two_hops(model, (6, "ab"), (7, "ab"))
    assert _same(_gradients(model), _alone((6, "ab"), (7, "ab")))
    optimizer.step()

    optimizer.zero_grad()
    with pytest.raises(mics.MicroStepError) as none_given:
        list(mics.micro_steps(model, []))
    return {
        "left early": str(left_early.value),
        "dropped": str(caught[0].message),
        "none": str(none_given.value),
    }


def test_hole_g_unknown_length_exceptions_and_early_exits_lose_or_leak_nothing() -> None:
    messages = _in_ranks(_hole_g)
    assert "optimizer.step() was called before the last micro-step" in messages["left early"]
    assert "(2 replicas)" in messages["left early"]
    assert "optimizer.zero_grad()" in messages["left early"]
    assert "left in its micro-step 2" in messages["dropped"]
    assert "micro_steps was given no micro-batch" in messages["none"]


def _abandoned_forward() -> None:
    """An exception inside forward leaves FSDP2 unsharded; the next step must start from rest."""

    class Fails(Branches):
        fail = True

        def forward(self, x: torch.Tensor, uses: str = "ab") -> torch.Tensor:
            x = self.a(x)
            if self.fail:
                raise ZeroDivisionError
            return self.head(self.b(x))

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    torch.manual_seed(0)
    model = Fails()
    for module in (model.a, model.b, model):
        mics.fully_shard(module, mesh=mesh)
    with pytest.raises(ZeroDivisionError):
        for step in mics.micro_steps(model, [1, 2]):
            _backward(model, step)
    model.fail = False
    _two_hops(model, (1, "ab"), (2, "ab"))
    assert _same(_gradients(model), _alone((1, "ab"), (2, "ab")))


def test_an_exception_inside_forward_does_not_spoil_the_next_step() -> None:
    _in_ranks(_abandoned_forward)


# -- h ---------------------------------------------------------------------------------------------


def _hole_h() -> None:
    for fully_shard, hidden in ((torch_fully_shard, True), (mics.fully_shard, False)):
        model = _sharded(fully_shard)
        model.set_requires_all_reduce(False)
        _backward(model, step=1)
        partial = [
            group._partial_reduce_output is not None
            for module in (model.a, model.b, model)
            for group in compat.param_groups(module)
        ]
        assert partial == [hidden] * 3


def test_hole_h_no_partial_reduction_hides_inside_fsdp2() -> None:
    """Manual finalization (torch 2.15) refuses partial HSDP reductions; mics never has any."""
    _in_ranks(_hole_h)


# -- i ---------------------------------------------------------------------------------------------


def _hole_i() -> str:
    model = _sharded(torch_fully_shard)
    model.set_requires_gradient_sync(False)  # what pipeline schedules do per micro-batch
    _backward(model, step=1)
    (group,) = compat.param_groups(model.a)
    kept = group.fsdp_params[0]._unsharded_param.grad
    assert kept.numel() == WIDTH * WIDTH  # the whole gradient, not 1/2 of it

    model = _sharded(mics.fully_shard)
    model.set_requires_gradient_sync(False)
    with pytest.raises(mics.MicroStepError) as error:
        mics.micro_steps(model, [1])
    model.set_requires_gradient_sync(True)
    _two_hops(model, (1, "ab"), (2, "ab"))
    return str(error.value)


def test_hole_i_keeping_unsharded_gradients_is_refused_with_their_size() -> None:
    message = _in_ranks(_hole_i)
    assert "set_requires_gradient_sync(False) is in force" in message
    assert f"3 group(s), {3 * WIDTH * WIDTH * 4 / 2**20:.2f} MiB of unsharded gradients" in message


# -- the schedule ----------------------------------------------------------------------------------


def _count_calls() -> dict[tuple[int, str], int]:
    model = _sharded(mics.fully_shard)
    _two_hops(model, (1, "ab"), (2, "ab"), (3, "ab"))
    counts = mics.ledger(model).traffic().counts
    return {(key.hop, key.collective): count.calls for key, count in counts.items()}


def test_three_micro_steps_of_three_groups_are_9_reduce_scatters_and_3_all_reduces() -> None:
    calls = _in_ranks(_count_calls)
    assert calls[1, "reduce_scatter"] == 9
    assert calls[2, "all_reduce"] == 3


def _accumulate_without_micro_steps() -> tuple[list[str], bool]:
    model = _sharded(mics.fully_shard)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2, 3):
            _backward(model, step)
    right = _same(_gradients(model), _alone((1, "ab"), (2, "ab"), (3, "ab")))
    return [str(w.message) for w in caught if w.category is mics.MicsWarning], right


def test_accumulating_without_micro_steps_is_right_and_warns_once_with_the_cost() -> None:
    messages, right = _in_ranks(_accumulate_without_micro_steps)
    assert right
    (message,) = messages
    assert "Hop 2 runs more than once a step: in every backward of a model that" in message
    assert "MiB per rank" in message and "torch.nn.ModuleList([a, b])" in message


def _zero_in_place() -> list[str]:
    model = _sharded(mics.fully_shard)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2):
            model.zero_grad(set_to_none=False)
            _backward(model, step)
    assert _same(_gradients(model), _alone((2, "ab")))
    return [str(w.message) for w in caught if w.category is mics.MicsWarning]


def test_gradients_zeroed_in_place_are_no_accumulation() -> None:
    assert _in_ranks(_zero_in_place) == []


def _optimizer_in_backward() -> str:
    model = _sharded(mics.fully_shard)
    model.a.weight.register_post_accumulate_grad_hook(lambda p: None)
    with pytest.raises(mics.MicroStepError) as error:
        _backward(model, 1)
    return str(error.value)


def test_hooks_that_would_see_gradients_before_hop_2_are_refused() -> None:
    message = _in_ranks(_optimizer_in_backward)
    assert "would see the gradient before hop 2" in message
    assert "a.weight" in message or "weight" in message


def _nested() -> str:
    model = _sharded(mics.fully_shard)
    outer = mics.micro_steps(model, [1, 2])
    _backward(model, next(outer))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _two_hops(model, (1, "ab"))
    with pytest.raises(mics.MicroStepError) as error:
        next(outer)
    return str(error.value)


def test_two_open_steps_on_one_model_are_refused() -> None:
    assert "Another micro_steps began on this model" in _in_ranks(_nested)


# -- normalisation ---------------------------------------------------------------------------------


def _by_tokens() -> None:
    """Rank r and micro-step s hold different numbers of tokens; the mean is over all of them."""
    rank = dist.get_rank()
    rows = [[1, 2, 3, 4], [4, 1, 1, 2]]
    data = [
        [
            torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(10 * s + r))
            for r, n in enumerate(row)
        ]
        for s, row in enumerate(rows)
    ]
    alone = _model()
    everything = torch.cat([x for micro in data for x in micro])
    ((alone(everything) ** 2).sum() / len(everything)).backward()
    model = _sharded(mics.fully_shard)
    for factor in (None, 0.5):  # what else divides them makes no difference
        for module in (model.a, model.b, model):
            if factor is not None:
                module.set_force_sum_reduction_for_comms(True)  # Gloo has no other with a factor
                module.set_gradient_divide_factor(factor)
        for x in mics.micro_steps(model, [micro[rank] for micro in data], normalise=len):
            (model(x) ** 2).sum().backward()
        assert _same(_gradients(model), _gradients(alone)), factor
        model.zero_grad()

    with pytest.raises(mics.MicroStepError, match="is not a choice"):
        mics.micro_steps(model, [1], normalise="tokens")


def _factor_alone() -> None:
    model = _sharded(mics.fully_shard)
    model.set_gradient_divide_factor(0.5)
    _backward(model, 1)


def test_a_divide_factor_that_gloo_has_no_reduction_for_is_refused_in_our_words() -> None:
    for said in errors_of_ranks(_factor_alone, 4):
        assert "ShardError" in said and "set_force_sum_reduction_for_comms(True)" in said


def test_loss_can_be_normalised_by_the_tokens_of_all_ranks_and_micro_steps() -> None:
    _in_ranks(_by_tokens)


def _steps_too_early(partition: int) -> dict[str, str]:
    """What optimizer.step() says in the last micro-step, after a break, and after a new start."""
    mesh = mics.init_mesh(partition=partition)
    said = {}
    for normalise in (None, "micro_steps"):
        for when in ("in the first", "in the last", "after a break in the last"):
            model = _model()
            mics.fully_shard(model, mesh=mesh)  # one unit, the root
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            with torch.no_grad():  # leaves the root unsharded, other parameters on its modules
                model(_data(1)[0], "ab")
            try:
                for i, batch in enumerate(
                    mics.micro_steps(model, [1, 2], normalise=normalise)  # type: ignore[arg-type]
                ):
                    _backward(model, batch)
                    if when == ("in the first", "in the last")[i]:
                        optimizer.step()
                    if i == 1 and "break" in when:
                        break
                optimizer.step()
                said[f"{when}, {normalise}"] = ""
            except mics.MicroStepError as error:
                said[f"{when}, {normalise}"] = str(error)
            optimizer.zero_grad()
            _backward(model, 3)  # no micro_steps: a gradient that owes nothing to the step left
            optimizer.step()
    return said


@pytest.mark.parametrize("partition", [2, 4])
@pytest.mark.filterwarnings("ignore::mics.MicsWarning")
def test_an_optimizer_step_before_gradients_are_complete_and_normalised_is_refused(
    partition: int,
) -> None:
    said = run_ranks(_quietly, 4, functools.partial(_steps_too_early, partition))[0]
    for normalise in ("None", "micro_steps"):
        assert "optimizer.step() was called before the l" in said.pop(f"in the first, {normalise}")
    for when in ("in the last", "after a break in the last"):
        assert said.pop(f"{when}, None") == ""  # nothing is to come
        text = said.pop(f"{when}, micro_steps")
        assert "its gradients are not normalised yet" in text and "1 micro-step(s)" in text
    assert not said


def _evaluate_before_the_optimizer() -> None:
    """FSDP2 leaves the root unsharded after an evaluation; its next forward uses those weights."""
    for whole in (torch_fully_shard, mics.fully_shard):
        model = _sharded(whole)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        _backward(model, step=1)
        with torch.no_grad():
            model(_data(1)[0], "ab")
        optimizer.step()
        optimizer.zero_grad()
        if whole is torch_fully_shard:
            used = model(_data(2)[0], "ab").detach()
        else:
            ledger = mics.ledger(model)
            ledger.reset()
            for _ in mics.micro_steps(model, [1]):
                output = model(_data(2)[0], "ab")
                (output**2).mean().backward()
            used = output.detach()
            assert ledger.traffic() == mics.predict_traffic(model)
        model.reshard()
        with torch.no_grad():
            fresh = model(_data(2)[0], "ab")
        assert torch.equal(used, fresh) == (whole is mics.fully_shard), whole.__module__


def test_an_evaluation_before_the_optimizer_step_leaves_no_old_weights_behind() -> None:
    _in_ranks(_evaluate_before_the_optimizer)


def _normalised_in_bf16() -> None:
    mesh = mics.init_mesh(partition=2, gpus_per_node=2)
    model = mics.fully_shard(nn.Linear(8, 8).bfloat16(), mesh=mesh)
    seen = []
    for normalise in (None, lambda _: 7):
        for x in mics.micro_steps(model, [torch.ones(2, 8).bfloat16()], normalise=normalise):
            model(x).square().sum().backward()
        seen.append(_full(model.weight.grad))
        model.zero_grad()
    # Of the mean over 4 ranks, per token of 4 x 7. The factor itself is no bf16 number.
    assert torch.equal(seen[1], (seen[0].double() * (4 / 28)).bfloat16())


def test_normalising_bf16_gradients_rounds_once() -> None:
    _in_ranks(_normalised_in_bf16)
