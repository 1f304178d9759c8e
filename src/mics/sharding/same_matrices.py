"""Do all ranks step the same whole matrices? Compared before one of them is sent.

Collectives are matched by order alone: a rank that lists its parameters in another order would get
other matrices of one shape for its own, and one that lacks a gradient would leave the rest waiting.

[Note: who compares with whom]
First the ranks of every mesh of the data, in the message that micro-steps end with, the smallest
mesh first; then those that have other parts of the same matrices besides, along tensor or expert
parallelism or a mesh of the user's own. A rank that differs is refused by the ranks of one of these
and takes part in all that follow, which says so to the others: so all of them raise, none is left
in a collective. Each compares its own parameters only, since others may be on fewer ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics.communication.optimizer_options import spelled_options
from mics.communication.same_steps import same_steps_of
from mics.errors import DisagreementError, MicroStepError
from mics.quantities import dtype_name
from mics.ranks.agreement import check_agreement
from mics.ranks.issuing import host_group
from mics.ranks.mesh import axes_beside
from mics.sharding.units import Unit
from mics.topology import Ranks

Sent = Mapping[nn.Parameter, Mapping[str, torch.Tensor]]
"""What a step sends of every parameter that has a gradient, by name and in order."""


def check_same_matrices(
    whose: str,
    optimizer: torch.optim.Optimizer,
    params: Sequence[nn.Parameter],
    sent: Sent,
    by_param: Mapping[int, Unit],
) -> None:
    """Refuse to step what other ranks do not: other parameters, gradients, order or options.

    Collective, see [Note: who compares with whom]; nothing is compared of plain tensors.

    Args:
        whose: the name of the optimizer's kind, for messages.
        optimizer: what is about to step.
        params: all of its, in the order in which they are stepped.
        sent: by those that have a gradient.
        by_param: see ``units_by_param``.

    Raises:
        DisagreementError: on every rank; it names the ranks and the first difference.
        MicroStepError: on every rank: they have stepped something else before.
    """
    subject = f"what {whose} steps"
    refused: DisagreementError | MicroStepError | None = None
    for units in _meshes(params, by_param):
        groups, set_of_units = units[0].groups, set(units)
        here = [p for p in params if by_param.get(id(p)) in set_of_units]
        tree = [unit for unit in units[0].tree() if unit.groups.shard is groups.shard]
        tree = tree or units  # before a forward has told who the root is
        trained = [param for unit in tree for param in unit.used.params]
        lines = _lines(optimizer, here, sent, by_param, refused)
        try:
            same_steps_of(groups).meet_to_step(trained, tree[0].used, subject, lines)
        except (DisagreementError, MicroStepError) as error:
            refused = refused or error
    for ranks, here in _parts_beside(params, by_param):
        lines = _lines(optimizer, here, sent, by_param, refused)
        try:
            on_host = [host_group(ranks, "mics_matrices")]
            check_agreement({subject: lines}, on_host, torch.device("cpu"))
        except DisagreementError as error:
            refused = refused or error
    if refused is not None:
        raise refused


def _meshes(params: Sequence[nn.Parameter], by_param: Mapping[int, Unit]) -> Iterator[list[Unit]]:
    """The units of some parameters, mesh by mesh; every rank takes them in one order."""
    ours = {by_param[id(param)] for param in params if id(param) in by_param}
    meshes: dict[object, list[Unit]] = {}
    for unit in dict.fromkeys(by_param.values()):  # in the order in which they were made
        if unit in ours:
            meshes.setdefault(unit.groups.shard, []).append(unit)
    yield from sorted(meshes.values(), key=lambda units: units[0].groups.whole.size())


def _parts_beside(
    params: Sequence[nn.Parameter], by_param: Mapping[int, Unit]
) -> Iterator[tuple[Ranks, list[nn.Parameter]]]:
    """The ranks beside the data that have other parts of some parameters, and these."""
    found: dict[Ranks, list[nn.Parameter]] = {}
    for param in params:
        ranks = _ranks_beside(param, by_param.get(id(param)))
        if ranks:
            found.setdefault(ranks, []).append(param)
    yield from sorted(found.items(), key=lambda item: (len(item[0]), item[0]))


def _ranks_beside(param: nn.Parameter, unit: Unit | None) -> Ranks:
    if not isinstance(param, DTensor):
        return ()
    mesh = param.device_mesh
    here, axes = mesh.get_coordinate(), range(mesh.ndim)
    beside = axes if unit is None else axes_beside(unit.groups, mesh)
    split = [a for a in beside if mesh.size(a) > 1 and not param.placements[a].is_replicate()]
    if here is None or not split:
        return ()
    row = mesh.mesh[tuple(slice(None) if axis in split else here[axis] for axis in axes)]
    return tuple(sorted(row.flatten().tolist()))


def _lines(
    optimizer: torch.optim.Optimizer,
    params: Sequence[nn.Parameter],
    sent: Sent,
    by_param: Mapping[int, Unit],
    refused: Exception | None,
) -> list[str]:
    """What ranks compare, in words: each parameter, the options of their groups, a refusal."""
    units = [unit for mesh in _meshes(params, by_param) for unit in mesh]
    names = {  # with numbers: before a forward, and in two models, several have one name
        id(param): f"{unit.name} {name} (parameter {at} of unit {number})"
        for number, unit in enumerate(units)
        for at, (param, name) in enumerate(zip(unit.used.params, unit.used.names, strict=True))
    }
    lines = []
    for param in params:
        tensors = sent[param].items() if param in sent else ()
        what = ", ".join(f"{key} of {dtype_name(one.dtype)}" for key, one in tensors)
        name = names.get(id(param), f"one of shape {list(param.shape)}")
        lines.append(f"{name}: {what or 'no gradient'}")
    ids = {id(param) for param in params}
    for group in optimizer.param_groups:
        inside = sum(id(param) in ids for param in group["params"])
        if inside:
            lines.append(f"a group of {inside} parameter(s): {spelled_options([group])}")
    return lines if refused is None else [*lines, f"refused: {str(refused).splitlines()[0]}"]
