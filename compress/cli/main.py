"""The command line: reads a recipe from YAML and flags, calls the pipeline, prints what came of it.

Errors that a user can cause are caught here and nowhere else: one message on stderr, exit code 2.
What a command imports is imported when its words have been read, so that help, completion and wrong flags do not wait
for torch.
"""

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from calibration.errors import InputError
from compress.cli.commands import COMMANDS
from compress.config.options import closest
from compress.errors import (
    CheckpointError,
    ComparisonError,
    LayerError,
    MissingExtraError,
    PluginError,
    RecipeError,
    SweepError,
)
from compress.report.environment import toolkit_version
from eval.errors import EvalError

_EXPECTED = (
    *(RecipeError, CheckpointError, ComparisonError, LayerError, PluginError, SweepError),
    *(InputError, EvalError, MissingExtraError, OSError),
)


_COMPLETE = "_COMPRESS_COMPLETE"
"""Set by the script that a shell completes with, which then runs the program."""


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM), which cleans up as Ctrl-C does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 2 for what was refused or failed, 130 for Ctrl-C, 143 for SIGTERM."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    wants_traceback = "--traceback" in given or bool(os.environ.get("COMPRESS_TRACEBACK"))
    given = [argument for argument in given if argument != "--traceback"]
    try:
        with _termination():
            if _COMPLETE in os.environ:
                from compress.cli.completion import answer

                print(answer(os.environ[_COMPLETE]))
            else:
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
    elif name in ("--show-completion", "--install-completion"):
        from compress.cli import completion

        shell = completion.shell_of(rest)
        show = completion.script if name == "--show-completion" else completion.install
        print(show(shell))
    elif name in COMMANDS:
        COMMANDS[name].call(rest)
    else:
        there = ", ".join(COMMANDS)
        raise RecipeError(f"{name}: no such command; there are {there}{closest(name, COMMANDS)}")


def _overview() -> str:
    commands = {name: command.about for name, command in COMMANDS.items()}
    return "\n".join(
        [
            "usage: compress COMMAND [options]",
            "",
            "Compresses language models: calibrate, compress, correct, export, verify, evaluate and report.",
            "A first try: compress run --method eora --bits 4",
            "",
            *_columns(commands),
            "",
            *_columns(
                {
                    "--version": "Print the version.",
                    "--install-completion [SHELL]": "Complete commands and flags in bash, zsh or fish.",
                    "--show-completion [SHELL]": "Print the script that does so.",
                    "--traceback": "Show where an error came from.",
                }
            ),
            "",
            "compress COMMAND --help lists the options of a command.",
        ]
    )


def _columns(about: Mapping[str, str]) -> list[str]:
    width = max(map(len, about))
    return [f"  {name:<{width}}  {text}" for name, text in about.items()]
