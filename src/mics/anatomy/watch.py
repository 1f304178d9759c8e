"""One forward and backward of a model on the meta device: what it computes and what it keeps.

Nothing is computed and no weight exists. Every operator is seen once, with the bytes it reads and
writes and the FLOPs of its products, and the bytes alive before, during and after each unit's part
of the pass are counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from mics import compat
from mics.anatomy.attention import FusedAttention
from mics.anatomy.products import flops_of, run_on_meta
from mics.anatomy.trace import ROOT, Operator, Pass, Segment, Trace
from mics.compat import TorchDispatchMode, tree_leaves, tree_map
from mics.errors import PlanError


def trace(model: nn.Module, blocks: Sequence[nn.Module], loss: Callable[[], torch.Tensor]) -> Trace:
    """Run one micro-step on the meta device.

    Attention is traced as one fused kernel, see ``FusedAttention``.

    Args:
        model: on the meta device, its parameters in the dtype that is computed in.
        blocks: its units but the root.
        loss: a forward on inputs on the meta device, up to the number to minimise.

    Raises:
        PlanError: an operator multiplies matrices in a way nobody has counted, the loss is none, or
            blocks run in another order or more than once.
    """
    watch = _Watch(model, blocks)
    with watch.hooked(), FusedAttention(watch.saw), watch, torch.device("meta"):
        watch.enter(ROOT, "forward")
        value = loss()
        _check_loss(value)
        watch.enter(ROOT, "backward")
        torch.autograd.backward([value])
        del value
        watch.leave()
    model.zero_grad(set_to_none=True)
    watched = Trace(tuple(watch.segments), tuple(watch.block_inputs))
    _check_order(watched)
    return watched


def _check_loss(value: object) -> None:
    """Check that there is something to minimise."""
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        shape = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise PlanError(f"A loss is one number; this one is {shape}.", write=".sum() or .mean()")
    if not value.requires_grad:
        raise PlanError("Nothing is trained: the loss depends on no parameter with a gradient.")


def _check_order(trace: Trace) -> None:
    """Check that blocks run once each, in their order, as memory and time are modelled for."""
    forward = [s.unit for s in trace.segments if s.unit != ROOT and s.direction == "forward"]
    if forward != sorted(set(forward)):
        order = " ".join(map(str, forward[:12])) + (" ..." if len(forward) > 12 else "")
        raise PlanError(
            "Plans are for models whose blocks run once each, in the order they are registered.",
            numbers=f"These ran as {order}.",
            write="blocks= of a class whose instances run so, or another order of registration",
        )


@dataclass
class _Open:
    """A segment that is not over."""

    unit: int
    direction: Pass
    start: int
    peak: int
    gradients: int = 0
    operators: list[Operator] = field(default_factory=list)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator; knows whose it is and which storages are alive."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.segments: list[Segment] = []
        self.block_inputs = [0] * len(blocks)
        self._model, self._blocks = model, list(blocks)
        # Gradients of the root are reduced when the backward pass is over, and stay until then.
        self._of_blocks = {id(param) for block in blocks for param in block.parameters()}
        self._parameters = list(model.parameters())
        self._alive = 0
        self._gradients = 0
        self._alike: dict[tuple[Operator, ...], tuple[Operator, ...]] = {}
        self._counted: set[int] = set()  # parameters with a gradient
        self._having: list[torch.Tensor] = []  # parameters of blocks with a gradient
        self._open: _Open | None = None
        self._known = WeakIdKeyDictionary()  # storages that are counted, or are the model's
        self._entered = WeakIdKeyDictionary()  # storages that entered a block
        for tensor in [*self._parameters, *model.buffers()]:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with compat.without_torch_functions():
            return self._see(func, args, kwargs or {})

    def _see(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is compat.READ_VALUE:
            return _asked(args[0])
        result = run_on_meta(func, args, kwargs)
        read = _tensors((args, kwargs))
        written = _tensors(result)
        for tensor in read:
            _unknown(self._known, tensor)  # made before: not ours to count
        fresh = [tensor for tensor in written if _unknown(self._known, tensor)]
        for tensor in fresh:
            self._born(tensor.untyped_storage())
        in_place = compat.writes_its_input(func)
        if fresh or in_place:
            self._ran(func, args, kwargs, result, read, written)
        return result

    def saw(self, flops: int, tensors: Sequence[torch.Tensor]) -> None:
        """Count one kernel that does not come through dispatch."""
        assert self._open is not None
        self._open.operators.append(Operator(flops, sum(map(_bytes, tensors))))

    def enter(self, unit: int, direction: Pass) -> None:
        """Say that what follows is a unit's."""
        self.leave()
        self._open = _Open(unit, direction, self._alive, self._alive)

    def leave(self) -> None:
        """Close the open segment; gradients of a block's parameters leave with it."""
        one = self._open
        if one is None:
            return
        for param in self._having:
            param.grad = None
            self._gradients -= _bytes(param)
            self._counted.discard(id(param))
        self._having.clear()
        operators = tuple(one.operators)
        operators = self._alike.setdefault(operators, operators)
        if operators or one.peak > one.start:
            self.segments.append(
                Segment(
                    one.unit,
                    one.direction,
                    one.start,
                    one.peak,
                    one.gradients,
                    self._alive,
                    operators,
                )
            )
        self._open = None

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Let blocks say when their part of a pass begins and ends."""
        handles: list[Any] = [self._model.register_forward_pre_hook(_cast_inputs, with_kwargs=True)]
        handles += [
            param.register_post_accumulate_grad_hook(self._accumulated)  # type: ignore[no-untyped-call]
            for param in self._parameters
            if param.requires_grad
        ]
        for number, block in enumerate(self._blocks):
            handles.append(block.register_forward_pre_hook(_cast_inputs, with_kwargs=True))
            handles.append(
                block.register_forward_pre_hook(self._on_entry(number), with_kwargs=True)
            )
            handles.append(block.register_forward_hook(self._on_exit(number)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _accumulated(self, param: torch.Tensor) -> None:
        if id(param) not in self._counted:
            self._counted.add(id(param))
            self._gradients += _bytes(param)
            if id(param) in self._of_blocks:
                self._having.append(param)

    def _on_entry(self, number: int) -> Callable[..., None]:
        def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.enter(number, "forward")
            for tensor in _tensors((args, kwargs)):
                if _unknown(self._entered, tensor):
                    self.block_inputs[number] += tensor.untyped_storage().nbytes()
                if tensor.requires_grad and tensor.grad_fn is not None:
                    _hook(tensor, lambda: self._over(number))

        return entering

    def _over(self, number: int) -> None:
        """Close a block's backward, unless the block before has begun its own."""
        if self._open is not None and self._open.unit == number:
            self.enter(ROOT, "backward")

    def _on_exit(self, number: int) -> Callable[..., None]:
        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    _hook(tensor, lambda: self.enter(number, "backward"))
            self.enter(ROOT, "forward")

        return leaving

    def _born(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._alive += size
        weakref.finalize(storage, self._died, size)
        one = self._open
        if one is not None and self._alive > one.peak:
            one.peak, one.gradients = self._alive, self._gradients

    def _died(self, size: int) -> None:
        self._alive -= size

    def _ran(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        read: list[torch.Tensor],
        written: list[torch.Tensor],
    ) -> None:
        if func in _NO_KERNEL:
            return
        self.saw(flops_of(func, args, kwargs, result), [*read, *written])


def _cast_inputs(module: nn.Module, args: Any, kwargs: Any) -> Any:
    """Cast what enters a unit to its parameters' dtype (FSDP2's ``cast_forward_inputs``)."""
    dtypes = (param.dtype for param in module.parameters() if param.is_floating_point())
    dtype = next(dtypes, None)

    def cast(value: Any) -> Any:
        floating = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.to(dtype) if floating and dtype is not None else value

    return tree_map(cast, args), tree_map(cast, kwargs)


def _asked(value: torch.Tensor) -> bool:
    """Answer a model that asks a tensor for its value.

    Models ask whether a mask hides anything, or sequences are packed: all(...) is true.

    Raises:
        ValueError: it asks for a number.
    """
    if value.dtype == torch.bool:
        return True
    raise ValueError(f"it asks a {value.dtype} tensor for its value")


_NO_KERNEL = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.new_empty.default,
}


def _hook(tensor: torch.Tensor, then: Callable[[], None]) -> None:
    """Do something when the tensor's gradient is there."""
    tensor.register_hook(lambda gradient: then())  # type: ignore[no-untyped-call]


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _unknown(known: WeakIdKeyDictionary, tensor: torch.Tensor) -> bool:
    """Tell whether a tensor's storage is new; it is known from now on."""
    storage = tensor.untyped_storage()
    if storage in known:
        return False
    known[storage] = True
    return True
