"""The data of a run, text or conversations, as its options say."""

from __future__ import annotations

from pathlib import Path

from mics.errors import DataError
from mics.training.config import DataConfig
from mics.training.data.chat_source import prepare_chats
from mics.training.data.prepare import Data, prepare_data


def open_data(config: DataConfig, *, seed: int, sequence: int, masked: bool, folder: Path) -> Data:
    """Open what a run trains on and is measured with. Collective, as ``prepare_data`` is.

    Raises:
        DataError: on every rank; see ``prepare_data`` and ``prepare_chats``, an option of the other
            of them, or conversations for a masked model.
    """
    if config.format == "chat":
        if masked:
            raise DataError(
                "A masked language model writes no answers.",
                numbers="data.format = chat.",
                write="--model.name of a causal model, or --data.format auto",
            )
        return prepare_chats(config, seed=seed, sequence=sequence, folder=folder)
    if not config.packing:
        raise DataError(
            "data.packing is for conversations; text is always one row after the other.",
            numbers=f"data.packing = false, data.format = {config.format}.",
            write="--data.format chat, or leave --data.no-packing out",
        )
    return prepare_data(config, seed=seed, sequence=sequence, masked=masked, folder=folder)
