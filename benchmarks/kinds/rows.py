"""The rows of the table, and the layouts that each is trained in on eight ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from torch import nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import mics
from kinds.models import Across, Net, Shape, build

WORLD = 8
FULL = MixedPrecisionPolicy()

Way = Literal["placed", "own mesh"]


@dataclass(frozen=True)
class Layout:
    """Where a model is: the sizes of axes whose product is the ranks.

    Args:
        shard: p, the ranks of context parallelism included.
        experts: (replicate, shard, ep) of the experts' mesh.
        ep_outside: neighbours of the experts' mesh are ranks of its shard axis, not of ep.
        gpus_per_node: k.
    """

    replicate: int = 2
    shard: int = 4
    tp: int = 1
    cp: int = 1
    experts: tuple[int, int, int] | None = None
    ep_outside: bool = False
    gpus_per_node: int = 2

    @property
    def data_ranks(self) -> int:
        """Ranks that have data of their own."""
        return self.replicate * self.shard // self.cp

    @property
    def words(self) -> str:
        """For the table."""
        found = f"{self.replicate} x {self.shard}"
        for size, name in ((self.cp, "cp"), (self.tp, "tp")):
            found += f", {name} {size}" if size > 1 else ""
        if self.experts:
            found += f", experts {self.experts[0]} x {self.experts[1]} x ep {self.experts[2]}"
        return f"{found}, k {self.gpus_per_node}"


DENSE = Shape()


@dataclass(frozen=True)
class Row:
    """One model, and where it is trained and read again.

    Args:
        layouts: it is trained in the first by two-stage collectives and by flat ones; in the
            others by both as well. The last one reads the checkpoint of the first.
    """

    name: str
    shape: Shape = DENSE
    layouts: tuple[Layout, ...] = (Layout(), Layout(4, 2))
    way: Way = "placed"
    fp32: bool = True  # so that the bounds of fp32 hold for it
    scales: bool = False  # torchao's are worked out once a step


MOE = Shape(experts=4)
EP_2, EP_4 = (2, 2, 2), (2, 1, 4)
ROWS = (
    Row("dense"),
    Row("tied", Shape(tied=True)),
    Row("frozen", Shape(frozen=True)),
    Row("MoE, EP 2, placed", MOE, (Layout(experts=EP_2), Layout(4, 2, experts=EP_4))),
    Row("MoE, EP 4, placed", MOE, (Layout(experts=EP_4), Layout(4, 2, experts=EP_2))),
    Row(
        "MoE, EP 2, own mesh",
        MOE,
        (Layout(experts=(1, 4, 2), ep_outside=True), Layout(4, 2, experts=EP_4)),
        "own mesh",
    ),
    Row("MoE, EP 4, own mesh", MOE, (Layout(experts=EP_4), Layout(4, 2, experts=EP_2)), "own mesh"),
    Row("TP 2", layouts=(Layout(1, 4, tp=2, gpus_per_node=4), Layout(2, 2, tp=2))),
    Row("CP 2", layouts=(Layout(cp=2), Layout(4, 2, cp=2))),
    Row(
        "TP 2 x EP 4",
        MOE,
        (
            Layout(1, 4, tp=2, experts=(1, 2, 4), gpus_per_node=4),
            Layout(2, 2, tp=2, experts=EP_4),
        ),
    ),
    Row("float8 gather", Shape(64, 128, 32, weights="float8"), fp32=False),
    Row(
        "float8 gather, scales once a step",
        Shape(64, 128, 32, weights="float8"),
        fp32=False,
        scales=True,
    ),
    Row("LoRA on bf16", Shape(weights="lora"), fp32=False),
    Row("NF4", Shape(64, 128, 32, weights="nf4")),
)


@dataclass(frozen=True)
class Place:
    """What this rank needs to know of a layout to train in it."""

    layout: Layout
    across: Across
    data: DeviceMesh  # (replicate, shard), where shard includes cp
    named: DeviceMesh  # every axis of the dense model, by name
    held_by: DeviceMesh | None  # (replicate, shard) of an expert

    @property
    def data_rank(self) -> int:
        """Which data this rank sees."""
        replica, shard = self.data.get_local_rank(0), self.data.get_local_rank(1)
        return replica * (self.layout.shard // self.layout.cp) + shard // self.layout.cp


@cache
def _mesh(sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def place_of(layout: Layout) -> Place:
    """Make the meshes of a layout, once; collective."""
    inner = (layout.replicate, layout.shard // layout.cp, layout.cp, layout.tp)
    named = _mesh(inner, ("replicate", "dp_shard", "cp", "tp"))
    flat = _mesh((layout.replicate, layout.shard, layout.tp), ("replicate", "shard", "tp"))
    ep = held_by = None
    if layout.experts is not None:
        replicate, shard, size = layout.experts
        names = ("replicate", "efsdp", "ep")
        sizes = layout.experts
        if layout.ep_outside:
            names, sizes = ("replicate", "ep", "efsdp"), (replicate, size, shard)
        experts = _mesh(sizes, names)
        ep, held_by = experts["ep"], experts["replicate", "efsdp"]
    across = Across(
        cp=named["cp"] if layout.cp > 1 else None,
        tp=named["tp"] if layout.tp > 1 else None,
        ep=ep,
    )
    return Place(layout, across, flat["replicate", "shard"], named, held_by)


def spread(row: Row, place: Place) -> Net:
    """Build a row's model, spread over what is not data, and not sharded yet."""
    net = build(row.shape, place.across)
    if place.across.tp is not None:
        for block in net.blocks:
            columns, rows = ColwiseParallel(), RowwiseParallel()
            plan = {f"attention.{one}": columns for one in "qkv"} | {"attention.o": rows}
            if not row.shape.experts:
                plan |= {"mlp.up": columns, "mlp.down": rows}
            parallelize_module(block, place.across.tp, plan)
    if place.across.ep is not None:
        for block in net.blocks:
            experts = block.mlp.experts  # type: ignore[union-attr]
            for name, param in list(experts.named_parameters()):  # type: ignore[operator,union-attr]
                own = distribute_tensor(param.data, place.across.ep, [Shard(0)])
                setattr(experts, name, nn.Parameter(own))
    return net


def by_mics(row: Row, place: Place, collectives: str = "auto") -> Net:
    """Shard a row's model with mics."""
    k = place.layout.gpus_per_node
    options: dict[str, Any] = {"mp_policy": FULL, "collectives": collectives, "gpus_per_node": k}
    where: dict[str, Any] = {"mesh": place.data}
    if place.across.cp is not None:
        dims = fsdp.DataParallelMeshDims(shard=("dp_shard", "cp"), replicate="replicate")
        axes = place.named["replicate", "dp_shard", "cp"]
        where = {"mesh": axes, "dp_mesh_dims": dims}
    return _each(row, place, mics.fully_shard, where | options, options)


def by_fsdp2(row: Row, place: Place) -> Net:
    """Shard a row's model with FSDP2, as torchtitan does."""
    options = {"mp_policy": FULL}
    model = _each(row, place, fsdp.fully_shard, {"mesh": place.data} | options, options)
    if place.held_by is not None:
        for block in model.blocks:
            _average_over(block, place.data.size())
    return model


def _each(
    row: Row, place: Place, shard: Any, where: dict[str, Any], options: dict[str, Any]
) -> Net:
    net = spread(row, place)
    for block in net.blocks:
        placement = None
        if place.held_by is not None and row.way == "own mesh":
            shard(block.mlp.experts, mesh=place.held_by, **options)  # type: ignore[union-attr]
        elif place.held_by is not None:
            placement = _placing(block.mlp.experts, place.held_by)  # type: ignore[union-attr,arg-type]
        shard(block, shard_placement_fn=placement, **where)
    shard(net, **where)
    return net


def _placing(experts: nn.Module, held_by: DeviceMesh) -> Any:
    info, mine = _get_mesh_info(held_by), set(experts.parameters())

    def place(param: nn.Parameter) -> Any:
        return ShardPlacementResult(Shard(0), info) if param in mine else None

    return place


def _average_over(block: Any, ranks: int) -> None:
    """Divide the gradients of experts by the ranks of the rest, which FSDP2 does not do itself.

    Sums are forced only where Gloo, which cannot divide, needs it: over one rank FSDP2 divides
    twice then.
    """
    of_experts = set(block.mlp.experts.parameters())
    for module in block.modules():
        if not isinstance(module, fsdp.FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            if {one.sharded_param for one in group.fsdp_params} <= of_experts:
                group.gradient_divide_factor = float(ranks)
                group.force_sum_reduction_for_comms = group.mesh_info.shard_mesh_size > 1
