"""A module's parameters are the sharded ones between passes, whatever FSDP2 keeps gathered.

[Note: parameters at rest]
FSDP2 leaves the root, and units with ``reshard_after_forward=False``, gathered after forward, for a
backward that may not come; with an int the parameters are shards of another mesh. Whoever reads
``model.parameters()`` then (an optimizer being made, clipping, ``zero_grad``, an average, freezing)
gets tensors that nobody trains, and the next forward reuses weights that may be old by then. So,
when the outermost forward ends,

    without gradients   everything is resharded, and FSDP2's order of uses is what it was before,
                        since it is gathered along in backward: none can come
    with gradients      the sharded parameters are registered, and what was gathered stays in
                        memory; the backward pass registers it again, since recomputed
                        activations look there; another forward gathers anew
    by an exception     FSDP2 is brought back to rest

A method registered with ``register_fsdp_forward_method`` begins without a hook of ours: FSDP2 takes
what an earlier forward has kept for what it needs. The modules that it calls gather anew.

A forward under ``inference_mode`` leaves buffers behind that autograd refuses; they are dropped.

[Note: a replica of one rank]
Where a partition group is one rank, its shards are the whole parameters, unless they are cast or
moved on their way. Then the whole parameters are made of the memory of the shards, once: nothing is
copied before a pass, nothing freed behind it, and nothing can be older than the shards. What is
registered changes as everywhere.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from mics import compat
from mics.sharding.registered import check_registered


def rest_after_forward(module: nn.Module) -> None:
    """Let a sharded module leave its parameters at rest, see [Note: parameters at rest]."""
    rest = _Rest(module)
    # Ahead of FSDP2's, which gathers; behind FSDP2's, and after exceptions.
    module.register_forward_pre_hook(compat.outside_graphs(rest.before_forward), prepend=True)
    module.register_forward_hook(compat.outside_graphs(rest.after_forward), always_call=True)


class _Rest:
    """The hooks of one module."""

    def __init__(self, module: nn.Module) -> None:
        self._groups = compat.param_groups(module)
        self._state = compat.state_of(module)
        self._handled: BaseException | None = None  # by whoever called the outermost forward
        self._uses = 0  # before it

    def before_forward(self, module: nn.Module, _: Any) -> None:
        if compat.in_backward():
            _register_gathered(self._groups)  # a recomputed block
        elif compat.runs_on(self._state):
            if _is_list(self._groups):
                _register_gathered(self._groups)  # a further module of a list that is one unit
            else:
                _free(self._groups)  # inside a method that began without our hook
        elif not compat.is_outermost(self._state):
            _free(group for group in self._groups if compat.is_kept(group))
        else:
            self._handled = sys.exc_info()[1]
            if torch.is_inference_mode_enabled():
                compat.initialise(module)
            groups = compat.groups_beside(module)
            self._uses = compat.num_uses(groups)
            for group in groups:
                if torch.is_inference_mode_enabled() and not compat.can_stay_whole(group):
                    compat.make_buffers_of_one(group)
            _free(group for group in groups if compat.is_kept(group))
            check_registered(groups)
            _let_stay_whole(module, groups)

    def after_forward(self, module: nn.Module, _: Any, output: Any) -> None:
        if compat.in_backward() or not compat.is_outermost(self._state):
            return
        groups = compat.groups_beside(module)
        if sys.exc_info()[1] is not self._handled:
            compat.reset_around(module)
        elif torch.is_grad_enabled():
            _keep(module, groups, output)
        else:
            compat.forget_uses(groups, self._uses)
            for group in groups:
                compat.free(group)
        self._handled = None
        if torch.is_inference_mode_enabled():
            for group in groups:
                compat.drop_inference_buffers(group)


def _is_list(groups: Sequence[Any]) -> bool:
    return any(len(compat.modules_of(group)) > 1 for group in groups)


def _free(groups: Iterable[Any]) -> None:
    """Let groups be gathered anew, but where a user wants them kept after backward."""
    for group in groups:
        if compat.reshards_after_backward(group):
            compat.free(group)  # the shards may have changed since
        elif compat.is_kept(group):
            compat.register_gathered(group)


def _let_stay_whole(module: nn.Module, groups: Sequence[Any]) -> None:
    """See [Note: a replica of one rank]; FSDP2 has to have taken the parameters for good."""
    if all(compat.shard_group(group).size() > 1 for group in groups):
        return
    compat.initialise(module)
    with torch.inference_mode(False), torch.no_grad():
        for group in groups:
            if compat.can_stay_whole(group):
                compat.stay_whole(group)


def _keep(module: nn.Module, groups: Sequence[Any], output: Any) -> None:
    """Register the sharded parameters, until a backward pass begins at ``output``."""
    for group in groups:
        compat.register_sharded(group)

    def begin_backward(_: torch.Tensor) -> None:
        _register_gathered(groups)
        if not all(compat.reshards_after_backward(group) for group in groups):
            compat.at_end_of_backward(lambda: _register_sharded(groups))

    for tensor in compat.tensors_with_grad(output):
        tensor.register_hook(begin_backward)  # type: ignore[no-untyped-call]


def _register_gathered(groups: Sequence[Any]) -> None:
    for group in groups:
        if compat.is_kept(group):
            compat.register_gathered(group)


def _register_sharded(groups: Sequence[Any]) -> None:
    for group in groups:
        compat.register_sharded(group)
