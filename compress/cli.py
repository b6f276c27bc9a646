"""The command line: reads a recipe from YAML and flags, calls the pipeline, prints what came of it.

Errors that a user can cause are caught here and nowhere else: one message on stderr, exit code 2.
The pipeline is imported by the commands that need it, so that help does not wait for lm-eval.
"""

import argparse
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.utils import logging

from calibration.errors import InputError
from compress.environment import toolkit_version
from compress.errors import CheckpointError, LayerError, RecipeError
from compress.flags import Flags, Parser
from compress.options import closest
from compress.progress import show_progress
from compress.recipe import METHODS, Recipe
from compress.recipe_file import read_yaml
from compress.report import Report
from compress.summary import Row, comparison_rows, lines, rows, table
from eval.errors import EvalError

_EXPECTED = (RecipeError, CheckpointError, LayerError, InputError, EvalError, OSError)
_RECIPE_NAME = "recipe.yaml"
_EVALUATION = (
    *("device", "dtype", "seed", "batch_size", "seq_len"),
    *("eval_text", "eval_windows", "tasks", "limit", "include_path"),
)


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM), which cleans up as Ctrl-C does."""


@dataclass(frozen=True)
class Command:
    """A subcommand: what it does, and one line about it."""

    call: Callable[[list[str]], None]
    about: str


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 2 for what was refused or failed, 130 for Ctrl-C, 143 for SIGTERM."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    wants_traceback = "--traceback" in given or bool(os.environ.get("COMPRESS_TRACEBACK"))
    given = [argument for argument in given if argument != "--traceback"]
    try:
        with _termination():
            _dispatch(given)
    except _EXPECTED as error:
        if wants_traceback:
            traceback.print_exc()
        _complain(str(error), error)
        return 2
    except Terminated as error:
        _complain("terminated", error)
        return 143
    except KeyboardInterrupt as error:
        _complain("interrupted", error)
        return 130
    return 0


@contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM raises Terminated, once: another one does not disturb the cleaning up."""

    def stop(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield  # Python lets only the main thread handle signals
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _complain(message: str, error: BaseException) -> None:
    for line in (f"error: {message}", *getattr(error, "__notes__", ())):
        print(line, file=sys.stderr)


def _dispatch(given: list[str]) -> None:
    name, rest = (given[0], given[1:]) if given else ("--help", [])
    if name in ("-h", "--help"):
        print(_overview())
    elif name == "--version":
        print(f"compress-llm {toolkit_version()}")
    elif name in COMMANDS:
        COMMANDS[name].call(rest)
    else:
        there = ", ".join(COMMANDS)
        raise RecipeError(f"{name}: no such command; there are {there}{closest(name, COMMANDS)}")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = [f"  {name:<{width}}  {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: compress COMMAND [options]",
            "",
            "Compresses language models after training: calibrate, compress, repair, export,",
            "verify, evaluate, report. A first try: compress run --method eora --bits 4",
            "",
            *commands,
            "",
            "compress COMMAND --help lists the options; compress --version tells the version;",
            "--traceback shows where an error came from.",
        ]
    )


def _run(given: list[str]) -> None:
    recipe = _recipe("run", given, COMMANDS["run"].about)
    from compress import pipeline

    with _progress() as progress:
        report = pipeline.run(recipe, progress=progress)
    _show(rows(report), f"{recipe.model}, {recipe.method_name}")
    print(f"written to {recipe.folder}; README.md there is the model card")


def _plan(given: list[str]) -> None:
    recipe = _recipe("plan", given, COMMANDS["plan"].about)
    from compress import pipeline

    with _progress() as progress:
        planned = pipeline.plan(recipe, progress=progress)
    print("\n".join(planned.lines()))


def _calibrate(given: list[str]) -> None:
    recipe = _recipe("calibrate", given, COMMANDS["calibrate"].about)
    from compress import pipeline

    with _progress() as progress:
        folder = pipeline.calibrate(recipe, progress=progress)
    print(f"statistics are in {folder}; a run on equal model, text and settings uses them")


def _methods(given: list[str]) -> None:
    Parser("compress methods", COMMANDS["methods"].about, "").parse_args(given)
    for name, kind in sorted(METHODS.items()):
        summary = (kind.__doc__ or "").strip().partition("\n")[0]
        print(f"{name:<14}{summary}\n{'':<14}{kind.paper}")
    print("\ncompress run --method NAME --help lists the options of one.")


def _verify(given: list[str]) -> None:
    parser = Parser("compress verify", COMMANDS["verify"].about, "DIR [--device DEVICE]")
    parser.add_argument("folder", metavar="DIR", type=Path, help="an export, or a folder of some")
    parser.add_argument("--device", default="cpu", help="where to load it (default: cpu)")
    known = parser.parse_args(given)
    from compress.verify import verify

    for folder in _exports(known.folder):
        found = verify(folder, device=known.device)
        print(
            f"{folder}: loaded by {found.loader}, reproduces the compressed model; relative "
            f"difference {found.relative_difference:.1e} (tolerance {found.tolerance:.0e})"
        )


def _evaluate(given: list[str]) -> None:
    # Twice: the folder may come after flags, and the defaults of flags are those of its recipe.
    folder = _evaluation({}, [part for part in given if part not in ("-h", "--help")], "?")[1]
    values = {} if folder.folder is None else _recipe_of(folder.folder)
    mapping, known = _evaluation(values, given, None)
    if not known.folder.is_dir():
        raise CheckpointError(f"{known.folder}: no such folder; name an export that `run` wrote")
    recipe = Recipe.from_mapping(mapping)
    if known.reference is not None:
        recipe = replace(recipe, model=known.reference)
    elif "model" not in mapping:
        raise RecipeError(f"--reference: {known.folder} has no recipe.yaml to tell; name a model")
    export = _first_export(known.folder, recipe)
    from compress import pipeline

    with _progress() as progress:
        scores = pipeline.evaluate(export, recipe, progress=progress)
    _show(comparison_rows(scores), f"{recipe.model} and {export}")


def _evaluation(
    values: Mapping[str, Any], given: list[str], nargs: str | None
) -> tuple[dict[str, Any], argparse.Namespace]:
    parser = Parser("compress eval", COMMANDS["eval"].about, "DIR [--reference MODEL] [options]")
    parser.add_argument(
        "folder", metavar="DIR", type=Path, nargs=nargs, help="an export that `run` wrote"
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="compare with it (default: its source)"
    )
    return Flags(Recipe, METHODS, _EVALUATION).parse(values, given, parser)


def _report(given: list[str]) -> None:
    parser = Parser("compress report", COMMANDS["report"].about, "DIR")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a folder that `run` wrote")
    folder = parser.parse_args(given).folder
    report = Report.load(folder)
    _show(rows(report), str(folder))
    for note in report.notes:
        print(f"note: {note}")


COMMANDS: dict[str, Command] = {
    "run": Command(_run, "Compress a model, verify, evaluate and describe the result."),
    "plan": Command(_plan, "Refuse or describe a run, with its sizes, without doing it."),
    "methods": Command(_methods, "List the methods there are, with their papers."),
    "calibrate": Command(_calibrate, "Collect and save the statistics that a run would use."),
    "verify": Command(_verify, "Load an export in a fresh process and compare its logits."),
    "eval": Command(_evaluate, "Evaluate an export beside its original."),
    "report": Command(_report, "Show the report in a folder that run wrote."),
}


def _recipe(command: str, given: list[str], about: str) -> Recipe:
    """Defaults, overlaid by the YAML file if the first argument names one, overlaid by flags."""
    has_file = bool(given) and not given[0].startswith("-")
    values = read_yaml(Path(given[0])) if has_file else {}
    parser = Parser(f"compress {command}", about, f"[{_RECIPE_NAME}] [options]")
    parser.add_argument(
        "recipe", nargs="?", metavar=_RECIPE_NAME, help="a recipe, which flags then override"
    )
    mapping, known = Flags(Recipe, METHODS).parse(values, given, parser)
    if known.recipe is not None and not has_file:
        raise RecipeError(f"{known.recipe}: a recipe goes first: compress {command} {known.recipe}")
    return Recipe.from_mapping(mapping)


def _recipe_of(folder: Path) -> Mapping[str, Any]:
    """The recipe in an export's folder, or beside it; empty if there is none."""
    files = [folder / _RECIPE_NAME, folder.parent / _RECIPE_NAME]
    return next((read_yaml(file) for file in files if file.is_file()), {})


def _first_export(folder: Path, recipe: Recipe) -> Path:
    """`folder`, or if it only holds exports, the one that the run evaluated: its recipe's first."""
    found = _exports(folder)
    if found == [folder] or (folder / "config.json").is_file():
        return folder
    first = next((path for name in recipe.export for path in found if path.name == name), found[0])
    others = ", ".join(str(path) for path in found if path != first)
    if others:
        print(f"note: evaluating {first}; there is also {others}", file=sys.stderr)
    return first


def _exports(folder: Path) -> list[Path]:
    """`folder` itself if it is an export, or the exports in it."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    found = [path.parent for path in sorted(folder.glob("*/probe.safetensors"))]
    return [folder] if (folder / "probe.safetensors").is_file() or not found else found


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Our progress on stderr, and no bars of transformers in between."""
    logging.disable_progress_bar()
    with show_progress(Console(stderr=True)) as progress:
        yield progress


def _show(result: list[Row], title: str) -> None:
    console = Console()
    if console.is_terminal:
        console.print(table(result, title))
    else:
        print("\n".join([title, *lines(result)]))
