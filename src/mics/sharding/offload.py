"""Activations on the host: what a block saves for its backward leaves the device until then.

[Note: what leaves]
Autograd offers every tensor that a block saves (``saved_tensors_hooks``). Its whole storage leaves,
once for all views of one tensor, however many operators save them, in one block or in two. Tensors
that share a storage and are no views of one (``unsafe_chunk``, in cells of an LSTM) have counters
of writes of their own, so that nothing tells whether a copy made for one is new enough for another:
each has its own. What stays:

- parameters, whole or sharded, views of them, and buffers: FSDP2 frees a whole parameter by
  emptying its storage, and fills the same storage again for backward, so a view of it that is saved
  costs nothing, and a copy would be of memory that is not the graph's;
- small storages, which would take longer to ask for than to keep;
- tensors that are no plain memory, or whose values are not those in memory.

With checkpointing nothing but a block's inputs is saved (those given by position; torch keeps those
given by name itself), and they leave the same way. What a recomputed forward saves is used at once
and stays. Copies run one block behind forward and one block ahead of backward, so that a device
holds what two blocks have saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from mics import compat
from mics.errors import ShardError
from mics.sharding.host_copies import Copy, Lanes, View, Visit, refuse_written

SMALLEST = 1 << 16
"""Bytes of a storage that leaves: at 25 GB/s it takes as long as starting its copy does."""

_ATTRIBUTE = "_mics_offload"


class Offload:
    """What the blocks of one model have on the host; bytes.

    Args:
        model: the root.
        blocks: whose activations leave.
        device: where they compute.

    Attributes:
        copied_bytes: that have left since the beginning.
        stayed_bytes: of saved storages that stayed since, weights and buffers left out.
        host_bytes: on the host now.
        most_host_bytes: the most there ever were.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device) -> None:
        self.copied_bytes = self.stayed_bytes = self.host_bytes = self.most_host_bytes = 0
        self._lanes = Lanes(device)
        self._device_type = device.type
        inside = {module for block in blocks for module in block.modules()}
        self._around = [module for module in model.modules() if module not in inside]
        self._within = {block: list(block.modules()) for block in blocks}
        self._nested: list[nn.Module] = []
        self._weights: set[int] = set()
        self._open: list[tuple[nn.Module, saved_tensors_hooks]] = []
        self._visit: Visit | None = None
        self._known = WeakIdKeyDictionary()  # tensors that left, views of them too, and the copy
        self._stayed = WeakIdKeyDictionary()
        for block in blocks:
            # Behind FSDP2's hook, which gathers, and ahead of checkpointing's, which saves inputs.
            block.register_forward_pre_hook(compat.outside_graphs(self._enter))
            block.register_forward_hook(
                compat.outside_graphs(self._leave), prepend=True, always_call=True
            )
        setattr(model, _ATTRIBUTE, self)

    def _enter(self, block: nn.Module, args: Any) -> None:
        if compat.in_backward() or not torch.is_grad_enabled():
            return
        modules = [*self._around, *self._within[block]]
        self._weights = _memory_of(modules)
        self._nested = [m for m in self._within[block] if m is not block and compat.param_groups(m)]
        self._visit = Visit(self._visit)
        hooks = saved_tensors_hooks(self._pack, self._unpack)
        hooks.__enter__()
        self._open.append((block, hooks))

    def _leave(self, block: nn.Module, args: Any, output: Any = None) -> None:
        if compat.in_backward() or not self._open or self._open[-1][0] is not block:
            return
        self._open.pop()[1].__exit__(None, None, None)
        assert self._visit is not None
        self._lanes.end(self._visit)

    def _pack(self, tensor: torch.Tensor) -> Any:
        with torch.no_grad():
            local = compat.local_of(tensor)
            if not self._may_leave(local):
                return tensor, compat.times_written(tensor)
            copy = self._copy_of(tensor)
        spec = (tensor.device_mesh, tensor.placements) if isinstance(tensor, DTensor) else None
        whole = (tensor.shape, tensor.stride()) if spec else None
        return copy, self._visit, View(local), spec, whole

    def _unpack(self, packed: Any) -> torch.Tensor:
        if len(packed) == 2:  # it stayed; autograd does not look at what hooks have given it
            tensor, written = packed
            refuse_written(tensor, written)
            return tensor  # type: ignore[no-any-return]
        copy, visit, view, spec, whole = packed
        self._lanes.begin(visit)
        local: torch.Tensor = copy.view(view)
        if spec is None:
            return local
        with torch.no_grad():
            mesh, placements = spec
            return DTensor.from_local(
                local, mesh, placements, run_check=False, shape=whole[0], stride=whole[1]
            )

    def _may_leave(self, tensor: torch.Tensor) -> bool:
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.device.type != self._device_type:
            return False
        if tensor.is_conj() or tensor.is_neg():
            return False
        storage = tensor.untyped_storage()
        memory = storage.data_ptr()
        if memory in self._weights or memory in _memory_of(self._nested):
            return False
        if storage.nbytes() >= SMALLEST:
            return True
        if storage not in self._stayed:
            self._stayed[storage] = True
            self.stayed_bytes += storage.nbytes()
        return False

    def _copy_of(self, tensor: torch.Tensor) -> Copy:
        """The copy of a tensor's storage as it is now, made where there is none."""
        viewed, written = compat.viewed(tensor), compat.times_written(tensor)
        assert self._visit is not None
        ref, of = self._known.get(viewed, (None, -1))  # type: ignore[no-untyped-call]
        copy: Copy | None = ref() if ref is not None and of == written else None
        if copy is None:
            copy = Copy(tensor, self._lanes)
            self._known[viewed] = (weakref.ref(copy), written)
            self._count(copy.num_bytes)
            weakref.finalize(copy, self._forget, copy.num_bytes)
        self._visit.add(copy)
        return copy

    def _count(self, num_bytes: int) -> None:
        self.copied_bytes += num_bytes
        self.host_bytes += num_bytes
        self.most_host_bytes = max(self.most_host_bytes, self.host_bytes)

    def _forget(self, num_bytes: int) -> None:
        self.host_bytes -= num_bytes


def offload_of(model: nn.Module) -> Offload | None:
    """What a model's blocks have on the host; ``None`` where activations stay."""
    found: Offload | None = getattr(model, _ATTRIBUTE, None)
    return found


def refuse_offload(model: nn.Module) -> None:
    """Refuse what cannot be told from weights, before anything is changed.

    Raises:
        ShardError: there is a parameter that says itself what is gathered of it.
    """
    for name, param in model.named_parameters():
        if compat.has_gather_hook(param):
            raise ShardError(
                f"{name} says itself what is gathered of it, so that what its operators save "
                "cannot be told from weights, which must not leave the device.",
                numbers=f"Its tensor is of type {type(compat.local_of(param)).__name__}.",
                write="activation_offload=False",
            )


def _memory_of(modules: Iterable[nn.Module]) -> set[int]:
    """Where parameters, those that FSDP2 has gathered, and buffers of modules are now."""
    found = set()
    for module in modules:
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        for group in compat.param_groups(module):
            held += compat.gathered_params(group)
        found |= {compat.local_of(one).untyped_storage().data_ptr() for one in held}
    return found - {0}
