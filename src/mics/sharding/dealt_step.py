"""An optimizer whose rule needs whole matrices, with one owner of each among all ranks.

``whole_step.py`` steps every matrix on every rank that holds a shard of it. Here each is stepped
once, on the rank that owns it, wherever in the job that is.

[Note: where the state is]
State lives with the owner, whole: a rank has 1/(p R) of it. Nobody else has it, so what reads an
optimizer's state would find nothing there. ``shard_state`` brings it to all ranks, as shards like
the parameter's, which is the form of ``WholeStep``; the next step takes it to the owners again. All
that is loaded is in that form too. So checkpoints are the same ones, at any p and R.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics import compat
from mics.communication.apart import Message
from mics.communication.owners import Form, Owner, Parcel, Routes, form_of
from mics.communication.whole import as_part
from mics.errors import CheckpointError, ConfigError, ShardError
from mics.quantities import dtype_name, first_of
from mics.ranks.agreement import gather_text
from mics.ranks.whereabouts import during
from mics.sharding.belonging import units_by_param
from mics.sharding.one_owner import Dealt, deal_owners
from mics.sharding.same_matrices import check_same_matrices
from mics.sharding.steppers import Steppers, as_given, is_alike
from mics.sharding.units import Unit


class DealtStep(torch.optim.Optimizer):
    """Step whole matrices by any optimizer of torch's form, each on one rank of all replicas.

    ``mics.DealtStep(matrices, torch.optim.Muon, lr=0.02)`` gives the same bits as
    ``mics.WholeStep``, for parameters that mics has sharded, and divides the work and the state by
    all ranks. A step sends the shards of every matrix to its owner inside a replica and back, in
    packs, and then what other replicas own: hop 0 of ``ledger`` and ``predict_traffic``.

    State is with the owners from a step on. ``mics.save``, ``mics.load`` and ``mics.Snapshots``
    bring it to the shards first; who reads it otherwise calls ``shard_state`` on every rank.

    Args:
        params: parameters or groups of them, sharded by mics.
        rule: makes the optimizer of one parameter, from ``[parameter]`` and ``options``. It steps
            each parameter by itself: what one parameter's step tells the next is not supported.
        options: of every group that does not say otherwise.

    Raises:
        ValueError: the rule does not take one of the parameters.
        ConfigError: the rule computes the loss in its step; or, at the first step, before a
            parameter is changed: it keeps something for all parameters of a group.
        ShardError: in a step, before a parameter is changed: one is not sharded by mics, or spread
            over tensor or expert parallelism too.
        DisagreementError: in a step, on every rank of a mesh, before anything is sent: ranks have
            other parameters or gradients, another order of them, or other options.
    """

    def __init__(
        self,
        params: Iterable[Any],
        rule: Callable[..., torch.optim.Optimizer],
        **options: Any,
    ) -> None:
        self._steppers = Steppers("mics.DealtStep", rule, options)
        self._num_tried = 0  # groups whose options the rule has taken
        self._owned: dict[nn.Parameter, dict[str, Any]] = {}  # whole states
        self._away: dict[nn.Parameter, Owner] = {}  # who has the state
        params = as_given(params)
        super().__init__(params, self._steppers.defaults(params))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; collective over all ranks of its mesh."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        units, groups = units_by_param(), self._group_of()
        dealt = self._dealt(units)
        ready = {param: self._sent(param, units) for param in groups if param.grad is not None}
        self._try_out()
        sent = {p: {one.key.strip(): one.tensor for one in all_of} for p, all_of in ready.items()}
        in_order = [param for one in dealt for param in one.owners]
        check_same_matrices("mics.DealtStep", self, in_order, sent, units)
        for one in dealt:
            for pack in one.packs(ready):
                routes = Routes(one.groups, units[id(pack[0])].ledger)
                self._step_pack({param: ready[param] for param in pack}, one, routes, groups)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, see torch's."""
        super().add_param_group(param_group)
        self._steppers.check(self.param_groups[-1])

    def messages_of(self, unit: Unit) -> list[Message]:
        """What the next step sends in the name of a unit, if all that is trained has a gradient."""
        units = units_by_param()
        trained = {
            param: self._sent(param, units)
            for param in self._group_of()
            if param.requires_grad and id(param) in units
        }
        return [
            message
            for one in self._dealt(units)
            for pack in one.packs(trained)
            if units[id(pack[0])] is unit
            for message in Routes(one.groups, None).messages(
                [Parcel(one.owners[p], sent.form) for p in pack for sent in trained[p]],
                [Parcel(one.owners[p], trained[p][0].form) for p in pack],
            )
        ]

    def state_dict(self) -> dict[str, Any]:
        """See torch's.

        Raises:
            CheckpointError: state is with its owners.
        """
        if self._away:
            raise CheckpointError(
                "state_dict() of mics.DealtStep was called while every parameter's state is with "
                "its owner, one rank of all.",
                numbers=f"{len(self._away)} of its parameters have been stepped.",
                write="mics.save(..., optimizer=optimizer); or optimizer.shard_state() on every "
                "rank before it",
            )
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See torch's. State is sharded like its parameters; the next step takes it to owners."""
        super().load_state_dict(state_dict)
        self._owned.clear()
        self._away.clear()

    @during("shard_state of mics.DealtStep")
    @torch.no_grad()
    def shard_state(self) -> None:
        """Bring the state from its owners to all ranks, sharded like the parameters.

        Collective over all ranks of each mesh. It stays so until the next step. Nothing is sent
        where no step has been since the last call.

        Raises:
            CheckpointError: on every rank: state of a kind that cannot be sent. Nothing is changed.
        """
        if not self._away:
            return
        units = units_by_param()
        described = [(one, self._describe(one)) for one in self._dealt(units)]
        for one, states in described:
            for pack in one.packs(states):
                self._shard_pack({param: states[param] for param in pack}, one)
        self._owned.clear()
        self._away.clear()

    # -- a step ----------------------------------------------------------------------------------

    def _group_of(self) -> dict[nn.Parameter, dict[str, Any]]:
        """The group of every parameter."""
        return {param: group for group in self.param_groups for param in group["params"]}

    def _dealt(self, units: dict[int, Unit]) -> list[Dealt]:
        """The owners of all parameters.

        Raises:
            ConfigError: a parameter whose state is with its owner would have another one.
        """
        dealt = deal_owners([group["params"] for group in self.param_groups], units)
        owners = {param: owner for one in dealt for param, owner in one.owners.items()}
        moved = [list(p.shape) for p, owner in self._away.items() if owners.get(p) != owner]
        if moved:
            raise ConfigError(
                "Parameters of mics.DealtStep were taken out of its groups, or replaced in the "
                "model, while their state was with its owners.",
                numbers=f"{len(moved)} of {len(self._away)}: {first_of([*map(str, moved)])}.",
                write="optimizer.shard_state() on every rank before; add_param_group may be called "
                "at any time",
            )
        return dealt

    def _sent(self, param: nn.Parameter, units: dict[int, Unit]) -> list[_Sent]:
        """What a step sends of a parameter: weight, gradient, and state that is not with its owner.

        Raises:
            ShardError: it cannot be brought to one owner.
        """
        values = self._steppers.values(param)
        gradient = values if param.grad is None else param.grad
        state = {
            key: value
            for key, value in self.state.get(param, {}).items()
            if isinstance(value, DTensor) and not _is_copy(value)
        }
        tensors = [(_WEIGHT, values), (_GRADIENT, gradient), *state.items()]
        return [_Sent(key, one, _form(one, units.get(id(param)))) for key, one in tensors]

    def _try_out(self) -> None:
        """Let every rank see what the rule does to the options of groups that are new."""
        for group in self.param_groups[self._num_tried :]:
            if group["params"]:
                self._steppers.try_out(group["params"][0], group)
        self._num_tried = len(self.param_groups)

    def _step_pack(
        self,
        pack: Mapping[nn.Parameter, list[_Sent]],
        dealt: Dealt,
        routes: Routes,
        groups: Mapping[nn.Parameter, dict[str, Any]],
    ) -> None:
        sent = [(param, one) for param, several in pack.items() for one in several]
        arrived = routes.to_owners(
            [Parcel(dealt.owners[param], one.form) for param, one in sent],
            [compat.local_of(one.tensor) for _, one in sent],
        )
        new: dict[int, torch.Tensor] = {}
        for number, param in enumerate(pack):
            if dealt.owners[param] == routes.here:
                wholes = {
                    sent[n][1].key: sent[n][1].form.take_all(rows)
                    for n, rows in arrived.items()
                    if sent[n][0] is param
                }
                new[number] = self._step(param, wholes, groups[param])
            self.state[param] = {}  # not nothing: torch would take it for one that never stepped
            self._away[param] = dealt.owners[param]
        parcels = [Parcel(dealt.owners[param], pack[param][0].form) for param in pack]
        for param, part in zip(pack, routes.from_owners(parcels, new), strict=True):
            assert isinstance(param, DTensor)
            param.copy_(as_part(part, param))

    def _step(
        self, param: nn.Parameter, wholes: dict[str, torch.Tensor], group: dict[str, Any]
    ) -> torch.Tensor:
        """Step what this rank owns, and keep its state."""
        weight, gradient = wholes.pop(_WEIGHT), wholes.pop(_GRADIENT)
        copies = {
            key: compat.local_of(value) if isinstance(value, DTensor) else value
            for key, value in self.state.get(param, {}).items()
            if key not in wholes
        }
        state = self._owned.get(param, {}) | copies | wholes
        new, self._owned[param] = self._steppers.step(param, weight, gradient, state, group)
        return new

    # -- state on all ranks ------------------------------------------------------------------------

    def _describe(self, dealt: Dealt) -> dict[nn.Parameter, dict[str, list[Any]]]:
        """What there is of state, of whoever owns it: each as ``_description`` has it. Collective.

        Raises:
            CheckpointError: there is something that cannot be sent.
        """
        known: dict[str, dict[str, list[Any]]] = {
            str(number): {
                str(key): _description(param, key, value)
                for key, value in self._owned[param].items()
            }
            for number, param in enumerate(dealt.owners)
            if param in self._owned
        }
        for group in dealt.groups.axes:
            for text in gather_text(json.dumps(known), group, dealt.groups.device):
                known |= json.loads(text)
        for state in known.values():
            for key, (kind, *what) in state.items():
                if kind == _UNKNOWN:
                    raise CheckpointError(
                        f"State {key!r} of mics.DealtStep cannot be sent to other ranks.",
                        numbers=f"It is a {what[0]}.",
                        write="mics.WholeStep, which has the state of a parameter on every rank "
                        "that holds a shard of it",
                    )
        return {
            param: known[str(number)]
            for number, param in enumerate(dealt.owners)
            if str(number) in known
        }

    def _shard_pack(self, pack: Mapping[nn.Parameter, dict[str, list[Any]]], dealt: Dealt) -> None:
        routes = Routes(dealt.groups, None)
        tensors: list[tuple[nn.Parameter, str, str, str]] = []
        parcels: list[Parcel] = []
        wholes: dict[int, torch.Tensor] = {}
        for param, state in pack.items():
            assert isinstance(param, DTensor)
            weight = form_of(param, dealt.groups.shard)
            assert weight is not None
            self.state[param] = {}
            for key, (kind, *what) in state.items():
                if kind == _VALUE:
                    self.state[param][key] = what[0]
                    continue
                dtype, shape, device = what
                split = weight.split if kind == _SPLIT else None
                form = Form(torch.Size(shape), getattr(torch, dtype), split)
                if dealt.owners[param] == routes.here:
                    wholes[len(parcels)] = self._owned[param][key]
                parcels.append(Parcel(dealt.owners[param], form))
                tensors.append((param, kind, key, device))
        parts = routes.from_owners(parcels, wholes)
        for (param, kind, key, device), part in zip(tensors, parts, strict=True):
            assert isinstance(param, DTensor)
            # A copy, or what all ranks sent would stay in memory.
            own = part.to(device).clone(memory_format=torch.contiguous_format)
            self.state[param][key] = as_part(own, param) if kind == _SPLIT else own


_WEIGHT, _GRADIENT = " weight", " gradient"  # beside the names of states
_SPLIT, _COPIED, _VALUE, _UNKNOWN = "split", "copied", "value", "unknown"


class _Sent(NamedTuple):
    """A tensor that goes to the owner of its parameter, and how it lies on the ranks."""

    key: str
    tensor: torch.Tensor
    form: Form


def _form(tensor: torch.Tensor, unit: Unit | None) -> Form:
    """How what a step sends lies on the partition group of a unit.

    Raises:
        ShardError: it lies elsewhere.
    """
    form = None
    if unit is not None and isinstance(tensor, DTensor):
        form = form_of(tensor, unit.groups.shard)
    if form is None:
        mesh = "no mesh"
        if isinstance(tensor, DTensor):
            mesh = f"{list(tensor.placements)} on a mesh of {list(tensor.device_mesh.shape)} ranks"
        raise ShardError(
            "mics.DealtStep steps parameters that mics has sharded over their partition group and "
            "over nothing else.",
            numbers=f"One of shape {list(tensor.shape)} is {mesh}.",
            write="mics.WholeStep for it, which steps tensor and expert parallelism too; or the "
            "rule itself for one that is on no mesh",
        )
    return form


def _is_copy(tensor: DTensor) -> bool:
    """Whether it is not split, as state of another shape than its parameter's."""
    return all(placed.is_replicate() for placed in tensor.placements)


def _description(param: nn.Parameter, key: Any, value: Any) -> list[Any]:
    """What other ranks have to know of a state before it is sent, as JSON."""
    if not isinstance(key, str):
        return [_UNKNOWN, f"state under {key!r}, which is no text"]
    if value is None or isinstance(value, bool | int | float | str):
        return [_VALUE, value]
    if type(value) is not torch.Tensor:
        return [_UNKNOWN, type(value).__name__]
    kind = _SPLIT if is_alike(param, value) else _COPIED
    return [kind, dtype_name(value.dtype), list(value.shape), value.device.type]
