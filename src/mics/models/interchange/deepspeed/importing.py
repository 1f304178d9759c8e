"""A checkpoint of DeepSpeed as one of ours, written one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mics.checkpoint.contents import contents_of
from mics.checkpoint.disk import write_bytes, write_manifest
from mics.checkpoint.layout import MODEL, chunk_key, file_of
from mics.checkpoint.manifest import Json, Manifest, whole_entry
from mics.checkpoint.optimizers import GROUPS, STATE
from mics.checkpoint.values import encode
from mics.errors import CheckpointError
from mics.models.building import build, load_config
from mics.models.interchange.deepspeed.folder import find_files
from mics.models.interchange.deepspeed.states import States, read_states
from mics.models.interchange.importing import Imported, files_to_keep, plain_names_of
from mics.models.interchange.new_folder import check_new, new_folder
from mics.models.interchange.stream import write_stream
from mics.models.interchange.weights import match_weights
from mics.models.small_files import CONFIG, left_behind, usual_that_lack
from mics.quantities import dtype_name
from mics.ranks.console import ShowBytes

_ADAM = {"exp_avg", "exp_avg_sq"}
_ADAM_AND_MORE = _ADAM | {"max_exp_avg_sq"}


def import_deepspeed(
    folder: Path, out: Path, *, dtype: torch.dtype | None, told: ShowBytes
) -> tuple[Imported, States]:
    """Write a checkpoint from what DeepSpeed's ``save_checkpoint`` wrote, optimizer state included.

    Weights are those in fp32 that its optimizer steps. Nothing in the files is executed. Memory is
    that of one tensor. With a ``config.json`` in the folder, as the Trainer of transformers leaves
    it, names and shapes are compared with the model, and its small files come along.

    Args:
        folder: one with ``latest``, or with ``*_states.pt``.
        out: the checkpoint's folder, to be made.
        dtype: the dtype of floating-point weights; ``None`` keeps theirs.
        told: is called as the work goes on.

    Returns:
        What was left out, and what was found.

    Raises:
        CheckpointError: files are missing, damaged, or name what no checkpoint needs; it is of
            another model than its ``config.json``, or ``out`` exists.
        ConfigError: ``config.json`` or another small file cannot be read.
    """
    check_new(out)
    found = find_files(folder)
    states = read_states(found)
    if not states.weights:
        raise CheckpointError(f"{found.folder} holds no weights.", write="a folder with weights")
    files: dict[str, bytes] = {}
    if (found.around / CONFIG).is_file():
        _match(found.around, states)
        files = files_to_keep(found.around)
    code = left_behind(found.around) if files else []
    tensors = _tensors(states, dtype)
    with new_folder(out) as making:
        facts, bad = write_stream(
            making / file_of(0),
            [(_key_of(name, shape), kind, shape) for name, (kind, shape, _) in tensors.items()],
            _Reader(tensors, told),
        )
        written = {name: write_bytes(making / name, data) for name, data in files.items()}
        manifest = _manifest(states, tensors, ascii(found.folder.name)[1:-1])
        manifest.files.update({file_of(0): facts, **written})
        write_manifest(making, manifest)
    not_finite = [name for name, (_, shape, _) in tensors.items() if _key_of(name, shape) in bad]
    lacking = usual_that_lack(plain_names_of(files)) if files else [CONFIG]
    bare = [name.removeprefix(MODEL) for name in not_finite]
    return Imported(states.left_out, bare, code, lacking), states


_Tensor = tuple[torch.dtype, tuple[int, ...], Callable[[], torch.Tensor]]


class _Reader:
    """Reads the tensors by their keys, one after the other, and shows how far it has come."""

    def __init__(self, tensors: Mapping[str, _Tensor], told: ShowBytes) -> None:
        self._by_key = {_key_of(name, tensor[1]): tensor for name, tensor in tensors.items()}
        self._told, self._done = told, 0
        self._total = sum(map(_num_bytes, tensors.values()))

    def __call__(self, key: str) -> torch.Tensor:
        tensor = self._by_key[key]
        value = tensor[2]()
        self._done += _num_bytes(tensor)
        self._told("writing", self._done, self._total)
        return value


def _num_bytes(tensor: _Tensor) -> int:
    return math.prod(tensor[1]) * tensor[0].itemsize


def _key_of(name: str, shape: tuple[int, ...]) -> str:
    return chunk_key(name, (0,) * len(shape))


def _manifest(states: States, tensors: Mapping[str, _Tensor], name: str) -> Manifest:
    """The table of contents, as yet without files."""
    return Manifest(
        world=1,
        partition=1,
        tensors={
            each: whole_entry(dtype_name(dtype), shape, file_of(0), _key_of(each, shape))
            for each, (dtype, shape, _) in tensors.items()
        },
        aliases={MODEL + tied: MODEL + first for tied, first in states.tied.items()},
        values=_values(states),
        extra={
            "step": states.step,
            "position": 0,
            "tokens": 0,
            "data": f"imported from {name}",
        },
        files={},
    )


def _tensors(states: States, dtype: torch.dtype | None) -> dict[str, _Tensor]:
    """Every tensor of the checkpoint by its name in the manifest."""
    tensors: dict[str, _Tensor] = {}
    for name, pieces in states.weights.items():
        change = dtype is not None and pieces.dtype.is_floating_point
        kind = dtype if change and dtype is not None else pieces.dtype
        tensors[MODEL + name] = (kind, pieces.shape, pieces.read)
    for (name, key), pieces in states.moments.items():
        tensors[f"{STATE}{name}.{key}"] = (pieces.dtype, pieces.shape, pieces.read)
    for name, step in states.steps.items():
        tensors[f"{STATE}{name}.step"] = (torch.float32, (), partial(torch.tensor, step))
    return tensors


def _values(states: States) -> dict[str, Json]:
    """The options of every parameter's group, Adam's under the names that torch's has."""
    keys = {key for _, key in states.moments}
    adam = _ADAM <= keys <= _ADAM_AND_MORE
    values: dict[str, Json] = {}
    for name, options in states.options.items():
        for option, value in (_as_adamw(options, keys) if adam else options).items():
            prefix = f"{GROUPS}{name}.{option}"
            values[prefix] = encode(prefix, value)
    return values


def _as_adamw(options: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """The options that torch's AdamW has; those of DeepSpeed's own Adam alone have no place."""
    usual = torch.optim.AdamW([torch.zeros(1)]).param_groups[0]
    table = {key: options.get(key, value) for key, value in usual.items() if key != "params"}
    table["amsgrad"] = "max_exp_avg_sq" in keys
    for key, value in table.items():
        number = isinstance(usual[key], int | float) and not isinstance(usual[key], bool)
        if number and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise CheckpointError(
                f"The option {key} of the optimizer is no number.", write="the optimizer's own file"
            )
    betas = table["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise CheckpointError("The betas of the optimizer are not two.", write="two of them")
    table["betas"] = tuple(betas)
    return table


def _match(folder: Path, states: States) -> None:
    """Compare with the model of ``config.json``, and take on its names and its tied parameters."""
    model = build(load_config(str(folder), vocabulary=1, separator=0))
    contents = contents_of(model, None)
    entries = {
        name: whole_entry(dtype_name(pieces.dtype), pieces.shape, "", name)
        for name, pieces in states.weights.items()
    }
    matched, unused = match_weights(folder, entries, model, contents)
    ours = {entry.chunks[0].key: name for name, entry in matched.items()}
    states.left_out += sorted(unused)
    states.weights = {ours[n]: p for n, p in states.weights.items() if n in ours}
    states.moments = {(ours[n], k): p for (n, k), p in states.moments.items() if n in ours}
    states.steps = {ours[n]: step for n, step in states.steps.items() if n in ours}
    states.options = {ours[n]: o for n, o in states.options.items() if n in ours}
    states.tied = {
        name.removeprefix(MODEL): first.removeprefix(MODEL)
        for name, first in contents.aliases.items()
    }
