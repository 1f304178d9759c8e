"""Pretrained weights into a sharded model, each rank reading only its own slices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mics.checkpoint.contents import contents_of
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
        model: a transformers model; ``base_model_prefix`` is added to names that lack it, where
            that makes them fit.
        folder: with ``model.safetensors``, or several and their index.

    Raises:
        CheckpointError: parameters are missing there, or have other shapes.
    """
    entries = read_entries(folder)
    contents = contents_of(model, None)
    wanted = {name.removeprefix("model/"): tensor for name, tensor in contents.tensors.items()}
    ties = {
        name.removeprefix("model/"): first.removeprefix("model/")
        for name, first in contents.aliases.items()
    }
    found = match_names(entries, set(wanted), ties, str(getattr(model, "base_model_prefix", "")))
    check_complete(folder, wanted, found)
    unused = set(entries) - {entry.chunks[0].key for entry in found.values()} - set(ties)
    if unused:
        say(f"{len(unused)} tensor(s) of {folder} have no place in the model{_named(unused)}")
    read_tensors(folder, found, wanted)


def match_names(
    entries: Mapping[str, Entry], wanted: set[str], ties: Mapping[str, str], prefix: str
) -> dict[str, Entry]:
    """The entries by the model's names, as far as they are there.

    Args:
        entries: by the names of the file.
        wanted: the model's names, one of each tied parameter.
        ties: the other names of tied parameters, to the one in ``wanted``.
        prefix: that names of the file may lack, because a bare encoder was saved.
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


def check_complete(
    folder: Path, wanted: Mapping[str, torch.Tensor], found: Mapping[str, Entry]
) -> None:
    """Refuse what would leave a parameter as it is.

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
