"""Plain names: those that a model's parameters and buffers have without wrappers around parts."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from mics.checkpoint.layout import MODEL
from mics.errors import CheckpointError

_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")
"""What ``torch.compile`` and torch's checkpoint wrapper call the module inside of them."""

_EXTRA_STATE = "_extra_state"
"""What torch calls the value of ``get_extra_state`` in a ``state_dict``."""


def is_extra_state(name: str) -> bool:
    """Whether a name is that of what ``get_extra_state`` of a module returned."""
    return name.replace("/", ".").rpartition(".")[2] == _EXTRA_STATE


def plain_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """The plain name of each name of a model's ``state_dict`` or ``named_parameters``.

    Raises:
        CheckpointError: two of them have the same plain name.
    """
    inside = {
        unwrapped(f"{name}.module" if name else "module")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, DistributedDataParallel | DataParallel)
    }
    plain = {name: _outside(unwrapped(name), inside) for name in names}
    by_plain: dict[str, str] = {}
    for name, short in plain.items():
        other = by_plain.setdefault(short, name)
        if other != name:
            raise CheckpointError(
                f"The model cannot be saved under plain names: two of its names are {short}.",
                numbers=f"They are {other} and {name}.",
                write="other names for its modules",
            )
    return plain


def parameter_names(model: nn.Module) -> tuple[dict[str, str], dict[int, str]]:
    """Plain names of parameters. A tied one has several, and is kept under the first.

    Returns:
        The first name of each name, and the first name of each parameter by its id.

    Raises:
        CheckpointError: two parameters have the same plain name.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    plain = plain_names(model, parameters)
    firsts: dict[int, str] = {}
    first_of = {
        plain[name]: firsts.setdefault(id(param), plain[name]) for name, param in parameters.items()
    }
    return first_of, firsts


def frozen_names(model: nn.Module) -> set[str]:
    """The parameters that do not train, by their names in the manifest; of a tied one the first."""
    firsts = parameter_names(model)[1]
    return {MODEL + firsts[id(p)] for p in model.parameters() if not p.requires_grad}


def unwrapped(name: str) -> str:
    """A name without what torch's wrappers add to it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def _outside(name: str, inside: set[str]) -> str:
    """The name without the steps into a data-parallel wrapper."""
    if not inside:
        return name
    parts = name.split(".")
    return ".".join(
        part for at, part in enumerate(parts) if ".".join(parts[: at + 1]) not in inside
    )
