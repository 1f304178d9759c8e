"""What is kept of a model and its optimizers, back into them: checked first, then changed.

Where the values come from is a ``Source``: the files of a checkpoint, or the memory of a node.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from mics.checkpoint.averages import plan_average, restore_updates
from mics.checkpoint.contents import contents_of
from mics.checkpoint.frozen import check_frozen
from mics.checkpoint.held_back import HeldBackRestoring, plan_held_back
from mics.checkpoint.manifest import Manifest
from mics.checkpoint.model_restoring import ModelRestoring
from mics.checkpoint.optimizer_restoring import Restoring, plan_optimizers, restore_optimizers
from mics.checkpoint.optimizers import Optimizers, list_optimizers
from mics.checkpoint.peers import Peers
from mics.errors import CheckpointError
from mics.sharding.average import EMA

_CHANGED = "Model and optimizer may have been changed in part."


class Source(Protocol):
    """Where the values of tensors are, by their names in the manifest."""

    def check(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Raise where ``read`` could not fill these.

        Raises:
            CheckpointError: what is there is of another dtype or shape.
        """

    def read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill tensors in place, each rank its own part.

        Raises:
            CheckpointError: a value cannot be read.
        """


@dataclass(frozen=True)
class Restoration:
    """What is to be read into what, when what was kept has been compared with it."""

    name: Path
    manifest: Manifest
    model: ModelRestoring
    optimizers: Restoring
    ema: EMA | None
    averages: Mapping[str, torch.Tensor]
    held_back: HeldBackRestoring

    def carry_out(
        self, source: Source, peers: Peers, *, beside: Callable[[], None] = lambda: None
    ) -> None:
        """Read everything, and let model and optimizers load it. Collective.

        Args:
            source: where the values are.
            peers: all ranks that restore.
            beside: what else is read before anything is changed.

        Raises:
            CheckpointError: on every rank; nothing is changed yet, or it says so.
        """

        def read_early() -> None:
            source.check(self._late())
            source.check(self.model.early)
            beside()
            source.read(self.model.early)
            self.model.check_early()

        peers.together(read_early)
        try:
            peers.together(self.model.try_hooks)
        except CheckpointError:
            self.model.put_back()
            raise
        try:
            peers.together(lambda: self._finish(source))
        except CheckpointError as error:
            raise CheckpointError(
                error.what,
                numbers=f"{error.numbers} {_CHANGED}".strip(),
                write=error.write,
            ) from None

    def _finish(self, source: Source) -> None:
        self.held_back.clear()
        source.read(self._late())
        self.model.finish()
        restore_optimizers(self.optimizers)
        if self.ema is not None:
            restore_updates(self.manifest, self.ema)

    def _late(self) -> dict[str, torch.Tensor]:
        others = {**self.averages, **self.held_back.tensors}
        return self.model.late | self.optimizers.tensors | others


def plan_restoration(
    name: Path,
    manifest: Manifest,
    model: nn.Module,
    optimizer: Optimizers | None,
    ema: EMA | None,
) -> Restoration:
    """Compare what was kept with a model and its optimizers; nothing is changed.

    Args:
        name: of what was kept, for messages.
        manifest: what was kept.
        model: it is to be restored into.
        optimizer: its optimizer, or several.
        ema: its moving average.

    Raises:
        CheckpointError: it is of another model, optimizer or average.
    """
    check_frozen(name, manifest, model)
    contents = contents_of(model, None, without=manifest.frozen)
    return Restoration(
        name,
        manifest,
        ModelRestoring(name, manifest, model, contents),
        plan_optimizers(name, manifest, model, list_optimizers(optimizer)),
        ema,
        plan_average(name, manifest, model, ema),
        plan_held_back(name, manifest, model),
    )
