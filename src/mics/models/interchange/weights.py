"""Pretrained weights into a sharded model, each rank reading only its own slices."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.tensor import DTensor

from mics.checkpoint.adapters import adapters_of
from mics.checkpoint.contents import Contents, contents_of
from mics.checkpoint.layout import ADAPTERS, ASSETS, MODEL, of_kind
from mics.checkpoint.manifest import Entry
from mics.checkpoint.reading import read_tensors
from mics.errors import CheckpointError
from mics.models.interchange.pretrained import read_entries
from mics.ranks.console import alarm, say
from mics.ranks.device import communication_device, default_device_type

_MOST_NAMED = 3
_ADAPTED = ".base_layer."  # what peft calls the layer that an adapter was put around
_ROWS = 4096  # of a tied parameter that are compared at once


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model, sharded or not, from the safetensors of a transformers folder.

    Values are converted to the parameters' dtypes. Of tied parameters one name is enough. Tensors
    that the model has no place for (another head) are said and left out. Adapters of peft keep the
    values they have.

    Args:
        model: a transformers model.
        folder: one with ``model.safetensors``, or several and their index.

    Raises:
        CheckpointError: parameters are missing there, or have other shapes.
    """
    contents = _of_base(model, contents_of(model, None))
    found, unused = match_weights(folder, read_entries(folder), model, contents)
    if unused:
        say(f"{len(unused)} tensor(s) of {folder} have no place in the model{_named(unused)}")
    tensors = of_kind(MODEL, contents.tensors)
    read_tensors(folder, found, tensors)
    say_not_finite(folder, _not_finite(tensors))


def _of_base(model: nn.Module, contents: Contents) -> Contents:
    """What the model has without its adapters, by the names it has without them."""
    told = adapters_of(model)
    if not told:
        return contents
    adapters = json.loads(told[ADAPTERS.removeprefix(ASSETS)])["adapters"].values()
    beside = {MODEL + name for one in adapters for name in one["tensors"].values()}
    tensors = {
        name.replace(_ADAPTED, "."): tensor
        for name, tensor in contents.tensors.items()
        if name not in beside
    }
    aliases = {
        name.replace(_ADAPTED, "."): first.replace(_ADAPTED, ".")
        for name, first in contents.aliases.items()
    }
    return replace(contents, tensors=tensors, aliases=aliases)


def match_weights(
    folder: Path, entries: Mapping[str, Entry], model: nn.Module, contents: Contents
) -> tuple[dict[str, Entry], set[str]]:
    """Find the tensors of a model in a transformers folder.

    Args:
        folder: one with safetensors.
        entries: the folder's.
        model: ``base_model_prefix`` is added to names that lack it, where that makes them fit.
        contents: the model's.

    Returns:
        The entries by the model's names, and the names that the model has no place for.

    Raises:
        CheckpointError: parameters are missing there, have other shapes or whole numbers instead
            of floating-point ones, or tied ones differ.
    """
    wanted = of_kind(MODEL, contents.tensors)
    ties = {
        name: first.removeprefix(MODEL) for name, first in of_kind(MODEL, contents.aliases).items()
    }
    prefix = str(getattr(model, "base_model_prefix", ""))
    found = _match_names(entries, set(wanted), ties, prefix)
    _check_complete(folder, wanted, found)
    _check_ties(folder, entries, ties, found)
    unused = set(entries) - {entry.chunks[0].key for entry in found.values()} - set(ties)
    return found, unused


def _match_names(
    entries: Mapping[str, Entry], wanted: set[str], ties: Mapping[str, str], prefix: str
) -> dict[str, Entry]:
    """The entries by the model's names, as far as they are there.

    Args:
        entries: what the file has, by its own names.
        wanted: the model's names, one of each tied parameter.
        ties: the other names of tied parameters, to the one in ``wanted``.
        prefix: what names of the file may lack, because a bare encoder was saved.
    """
    found = {name: entries[name] for name in wanted if name in entries}
    for name, first in ties.items():
        if first not in found and name in entries:
            found[first] = entries[name]
    if prefix and not any(name.startswith(f"{prefix}.") for name in entries):
        for name in wanted - set(found):
            bare = name.removeprefix(f"{prefix}.")
            if bare != name and bare in entries:
                found[name] = entries[bare]
    return found


def _check_complete(
    folder: Path, wanted: Mapping[str, torch.Tensor], found: Mapping[str, Entry]
) -> None:
    """Check that every parameter has an entry of its shape.

    Raises:
        CheckpointError: names the first ones missing, or of another shape.
    """
    missing = set(wanted) - set(found)
    if missing:
        raise CheckpointError(
            f"{folder} is of another model: parameters are missing.",
            numbers=f"{len(missing)} of {len(wanted)} are not there{_named(missing)}.",
            write="--model.name of the model that these weights are of",
        )
    shapes = [
        f"{name} is {list(found[name].shape)} there, {list(tensor.shape)} here"
        for name, tensor in sorted(wanted.items())
        if found[name].shape != tuple(tensor.shape)
    ]
    if shapes:
        raise CheckpointError(
            f"{folder} is of another model: shapes differ.",
            numbers=f"{len(shapes)} of {len(wanted)}: {'; '.join(shapes[:_MOST_NAMED])}.",
            write="--model.name of the model that these weights are of, and its tokenizer",
        )

    others = [
        f"{name} is {found[name].dtype}"
        for name, tensor in sorted(wanted.items())
        if tensor.dtype.is_floating_point != found[name].torch_dtype.is_floating_point
    ]
    if others:
        raise CheckpointError(
            f"{folder} holds whole numbers where the model has floating-point ones, or the other "
            "way round.",
            numbers=f"{len(others)} of {len(wanted)}: {'; '.join(others[:_MOST_NAMED])}.",
            write="the weights of the model before it was quantised",
        )


def _check_ties(
    folder: Path,
    entries: Mapping[str, Entry],
    ties: Mapping[str, str],
    found: Mapping[str, Entry],
) -> None:
    """Check that tied parameters that stand there twice are the same, slice by slice.

    Raises:
        CheckpointError: they differ; the model would take one for the other.
    """
    for name, first in ties.items():
        second = entries.get(name)
        if second is None or second.chunks[0] == found[first].chunks[0]:
            continue
        if not _equal(folder, found[first], second):
            raise CheckpointError(
                f"{first} and {name} are one parameter in the model, and differ in {folder}.",
                write='"tie_word_embeddings": false in its config.json, where they are two',
            )


def _equal(folder: Path, one: Entry, other: Entry) -> bool:
    if one.shape != other.shape:
        return False
    with ExitStack() as opened:
        slices = [
            opened.enter_context(safe_open(folder / e.chunks[0].file, framework="pt")).get_slice(
                e.chunks[0].key
            )
            for e in (one, other)
        ]
        rows = one.shape[0] if one.shape else 0
        return all(
            torch.equal(*(part[at : at + _ROWS] for part in slices)) for at in range(0, rows, _ROWS)
        )


def say_not_finite(folder: Path, names: set[str]) -> None:
    """Say which tensors of a folder hold values that are no numbers, if any."""
    if names:
        alarm(f"{len(names)} tensor(s) of {folder} hold NaN or infinity{_named(names)}.")


def _not_finite(tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Names of tensors that are not finite on some rank. Collective, where there are ranks."""
    local = [t.to_local() if isinstance(t, DTensor) else t for t in tensors.values()]
    if not local:
        return set()
    bad = torch.stack([(~t.detach().isfinite()).any().to(torch.int32).cpu() for t in local])
    if dist.is_initialized():
        bad = bad.to(communication_device(default_device_type()))
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    return {name for name, each in zip(tensors, bad.tolist(), strict=True) if each}


def _named(names: set[str]) -> str:
    more = ", ..." if len(names) > _MOST_NAMED else ""
    return f" ({', '.join(sorted(names)[:_MOST_NAMED])}{more})"
