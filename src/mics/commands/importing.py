"""``mics import``: a folder of transformers or of DeepSpeed as a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Config:
    """Write a checkpoint from a folder of transformers (weights only) or of DeepSpeed (all).

    Tokenizer, chat templates, generation configuration and processors come along, code never does.
    What DeepSpeed's ZeRO or MiCS saved is read as data, with the optimizer's state. Train from it
    with `mics train --run.resume OUT`.
    """

    folder: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """Folder that transformers' save_pretrained or DeepSpeed's save_checkpoint wrote."""

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
    """Checkpoint to be made."""

    dtype: Literal["as-is", "bf16", "fp16", "fp32"] = "as-is"
    """What weights are converted to; `mics train` wants fp32."""


def run(config: Config) -> int:
    """Import, and say what was left out.

    Returns:
        0.

    Raises:
        CheckpointError: the folder holds no model, is damaged, or the checkpoint cannot be
            written.
        ConfigError: a small file of the folder cannot be read, or is not of a language model.
    """
    from mics.models.interchange.deepspeed.folder import is_deepspeed
    from mics.models.interchange.deepspeed.importing import import_deepspeed
    from mics.models.interchange.dtypes import FLOATS
    from mics.models.interchange.importing import import_folder
    from mics.ranks.console import alarm, show
    from mics.ranks.progress_bar import TextProgress

    dtype, found = FLOATS[config.dtype], ""
    with TextProgress() as progress:
        if is_deepspeed(config.folder):
            imported, states = import_deepspeed(
                config.folder, config.out, dtype=dtype, told=progress.show
            )
            found = f" (DeepSpeed stage {states.stage}, {states.ranks} ranks, step {states.step})"
        else:
            imported = import_folder(config.folder, config.out, dtype=dtype, told=progress.show)
    show(f"{config.folder}{found} -> {config.out}")
    if imported.unused:
        show(f"left out, as the model has no place for them: {', '.join(imported.unused)}")
    if imported.code:
        show(f"left out, as code is never brought along: {', '.join(imported.code)}")
    if imported.lacking:
        show(f"not there: {', '.join(imported.lacking)}")
    if imported.not_finite:
        alarm(f"These weights hold NaN or infinity: {', '.join(imported.not_finite)}.")
    return 0
