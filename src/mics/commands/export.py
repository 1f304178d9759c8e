"""``mics export``: a checkpoint as a folder that transformers loads, or its adapters as peft's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mics.errors import CheckpointError
from mics.quantities import parse_size


@dataclass(frozen=True)
class Config:
    """Write a checkpoint as safetensors with config.json and tokenizer, for transformers.

    One tensor is in memory at a time; every file of the checkpoint is verified first.
    """

    checkpoint: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="CHECKPOINT")]]
    """A checkpoint, or a run's folder for its newest one."""

    out: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="FOLDER")]]
    """Folder to be made."""

    dtype: Literal["as-is", "bf16", "fp16", "fp32"] = "as-is"
    """What weights are converted to."""

    shard_size: str = "5GB"
    """Most bytes in one file: 500MB, 5GB, ..."""

    check: tyro.conf.FlagCreatePairsOff[bool] = False
    """Load the result with transformers; compare logits and small files with the checkpoint's."""

    adapters: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write the adapters of peft alone, as PeftModel.from_pretrained reads them."""


def run(config: Config) -> int:
    """Export, and compare if asked.

    Returns:
        0; 1 when logits or small files differ that should not.

    Raises:
        CheckpointError: there is no such checkpoint, it is damaged, or the folder exists.
    """
    from mics.models.interchange.comparing import differing_files, largest_difference
    from mics.models.interchange.dtypes import FLOATS
    from mics.models.interchange.exporting import export
    from mics.models.interchange.exporting_adapters import export_adapters
    from mics.models.small_files import usual_that_lack
    from mics.ranks.console import alarm, show
    from mics.ranks.progress_bar import TextProgress

    dtype = FLOATS[config.dtype]
    if config.adapters:
        _check_fits_adapters(config)
    with TextProgress() as progress:
        if config.adapters:
            exported = export_adapters(
                config.checkpoint, config.out, dtype=dtype, told=progress.show
            )
        else:
            exported = export(
                config.checkpoint,
                config.out,
                dtype=dtype,
                shard_bytes=_bytes(config.shard_size),
                told=progress.show,
            )
    show(
        f"{exported.checkpoint} -> {exported.folder}: {exported.num_tensors} tensors, "
        f"{exported.num_bytes:,} bytes; {', '.join(exported.files)}"
    )
    if not config.adapters and (lacking := usual_that_lack(exported.files)):
        show(f"the checkpoint does not have: {', '.join(lacking)}")
    if exported.not_finite:
        alarm(f"These weights hold NaN or infinity: {', '.join(exported.not_finite)}.")
    if not config.check:
        return 0
    differing = differing_files(exported)
    verdict = f"{', '.join(differing)} differ or are not there" if differing else "equal"
    show(f"small files of the folder and of the checkpoint: {verdict}")
    difference = largest_difference(exported, dtype)
    exact = config.dtype in ("as-is", "fp32")
    verdict = "equal" if difference == 0 else f"differ by at most {difference:.3g}"
    show(f"logits of transformers and of the checkpoint: {verdict}")
    return 1 if differing or (exact and difference != 0) else 0


def _check_fits_adapters(config: Config) -> None:
    """Refuse options that are for whole models.

    Raises:
        CheckpointError: one was given.
    """
    given = ["--check"] if config.check else []
    given += ["--shard-size"] if config.shard_size != Config.shard_size else []
    if given:
        raise CheckpointError(
            f"{' and '.join(given)} is for whole models, and --adapters writes adapters alone.",
            write="mics export CHECKPOINT OUT --adapters",
        )


def _bytes(text: str) -> int:
    num_bytes = parse_size(text, units=("MB", "GB"))
    if num_bytes is None:
        raise CheckpointError(
            f"shard-size = {text!r} is no size.", write="--shard-size 500MB, or 5GB"
        )
    return num_bytes
