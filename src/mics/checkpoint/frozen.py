"""A checkpoint without the parameters that do not train: is the model's own base the one it had?

Instead of a frozen parameter the manifest has a fingerprint of its values, see ``prints.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from mics.checkpoint.contents import Contents
from mics.checkpoint.differences import not_to_be
from mics.checkpoint.layout import MODEL
from mics.checkpoint.manifest import Manifest
from mics.checkpoint.names import frozen_names, parameter_names
from mics.checkpoint.peers import Peers
from mics.checkpoint.prints import print_of_part, whole_print
from mics.errors import CheckpointError
from mics.quantities import first_of


def prints_of(tensors: Mapping[str, torch.Tensor], peers: Peers) -> dict[str, str]:
    """The fingerprints of parameters, equal at any layout. Collective, for the same names.

    Raises:
        CheckpointError: on every rank: the values of one cannot be found, or ranks have others.
    """
    names = sorted(tensors)
    if not names:
        return {}
    parts = peers.together(lambda: [print_of_part(name, tensors[name]) for name in names])
    return {
        name: whole_print(name, tensors[name].shape, [of_rank[number] for of_rank in parts])
        for number, name in enumerate(names)
    }


def check_frozen(folder: Path, manifest: Manifest, model: nn.Module) -> None:
    """Check that what a checkpoint leaves out does not train in a model.

    Raises:
        CheckpointError: it does, so that it would need values that the checkpoint does not have.
    """
    here = {MODEL + name: MODEL + first for name, first in parameter_names(model)[0].items()}
    frozen = frozen_names(model)
    trained = [name for name in manifest.frozen if name in here and here[name] not in frozen]
    if trained:
        raise CheckpointError(
            f"{folder} was saved without its frozen parameters, and some of them train here.",
            numbers=f"{len(trained)} of {len(manifest.frozen)}: {first_of(trained)}.",
            write="requires_grad_(False) on them until the load has ended, or a checkpoint that "
            "was saved with frozen=True",
        )


def check_base(folder: Path, manifest: Manifest, contents: Contents, peers: Peers) -> None:
    """Compare a model's own frozen parameters with those that a checkpoint was saved beside.

    Collective.

    Raises:
        CheckpointError: on every rank: they have other values.
    """
    own = {name: contents.aliases.get(name, name) for name in manifest.frozen}
    strange = [name for name, first in own.items() if first not in contents.left_out]
    if strange:
        raise not_to_be(folder, strange[0], "It was left out, and is no tensor here")
    wanted = {first: contents.left_out[first] for first in own.values()}
    here = prints_of(wanted, peers)
    others = [name for name, print in manifest.frozen.items() if print != here[own[name]]]
    if others:
        raise CheckpointError(
            f"{folder} was saved without its frozen parameters, and this model has others.",
            numbers=f"{len(others)} of {len(manifest.frozen)} differ: {first_of(others)}. The "
            f"first was {manifest.frozen[others[0]]}, and is {here[own[others[0]]]}.",
            write="the weights that it was trained on into the model before mics.load, in the same "
            "dtype and quantised alike, or a checkpoint that was saved with frozen=True",
        )
