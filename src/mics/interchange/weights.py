"""Pretrained weights into a sharded model, each rank reading only its own slices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mics.checkpoint.contents import Contents, contents_of
from mics.checkpoint.layout import MODEL, of_kind
from mics.checkpoint.manifest import Entry
from mics.checkpoint.reading import read_tensors
from mics.errors import CheckpointError
from mics.interchange.pretrained import read_entries
from mics.ranks.console import say

_MOST_NAMED = 3


def load_weights(model: nn.Module, folder: Path) -> None:
    """Fill a model, sharded or not, from the safetensors of a transformers folder.

    Values are converted to the parameters' dtypes. Of tied parameters one name is enough. Tensors
    that the model has no place for (another head) are said and left out.

    Args:
        model: a transformers model.
        folder: one with ``model.safetensors``, or several and their index.

    Raises:
        CheckpointError: parameters are missing there, or have other shapes.
    """
    contents = contents_of(model, None)
    found, unused = match_weights(folder, read_entries(folder), model, contents)
    if unused:
        say(f"{len(unused)} tensor(s) of {folder} have no place in the model{_named(unused)}")
    read_tensors(folder, found, of_kind(MODEL, contents.tensors))


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
        CheckpointError: parameters are missing there, or have other shapes.
    """
    wanted = of_kind(MODEL, contents.tensors)
    ties = {
        name: first.removeprefix(MODEL) for name, first in of_kind(MODEL, contents.aliases).items()
    }
    prefix = str(getattr(model, "base_model_prefix", ""))
    found = _match_names(entries, set(wanted), ties, prefix)
    _check_complete(folder, wanted, found)
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


def _named(names: set[str]) -> str:
    more = ", ..." if len(names) > _MOST_NAMED else ""
    return f" ({', '.join(sorted(names)[:_MOST_NAMED])}{more})"
