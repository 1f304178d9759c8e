"""The state of a model from a checkpoint, by the model's own ``load_state_dict`` and its hooks.

What can be read in place is: ``state_dict`` gives the tensors in use. What cannot is read before
anything is changed: extra states, tensors whose cells share memory, and a second copy of a
parameter that is tied here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mics import compat
from mics.checkpoint.contents import Contents
from mics.checkpoint.differences import MOST_NAMED, differ, not_to_be
from mics.checkpoint.layout import MODEL
from mics.checkpoint.manifest import Entry, Manifest
from mics.checkpoint.names import is_extra_state
from mics.checkpoint.values import decode
from mics.errors import CheckpointError
from mics.quantities import dtype_name
from mics.sharding.tensor_parts import values_of


class ModelRestoring:
    """A model that is about to load a checkpoint; made, it has only been compared with it.

    ``contents`` is its state now. ``early`` are the tensors to be read before anything is changed,
    ``late`` those that are read in place, by their names in the manifest; ``copies`` are those of
    ``early`` that are read under other names, because two names are one tensor here.

    Args:
        folder: the checkpoint, for messages.
        manifest: its table of contents.
        model: the model.
        contents: its state.

    Raises:
        CheckpointError: the checkpoint is of another model, or has values that cannot be.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, model: nn.Module, contents: Contents
    ) -> None:
        self._folder, self._model, self.contents = folder, model, contents
        self.early: dict[str, torch.Tensor] = {}
        self.late: dict[str, torch.Tensor] = {}
        here = {name: t for name, t in contents.tensors.items() if name.startswith(MODEL)}
        self._copies = _check_names(folder, manifest, contents)
        _check_shapes(folder, manifest.tensors, here)
        self._values: dict[str, Any] = {}
        names = contents.keys.values()
        self._anew = {n for n in names if is_extra_state(n) or n in contents.values}
        for name in sorted(self._anew):
            self._plan_anew(name, manifest)
        for name, tensor in here.items():
            if name in self._anew:
                continue
            if _overlaps(tensor):
                self.early[name] = torch.empty(tensor.shape, dtype=tensor.dtype)
            else:
                self.late[name] = tensor
        for name, first in self._copies.items():
            for each in (name, first):
                self.early[each] = torch.empty_like(here[first])

    def _plan_anew(self, name: str, manifest: Manifest) -> None:
        if name in manifest.tensors:
            entry = manifest.tensors[name]
            now = self.contents.tensors.get(name)
            device = now.device if now is not None else "cpu"
            self.early[name] = torch.empty(entry.shape, dtype=entry.torch_dtype, device=device)
            return
        try:
            self._values[name] = decode(manifest.values[name])
        except (ValueError, TypeError, RecursionError) as error:
            raise not_to_be(self._folder, name, str(error)) from None

    def check_early(self) -> None:
        """Raise where what was read of ``early`` does not fit into the model.

        Raises:
            CheckpointError: cells that share memory here differ there, or tied parameters do.
        """
        for name, first in self._copies.items():
            if not _same(compat.local_of(self.early[name]), compat.local_of(self.early[first])):
                raise CheckpointError(
                    f"{self._folder} is of another model: other parameters are tied.",
                    numbers=f"{name} and {first} are one here, and differ there.",
                    write="the model it was saved from",
                )
        for name, value in self.early.items():
            now = self.contents.tensors.get(name)
            if now is None or not _overlaps(now) or name in self._anew:
                continue
            if not _same(_one_of_each(value, now).expand_as(value), value):
                raise CheckpointError(
                    f"{self._folder} is of another model: {name} is expanded here, so that cells "
                    "share memory, and they differ there.",
                    write=f"{name}.clone() where the model is built",
                )

    def try_hooks(self) -> None:
        """Let the model load its own tensors and the new extra states, as a trial.

        Raises:
            CheckpointError: it refuses; ``put_back`` undoes what it took.
        """
        try:
            self._load(self._values | {n: t for n, t in self.early.items() if n in self._anew})
        except Exception as error:  # hooks and modules of the user's raise what they like
            raise CheckpointError(
                f"The model does not load the state of {self._folder}.",
                numbers=f"{type(error).__name__}: {str(error)[:500]}",
                write="a model whose load_state_dict takes what its state_dict gives",
            ) from None

    def put_back(self) -> None:
        """Undo a trial that failed, here or on another rank."""
        with contextlib.suppress(Exception):  # it has been told what is wrong
            self._load({})

    def finish(self) -> None:
        """Let the model load everything, when it has been read."""
        with torch.no_grad():
            for name, value in self.early.items():
                now = self.contents.tensors.get(name)
                if now is not None and _overlaps(now) and name not in self._anew:
                    _one_of_each(now, now).copy_(_one_of_each(value, now))
        self._load(self._values | {n: t for n, t in self.early.items() if n in self._anew})

    def _load(self, extra: Mapping[str, Any]) -> None:
        """The model's ``load_state_dict``, of the tensors in use and of extra states."""
        contents = self.contents
        state = contents.state.copy()  # torch's own class, with the versions of the modules
        left_out: list[str] = []
        spread = {n for n, value in contents.left_out.items() if values_of(value) is None}
        for key, name in contents.keys.items():
            if name in extra:
                state[key] = extra[name]
            elif name in spread:
                left_out.append(key)  # the model's own stay, and could not be copied
                del state[key]
            elif isinstance(state[key], torch.Tensor) and _overlaps(state[key]):
                left_out.append(key)  # torch cannot copy into it
                del state[key]
        self._model.load_state_dict(state, strict=not left_out)


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether cells of a tensor are one in memory, because it was expanded."""
    if isinstance(tensor, DTensor) or tensor.layout is not torch.strided:
        return False
    return any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    )


def _one_of_each(tensor: torch.Tensor, expanded: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that holds every cell of ``expanded``, of the same shape, once."""
    for dim, step in enumerate(expanded.stride()):
        if step == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(((one == other) | ((one != one) & (other != other))).all())


# -- is it of this model ---------------------------------------------------------------------------


def _check_names(folder: Path, manifest: Manifest, contents: Contents) -> dict[str, str]:
    """Raise where names or ties differ; return what is tied here and was kept twice there."""
    there = _names(manifest.tensors, manifest.aliases, manifest.values, manifest.frozen)
    here = set(contents.keys.values())
    if there != here:
        raise CheckpointError(
            f"{folder} is of another model: names differ.",
            numbers=differ(there, here),
            write="the model it was saved from",
        )
    tied_there, tied_here = _ties(manifest.aliases), _ties(contents.aliases)
    # Of what is left out only the fingerprints can be compared, and they are.
    tied_here = {
        name: first
        for name, first in tied_here.items()
        if not {name, first} <= manifest.frozen.keys()
    }
    twice = {n: first for n, first in tied_here.items() if n not in tied_there}
    if tied_there != {n: first for n, first in tied_here.items() if n not in twice} or any(
        name not in manifest.tensors
        or (manifest.tensors[name].shape, manifest.tensors[name].dtype)
        != (manifest.tensors[first].shape, manifest.tensors[first].dtype)
        for name, first in twice.items()
    ):
        raise CheckpointError(
            f"{folder} is of another model: other parameters are tied.",
            numbers=f"There {tied_there}, here {tied_here}.",
            write="the model it was saved from",
        )
    return twice


def _check_shapes(
    folder: Path, there: Mapping[str, Entry], here: Mapping[str, torch.Tensor]
) -> None:
    compared = {name: tensor for name, tensor in here.items() if not is_extra_state(name)}
    missing = [name for name in compared if name not in there]
    if missing:
        raise not_to_be(folder, missing[0], "It is a tensor here, and none there")
    differences = [
        f"{name} is {_shown(there[name].dtype, there[name].shape)} there, "
        f"{_shown(dtype_name(tensor.dtype), tuple(tensor.shape))} here"
        for name, tensor in compared.items()
        if there[name].shape != tuple(tensor.shape) or there[name].torch_dtype != tensor.dtype
    ]
    if differences:
        shapes_fit = all(there[name].shape == tuple(t.shape) for name, t in compared.items())
        raise CheckpointError(
            f"{folder} is of another model: shapes or dtypes differ.",
            numbers=f"{len(differences)} of {len(here)} tensors: "
            f"{'; '.join(differences[:MOST_NAMED])}.",
            write="the model in the dtype it was saved in, or `mics import --dtype fp32` where it "
            "was imported"
            if shapes_fit
            else "the model it was saved from",
        )


def _names(*tables: Mapping[str, Any]) -> set[str]:
    return {name for table in tables for name in table if name.startswith(MODEL)}


def _ties(aliases: Mapping[str, str]) -> dict[str, str]:
    return {name: first for name, first in aliases.items() if name.startswith(MODEL)}


def _shown(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"
