"""Where each parameter and each of its states lies in the files of a DeepSpeed checkpoint.

Stage 3 and MiCS: every parameter is cut into as many pieces of equal length as there are ranks (of
a shard group), the last one padded. A rank's pieces stand one behind the other, in sub-groups that
are tensors of their own. Stages 1 and 2: the parameters of a group stand one behind the other, and
that row is cut into one piece for each rank, padded at its end.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from mics.models.interchange.deepspeed.archives import TorchFile
from mics.models.interchange.deepspeed.folder import Found
from mics.models.interchange.deepspeed.pickles import TensorAt
from mics.models.interchange.deepspeed.tables import (
    Kept,
    called,
    check_alike,
    count_in,
    flat_tensors,
    is_name,
    kept_in,
    optimizer_table,
    order_in,
    param_shapes,
    shapes_in,
    stage_of,
    table_in,
)

_SHARED_BYTES = 64 << 20  # that buffers of many blocks may have in common


class Row:
    """Tensors that stand one behind the other, each in a file."""

    def __init__(self, parts: Sequence[tuple[TorchFile, TensorAt]]) -> None:
        self._parts = parts
        sizes = [math.prod(tensor.shape) for _, tensor in parts]
        self._ends = list(itertools.accumulate(sizes))
        self.numel = sum(sizes)

    def read(self, start: int, into: torch.Tensor) -> None:
        """Fill ``into`` (flat) with the values from ``start`` on."""
        at, end = start, start + into.numel()
        while at < end:
            number = bisect.bisect_right(self._ends, at)
            file, tensor = self._parts[number]
            stop = min(self._ends[number], end)
            begin = self._ends[number] - math.prod(tensor.shape)
            file.read(tensor, at - begin, into[at - start : stop - start])
            at = stop


@dataclass(frozen=True)
class Pieces:
    """A tensor whose pieces of ``length`` values begin at ``start`` in each of ``rows``."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    rows: Sequence[Row]
    start: int
    length: int

    def read(self) -> torch.Tensor:
        """The whole tensor."""
        numel = math.prod(self.shape)
        flat = torch.empty(numel, dtype=self.dtype)
        for number, row in enumerate(self.rows):
            begin = min(number * self.length, numel)
            row.read(self.start, flat[begin : min(begin + self.length, numel)])
        return flat.reshape(self.shape)


@dataclass
class States:
    """What a checkpoint holds, by names of parameters.

    ``moments`` has the optimizer's tensors in the shape of a parameter by (parameter, key);
    ``steps`` and ``options`` have its count of steps and the options of its group.
    """

    step: int
    ranks: int
    stage: int
    weights: dict[str, Pieces] = field(default_factory=dict)
    moments: dict[tuple[str, str], Pieces] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def read_states(found: Found) -> States:
    """Find out where everything is; of tensors no byte but their checksums is read.

    Raises:
        CheckpointError: a file is damaged, of another save than the others, or not of ZeRO.
    """
    models = [TorchFile(path) for path in found.model]
    optimizers = [TorchFile(path) for path in found.optimizer]
    tables = [table_in(file, file.value, "what was saved") for file in models]
    inner = [optimizer_table(file) for file in optimizers]
    ranks = check_alike(models, tables, optimizers, inner)
    stage = stage_of(optimizers[0], inner[0])
    if stage < 3 and len(models) != 1:
        raise optimizers[0].damaged(f"it is of stage {stage}, its model states of stage 3")
    groups = param_shapes(models[0], tables[0])
    states = States(
        count_in(models[0], tables[0].get("global_steps", 0), "global_steps"), ranks, stage
    )
    flat = "fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups"
    base = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    fp32 = [
        flat_tensors(file, table.get(flat), flat)
        for file, table in zip(optimizers, inner, strict=True)
    ]
    kept = [
        kept_in(file, table.get(base), base) for file, table in zip(optimizers, inner, strict=True)
    ]
    if stage == 3:
        _place_stage_3(states, groups, optimizers, fp32, kept)
    else:
        groups = [order_in(optimizers, inner, at, shapes) for at, shapes in enumerate(groups)]
        _place_stage_2(states, groups, optimizers, fp32, kept)
    _add_frozen(states, models, tables)
    _add_buffers(states, models[0], tables[0])
    _check_sum(states, (*models, *optimizers))
    for file in (*models, *optimizers):
        file.verify()
    return states


def _check_sum(states: States, files: Sequence[TorchFile]) -> None:
    """Raise where small files say that they hold much: tensors that are all the same bytes."""
    wanted = [*states.weights.values(), *states.moments.values()]
    num_bytes = sum(math.prod(each.shape) * each.dtype.itemsize for each in wanted)
    there = sum(file.num_bytes for file in files)
    if num_bytes > 2 * there + _SHARED_BYTES:
        raise files[0].damaged(f"its tensors have {num_bytes:,} bytes, all files {there:,}")


# -- where parameters are --------------------------------------------------------------------------


def _place_stage_3(
    states: States,
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    files: Sequence[TorchFile],
    fp32: Sequence[Sequence[TensorAt]],
    kept: Sequence[Kept],
) -> None:
    rows = [_row(file, tensors) for file, tensors in zip(files, fp32, strict=True)]
    moments = _moments(files, fp32, kept)
    by_key = {
        key: [_row(file, tensors) for file, tensors in zip(files, by_rank, strict=True)]
        for key, by_rank in moments.items()
    }
    sizes = _dtypes(files, fp32), {key: _dtypes(files, by_rank) for key, by_rank in moments.items()}
    ends = list(itertools.accumulate(math.prod(t.shape) for t in fp32[0]))
    start = 0
    for shapes in groups:
        for name, shape in shapes.items():
            length = -(-math.prod(shape) // states.ranks)
            states.weights[name] = Pieces(shape, sizes[0], rows, start, length)
            for key, own in by_key.items():
                states.moments[name, key] = Pieces(shape, sizes[1][key], own, start, length)
            number = min(bisect.bisect_right(ends, start), len(ends) - 1)
            if ends:
                _add_group(states, files[0], name, kept[0], number)
            start += length
    for file, row in zip(files, rows, strict=True):
        if row.numel != start:
            raise file.damaged(f"it has {row.numel:,} values, its parameters {start:,}")


def _place_stage_2(
    states: States,
    groups: Sequence[Mapping[str, tuple[int, ...]]],
    files: Sequence[TorchFile],
    fp32: Sequence[Sequence[TensorAt]],
    kept: Sequence[Kept],
) -> None:
    if any(len(tensors) != len(groups) for tensors in fp32):
        raise files[0].damaged(f"its groups are not the {len(groups)} of param_shapes")
    moments = _moments(files, fp32, kept, padded=True)
    dtype = _dtypes(files, fp32)
    for number, shapes in enumerate(groups):
        rows = {"": _across(files, fp32, number)}
        rows |= {key: _across(files, by_rank, number) for key, by_rank in moments.items()}
        total = sum(math.prod(shape) for shape in shapes.values())
        for row in rows.values():
            if not total <= row.numel < total + 2 * states.ranks:
                raise files[0].damaged(
                    f"group {number} has {row.numel:,} values, its parameters {total:,}"
                )
        start = 0
        for name, shape in shapes.items():
            length = math.prod(shape)
            states.weights[name] = Pieces(shape, dtype, [rows[""]], start, length)
            for key, by_rank in moments.items():
                pieces = Pieces(shape, _dtypes(files, by_rank), [rows[key]], start, length)
                states.moments[name, key] = pieces
            _add_group(states, files[0], name, kept[0], number)
            start += length


def _row(file: TorchFile, tensors: Sequence[TensorAt]) -> Row:
    return Row([(file, tensor) for tensor in tensors])


def _across(files: Sequence[TorchFile], by_rank: Sequence[Sequence[TensorAt]], number: int) -> Row:
    return Row([(file, tensors[number]) for file, tensors in zip(files, by_rank, strict=True)])


def _dtypes(files: Sequence[TorchFile], by_rank: Sequence[Sequence[TensorAt]]) -> torch.dtype:
    """The dtype that all tensors have."""
    found = {
        file.dtype(tensor)
        for file, tensors in zip(files, by_rank, strict=True)
        for tensor in tensors
    }
    if len(found) > 1:
        raise files[0].damaged("its flat tensors have several dtypes")
    return found.pop() if found else torch.float32


def _moments(
    files: Sequence[TorchFile],
    fp32: Sequence[Sequence[TensorAt]],
    kept: Sequence[Kept],
    *,
    padded: bool = False,
) -> dict[str, list[list[TensorAt]]]:
    """Tensors of the optimizer beside the weights, by key and rank."""
    keys = list(kept[0].tensors[0]) if kept[0].tensors else []
    for file, tensors, own in zip(files, fp32, kept, strict=True):
        if len(own.tensors) != len(tensors) or own.steps != kept[0].steps:
            raise file.damaged("its optimizer has other parameters or steps than its weights")
        for weight, state in zip(tensors, own.tensors, strict=True):
            if set(state) != set(keys):
                raise file.damaged("some of its parameters lack states that others have")
            for key, tensor in state.items():
                less, most = math.prod(weight.shape), math.prod(tensor.shape)
                fits = less <= most < less + 2 * len(files) if padded else less == most
                if len(tensor.shape) != 1 or not fits:
                    raise file.damaged(f"{key} has {most:,} values, its weights {less:,}")
    return {key: [[state[key] for state in own.tensors] for own in kept] for key in keys}


def _add_group(states: States, file: TorchFile, name: str, kept: Kept, number: int) -> None:
    group = next((at for at, own in enumerate(kept.members) if number in own), None)
    if group is None:
        raise file.damaged("a flat parameter is in no group of the optimizer")
    states.options[name] = kept.options[group]
    step = kept.steps[number]
    if step is None and kept.tensors[number]:  # kept for the whole group, or not at all
        own = kept.options[group].get("step", states.step)
        step = float(own) if type(own) is int and 0 <= own < 2**53 else float(states.step)
    if step is not None:
        states.steps[name] = step


# -- what does not train ---------------------------------------------------------------------------


def _add_frozen(
    states: States, files: Sequence[TorchFile], tables: Sequence[Mapping[Any, Any]]
) -> None:
    shapes = tables[0].get("frozen_param_shapes")
    for name, shape in shapes_in(files[0], shapes, "frozen_param_shapes").items() if shapes else ():
        if name in states.weights:
            raise files[0].damaged(f"{name} is trained and frozen")
        numel = math.prod(shape)
        length = -(-numel // len(files))
        parts = []
        for file, table in zip(files, tables, strict=True):
            own = table_in(file, table.get("frozen_param_fragments"), "frozen_param_fragments")
            tensor = file.check(own.get(name), f"the piece of {name}")
            if math.prod(tensor.shape) != length:
                raise file.damaged(f"the piece of {name} has another size")
            parts.append((file, tensor))
        dtype = _dtypes(files, [[tensor] for _, tensor in parts])
        states.weights[name] = Pieces(shape, dtype, [Row([part]) for part in parts], 0, length)


def _add_buffers(states: States, file: TorchFile, table: Mapping[Any, Any]) -> None:
    """Buffers, other names of tied parameters, and what is left out."""
    module = table_in(file, table.get("module"), "module")
    buffers = table.get("buffer_names")
    listed = buffers if isinstance(buffers, list) else []
    names = {name for name in listed if isinstance(name, str)}
    tied = table.get("shared_params")
    for name, first in _pairs(tied):
        if name not in states.weights and first in states.weights:
            states.tied[name] = first
    for name, value in module.items():
        if not isinstance(name, str) or not is_name(name):
            raise file.damaged(f"module has {called(name)}, which is no name")
        if name in states.weights or name in states.tied:
            continue
        # Below stage 3 the module is whole, with what is frozen.
        if isinstance(value, TensorAt) and (name in names or states.stage < 3):
            tensor = file.check(value, name)
            row, numel = Row([(file, tensor)]), math.prod(tensor.shape)
            states.weights[name] = Pieces(tensor.shape, file.dtype(tensor), [row], 0, numel)
        else:
            states.left_out.append(name)


def _pairs(value: Any) -> list[tuple[str, str]]:
    """Pairs of names, from a table or from a list of pairs."""
    pairs = list(value.items()) if isinstance(value, dict) else value
    return [
        (pair[0], pair[1])
        for pair in (pairs if isinstance(pairs, list) else [])
        if isinstance(pair, tuple | list) and len(pair) == 2
        if all(isinstance(name, str) and is_name(name) for name in pair)
    ]
