"""Finds out from a folder's own config what compressed checkpoint it holds, and refuses what no base reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.bases.base import BASES, Base
from compress.bases.folder import CheckpointFolder
from compress.errors import CheckpointError
from compress.models.checkpoint import Reader


def open_base(folder: Path) -> Base:
    """The checkpoint in a folder; headers are read, no tensor is.

    Raises CheckpointError saying what was found and what is read.
    """
    found = CheckpointFolder(Path(folder))
    return kind_of(found)(found)


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
        raise CheckpointError(f"{folder.path}: {what} is not read; there are {', '.join(BASES)}")
    raise CheckpointError(
        f"{folder.path}: {' and '.join(kind.format for kind in found)} both take it for theirs; uninstall the "
        "distribution that adds one of them"
    )


def open_reader(folder: Path) -> Reader:
    """The tensors of a checkpoint, whatever it calls its files."""
    return CheckpointFolder(folder).reader


def quantisation_of(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """What config.json, or a file beside it, says of a quantisation, with its quant_method; None if nothing does."""
    del config
    found = CheckpointFolder(folder)
    if found.quantisation is None:
        return None
    return {**found.quantisation, "quant_method": kind_of(found).format}
