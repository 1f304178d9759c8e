"""Does an exported folder compute what the checkpoint computes? Through two separate ways in."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from mics.checkpoint.contents import contents_of
from mics.checkpoint.layout import MODEL_CONFIG
from mics.checkpoint.manifest import read_manifest
from mics.checkpoint.reading import read_tensors
from mics.models.building import build, load_config, num_positions, task_of
from mics.models.interchange.exporting import Exported, exported_files
from mics.models.small_files import CONFIG, read_small

_SEQUENCES, _LENGTH = 2, 32
_CHANGED = ("dtype", "torch_dtype", "auto_map")  # in config.json, by an export


def differing_files(exported: Exported) -> list[str]:
    """Small files of the checkpoint that the export lacks, or has with another content.

    JSON is compared by its values, but for what an export changes in ``config.json``.
    """
    manifest = read_manifest(exported.checkpoint)
    config = {CONFIG: read_small(exported.checkpoint / MODEL_CONFIG)}
    wanted = config | exported_files(exported.checkpoint, manifest)
    return [name for name, data in wanted.items() if not _same(exported.folder / name, data)]


def _same(path: Path, wanted: bytes) -> bool:
    if not path.is_file():
        return False
    found = read_small(path)
    if path.suffix != ".json":
        return found == wanted
    return _value(found, path.name) == _value(wanted, path.name)


def _value(data: bytes, name: str) -> object:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return data
    if name != CONFIG or not isinstance(value, dict):
        return value
    return {key: each for key, each in value.items() if key not in _CHANGED}


def largest_difference(exported: Exported, dtype: torch.dtype | None) -> float:
    """The largest difference between logits of the export and of the checkpoint itself.

    The export is loaded by transformers alone, the checkpoint is read into a model built from its
    configuration; both see the same random ids. Needs the memory of both models.

    Args:
        exported: what ``export`` returned.
        dtype: what it was exported in; ``None`` is the checkpoint's own.
    """
    theirs = _load_plain(exported.folder, dtype)
    ours = _load_checkpoint(exported.checkpoint)
    config = load_config(str(exported.checkpoint / MODEL_CONFIG), vocabulary=1, separator=0)
    length = min(_LENGTH, num_positions(config) or _LENGTH)
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (_SEQUENCES, length), generator=seeded)
    with torch.no_grad():
        difference = theirs(input_ids=ids).logits.float() - ours(input_ids=ids).logits.float()
    return float(difference.abs().max())


def _load_plain(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.utils.logging import disable_progress_bar

    config = load_config(str(folder), vocabulary=1, separator=0)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    auto = AutoModelForMaskedLM if task_of(config) == "masked" else AutoModelForCausalLM
    model: nn.Module = auto.from_pretrained(
        str(folder), dtype=dtype or "auto", trust_remote_code=False
    )
    return model.eval()


def _load_checkpoint(checkpoint: Path) -> nn.Module:
    config = load_config(str(checkpoint / MODEL_CONFIG), vocabulary=1, separator=0)
    manifest = read_manifest(checkpoint)
    torch.manual_seed(0)
    model = build(config, device="cpu").eval()
    names = contents_of(model, None).tensors
    first = next(manifest.tensors[name] for name in names)
    model = model.to(first.torch_dtype)
    read_tensors(checkpoint, manifest.tensors, contents_of(model, None).tensors)
    return model
