"""Folders that runs wrote: the exports in one, and their recipe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.config.yaml_file import read_yaml
from compress.errors import CheckpointError
from compress.exports.verification.places import probe_in

RECIPE_NAME = "recipe.yaml"


def recipe_of(folder: Path) -> Mapping[str, Any]:
    """The recipe in an export's folder, or beside it; empty if there is none."""
    files = [folder / RECIPE_NAME, folder.parent / RECIPE_NAME]
    return next((read_yaml(file) for file in files if file.is_file()), {})


def exports(folder: Path) -> list[Path]:
    """`folder` itself if it is an export, or the exports in it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    found = [path for path in sorted(folder.iterdir()) if probe_in(path) is not None]
    return [folder] if probe_in(folder) is not None or not found else found
