"""Refuses links that lead out of the folder of a model: what lies elsewhere is never read or copied for it."""

from pathlib import Path, PurePosixPath

from compress.errors import CheckpointError


def inside(folder: Path, name: str) -> Path:
    """The path of a file that `folder` names, which may be a link to another file there, or to the hub cache's blobs.

    Raises CheckpointError if it leads anywhere else, or in a circle; the file itself need not be there.
    """
    pure = PurePosixPath(name)
    if "\0" in name or not _is_text(name):
        raise CheckpointError(f"{folder}: {name!r} cannot be the name of a file")
    if pure.is_absolute() or ".." in pure.parts or Path(name).is_absolute() or "\\" in name:
        raise CheckpointError(f"{folder}: {name!r} points outside the folder")
    path = folder / name
    try:
        home, real = folder.resolve(), path.resolve()
    except (RuntimeError, OSError) as error:  # RuntimeError: what Python 3.11 raises for a circle
        raise CheckpointError(f"{path} is a link that leads nowhere: {error}") from error
    if not real.is_relative_to(home) and real.parent != _blobs(home):
        raise CheckpointError(
            f"{path} is a link that points outside the folder, to {real}; put the file itself there, or remove the link"
        )
    return path


def _blobs(home: Path) -> Path | None:
    """The folder of files in the hub's cache: models--x/snapshots/<revision>/name -> models--x/blobs/<hash>."""
    return home.parent.parent / "blobs" if home.parent.name == "snapshots" else None


def _is_text(name: str) -> bool:
    """Whether it can be encoded: half a surrogate pair cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
