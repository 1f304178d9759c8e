"""Which files a source is: every one of them in a fixed order, or an error that names what is not.

What cannot be listed, or is no file that ends, is never left out without a word: a run on less text
than was meant looks like any other. A glob takes the files that it matches; links are followed.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import stat
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mics.errors import DataError

HUB = "hub:"
LIBRARY = "stdlib"

# Installed packages and tests are not the library itself.
_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_MOST_STATE = 64 << 20  # bytes of a state.json
_SPECIAL = {
    stat.S_ISFIFO: "a FIFO",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


def source_meant(source: str | None) -> str:
    """The source that an option means: where it is not given, Python's standard library."""
    return LIBRARY if source is None else source


def find_files(source: str) -> list[Path]:
    """The files of a local source, sorted; a hub source has none.

    Of a folder that ``datasets`` has saved they are the files of its rows.

    Raises:
        DataError: there is no such file, nothing in that folder or glob, or something in it that
            cannot be listed, has no end, leads nowhere or has a name that no text can show.
    """
    if source.startswith(HUB):
        return []
    check_name(source)
    if source == LIBRARY:
        root = Path(sysconfig.get_paths()["stdlib"])
        return sorted(file for file in _walk(root, _NOT_LIBRARY, suffix=".py"))
    path = Path(source).expanduser()
    mode = _mode(path, missing=True)
    if mode is None:
        files = [match for match in _matches(path) if _is_file(match)]
    elif stat.S_ISDIR(mode):
        files = list(_walk(path))
    else:
        files = [path] if _is_file(path) else []
    if not files:
        raise DataError(
            f"There is no text in data.source {source!r}.",
            numbers="No file, folder or glob of that name has files."
            if mode is None
            else "It is a folder without files.",
            write='--data.source <file, folder, glob, hub:owner/name or "stdlib">',
        )
    return sorted(files)


def check_name(source: str) -> None:
    """Check that a name can be one of a file, and can be shown.

    Raises:
        DataError: it is empty, has a NUL, or bytes that are no UTF-8.
    """
    if not source.strip():
        raise DataError(
            "data.source is empty.",
            numbers="The folder that a command runs in is read where it is named.",
            write='--data.source <file, folder, glob, hub:owner/name or "stdlib">, or .',
        )
    if "\0" in source or not _is_text(source):
        raise DataError(
            "The name of a file has a NUL or bytes that are no UTF-8.",
            numbers=f"It is {source!a}.",
            write="another name: mv <file> <a name of letters and digits>",
        )


def is_hidden(path: Path) -> bool:
    """Whether a file or a folder above it has a name that begins with a dot."""
    return any(part.startswith(".") for part in path.parts)


def _walk(top: Path, without: frozenset[str] = frozenset(), suffix: str = "") -> Iterator[Path]:
    """The files below a folder, hidden ones left out."""
    for folder, entries in _folders(top, without):
        names = {entry.name for entry in entries}
        if _SPLITS in names:
            raise _has_splits(folder)
        if {_STATE, _INFO} <= names and (saved := _saved_rows(folder)) is not None:
            yield from saved
            continue
        if _INFO in names and _STATE not in names and any(n.endswith(".arrow") for n in names):
            raise _not_whole(folder)
        for entry in entries:
            path = folder / entry.name
            if entry.name.endswith(suffix) and _is_file(path):
                yield path


def _folders(
    top: Path, without: frozenset[str] = frozenset()
) -> Iterator[tuple[Path, list[os.DirEntry[str]]]]:
    """A folder and those below it, each with what is in it that is not hidden."""
    left: list[tuple[Path, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    while left:
        folder, above = left.pop()
        entries = [entry for entry in _list(folder) if not entry.name.startswith(".")]
        yield folder, entries
        identity = _identity(folder)
        for entry in entries:
            path = folder / entry.name
            if entry.name in without or not stat.S_ISDIR(_mode(path) or 0):
                continue
            if _identity(path) in above | {identity}:
                raise DataError(
                    f"{path} is a link to a folder that it lies in, so there is no end of files.",
                    numbers=f"It leads to {path.resolve()}.",
                    write="--data.source <a folder or glob without it>",
                )
            left.append((path, above | {identity}))


def _list(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError as error:
        raise _unusable(folder, error, "listed") from None
    for entry in entries:
        check_name(str(folder / entry.name))
    return entries


def _matches(pattern: Path) -> list[Path]:
    """What a pattern matches. ``glob`` would leave out what it may not list."""
    parts = [part for part in pattern.parts if part != pattern.anchor]
    found = [Path(pattern.anchor)]
    for at, part in enumerate(parts):
        if part == "**":
            last = at == len(parts) - 1
            found = [
                path
                for base in found
                for folder, entries in _folders(base)
                for path in ([folder / entry.name for entry in entries] if last else [folder])
            ]
        elif re.search(r"[*?[]", part):
            found = [
                base / entry.name
                for base in found
                if stat.S_ISDIR(_mode(base) or 0)
                for entry in _list(base)
                if fnmatch.fnmatchcase(entry.name, part)
                and (part.startswith(".") or not entry.name.startswith("."))
            ]
        else:
            found = [base / part for base in found if os.path.lexists(base / part)]
    return found


def _is_file(path: Path) -> bool:
    """Whether it is a file, or a folder.

    Raises:
        DataError: it is neither: a device, a FIFO or a socket; or it leads nowhere.
    """
    mode = _mode(path)
    assert mode is not None
    for is_special, what in _SPECIAL.items():
        if is_special(mode):
            raise DataError(
                f"{path} is {what}, which has no end, and no text that is there tomorrow.",
                numbers=f"Its mode is {stat.filemode(mode)}.",
                write="--data.source <files, or a folder or glob of them>",
            )
    return stat.S_ISREG(mode)


def _mode(path: Path, *, missing: bool = False) -> int | None:
    """What a path leads to; ``None`` when there is nothing of that name and that may be so."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        if missing and not os.path.islink(path):  # noqa: PTH114 - Path's raises for a long name
            return None
        raise _unusable(path, error, "followed") from None
    except OSError as error:
        raise _unusable(path, error, "read") from None


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino


def _unusable(path: Path, error: OSError, what: str) -> DataError:
    is_link = os.path.islink(path)  # noqa: PTH114 - Path's raises for a long name
    link = f"It is a link to {path.readlink()}." if is_link else ""
    return DataError(
        f"{path} cannot be {what}: {error.strerror}.",
        numbers=link or "Nothing is left out: less text would look like any other run.",
        write="--data.source <a folder or glob without it>, or make it readable",
    )


def _saved_rows(folder: Path) -> list[Path] | None:
    """The files of a data set's rows, as ``save_to_disk`` lists them in ``state.json``.

    Raises:
        DataError: the list is no list of files, or one of them is missing.
    """
    state = folder / _STATE
    try:
        with state.open("rb") as file:
            told: Any = json.loads(file.read(_MOST_STATE))
        if not isinstance(told, dict) or "_data_files" not in told:
            return None
        names = [str(entry["filename"]) for entry in told["_data_files"]]
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(
            f"{folder} is a data set that datasets has saved, but its {_STATE} cannot be read.",
            numbers=f"{type(error).__name__}: {error}"[:200],
            write="--data.source <its .arrow files>, or save it again",
        ) from None
    lacking = [name for name in names if Path(name).name != name or not (folder / name).is_file()]
    if lacking:
        raise DataError(
            f"{folder} is a data set that datasets has saved, but some of its rows are missing.",
            numbers=f"{_STATE} lists {len(names)} file(s), there is no {lacking[0]}.",
            write="--data.source <a whole copy of it>",
        )
    return [folder / name for name in names]


def _not_whole(folder: Path) -> DataError:
    return DataError(
        f"{folder} is a data set that datasets has saved, but not to its end.",
        numbers=f"There is {_INFO}, and no {_STATE}, which lists the files of its rows.",
        write="--data.source <a whole copy of it>, or a glob of its .arrow files",
    )


def _has_splits(folder: Path) -> DataError:
    splits = sorted(entry.name for entry in _list(folder) if (folder / entry.name).is_dir())
    return DataError(
        f"{folder} is a data set of several splits that datasets has saved.",
        numbers=f"They are {', '.join(splits) or 'missing'}.",
        write=f"--data.source {folder / ([s for s in splits if s == 'train'] + splits + ['-'])[0]}",
    )


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
