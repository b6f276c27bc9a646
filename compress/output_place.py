"""Whether an output folder can be made where it was asked for, found out before any work."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from compress.errors import RecipeError


def refuse_existing_output(folder: Path) -> None:
    """Raises RecipeError if the output folder is there already, or cannot be made."""
    if folder.exists():
        raise RecipeError(f"out: {folder} exists; name a new folder, or remove it")
    refuse_unwritable(folder)


def refuse_unwritable(folder: Path) -> None:
    """Raises RecipeError if nothing can be written where a folder is to be, or in it if it is there.

    A folder is made there and removed again: permissions do not tell of file systems that take none.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise RecipeError(f"out: {folder} cannot be made, for {place} is no folder; name another")
    try:
        with TemporaryDirectory(prefix=".compress-", dir=place):
            pass
    except OSError as error:
        why = error.strerror or str(error)
        raise RecipeError(
            f"out: {folder} cannot be made, for {place} takes no folder ({why}); name another"
        ) from error
