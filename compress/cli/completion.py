"""Shell completion: commands, flags, methods and other named values, paths.

click writes the shells' scripts, reads what they send and formats what they take; what there is to complete is ours,
as flags depend on the methods named before them. Methods are imported only where their own options are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from click import Command as ClickCommand
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

from compress.cli.command import Argument, Command
from compress.cli.commands import COMMANDS, SWEEP_NAME
from compress.cli.folders import RECIPE_NAME
from compress.config.flags import (
    Flags,
    flag_of,
    is_list,
    matching,
    metavar,
    named_values,
    shortest,
)
from compress.config.options import Option
from compress.config.recipe import Recipe
from compress.errors import PluginError, RecipeError
from compress.families.base import METHODS

VARIABLE = "_COMPRESS_COMPLETE"
"""Set by the scripts: "bash_complete"."""
SHELLS = ("bash", "zsh", "fish")
GENERAL = {
    "--help": "list the commands",
    "--version": "the version",
    "--install-completion": "complete commands and flags in this shell",
    "--show-completion": "print the script that does so",
}
"""Flags that stand without a command."""
PATHS = {
    "DIR": "dir",
    **dict.fromkeys(("FILE", "MODEL", "CHECKPOINT", "DATASET", RECIPE_NAME, SWEEP_NAME), "file"),
}
"""What the shell completes, by the name that help gives a value."""
_ZSH_SETUP = "(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }; "

Item = CompletionItem


def answer(instruction: str) -> str:
    """What a shell's script asked for. Raises RecipeError for an unknown shell."""
    return _completer(instruction.partition("_")[0]).complete()


def shell_of(words: Sequence[str]) -> str:
    """The shell that is named, or the user's. Raises RecipeError if it is neither bash, zsh nor fish."""
    name = words[0] if words else Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        told = repr(name) if name else "the user's shell is not known"
        raise RecipeError(f"completion: {told}; name one of {', '.join(SHELLS)}")
    return name


def script(shell: str) -> str:
    """The script that a shell is to read."""
    return _completer(shell).source().strip()


def install(shell: str) -> str:
    """Write the script, let the shell read it when it starts, and tell where. Installing again changes nothing more."""
    home = Path.home()
    if shell == "fish":
        config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
        file = config / "fish" / "completions" / "compress.fish"
        _write(file, script(shell))
        return f"wrote {file}; new shells complete"
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    file = data / "compress-llm" / f"completion.{shell}"
    _write(file, script(shell))
    start = home / ".bashrc"
    if shell == "zsh":
        start = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
    line = f'{_ZSH_SETUP if shell == "zsh" else ""}source "{file}"'
    text = start.read_text(encoding="utf-8") if start.is_file() else ""
    if line not in text.splitlines():
        gap = "" if not text or text.endswith("\n") else "\n"
        with start.open("a", encoding="utf-8") as opened:
            opened.write(f"{gap}{line}\n")
    return f"wrote {file}, which {start} reads; new shells complete"


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n", encoding="utf-8")


class _Ours(ShellComplete):
    def get_completions(self, args: list[str], incomplete: str) -> list[Item[str]]:
        """What can stand in the place of the incomplete word."""
        return list(completions(args, incomplete))


def _completer(shell: str) -> ShellComplete:
    kind = get_completion_class(shell)
    if kind is None or shell not in SHELLS:
        raise RecipeError(f"completion: {shell!r}; name one of {', '.join(SHELLS)}")
    ours = type(f"Our{kind.__name__}", (_Ours, kind), {})
    made: ShellComplete = ours(ClickCommand("compress"), {}, "compress", VARIABLE)
    return made


def completions(words: Sequence[str], incomplete: str) -> Iterator[Item[str]]:
    """What can stand after `words`, the program's name left out, where `incomplete` was begun."""
    words = list(words)
    if words and "=" in (
        words[-1],
        incomplete,
    ):  # bash gives the two sides of --flag=value as words
        words, incomplete = (words, "") if incomplete == "=" else (words[:-1], incomplete)
    if not words:
        yield from _first(incomplete)
        return
    command = COMMANDS.get(words[0])
    if command is None:
        shells = words[0] in ("--install-completion", "--show-completion")
        yield from _plain(SHELLS if shells else (), incomplete)
        return
    yield from _Place(command, words[1:]).completed(incomplete)


def _first(incomplete: str) -> Iterator[Item[str]]:
    about = (
        GENERAL if incomplete.startswith("-") else {it.name: it.about for it in COMMANDS.values()}
    )
    for name, text in about.items():
        if name.startswith(incomplete):
            yield Item(name, help=text)


def _plain(values: Sequence[str], incomplete: str, head: str = "") -> Iterator[Item[str]]:
    for value in values:
        if value.startswith(incomplete):
            yield Item(head + value)


class _Place:
    """A place on the command line, after the words of a command."""

    def __init__(self, command: Command, words: Sequence[str]) -> None:
        self.command, self.words = command, words
        self.flag = next((word for word in reversed(words) if word.startswith("--")), "")
        """The last flag, whose value may be due."""
        self.is_due = bool(words) and words[-1] == self.flag and "=" not in self.flag

    def completed(self, incomplete: str) -> Iterator[Item[str]]:
        flag, equals, value = incomplete.partition("=")
        if flag.startswith("--") and equals:
            yield from self._values(flag, value, f"{flag}=")
        elif incomplete.startswith("-"):
            yield from self._flags(incomplete)
        elif self.flag and self._is_open(self.flag):
            yield from self._values(self.flag, incomplete)
        else:
            alone = [it for it in self.command.arguments if not it.name.startswith("-")]
            kinds = (PATHS.get(it.metavar or "", "") for it in alone)
            yield from (Item(incomplete, type=kind) for kind in kinds if kind)

    def _flags(self, incomplete: str) -> Iterator[Item[str]]:
        for argument in self.command.arguments:
            if argument.name.startswith("-") and argument.name.startswith(incomplete):
                yield Item(argument.name, help=argument.about)
        options = self._options(self.words)
        for option in options:
            for flag in (shortest(option, options), flag_of(option)):
                if flag.startswith(incomplete):
                    yield Item(flag, help=str(option.field.metadata.get("help", "")))
                    break
        yield from _plain(("--help",), incomplete)

    def _is_open(self, flag: str) -> bool:
        """Whether a word after the flag can be its value."""
        found = self._of(flag)
        if isinstance(found, Argument):
            return self.is_due and found.const is None
        return found is not None and (self.is_due or is_list(found))

    def _values(self, flag: str, incomplete: str, head: str = "") -> Iterator[Item[str]]:
        found = self._of(flag)
        if isinstance(found, Argument):
            values, kind = found.choices(), PATHS.get(found.metavar or "")
        elif found is not None:
            values, kind = named_values(found), PATHS.get(metavar(found))
        else:
            return
        yield from _plain(values, incomplete, head)
        if kind:
            yield Item(incomplete, type=kind)

    def _of(self, flag: str) -> Argument | Option | None:
        """What a flag is of."""
        own = next((it for it in self.command.arguments if it.name == flag), None)
        if own is not None:
            return own
        before = self.words[: -1 if self.is_due else None]
        for words in (before, [*before, flag]):  # the flag may be of a method that is not named
            found = matching(flag, self._options(words))
            if found:
                return found[0]
        return None

    def _options(self, words: Sequence[str]) -> list[Option]:
        """The options that flags can be of, as far as the words make sense."""
        if self.command.options is None:
            return []
        flags = Flags(Recipe, METHODS, self.command.options)
        try:
            values = self.command.recipe(self.command, words)
            return flags.known(values, words, self.command.own_flags)[1]
        except (RecipeError, PluginError):
            return flags.known({}, ())[1]
