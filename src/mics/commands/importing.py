"""``mics import``: a transformers folder as a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro


@dataclass(frozen=True)
class Config:
    """Write a checkpoint (weights only, step 0) from config.json and safetensors.

    Tokenizer, chat templates, generation configuration and processors come along, code never does.
    Train from it with `mics train --run.resume OUT`.
    """

    folder: tyro.conf.Positional[Path]
    """Folder that transformers' save_pretrained wrote."""

    out: tyro.conf.Positional[Path]
    """Checkpoint to be made."""

    dtype: Literal["as-is", "bf16", "fp16", "fp32"] = "as-is"
    """What weights are converted to; `mics train` wants fp32."""


def run(config: Config) -> int:
    """Import, and say what was left out.

    Returns:
        0.

    Raises:
        CheckpointError: the folder holds no model, or the checkpoint cannot be written.
        ConfigError: a small file of the folder cannot be read, or is not of a language model.
    """
    from mics.interchange.dtypes import FLOATS
    from mics.interchange.importing import import_folder
    from mics.ranks.console import alarm, show
    from mics.ranks.progress_bar import TextProgress

    with TextProgress() as progress:
        imported = import_folder(
            config.folder, config.out, dtype=FLOATS[config.dtype], told=progress.show
        )
    show(f"{config.folder} -> {config.out}")
    if imported.unused:
        show(f"left out, as the model has no place for them: {', '.join(imported.unused)}")
    if imported.code:
        show(f"left out, as code is never brought along: {', '.join(imported.code)}")
    if imported.lacking:
        show(f"not there: {', '.join(imported.lacking)}")
    if imported.not_finite:
        alarm(f"These weights hold NaN or infinity: {', '.join(imported.not_finite)}.")
    return 0
