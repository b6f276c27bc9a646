"""Finds out from a folder's own config what compressed checkpoint it holds, and refuses what no base reads."""

from __future__ import annotations

from pathlib import Path

from compress.bases.base import BASES, Base
from compress.bases.folder import CheckpointFolder
from compress.errors import CheckpointError


def open_base(folder: Path) -> Base:
    """The checkpoint in a folder; headers are read, no tensor is.

    Raises CheckpointError saying what was found and what is read.
    """
    found = CheckpointFolder(Path(folder))
    return kind_of(found)(found)


def format_in(folder: Path) -> str | None:
    """The name of the format of a folder's checkpoint; None for a folder without config.json.

    Raises CheckpointError as `kind_of`.
    """
    if not (folder / "config.json").is_file():
        return None
    return kind_of(CheckpointFolder(folder)).format


def kind_of(folder: CheckpointFolder) -> type[Base]:
    """The one class of bases that recognises a folder; ordinary weights are what no other recognises.

    Raises CheckpointError if there is none, or more than one.
    """
    mine = [kind for kind in BASES.values() if kind.recognises(folder)]
    found = [kind for kind in mine if not kind.ordinary] or mine
    if len(found) == 1:
        return found[0]
    if not found:
        named = folder.quant_method
        what = (
            "a quantisation without a quant_method" if named is None else f"quant_method {named!r}"
        )
        raise CheckpointError(
            f"{folder.path}: {what} is not supported; there are {', '.join(BASES)}"
        )
    raise CheckpointError(
        f"{folder.path}: {' and '.join(kind.format for kind in found)} both take it for theirs; uninstall the "
        "distribution that adds one of them"
    )
