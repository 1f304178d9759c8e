"""What mics raises: what is wrong, the numbers, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MicsError(Exception):
    """Base of every error mics raises on purpose.

    Args:
        what: what is wrong, one sentence.
        numbers: the values that show it, one sentence; may be empty.
        write: what to write instead; may be empty.
    """

    def __init__(self, what: str, *, numbers: str = "", write: str = "") -> None:
        self.what = what
        self.numbers = numbers
        self.write = write
        lines = [what]
        if numbers:
            lines.append(f"  {numbers}")
        if write:
            lines.append(f"  Write: {write}")
        super().__init__("\n".join(lines))


class TopologyError(MicsError, ValueError):
    """Nodes, ranks or partition size that do not fit together."""


class DisagreementError(MicsError):
    """Ranks that were started with different versions, models or settings."""


class RankError(MicsError, RuntimeError):
    """Another rank has failed, has left, or waits where this one does not come."""


class ShardError(MicsError, ValueError):
    """A model that cannot be sharded as asked."""


class MicroStepError(MicsError):
    """A two-hop schedule that would lose or leak gradients."""


class ConfigError(MicsError, ValueError):
    """Options of a run that are unknown, contradict each other or cannot be honoured."""


class NormError(MicsError, RuntimeError):
    """A norm of gradients that is not finite, where it has to be."""


class DataError(MicsError, ValueError):
    """Text, tokens or sequences that a model cannot be trained on."""


class CheckpointError(MicsError):
    """A checkpoint that cannot be written, is damaged, or belongs to another model."""


class RecoveryError(MicsError):
    """A state in memory that cannot be kept, or from which training cannot go on."""


class LabError(MicsError):
    """A cluster on one machine that cannot be built, or of which something was asked in vain."""


class CheckError(MicsError):
    """A script that cannot be checked, because it does not train here."""


class TraceError(MicsError):
    """Steps that cannot be recorded, or not be brought together in one file."""


class PlanError(MicsError, ValueError):
    """A model and a cluster for which there is no plan, or an unknown part of either."""


class MissingError(MicsError, ImportError):
    """A package that is not installed, and the extra that brings it."""


EXTRAS = {
    "cli": ("tyro", "rich"),
    "train": (
        "datasets",
        "matplotlib",
        "numpy",
        "plotly",
        "pydantic",
        "safetensors",
        "tensorboard",
        "tokenizers",
        "transformers",
    ),
    "accelerate": ("accelerate", "transformers"),
    "lightning": ("lightning", "safetensors"),
    "peft": ("peft",),
    "torchtitan": ("torchtitan",),
}
"""What each extra of pyproject.toml brings, by the names that are imported; train brings cli, and
peft brings accelerate."""


@contextmanager
def naming_extras(what: str) -> Iterator[None]:
    """Say which extra to install where a package of one is missing.

    Args:
        what: needs the package: mics.plan, mics bench.

    Raises:
        MissingError: a package of an extra cannot be found.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        extra = next((extra for extra, brings in EXTRAS.items() if package in brings), None)
        if extra is None or isinstance(error, MissingError):
            raise
        raise MissingError(
            f"{what} needs {package}, which is not installed.",
            write=f"pip install 'torch-mics[{extra}]'",
        ) from error


class MicsWarning(UserWarning):
    """Something legal that costs time, memory or a step."""
