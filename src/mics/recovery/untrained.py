"""Parameters that do not train: left out of a state as long as a new process has the same values.

[Note: what others write]
Such a parameter may train later, or be written by the program itself, as a teacher that follows its
student is. Then it is kept like any other from there on. It is seen by torch's counter of writes,
at every state; a write that torch does not count (of many tensors in one call, or below the shard)
by fingerprints of the values, at the first state and whenever their number has doubled.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mics import compat
from mics.checkpoint.frozen import prints_of
from mics.checkpoint.layout import MODEL
from mics.checkpoint.names import parameter_names
from mics.checkpoint.peers import Peers


class Untrained:
    """The parameters of a model that did not train when this was made. Collective when made.

    Args:
        model: they are its.
        values: of these parameters, by their names in the manifest.
        peers: all ranks.
    """

    def __init__(self, model: nn.Module, values: Mapping[str, torch.Tensor], peers: Peers) -> None:
        self._prints = prints_of(values, peers)
        names = parameter_names(model)[1]
        params = {MODEL + names[id(param)]: param for param in model.parameters()}
        self._left = {name: params[name] for name in values}
        self._times = {name: compat.times_written(p) for name, p in self._left.items()}
        self._states = 0

    def prints(self) -> dict[str, str]:
        """The fingerprints of what is left out now, by name."""
        for name, param in list(self._left.items()):
            if param.requires_grad or compat.times_written(param) != self._times[name]:
                del self._left[name]
        return {name: self._prints[name] for name in self._left}

    def is_due(self) -> bool:
        """Whether values are to be compared now, see [Note: what others write]."""
        self._states += 1
        return bool(self._left) and self._states & (self._states - 1) == 0

    def compare(self, values: Mapping[str, torch.Tensor], peers: Peers) -> None:
        """Find those that have other values than at the beginning. Collective.

        Args:
            values: of all that did not train then.
            peers: all ranks.
        """
        for name, found in prints_of({n: values[n] for n in self._left}, peers).items():
            if found != self._prints[name]:
                del self._left[name]
            else:
                self._times[name] = compat.times_written(self._left[name])
