"""What the files of a DeepSpeed checkpoint say: sizes, names and options, each of them checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mics.models.interchange.deepspeed.archives import TorchFile
from mics.models.interchange.deepspeed.pickles import Made, TensorAt

_MOST_NAME = 1000


@dataclass(frozen=True)
class Kept:
    """A rank's part of an optimizer: tensors and counts of each of its flat parameters."""

    tensors: list[dict[str, TensorAt]]
    steps: list[float | None]
    members: list[list[int]]
    """Numbers of the flat parameters of each group."""
    options: list[dict[str, Any]]


def table_in(file: TorchFile, value: Any, what: str) -> dict[Any, Any]:
    """A value that has to be a table.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, dict):
        raise file.damaged(f"{what} is no table")
    return value


def optimizer_table(file: TorchFile) -> dict[Any, Any]:
    """What ``optimizer_state_dict`` of an optimizer's file holds.

    Raises:
        CheckpointError: it is no table.
    """
    table = table_in(file, file.value, "what was saved")
    return table_in(file, table.get("optimizer_state_dict"), "optimizer_state_dict")


def count_in(file: TorchFile, value: Any, what: str) -> int:
    """A value that has to be a count.

    Raises:
        CheckpointError: it is none.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        raise file.damaged(f"{what} is no count")
    return value


def stage_of(file: TorchFile, table: Mapping[Any, Any]) -> int:
    """The stage of ZeRO that wrote a file.

    Raises:
        CheckpointError: it is none of 1, 2 and 3.
    """
    stage = table.get("zero_stage")
    if isinstance(stage, Made) and isinstance(stage.arguments, tuple) and len(stage.arguments) == 1:
        stage = stage.arguments[0]
    if type(stage) is not int or stage not in (1, 2, 3):
        raise file.damaged("its zero_stage is none of 1, 2 and 3")
    return stage


def _partitions(file: TorchFile, table: Mapping[Any, Any]) -> int:
    count = table.get("partition_count")
    counts = count if isinstance(count, list) else [count]
    numbers = {count_in(file, each, "partition_count") for each in counts}
    if len(numbers) > 1:
        raise file.damaged("its groups are cut into different numbers of pieces (experts)")
    return numbers.pop() if numbers else 0


def check_alike(
    models: Sequence[TorchFile],
    tables: Sequence[Mapping[Any, Any]],
    optimizers: Sequence[TorchFile],
    inner: Sequence[Mapping[Any, Any]],
) -> int:
    """The number of pieces, after a look at whether all files are of one save."""
    for file, table in zip(optimizers, inner, strict=True):
        if _partitions(file, table) != len(optimizers):
            raise file.damaged(
                f"it is one of {_partitions(file, table)} pieces, and there are files of "
                f"{len(optimizers)}"
            )
        if stage_of(file, table) != stage_of(optimizers[0], inner[0]):
            raise file.damaged("it is of another stage than the first rank's")
        alignment = table.get("param_alignment_paddings")
        if _any_number(alignment):
            raise file.damaged("its parameters are aligned (parameter_alignment)")
    for file, other in zip(models, tables, strict=True):
        for key in ("global_steps", "dp_world_size", "param_shapes", "frozen_param_shapes"):
            if not _same(other.get(key), tables[0].get(key)):
                raise file.damaged(f"it is of another save than the first rank's: {key} differ")
    return len(optimizers)


def _any_number(value: Any) -> bool:
    rows = value if isinstance(value, list) else []
    return any(isinstance(v, int) and v for row in rows if isinstance(row, list) for v in row)


def _same(one: Any, other: Any) -> bool:
    """Whether two tables of shapes, lists of them or counts are the same; three levels at most."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_table, one, other))
    return _same_table(one, other)


def _same_table(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = zip(one.items(), other.items(), strict=False)
        return len(one) == len(other) and all(
            a == c and _shape(b) == _shape(d) for (a, b), (c, d) in pairs
        )
    return type(one) is type(other) and isinstance(one, int | None) and one == other


def _shape(value: Any) -> tuple[int, ...] | None:
    fits = isinstance(value, tuple) and all(type(v) is int and 0 <= v < 2**63 for v in value)
    return value if fits and len(value) <= 16 else None


def shapes_in(file: TorchFile, table: Any, what: str) -> dict[str, tuple[int, ...]]:
    """Shapes by names of parameters.

    Raises:
        CheckpointError: one is no shape, or no name.
    """
    shapes = {}
    for name, value in table_in(file, table, what).items():
        shape = _shape(value)
        if not isinstance(name, str) or not is_name(name) or shape is None:
            raise file.damaged(f"{what} has {called(name)}, which is no parameter's name and shape")
        shapes[name] = shape
    return shapes


def is_name(name: str) -> bool:
    """Whether a text may be the name of a parameter or buffer."""
    return 0 < len(name) <= _MOST_NAME and name.isprintable() and not {"/", "@"} & set(name)


def called(name: Any) -> str:
    """A name for messages; what is no text is not shown, as it may be of any depth."""
    return ascii(name)[:60] if isinstance(name, str) else f"a {type(name).__name__}"


def param_shapes(file: TorchFile, table: Mapping[Any, Any]) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of parameters by name, one table for each group, in their order.

    Raises:
        CheckpointError: they are not there, or a name stands twice.
    """
    given = table.get("param_shapes")
    if isinstance(given, dict):  # releases before groups were told apart
        given = [given]
    if not isinstance(given, list):
        raise file.damaged("it has no param_shapes, so that flat values have no names")
    groups = [shapes_in(file, group, "param_shapes") for group in given]
    names = [name for group in groups for name in group]
    if len(set(names)) != len(names):
        raise file.damaged("a parameter stands in two groups of param_shapes")
    return groups


def order_in(
    files: Sequence[TorchFile],
    tables: Sequence[Mapping[Any, Any]],
    number: int,
    shapes: dict[str, tuple[int, ...]],
) -> dict[str, tuple[int, ...]]:
    """The shapes of a group of stage 1 or 2 in the order of its flat values.

    With round_robin_gradients that is another order than that of the model, and what slices each
    rank has says it; releases that do not say it are taken to have the model's order.

    Raises:
        CheckpointError: slices are there, and not of these parameters.
    """
    names: dict[str, None] = {}
    for file, table in zip(files, tables, strict=True):
        groups = table.get("param_slice_mappings")
        if groups is None:
            if _is_round_robin(file):
                raise file.damaged("with round_robin_gradients it does not say their order")
            return shapes
        if not isinstance(groups, list) or number >= len(groups):
            raise file.damaged("its param_slice_mappings lack a group")
        names |= dict.fromkeys(table_in(file, groups[number], "param_slice_mappings"))
    if set(names) != set(shapes):
        raise files[0].damaged("its param_slice_mappings are not of the parameters it names")
    return {name: shapes[name] for name in names}


def _is_round_robin(file: TorchFile) -> bool:
    config = file.value.get("ds_config")
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return isinstance(zero, dict) and zero.get("round_robin_gradients") is True


def flat_tensors(file: TorchFile, values: Any, what: str) -> list[TensorAt]:
    """A list that has to be of flat tensors of floating-point values.

    Raises:
        CheckpointError: it is not.
    """
    if not isinstance(values, list):
        raise file.damaged(f"{what} is no list")
    tensors = [file.check(value, f"{what}[{at}]") for at, value in enumerate(values)]
    if any(len(t.shape) != 1 or not file.dtype(t).is_floating_point for t in tensors):
        raise file.damaged(f"{what} has tensors that are not flat")
    return tensors


def kept_in(file: TorchFile, value: Any, what: str) -> Kept:
    """A rank's part of an optimizer.

    Raises:
        CheckpointError: it is not in the form that torch's optimizers have.
    """
    if isinstance(value, list):
        raise file.damaged(f"{what} is of an elastic checkpoint (elastic_checkpoint)")
    table = table_in(file, value, what)
    state = table_in(file, table.get("state"), f"state of {what}")
    groups = table.get("param_groups")
    if not isinstance(groups, list):
        raise file.damaged(f"{what} has no param_groups")
    kept = Kept([], [], [], [])
    number = 0
    for group in groups:
        own = table_in(file, group, "a group of the optimizer")
        members = own.get("params")
        count = len(members) if isinstance(members, list) else -1
        if count < 0 or members != list(range(number, number + count)):
            raise file.damaged(f"{what} does not number its parameters one after the other")
        kept.members.append(list(range(number, number + count)))
        number += count
        kept.options.append(_options(file, own))
    if not all(type(key) is int and 0 <= key < number for key in state):
        raise file.damaged(f"{what} has states of parameters that it does not have")
    for at in range(number):
        _add_kept(file, kept, table_in(file, state.get(at, {}), f"state {at}"), at)
    return kept


def _options(file: TorchFile, group: Mapping[Any, Any]) -> dict[str, Any]:
    """The options of a group, as far as they are numbers, texts or none; a tensor of one number is.

    Raises:
        CheckpointError: a number is none.
    """
    options = {}
    for key, value in group.items():
        if not isinstance(key, str) or not key.isidentifier() or key == "params":
            continue
        if isinstance(value, TensorAt) and math.prod(value.shape) == 1:
            value = one_value(file, value, key)
        parts = value if isinstance(value, tuple | list) else [value]
        if all(part is None or isinstance(part, bool | int | float | str) for part in parts):
            numbers = [p for p in parts if isinstance(p, int | float)]
            if any(abs(n) >= 2**63 or not math.isfinite(n) for n in numbers):
                raise file.damaged(f"the option {called(key)} of its optimizer is no number")
            options[key] = value
    return options


def one_value(file: TorchFile, tensor: TensorAt, what: str) -> float:
    """The only value of a tensor.

    Raises:
        CheckpointError: it is not in the file.
    """
    file.check(tensor, what)
    one = torch.empty(1, dtype=file.dtype(tensor))
    file.read(tensor, 0, one)
    return float(one)


def _add_kept(file: TorchFile, kept: Kept, state: Mapping[Any, Any], at: int) -> None:
    tensors, step = {}, None
    for key, value in state.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise file.damaged(f"a state of the optimizer is called {called(key)}")
        if isinstance(value, TensorAt):
            if key == "step" and math.prod(value.shape) == 1:
                step = one_value(file, value, key)
            else:
                tensors[key] = file.check(value, f"{key} of state {at}")
        elif key == "step" and isinstance(value, int | float) and not isinstance(value, bool):
            step = float(value) if abs(value) < 2**53 else math.nan
    if step is not None and not (0 <= step < 2**53 and step == int(step)):
        raise file.damaged("its optimizer has a count of steps that is none")
    kept.tensors.append(tensors)
    kept.steps.append(step)
