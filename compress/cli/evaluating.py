"""eval: an export beside its original."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from compress.cli.command import Given
from compress.cli.folders import exports
from compress.cli.showing import show, show_changes, shown_progress
from compress.config.recipe import Recipe
from compress.errors import CheckpointError, RecipeError
from compress.report.summary import comparison_rows


def evaluate(given: Given) -> None:
    """Evaluate an export."""
    known = given.own
    if not known.folder.is_dir():
        raise CheckpointError(f"{known.folder}: no such folder; name an export that `run` wrote")
    recipe = Recipe.from_mapping(given.recipe)
    if known.reference is not None:
        recipe = replace(recipe, model=known.reference)
    elif "model" not in given.recipe:
        raise RecipeError(f"--reference: {known.folder} has no recipe.yaml to tell; name a model")
    export = _first_export(known.folder, recipe)
    from compress.pipeline import main as pipeline

    with shown_progress() as progress:
        scores = pipeline.evaluate(export, recipe, progress=progress)
    show(comparison_rows(scores), f"{recipe.model} and {export}")
    show_changes(scores)


def _first_export(folder: Path, recipe: Recipe) -> Path:
    """`folder`, or if it only holds exports, the one that the run evaluated: its recipe's first."""
    found = exports(folder)
    if found == [folder] or (folder / "config.json").is_file():
        return folder
    first = next((path for name in recipe.export for path in found if path.name == name), found[0])
    others = ", ".join(str(path) for path in found if path != first)
    if others:
        print(f"note: evaluating {first}; there is also {others}", file=sys.stderr)
    return first
