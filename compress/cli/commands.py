"""The commands there are, in the order of help."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from compress.cli.command import Argument, Command, of_export, of_file
from compress.cli.folders import RECIPE_NAME
from compress.config.recipe import Recipe
from compress.config.yaml_file import read_yaml
from compress.engines.base import ENGINES
from compress.errors import RecipeError
from compress.report.metrics import Shown, shown_in

SWEEP_NAME = "sweep.yaml"
METHOD_HELP = (
    "Flags may be shortened to any unique suffix: --bits for --method.base.bits. "
    "compress {} --method NAME --help lists the options of a method."
)
_RECIPE_FILE = Argument(
    name="recipe", metavar=RECIPE_NAME, nargs="?", about="a recipe, which flags then override"
)


def _of_sweep(_: Command, words: Sequence[str]) -> Mapping[str, Any]:
    """The base recipe in a sweep's file."""
    base = (
        read_yaml(Path(words[0])).get("recipe") if words and not words[0].startswith("-") else None
    )
    if base is not None and not isinstance(base, Mapping):
        raise RecipeError(f"recipe: {base!r} is not a mapping of options such as `model: demo`")
    return base or {}


def _of_recipe(name: str, about: str, *arguments: Argument) -> Command:
    """A command that takes a whole recipe, and some arguments of its own."""
    return Command(
        name=name,
        about=about,
        usage=f"[{RECIPE_NAME}] [options]",
        home=f"running.{name}",
        arguments=(_RECIPE_FILE, *arguments),
        options=(),
        recipe=of_file,
        epilog=METHOD_HELP.format(name),
    )


_ALL = (
    _of_recipe("run", "Compress a model, verify, evaluate and describe the result."),
    _of_recipe(
        "plan",
        "Dry run: check everything, and print sizes and times.",
        Argument(
            name="--layers",
            const="each",
            default="kinds",
            about="where ranks differ, a row for each expert too",
        ),
    ),
    Command(
        name="sweep",
        about="Run many recipes, planned together, and compare what they reach.",
        usage=f"{SWEEP_NAME} [options]",
        home="sweeping.sweep",
        arguments=(
            Argument(
                name="sweep", metavar=SWEEP_NAME, nargs="?", about="a base recipe, points and axes"
            ),
            Argument(
                name="--out", metavar="DIR", kind=Path, about="where (default: the file's name)"
            ),
            Argument(
                name="--budget",
                metavar="BYTES",
                about="sizes of whole checkpoints (120MB,80MB): tells the best point at each, and makes points of "
                "just these sizes for methods that have a budget",
            ),
            Argument(
                name="--by",
                choices=lambda: [metric.key for metric in shown_in(Shown.PARETO)],
                default="kl",
                about="what the best point is best in (default: kl)",
            ),
            Argument(
                name="--plan", const=True, about="check everything and print the plan; run nothing"
            ),
        ),
        options=tuple(
            it.name for it in fields(Recipe) if it.name not in ("method", "out", "publish_as")
        ),
        recipe=_of_sweep,
    ),
    Command(
        name="inspect",
        about="Show what is in a checkpoint, and what methods could do to it.",
        usage="MODEL [options]",
        home="inspecting.inspect",
        arguments=(
            Argument(
                name="model",
                metavar="MODEL",
                about="a folder, a hub id, a .gguf file, or demo; compressed or not",
            ),
            Argument(name="--layers", const="each", default="kinds", about="a row for each layer"),
            Argument(
                name="--spectra",
                const=True,
                about="effective ranks of the weights; reads all of them",
            ),
            Argument(
                name="--html", metavar="FILE", kind=Path, about="the same as a page of pictures"
            ),
        ),
    ),
    Command(
        name="methods",
        about="List the methods there are, with their papers.",
        usage="",
        home="methods.methods",
        extra="",
    ),
    _of_recipe(
        "calibrate",
        "Collect and save the statistics that a run would use.",
        Argument(
            name="--imatrix",
            metavar="FILE",
            kind=Path,
            about="write the mean squares of layers' inputs to this .gguf file too, which llama-quantize reads",
        ),
    ),
    Command(
        name="verify",
        about="Load an export in a fresh process and compare its logits.",
        usage="DIR [--device DEVICE] [--engine NAME ...]",
        home="verifying.verify",
        extra="",
        arguments=(
            Argument(
                name="folder", metavar="DIR", kind=Path, about="an export, or a folder of some"
            ),
            Argument(
                name="--device",
                metavar="DEVICE",
                default="cpu",
                about="where to load it (default: cpu)",
            ),
            Argument(
                name="--engine",
                metavar="NAME",
                nargs="+",
                default=(),
                choices=lambda: ["auto", *ENGINES],
                about="engines that must load it too, and reproduce its log-probabilities; auto: all that its format "
                "is for, where they are installed",
            ),
        ),
    ),
    Command(
        name="publish",
        about="Upload an export to the Hugging Face hub, into a repository of its own.",
        usage="DIR [OWNER/NAME] [options]",
        home="publishing.publish",
        arguments=(
            Argument(
                name="folder", metavar="DIR", kind=Path, about="an export, or a folder of some"
            ),
            Argument(
                name="repository",
                metavar="OWNER/NAME",
                nargs="?",
                about="the repository (default: --publish-as of the run); several exports are a repository each, whose "
                "names this one begins",
            ),
            Argument(
                name="--public",
                const="public",
                default="private",
                about="a new repository is for everybody to see",
            ),
            Argument(
                name="--dry-run", const=True, about="print the files and the card; upload nothing"
            ),
            Argument(
                name="--base-model", metavar="ID", about="the original's repository, for the card"
            ),
            Argument(name="--license", metavar="LICENSE", about="the licence, by the hub's id"),
            Argument(
                name="--base",
                metavar="ID",
                about="the repository of the checkpoint that an adapter belongs to, where the run had a folder",
            ),
        ),
    ),
    Command(
        name="eval",
        about="Evaluate an export beside its original.",
        usage="DIR [--reference MODEL] [options]",
        home="evaluating.evaluate",
        arguments=(
            Argument(name="folder", metavar="DIR", kind=Path, about="an export that `run` wrote"),
            Argument(
                name="--reference",
                metavar="MODEL",
                about="compare with it (default: its source)",
            ),
        ),
        options=(
            *("device", "dtype", "seed", "batch_size", "seq_len"),
            *("eval_text", "eval_windows", "tasks", "limit", "include_path"),
        ),
        recipe=of_export,
    ),
    Command(
        name="report",
        about="Show the report in a folder that run wrote, or compare several.",
        usage="DIR [DIR ...] [options]",
        home="reporting.report",
        arguments=(
            Argument(
                name="folders",
                metavar="DIR",
                kind=Path,
                nargs="+",
                about="a folder that `run` wrote, or the report.json in it; several are compared",
            ),
            Argument(
                name="--format",
                choices=lambda: ("md", "json", "html", "csv"),
                about="default: what --out ends in, else a table",
            ),
            Argument(
                name="--out", metavar="FILE", kind=Path, about="write it there (default: print)"
            ),
            Argument(
                name="--allow-mismatch",
                const="tell",
                default="refuse",
                about="compare runs that were measured differently too, and tell in what",
            ),
        ),
    ),
)

COMMANDS: Mapping[str, Command] = {command.name: command for command in _ALL}
