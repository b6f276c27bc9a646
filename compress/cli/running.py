"""run, plan and calibrate: the commands that take a whole recipe."""

from __future__ import annotations

from compress.cli.command import Given
from compress.cli.showing import show, show_notes, show_warning, shown_progress
from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.report.experts import experts_line
from compress.report.summary import rows


def run(given: Given) -> None:
    """Compress a model."""
    recipe = _recipe("run", given)
    from compress.pipeline import main as pipeline

    with shown_progress() as progress:
        report = pipeline.run(recipe, progress=progress, warn=show_warning)
    show(rows(report), f"{recipe.model}, {recipe.method_name}")
    if line := experts_line(report):
        print(line)
    show_notes(report)
    print(f"written to {recipe.folder}; README.md there is the model card")


def plan(given: Given) -> None:
    """Show what a run would do."""
    recipe = _recipe("plan", given)
    from compress.pipeline import main as pipeline
    from compress.planning.rows import Rows

    with shown_progress() as progress:
        planned = pipeline.plan(recipe, progress=progress)
    print("\n".join(planned.lines(Rows(given.own.layers))))


def calibrate(given: Given) -> None:
    """Save the statistics that a run would use."""
    recipe = _recipe("calibrate", given)
    from compress.pipeline import main as pipeline

    with shown_progress() as progress:
        folder = pipeline.calibrate(recipe, progress=progress, imatrix=given.own.imatrix)
    print(f"statistics are in {folder}; a run on equal model, text and settings uses them")
    if given.own.imatrix is not None:
        print(f"{given.own.imatrix} has their diagonals, for llama-quantize --imatrix")


def _recipe(command: str, given: Given) -> Recipe:
    """Defaults, overlaid by the YAML file if the first argument names one, overlaid by flags."""
    file = given.own.recipe
    if file is not None and given.words[0] != file:
        raise RecipeError(f"{file}: a recipe goes first: compress {command} {file}")
    return Recipe.from_mapping(given.recipe)
