"""The files of a DeepSpeed checkpoint: which, of how many ranks, and which are refused."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mics.errors import CheckpointError
from mics.ranks.files import read_small

_LATEST = "latest"
_MOST_TAG = 256
_MODEL = re.compile(
    r"(?:zero_pp_rank_(\d{1,6})_)?mp_rank_(\d{2,6})(?:_[A-Za-z0-9]+)?_model_states\.pt"
)
_OPTIMIZER = re.compile(
    r"(?:bf16_|fp16_)?zero_pp_rank_(\d{1,6})_mp_rank_(\d{2,6})_optim_states\.pt"
)
_WRITE = "the folder that DeepSpeed's save_checkpoint wrote, or its global_step folder"


@dataclass(frozen=True)
class Found:
    """A checkpoint's folder, and its files by rank; ``model`` has one file below stage 3.

    ``around`` is the folder that ``latest`` stands in, which may hold the small files of a model.
    """

    folder: Path
    around: Path
    model: list[Path]
    optimizer: list[Path]


def is_deepspeed(folder: Path) -> bool:
    """Whether a folder is a checkpoint of DeepSpeed, or holds one that ``latest`` names."""
    if not folder.is_dir():
        return False
    if any(_is_states(path.name) for path in folder.iterdir()):
        return True
    try:
        return (folder / _LATEST).is_file() and any(
            _is_states(path.name)
            for below in folder.iterdir()
            if below.is_dir()
            for path in below.iterdir()
        )
    except OSError:  # a folder beside it that is nobody's to read
        return False


def _is_states(name: str) -> bool:
    return name.endswith(("_model_states.pt", "_optim_states.pt"))


def find_files(folder: Path) -> Found:
    """Find the files of a checkpoint.

    Args:
        folder: one with ``*_states.pt``, or with ``latest``, which names one below.

    Raises:
        CheckpointError: files of ranks are missing, or it is a kind that cannot be read.
    """
    inside = folder
    if not any(_is_states(path.name) for path in folder.iterdir()):
        inside = folder / _tag(folder)
        if not inside.is_dir():
            raise _refused(folder, f"latest names {inside.name}, which is no folder in it")
    names = sorted(path.name for path in inside.iterdir())
    model = {n: m for n in names if (m := _MODEL.fullmatch(n))}
    optimizer = {n: m for n in names if (m := _OPTIMIZER.fullmatch(n))}
    strange = [n for n in names if _is_states(n) and n not in model and n not in optimizer]
    if strange or any(n.startswith("layer_") for n in names):
        parts = strange or [n for n in names if n.startswith("layer_")]
        raise _refused(inside, f"it has parts of experts or of a pipeline, such as {parts[0]!a}")
    split = [n for n, m in (model | optimizer).items() if int(m[2])]
    if split:
        raise _refused(inside, f"it is split by tensor parallelism: {split[0]}")
    if not optimizer:
        raise _refused(inside, "it has no *_optim_states.pt, where ZeRO keeps the weights in fp32")
    by_rank = _in_order(inside, {n: int(m[1]) for n, m in optimizer.items()})
    ranked = {n: int(m[1]) for n, m in model.items() if m[1] is not None}
    plain = [n for n, m in model.items() if m[1] is None]
    if bool(ranked) == bool(plain) or len(plain) > 1:
        raise _refused(inside, "its *_model_states.pt are of no stage of ZeRO alone")
    models = _in_order(inside, ranked) if ranked else [inside / plain[0]]
    if ranked and len(models) != len(by_rank):
        raise _refused(
            inside,
            f"it has model states of {len(models)} ranks, optimizer states of {len(by_rank)}",
        )
    around = folder if inside != folder else _around(folder)
    return Found(inside, around, models, by_rank)


def _tag(folder: Path) -> str:
    """The name of the newest checkpoint, as ``latest`` has it."""
    try:
        tag = read_small(folder / _LATEST, _MOST_TAG).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _refused(folder, f"latest cannot be read ({error})") from None
    if not tag or Path(tag).name != tag or tag in (".", "..") or not tag.isprintable():
        raise _refused(folder, f"latest names {tag!a}, which is outside of it")
    return tag


def _around(folder: Path) -> Path:
    above = folder.resolve().parent
    return above if (above / _LATEST).is_file() else folder


def _in_order(folder: Path, ranks: dict[str, int]) -> list[Path]:
    by_rank: dict[int, str] = {}
    for name, rank in ranks.items():
        if rank in by_rank:
            raise _refused(folder, f"{by_rank[rank]} and {name} are of one rank")
        by_rank[rank] = name
    missing = set(range(len(by_rank))) - set(by_rank)
    if missing:
        raise _refused(
            folder, f"the states of rank {min(missing)} of {max(by_rank) + 1} are missing"
        )
    return [folder / by_rank[rank] for rank in range(len(by_rank))]


def _refused(folder: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{folder} cannot be read: {why}.", write=_WRITE)
