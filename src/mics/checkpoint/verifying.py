"""Is every byte of a checkpoint what was written? The files are shared out over the ranks."""

from __future__ import annotations

from pathlib import Path

from mics.checkpoint.disk import facts_of
from mics.checkpoint.manifest import Manifest, read_manifest
from mics.checkpoint.peers import Peers
from mics.errors import CheckpointError


def verified_manifest(folder: Path, peers: Peers | None = None) -> Manifest:
    """Read the manifest of a checkpoint and compare every file with it. Collective with peers.

    Raises:
        CheckpointError: on every rank; names the file that is damaged, missing or of another size.
    """
    if peers is None:
        manifest = read_manifest(folder)
        _verify(folder, manifest, first=0, step=1)
        return manifest
    # All read it, and come to an end together even if only one cannot.
    read: list[Manifest] = []
    peers.together(lambda: read.append(read_manifest(folder)))
    verify_files(folder, read[0], peers)
    return read[0]


def verify_files(folder: Path, manifest: Manifest, peers: Peers) -> None:
    """Compare every file of a checkpoint with its manifest. Collective.

    Raises:
        CheckpointError: as ``verified_manifest``.
    """
    peers.together(lambda: _verify(folder, manifest, first=peers.rank, step=peers.world))


def _verify(folder: Path, manifest: Manifest, *, first: int, step: int) -> None:
    largest_first = sorted(manifest.files.items(), key=lambda item: (-item[1].bytes, item[0]))
    for name, wanted in largest_first[first::step]:
        path = folder / name
        try:
            size = path.stat().st_size
            if size != wanted.bytes:
                raise CheckpointError(
                    f"{path} is damaged: it has another size than when it was written.",
                    numbers=f"{size} bytes instead of {wanted.bytes}.",
                    write="an older checkpoint of the same run",
                )
            found = facts_of(path)
        except OSError as error:
            raise CheckpointError(
                f"{path} is damaged: it cannot be read ({error.strerror or error}).",
                write="an older checkpoint of the same run",
            ) from None
        if found != wanted:
            raise CheckpointError(
                f"{path} is damaged: its checksum is not the one it was written with.",
                numbers=f"sha256 {found.sha256[:16]}... instead of {wanted.sha256[:16]}...",
                write="an older checkpoint of the same run",
            )
