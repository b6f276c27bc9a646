"""run, plan and calibrate: the commands that take a whole recipe."""

from __future__ import annotations

from pathlib import Path

from compress.cli.command import RECIPE_NAME, Command, show, show_notes, shown_progress
from compress.config.flags import Flags, Parser
from compress.config.recipe import Recipe
from compress.config.yaml_file import read_yaml
from compress.errors import RecipeError
from compress.families.base import METHODS
from compress.report.summary import rows


def _run(given: list[str]) -> None:
    recipe = _recipe("run", given, RUN.about)
    from compress.pipeline import main as pipeline

    with shown_progress() as progress:
        report = pipeline.run(recipe, progress=progress)
    show(rows(report), f"{recipe.model}, {recipe.method_name}")
    show_notes(report)
    print(f"written to {recipe.folder}; README.md there is the model card")


def _plan(given: list[str]) -> None:
    recipe = _recipe("plan", given, PLAN.about)
    from compress.pipeline import main as pipeline

    with shown_progress() as progress:
        planned = pipeline.plan(recipe, progress=progress)
    print("\n".join(planned.lines()))


def _calibrate(given: list[str]) -> None:
    recipe = _recipe("calibrate", given, CALIBRATE.about)
    from compress.pipeline import main as pipeline

    with shown_progress() as progress:
        folder = pipeline.calibrate(recipe, progress=progress)
    print(f"statistics are in {folder}; a run on equal model, text and settings uses them")


def _recipe(command: str, given: list[str], about: str) -> Recipe:
    """Defaults, overlaid by the YAML file if the first argument names one, overlaid by flags."""
    has_file = bool(given) and not given[0].startswith("-")
    values = read_yaml(Path(given[0])) if has_file else {}
    parser = Parser(f"compress {command}", about, f"[{RECIPE_NAME}] [options]")
    parser.add_argument(
        "recipe", nargs="?", metavar=RECIPE_NAME, help="a recipe, which flags then override"
    )
    mapping, known = Flags(Recipe, METHODS).parse(values, given, parser)
    if known.recipe is not None and not has_file:
        raise RecipeError(f"{known.recipe}: a recipe goes first: compress {command} {known.recipe}")
    return Recipe.from_mapping(mapping)


RUN = Command(_run, "Compress a model, verify, evaluate and describe the result.")


PLAN = Command(_plan, "Refuse or describe a run, with its sizes, without doing it.")


CALIBRATE = Command(_calibrate, "Collect and save the statistics that a run would use.")
