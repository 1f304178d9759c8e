"""Packed sequences in an endless order, as batches of inputs and labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from mics.training.data.order import sequence_at
from mics.training.data.shards import Shards

IGNORED = -100
"""The label of a token that is not to be predicted."""


Tokens = Shards | NDArray[np.unsignedinteger]
"""Ids in a row, indexed as an array of numpy is."""


@dataclass(frozen=True)
class Batch:
    """``inputs`` and ``labels``, int64 of shape [sequences, length]; labels are aligned to inputs.

    ``labels[i, j]`` is what the model should predict at ``inputs[i, j]``: the next token, the token
    behind a mask, or ``IGNORED``. ``positions``, of the same shape, begin at 0 anew for every text
    of a row that must not see those before it; ``None``: a row is one text.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None = None

    @property
    def num_targets(self) -> int:
        """How many labels are to be predicted."""
        return int((self.labels != IGNORED).sum())

    def to(self, device: torch.device) -> Batch:
        """Copy it to a device; from pinned memory beside what runs there."""
        places = self.positions
        return Batch(
            self.inputs.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            None if places is None else places.to(device, non_blocking=True),
        )

    def model_inputs(self) -> dict[str, torch.Tensor | bool]:
        """What a transformers model is called with."""
        if self.positions is None:
            return {"input_ids": self.inputs}
        # With a cache transformers takes positions for places in it, and attention is not cut.
        return {"input_ids": self.inputs, "position_ids": self.positions, "use_cache": False}


@dataclass(frozen=True)
class Masking:
    """What a masked language model is asked (BERT: Devlin et al., 2019, section 3.1).

    Of the tokens, ``share`` are to be predicted; of these 80 % become ``mask``, 10 % a random one
    of ``vocabulary``, 10 % stay.
    """

    share: float
    mask: int
    vocabulary: int


class Stream:
    """The sequences of one split.

    Args:
        tokens: ids of all documents with the separator between, usually a memory map.
        num_bytes: size of the text that the tokens come from; ``None`` where nobody knows it.
        sequence: tokens per sequence.
        seed: what the order and the masks are drawn from.
        masking: how a masked model's tokens are hidden; ``None`` gives the next token as label.
    """

    def __init__(
        self,
        tokens: Tokens,
        *,
        num_bytes: int | None,
        sequence: int,
        seed: int,
        masking: Masking | None,
    ) -> None:
        self._tokens = tokens
        self._sequence = sequence
        self._seed = seed
        self._masking = masking
        # A causal window needs one token more, the label of its last; windows share it.
        self._width = sequence if masking else sequence + 1
        self.num_tokens = len(tokens)
        self.num_sequences = max(0, (self.num_tokens - self._width) // sequence + 1)
        self.bytes_per_token: float | None = None
        if num_bytes is not None:
            self.bytes_per_token = num_bytes / self.num_tokens if self.num_tokens else 0.0

    def sequences(self, position: int, count: int) -> list[int]:
        """Which sequences stand there in the endless order: number n is at token n x length."""
        positions = np.arange(position, position + count)
        return [int(n) for n in sequence_at(positions, self.num_sequences, self._seed)]

    def batch(self, position: int, count: int) -> Batch:
        """The sequences at ``position`` to ``position + count - 1`` of the endless order."""
        positions = np.arange(position, position + count)
        starts = sequence_at(positions, self.num_sequences, self._seed) * self._sequence
        windows = self._tokens[starts[:, None] + np.arange(self._width)].astype(np.int64)
        if self._masking is None:
            whole = torch.from_numpy(windows)
            # Copies: of one row both would be views of the same tokens, and labels are written to.
            return Batch(whole[:, :-1].clone(), whole[:, 1:].clone())
        inputs, labels = windows, np.full_like(windows, IGNORED)
        for row, where in enumerate(positions):
            _mask(inputs[row], labels[row], self._masking, seed=self._seed, position=int(where))
        return Batch(torch.from_numpy(inputs), torch.from_numpy(labels))


def _mask(
    inputs: NDArray[np.int64],
    labels: NDArray[np.int64],
    masking: Masking,
    *,
    seed: int,
    position: int,
) -> None:
    """Mask one sequence in place: a pure function of the seed and its position."""
    draw = np.random.Generator(np.random.Philox(key=[seed, position]))
    chosen = draw.random(len(inputs)) < masking.share
    labels[chosen] = inputs[chosen]
    fate = draw.random(len(inputs))
    inputs[chosen & (fate < 0.8)] = masking.mask
    replaced = chosen & (fate >= 0.8) & (fate < 0.9)
    inputs[replaced] = draw.integers(0, masking.vocabulary, int(replaced.sum()))
