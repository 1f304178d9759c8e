"""Traces kept on disk, so that a model is traced once.

JSON, one file per model, micro-batch and sequence; equal lists of kernels are written once. A file
that cannot be read is as good as none.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mics.anatomy.trace import Operator, Segment, Trace
from mics.ranks.files import read_small, write_whole
from mics.version import __version__

_COUNTED = 2
"""Raised when traces count otherwise, so that those of before are not used."""

_FIGURES = ("unit", "direction", "start", "peak", "gradients", "end")


class TraceCache:
    """A folder where traces of one model are kept.

    Args:
        identity: everything a trace depends on but micro-batch, sequence and this library:
            configuration, dtype, versions of others.
        folder: ``$MICS_CACHE``, else ``~/.cache/mics``, by default.
    """

    def __init__(self, identity: str, folder: Path | None = None) -> None:
        at = folder or Path(os.environ.get("MICS_CACHE", "~/.cache/mics")).expanduser()
        known = f"{_COUNTED}\n{__version__}\n{identity}"
        self._folder = at / "traces" / hashlib.sha256(known.encode()).hexdigest()[:24]

    def get(self, micro_batch: int, sequence: int) -> Trace | None:
        """Return a trace that was kept, or ``None``."""
        try:
            return _read(json.loads(read_small(self._file(micro_batch, sequence))))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None

    def put(self, micro_batch: int, sequence: int, trace: Trace) -> None:
        """Keep a trace; a folder that cannot be written is no error."""
        file = self._file(micro_batch, sequence)
        try:
            write_whole(file, json.dumps(_written(trace)))
        except OSError:
            return

    def _file(self, micro_batch: int, sequence: int) -> Path:
        return self._folder / f"{micro_batch}x{sequence}.json"


def _written(trace: Trace) -> dict[str, Any]:
    lists: dict[tuple[Operator, ...], int] = {}
    segments = [
        [*(getattr(s, name) for name in _FIGURES), lists.setdefault(s.operators, len(lists))]
        for s in trace.segments
    ]
    return {
        "kernels": [[[op.flops, op.num_bytes] for op in kernels] for kernels in lists],
        "segments": segments,
        "block_inputs": trace.block_inputs,
    }


def _read(written: dict[str, Any]) -> Trace:
    lists = [tuple(Operator(*op) for op in kernels) for kernels in written["kernels"]]
    segments = tuple(
        Segment(**dict(zip(_FIGURES, figures, strict=True)), operators=lists[at])
        for *figures, at in written["segments"]
    )
    return Trace(segments, tuple(written["block_inputs"]))
