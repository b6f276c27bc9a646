"""eval: an export beside its original."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from compress.cli.command import (
    Command,
    exports,
    recipe_of,
    show,
    show_changes,
    shown_progress,
)
from compress.config.flags import Flags, Parser
from compress.config.recipe import Recipe
from compress.errors import CheckpointError, RecipeError
from compress.families.base import METHODS
from compress.report.summary import comparison_rows

_EVALUATION = (
    *("device", "dtype", "seed", "batch_size", "seq_len"),
    *("eval_text", "eval_windows", "tasks", "limit", "include_path"),
)


def _evaluate(given: list[str]) -> None:
    # Twice: the folder may come after flags, and the defaults of flags are those of its recipe.
    folder = _evaluation({}, [part for part in given if part not in ("-h", "--help")], "?")[1]
    values = {} if folder.folder is None else recipe_of(folder.folder)
    mapping, known = _evaluation(values, given, None)
    if not known.folder.is_dir():
        raise CheckpointError(f"{known.folder}: no such folder; name an export that `run` wrote")
    recipe = Recipe.from_mapping(mapping)
    if known.reference is not None:
        recipe = replace(recipe, model=known.reference)
    elif "model" not in mapping:
        raise RecipeError(f"--reference: {known.folder} has no recipe.yaml to tell; name a model")
    export = _first_export(known.folder, recipe)
    from compress.pipeline import main as pipeline

    with shown_progress() as progress:
        scores = pipeline.evaluate(export, recipe, progress=progress)
    show(comparison_rows(scores), f"{recipe.model} and {export}")
    show_changes(scores)


def _evaluation(
    values: Mapping[str, Any], given: list[str], nargs: str | None
) -> tuple[dict[str, Any], argparse.Namespace]:
    parser = Parser("compress eval", EVAL.about, "DIR [--reference MODEL] [options]")
    parser.add_argument(
        "folder", metavar="DIR", type=Path, nargs=nargs, help="an export that `run` wrote"
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="compare with it (default: its source)"
    )
    return Flags(Recipe, METHODS, _EVALUATION).parse(values, given, parser)


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


EVAL = Command(_evaluate, "Evaluate an export beside its original.")
