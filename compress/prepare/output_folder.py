"""Whether an output folder can be made where it was asked for, found out before any work."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.subjects.opening import opening


def refuse_bad_output(recipe: Recipe) -> None:
    """Raises RecipeError if the output folder is there already, cannot be made, or lies where nothing is written."""
    folder = recipe.folder
    if os.path.lexists(folder):  # a link to nowhere too
        raise RecipeError(f"{folder} exists; name a new folder, or remove it", option="out")
    base = opening(recipe).never_written
    if base is not None and folder.resolve().is_relative_to(base):
        raise RecipeError(
            f"{folder} lies in {base}, the base checkpoint, which is never written to; choose another --out",
            option="out",
        )
    refuse_unwritable(folder)


def refuse_unwritable(folder: Path) -> None:
    """Raises RecipeError if nothing can be written where a folder is to be, or in it if it is there.

    A folder is made there and removed again: permissions do not tell of file systems that take none.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not place.is_dir():
        raise RecipeError(
            f"{folder} cannot be created, because {place} is not a folder; choose another --out",
            option="out",
        )
    try:
        with TemporaryDirectory(prefix=".compress-", dir=place):
            pass
    except OSError as error:
        why = error.strerror or str(error)
        raise RecipeError(
            f"{folder} cannot be created, because {place} is not writable ({why}); choose another folder",
            option="out",
        ) from error
