"""Rows of packed conversations in an endless order, as batches.

[Note: apart from each other]
Conversations in a row must not see each other. Their positions begin anew at 0 each, and from that
transformers makes attention block-diagonal for the families in ``models/packing.py``. The last
token of a conversation predicts nothing, and what is left of a row is padding that is one more
conversation with nothing to predict: a causal model sees it from nowhere else.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mics.checkpoint.disk import facts_of, sync, write_bytes
from mics.ranks.files import read_small
from mics.training.data.chat_template import Spoken
from mics.training.data.order import sequence_at
from mics.training.data.packing import packed
from mics.training.data.stream import IGNORED, Batch

_ARRAYS = {"ids": np.uint32, "learnt": np.bool_, "starts": np.int64}
_MOST_META = 1 << 20


@dataclass(frozen=True)
class Kept:
    """What is known of the conversations of a split beside their tokens."""

    tokens: int
    learnt: int
    conversations: int
    sha256: dict[str, str]


def write_chats(folder: Path, spoken: Sequence[Spoken]) -> Kept:
    """Write the tokens of conversations; they are in order when this returns, and on the disk.

    Raises:
        OSError: they cannot be written.
    """
    folder.mkdir(parents=True)
    lengths = [len(one.ids) for one in spoken]
    arrays: dict[str, NDArray[Any]] = {
        "ids": np.concatenate([np.zeros(0, np.uint32), *(one.ids for one in spoken)]),
        "learnt": np.concatenate([np.zeros(0, np.bool_), *(one.learnt for one in spoken)]),
        "starts": np.cumsum([0, *lengths], dtype=np.int64),
    }
    sums = {}
    for name, array in arrays.items():
        data = array.astype(_ARRAYS[name]).tobytes()
        sums[name] = sha256(data).hexdigest()
        write_bytes(folder / f"{name}.bin", data)
    kept = Kept(sum(lengths), int(arrays["learnt"].sum()), len(spoken), sums)
    write_bytes(folder / "kept.json", json.dumps(asdict(kept)).encode())
    sync(folder)
    return kept


def read_kept(folder: Path) -> Kept | None:
    """What is known of a split that was written; ``None`` where it is missing or not whole."""
    try:
        kept = Kept(**json.loads(read_small(folder / "kept.json", _MOST_META)))
        wanted = {"ids": kept.tokens * 4, "learnt": kept.tokens, "starts": 8 * kept.conversations}
        wanted["starts"] += 8
        sizes = {name: (folder / f"{name}.bin").stat().st_size for name in wanted}
    except (OSError, ValueError, TypeError):
        return None
    return kept if sizes == wanted else None


def is_intact(folder: Path, kept: Kept) -> bool:
    """Whether a split is what was written, to the byte.

    Args:
        folder: what ``write_chats`` wrote.
        kept: what it returned then.
    """
    if read_kept(folder) != kept:
        return False
    return all(facts_of(folder / f"{name}.bin").sha256 == kept.sha256[name] for name in _ARRAYS)


class Chats:
    """The rows of one split.

    Args:
        folder: what ``write_chats`` wrote.
        sequence: tokens of a row; no conversation is longer.
        seed: what the order is drawn from.
        padding: the id behind the conversations of a row.
        packing: several in a row; else one each.
    """

    bytes_per_token: float | None = None
    """Of what is learnt nobody knows how many bytes of text it is."""

    def __init__(
        self, folder: Path, *, sequence: int, seed: int, padding: int, packing: bool
    ) -> None:
        kept = read_kept(folder)
        assert kept is not None, "whoever calls this has looked"
        self._ids, self._learnt, self._starts = (
            _mapped(folder / f"{name}.bin", _ARRAYS[name]) for name in ("ids", "learnt", "starts")
        )
        self._sequence, self._seed, self._padding, self._packing = sequence, seed, padding, packing
        lengths = np.diff(self._starts).tolist()
        self._rows = packed(lengths, sequence) if packing else [[n] for n in range(len(lengths))]
        self.num_conversations = kept.conversations
        self.num_tokens = kept.tokens
        self.num_learnt = kept.learnt
        self.num_sequences = len(self._rows)

    @property
    def filled(self) -> float:
        """The share of the rows that is conversations, and not padding."""
        return self.num_tokens / (self.num_sequences * self._sequence)

    def sequences(self, position: int, count: int) -> list[int]:
        """Which rows stand there in the endless order."""
        positions = np.arange(position, position + count)
        return [int(n) for n in sequence_at(positions, self.num_sequences, self._seed)]

    def batch(self, position: int, count: int) -> Batch:
        """The rows at ``position`` to ``position + count - 1`` of the endless order.

        See [Note: apart from each other].
        """
        shape = (count, self._sequence)
        inputs = np.full(shape, self._padding, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        places = np.zeros(shape, np.int64)
        for row, number in enumerate(self.sequences(position, count)):
            at = 0
            for member in self._rows[number]:
                start, end = self._starts[member : member + 2]
                size = int(end - start)
                inputs[row, at : at + size] = self._ids[start:end]
                places[row, at : at + size] = np.arange(size)
                following = self._ids[start + 1 : end].astype(np.int64)
                is_learnt = self._learnt[start + 1 : end]
                labels[row, at : at + size - 1] = np.where(is_learnt, following, IGNORED)
                at += size
            places[row, at:] = np.arange(self._sequence - at)
        whole = Batch(*map(torch.from_numpy, (inputs, labels, places)))
        # Padding behind a conversation is seen by none of it; every model may be told nothing.
        return whole if self._packing else Batch(whole.inputs, whole.labels)


def _mapped(file: Path, dtype: Any) -> NDArray[Any]:
    if file.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype=dtype, mode="r")
