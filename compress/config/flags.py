"""Command-line flags made from a tree of options.

A flag is the path of its option (--method.base.bits), which may be shortened to any unique suffix (--bits).
Which options there are depends on the methods chosen, so these are read first, and only if a flag or the recipe names
one: the options of a recipe itself need no method, and methods need torch.
"""

import argparse
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, NoReturn, get_args, get_origin

from compress.config.options import (
    NONE,
    Option,
    Registry,
    build,
    closest,
    own_options,
    split_list,
    walk_options,
)
from compress.errors import RecipeError
from compress.families.option_types import plain
from compress.families.renamed import flag_now

HELP = ("-h", "--help")


class Parser(argparse.ArgumentParser):
    """argparse that reports errors as RecipeError and knows no abbreviations."""

    def __init__(self, prog: str, description: str, usage: str) -> None:
        """`usage` is what follows the name of the program."""
        width = min(shutil.get_terminal_size((100, 24)).columns, 120)
        super().__init__(
            prog=prog,
            usage=f"{prog} {usage}",
            description=description,
            allow_abbrev=False,
            formatter_class=partial(argparse.HelpFormatter, max_help_position=28, width=width),
        )

    def error(self, message: str) -> NoReturn:
        """Raises instead of printing the usage."""
        raise RecipeError(f"{message}; {self.prog} --help lists the options")


@dataclass(frozen=True)
class Flags:
    """The flags of one command over options of dataclass `kind`.

    `only` limits them to fields of `kind` with these names; empty allows all.
    """

    kind: type
    registry: Registry
    only: tuple[str, ...] = ()

    def choose(self, values: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
        """`values` with every method that flags name; options of a replaced method are dropped."""
        chosen = dict(values)
        # A choice can bring further choices (the base of a base): look again until it is stable.
        for _ in range(len(arguments) + 1):
            options = self.options(chosen)
            change = next(self._changes(options, arguments), None)
            if change is None:
                break
            chosen = with_value(chosen, *change)
        return chosen

    def options(self, values: Mapping[str, Any]) -> list[Option]:
        """Every option that the methods in `values` have, with its value there or its default."""
        start: Any = build(self.kind, values, self.kind.__name__.lower(), self.registry)
        return [option for option in walk_options(start, self.registry) if self._takes(option)]

    def known(
        self, values: Mapping[str, Any], arguments: Sequence[str], own: Collection[str] = HELP
    ) -> tuple[dict[str, Any], list[Option]]:
        """`values` with the methods that flags name, and the options that flags can be of.

        Methods stay closed, unless `values` or a flag names one or a flag is none of the recipe's `own` options.
        """
        closed = [it for it in own_options(self.kind, self.registry) if self._takes(it)]
        flags = {argument.partition("=")[0] for argument in arguments if argument[:2] == "--"}
        leaves = {flag_of(option) for option in closed if not option.choices}
        opened = any(option.path[0] in values for option in closed if option.choices)
        if not opened and all(_dashed(flag) in leaves or flag in own for flag in flags):
            return dict(values), closed
        chosen = self.choose(values, arguments)
        return chosen, self.options(chosen)

    def parse(
        self,
        values: Mapping[str, Any],
        arguments: Sequence[str],
        parser: Parser,
        own: Collection[str] = HELP,
    ) -> tuple[dict[str, Any], argparse.Namespace]:
        """`values` overlaid by the flags in `arguments`, and what else `parser` knows, of which `own` are the flags.

        Raises:
            RecipeError: an unknown or ambiguous flag (naming the candidates), or a missing value.
        """
        chosen, options = self.known(values, arguments, own)
        add_options(parser, options)
        # A base checkpoint takes the place of the base, whose options then mean nothing.
        on_top = chosen.get("base_checkpoint") or any(
            flag == "--base-checkpoint" for flag, _ in _pairs(arguments)
        )
        idle = ("method", "base") if on_top else None
        known = parser.parse_args(list(spelled_out(arguments, options, own, idle)))
        for option in options:
            name = ".".join(option.path)
            if hasattr(known, name):
                chosen = _overlaid(chosen, option, _joined(getattr(known, name)))
        return chosen, known

    def _takes(self, option: Option) -> bool:
        return not self.only or option.path[0] in self.only

    def _changes(
        self, options: Sequence[Option], arguments: Sequence[str]
    ) -> Iterator[tuple[tuple[str, ...], dict[str, str] | None]]:
        """Choices that the flags make and `options` do not show; of two equal flags the last."""
        named: dict[tuple[str, ...], tuple[Option, str]] = {}
        for flag, value in _pairs(arguments):
            matches = matching(flag, options)
            if len(matches) == 1 and matches[0].choices:
                named[matches[0].path] = (matches[0], value)
        for path, (option, name) in named.items():
            if name not in option.choices:
                there = ", ".join(option.choices) + closest(name, option.choices)
                raise RecipeError(f"{flag_of(option)}: there is no {name!r}; there are {there}")
            wanted = self.registry.get(name, type(None))
            if wanted is not type(option.value):
                yield path, None if wanted is type(None) else {"name": name}


def flag_of(option: Option) -> str:
    """The full flag of an option: --method.base.group-size."""
    return _flag(option.path)


def with_value(values: Mapping[str, Any], path: tuple[str, ...], value: object) -> dict[str, Any]:
    """A copy of nested `values` with `value` at `path`."""
    head, rest = path[0], path[1:]
    if not rest:
        return {**values, head: value}
    inner = values.get(head) or {}
    if isinstance(inner, str):  # a method written as its name alone
        inner = {"name": inner}
    return {**values, head: with_value(inner, rest, value)}


def _overlaid(
    values: Mapping[str, Any], option: Option, given: str | tuple[str, ...]
) -> dict[str, Any]:
    """`values` with an option as a flag gives it; a method by its name, even where that is the default."""
    if not option.choices:
        return with_value(values, option.path, given)
    if given == NONE:
        return with_value(values, option.path, None)
    return with_value(values, (*option.path, "name"), given)


def add_options(parser: argparse.ArgumentParser, options: Sequence[Option]) -> None:
    """Adds the shortest flag of every option, in groups, with its help and default."""
    groups: dict[str, list[Option]] = {}
    for option in options:
        groups.setdefault(_group_title(option, options), []).append(option)
    for title, members in groups.items():
        group = parser.add_argument_group(title)
        for option in members:
            arguments: dict[str, Any] = {"nargs": "*"} if is_list(option) else {}
            group.add_argument(
                shortest(option, options),
                dest=".".join(option.path),
                default=argparse.SUPPRESS,
                metavar=metavar(option),
                help=_help(option),
                **arguments,
            )


def spelled_out(
    arguments: Iterable[str],
    options: Sequence[Option],
    own: Collection[str],
    idle: tuple[str, ...] | None = None,
) -> Iterator[str]:
    """`arguments` with every flag as the one that the parser has, except the parser's `own` ones.

    `idle`: the path below which an option is meant only where no other has its ending.

    Raises:
        RecipeError: no option, or more than one, has that ending.
    """
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        if not flag.startswith("--") or flag == "--" or flag in own:
            yield argument
            continue
        matches = matching(flag, options)
        if idle is not None and len(matches) > 1:
            matches = [it for it in matches if it.path[: len(idle)] != idle] or matches
        if not matches:
            refuse_renamed([flag], own)
            names = {shortest(option, options) for option in options} | {*own}
            raise RecipeError(f"{flag}: no such option{closest(flag, names)}; --help lists them")
        if len(matches) > 1:
            raise RecipeError(
                f"{flag}: could be {' or '.join(map(flag_of, matches))}; write one of these"
            )
        yield shortest(matches[0], options) + equals + value


def refuse_renamed(arguments: Iterable[str], own: Collection[str]) -> None:
    """Raises RecipeError naming the new name of a flag that is none of a command's `own` and had another name."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        now = flag_now(flag) if flag.startswith("--") and flag not in own else None
        if now is not None:
            raise RecipeError(f"{flag}: this flag is called {now} now")


def _joined(value: str | list[str]) -> str | tuple[str, ...]:
    """The values of a list, which may be separated by spaces, commas or both."""
    if isinstance(value, str):
        return value
    return tuple(part for text in value for part in split_list(text))


def matching(flag: str, options: Sequence[Option]) -> list[Option]:
    """The option with exactly this path, or else all whose path ends in it.

    Of options inside one another, as when the base has a base, --base means the outer one.
    """
    wanted = tuple(flag.removeprefix("--").replace("-", "_").split("."))
    exact = [option for option in options if option.path == wanted]
    ending = [option for option in options if option.path[-len(wanted) :] == wanted]
    outer = [
        option
        for option in ending
        if all(other.path[: len(option.path)] == option.path for other in ending)
    ]
    return exact or outer or ending


def shortest(option: Option, options: Sequence[Option]) -> str:
    """The shortest flag that means this option and no other: --bits."""
    endings = (_flag(option.path[start:]) for start in reversed(range(len(option.path))))
    return next(ending for ending in endings if matching(ending, options) == [option])


def is_list(option: Option) -> bool:
    """Whether its flag takes any number of values."""
    return get_origin(option.hint) is tuple


def named_values(option: Option) -> tuple[str, ...]:
    """The values there are, where they have names: the choices, the names of a registry, the members of an enum."""
    kinds = (option.hint, *get_args(option.hint))
    enums = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)]
    registered = tuple(option.field.metadata.get("values", ()))
    return (
        option.choices
        or registered
        or tuple(str(member.value) for kind in enums for member in kind)
    )


def metavar(option: Option) -> str:
    """What its value is called in help: {auto,float32}, or MODEL; of itself the last word of the option's name."""
    named = named_values(option)
    if named and not option.choices and "values" not in option.field.metadata:
        return "{" + ",".join(named) + "}"
    return str(option.field.metadata.get("metavar", option.path[-1].rpartition("_")[2].upper()))


def _flag(path: tuple[str, ...]) -> str:
    return _dashed("--" + ".".join(path))


def _dashed(flag: str) -> str:
    return flag.replace("_", "-")


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=False):
        flag, equals, value = argument.partition("=")
        if flag.startswith("--") and (equals or (after and not after.startswith("--"))):
            yield flag, value if equals else after


def _group_title(option: Option, options: Sequence[Option]) -> str:
    general: str = option.field.metadata.get("group", "general")
    if option.closed:
        return general
    if option.choices:
        name = ".".join(option.path)
        if option.value is None:
            return f"{name}: none"
        return f"{name}: {type(option.value).__name__}, {_summary(option.value)}"
    parents = {each.path: each for each in options if each.choices}
    parent = parents.get(option.path[:-1])
    return _group_title(parent, options) if parent else general


def _summary(options: object) -> str:
    return (type(options).__doc__ or "").strip().partition("\n")[0].rstrip(".")


def _help(option: Option) -> str:
    text = str(option.field.metadata.get("help", "")).replace("%", "%%")
    if option.choices:
        return f"{text}: {', '.join(option.choices)}"
    registered = option.field.metadata.get("values")
    if registered:
        text = f"{text}: {', '.join(registered)}"
    value = plain(option.value)
    shown = " ".join(map(str, value)) or "empty" if isinstance(value, list) else value
    return f"{text} (default: {str(shown).lower() if value is None else shown})".strip()
