"""What a command is: a line about it, the arguments that it takes, and the function that is imported when it is called.

Arguments are read here, before anything is imported that computes: help, completion and wrong flags do not wait.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from compress.cli.folders import recipe_of
from compress.config.flags import HELP, Flags, Parser, refuse_renamed
from compress.config.recipe import Recipe
from compress.config.yaml_file import read_yaml
from compress.errors import RecipeError
from compress.extras import RUN, require
from compress.families.base import METHODS


@dataclass(frozen=True, kw_only=True)
class Argument:
    """An argument of a command that is no option of a recipe, as argparse takes it."""

    name: str
    """With dashes, a flag; without, what stands alone."""
    about: str
    metavar: str | None = None
    kind: type = str
    choices: Callable[[], Sequence[str]] = tuple
    """Asked when it is needed, for a program may add some; empty: any value."""
    default: object = None
    nargs: str | None = None
    const: object = None
    """What a flag without a value stands for; None: it takes a value."""

    def add_to(self, parser: Parser) -> None:
        """Let a parser know it."""
        if self.const is not None:
            parser.add_argument(
                self.name,
                action="store_const",
                const=self.const,
                default=self.default,
                help=self.about,
            )
            return
        parser.add_argument(
            self.name,
            metavar=self.metavar,
            type=self.kind,
            choices=self.choices() or None,
            default=self.default,
            nargs=self.nargs,
            help=self.about,
        )


@dataclass(frozen=True)
class Given:
    """What a command was given."""

    recipe: dict[str, Any]
    """Options of a recipe: of its file, overlaid by flags."""
    own: argparse.Namespace
    """The command's own arguments."""
    words: Sequence[str]


def no_recipe(_: Command, __: Sequence[str]) -> Mapping[str, Any]:
    """For commands that read none."""
    return {}


def of_file(_: Command, words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe in the YAML file that the first argument names, if it does."""
    return read_yaml(Path(words[0])) if words and not words[0].startswith("-") else {}


@dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand."""

    name: str
    about: str
    usage: str
    """What follows its name."""
    home: str
    """Module of `compress.cli` and its function: "running.run"."""
    arguments: tuple[Argument, ...] = ()
    options: tuple[str, ...] | None = None
    """The options of a recipe that it has flags for; empty: all. None: it takes no recipe."""
    recipe: Callable[[Command, Sequence[str]], Mapping[str, Any]] = no_recipe
    """The values that flags overlay, from its words."""
    epilog: str = ""
    extra: str = RUN
    """Optional dependencies without which it cannot be carried out; empty: none."""

    @property
    def own_flags(self) -> tuple[str, ...]:
        """Flags that are no option of a recipe."""
        return (*HELP, *(it.name for it in self.arguments if it.name.startswith("-")))

    def call(self, words: Sequence[str]) -> None:
        """Read the words after its name, then import the command and carry it out."""
        given = self.given(words, self.recipe(self, words))
        if self.extra:
            require(f"compress {self.name}", self.extra)
        module, _, function = self.home.partition(".")
        getattr(import_module(f"compress.cli.{module}"), function)(given)

    def given(self, words: Sequence[str], recipe: Mapping[str, Any]) -> Given:
        """What the words say. Raises RecipeError for what they cannot say, SystemExit after help."""
        parser = Parser(f"compress {self.name}", self.about, self.usage)
        parser.epilog = self.epilog
        for argument in self.arguments:
            argument.add_to(parser)
        if self.options is None:
            refuse_renamed(words, self.own_flags)
            return Given({}, parser.parse_args(words), words)
        flags = Flags(Recipe, METHODS, self.options)
        options, own = flags.parse(recipe, words, parser, self.own_flags)
        return Given(options, own, words)


def of_export(command: Command, words: Sequence[str]) -> Mapping[str, Any]:
    """The recipe of the export that the words name, wherever among them; none while they are wrong."""
    try:
        known = command.given([word for word in words if word not in HELP], {})
    except RecipeError:
        return {}  # the same words are refused once more, by their own reading
    return recipe_of(known.own.folder)
