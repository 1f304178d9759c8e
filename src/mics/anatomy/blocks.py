"""Finds the repeated blocks of a model: the units that are gathered and freed one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mics.errors import ShardError
from mics.quantities import dtype_name

Block = type[nn.Module] | nn.Module
Blocks = Sequence[Block] | Block | Callable[[nn.Module], bool] | None

_CONTAINERS = (nn.ModuleList, nn.Sequential, nn.ModuleDict)


def find_blocks(model: nn.Module, blocks: Blocks = None) -> dict[str, nn.Module]:
    """The blocks of ``model`` by name, outermost, in module order.

    Without ``blocks``: the classes a transformers model names in ``_no_split_modules``; else the
    children of containers that repeat one class; else children of one module that repeat a class
    of the model's own. Blocks that share a parameter with the rest of the model (tied embeddings)
    are left to the root, because FSDP2 keeps a parameter in one unit.

    Args:
        model: any module.
        blocks: classes, the block modules themselves (a ModuleList too), one of either, or a
            function that says whether a module is one.

    Raises:
        ShardError: there is no block, or a given class or module does not occur.
    """
    found = _given(model, blocks) if blocks is not None else _guess(model)
    found = {name: block for name, block in found.items() if any(True for _ in block.parameters())}
    if not found:
        raise ShardError(
            f"{type(model).__name__} has no repeated blocks: nothing could be freed between uses.",
            numbers="Its children are "
            + (", ".join(f"{n} ({type(c).__name__})" for n, c in model.named_children()) or "none")
            + ".",
            write="mics.shard(model, blocks=[BlockClass]), or mics.fully_shard on each part",
        )
    shared = _shared_parameters(model, found)
    if len(shared) == len(found):
        raise ShardError(
            f"Every block of {type(model).__name__} shares a parameter with the rest of the model, "
            "so that all of them would be one unit and nothing could be freed between uses.",
            numbers=_first_shared(model, found),
            write="mics.shard(model, blocks=[modules that share nothing]), or "
            "mics.fully_shard(model, mesh=mesh) to have one unit",
        )
    return {name: block for name, block in found.items() if name not in shared}


def units_of_block(block: nn.Module, ignored: set[nn.Parameter]) -> list[nn.Module]:
    """Modules to shard for one block, bottom-up; the block itself is last.

    FSDP2 wants one dtype among the trainable parameters of a unit. Modules whose trainable
    parameters have another dtype than most of the block become units of their own.

    Raises:
        ShardError: one module holds trainable parameters of two dtypes.
    """
    sizes: Counter[torch.dtype] = Counter()
    for param in block.parameters():
        if param.requires_grad and param not in ignored:
            sizes[param.dtype] += param.numel()
    if len(sizes) <= 1:
        return [block]
    common = sizes.most_common(1)[0][0]
    units = []
    for name, module in block.named_modules():
        own = {p for p in module.parameters(recurse=False) if p.requires_grad and p not in ignored}
        dtypes = {p.dtype for p in own}
        if len(dtypes) > 1:
            raise ShardError(
                f"{name or type(block).__name__} holds trainable parameters of several dtypes.",
                numbers=", ".join(sorted(dtype_name(d) for d in dtypes)) + ".",
                write="module.to(dtype) before sharding, or mics.fully_shard with ignored_params",
            )
        if dtypes and dtypes != {common}:
            if module is block:
                raise ShardError(
                    f"{type(block).__name__} itself holds parameters of "
                    f"{dtypes.pop()}, most of what it contains is {common}.",
                    write="block.to(dtype) before sharding",
                )
            units.append(module)
    return [*reversed(units), block]


def _as_list(blocks: Any) -> list[Block]:
    """Blocks one by one: a list of them, the layers of a ModuleList, or a single one."""
    if isinstance(blocks, Sequence | nn.ModuleList):
        return list(blocks)
    return [blocks]


def _given(model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    if callable(blocks) and not isinstance(blocks, (type, nn.Module)):
        return _outermost(model, blocks)
    named = _as_list(blocks)
    classes = tuple(b for b in named if isinstance(b, type))
    modules = {b for b in named if isinstance(b, nn.Module)}
    present = set(model.modules())
    for block in named:
        missing = (
            block not in present
            if isinstance(block, nn.Module)
            else not any(isinstance(m, block) for m in present)
        )
        if missing:
            name = block.__name__ if isinstance(block, type) else type(block).__name__
            raise ShardError(
                f"blocks names {name}, which does not occur in {type(model).__name__}.",
                numbers="Its module classes are "
                + ", ".join(sorted({type(m).__name__ for m in present}))
                + ".",
            )
    return _outermost(model, lambda m: m in modules or isinstance(m, classes))


def _guess(model: nn.Module) -> dict[str, nn.Module]:
    named = getattr(model, "_no_split_modules", None)
    found = _outermost(model, lambda m: type(m).__name__ in named) if named else {}
    if found:
        return found
    repeated = _repeated_children(model, only_containers=True)
    return repeated or _repeated_children(model, only_containers=False)


def _outermost(model: nn.Module, wanted: Callable[[nn.Module], bool]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if wanted(child):
                if not any(child is other for other in found.values()):
                    found[path] = child
            else:
                walk(child, f"{path}.")

    walk(model, "")
    return found


def _repeated_children(model: nn.Module, *, only_containers: bool) -> dict[str, nn.Module]:
    repeated: set[nn.Module] = set()
    for module in model.modules():
        if only_containers != isinstance(module, _CONTAINERS):
            continue
        # A class of torch.nn repeated beside other children (q, k and v of an attention) is no
        # block; repeated in a container it is.
        children = [c for c in module.children() if any(True for _ in c.parameters())]
        if not only_containers:
            children = [c for c in children if not type(c).__module__.startswith("torch.nn")]
        counts = Counter(type(c) for c in children)
        repeated |= {c for c in children if counts[type(c)] >= 2}
    return _outermost(model, lambda m: m in repeated)


def _first_shared(model: nn.Module, blocks: dict[str, nn.Module]) -> str:
    """Who shares the first shared parameter of the blocks."""
    for param_name, param in model.named_parameters():
        paths = [n for n, p in model.named_parameters(remove_duplicate=False) if p is param]
        holders = dict.fromkeys(_block_of(path, blocks) or path for path in paths)
        if len(holders) > 1 and any(holder in blocks for holder in holders):
            return f"{' and '.join(holders)} share {param_name}."
    return ""


def _block_of(path: str, blocks: dict[str, nn.Module]) -> str:
    return next((name for name in blocks if path.startswith(f"{name}.")), "")


def _shared_parameters(model: nn.Module, blocks: dict[str, nn.Module]) -> set[str]:
    """Names of blocks that share a parameter with anything outside themselves."""
    inside = {name: {id(p) for p in block.parameters()} for name, block in blocks.items()}
    block_modules = {m: name for name, block in blocks.items() for m in block.modules()}
    owners: dict[int, set[str]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(id(param), set()).add(block_modules.get(module, ""))
    return {name for name, ids in inside.items() if any(owners[i] != {name} for i in ids)}
