"""Dataclasses of options <-> plain mappings (YAML, JSON) and the strings of a command line.

A field is a leaf (number, text, path, enum, list of these) or a choice: an object of some other
options class, named in a registry, such as the base of a correction. In a mapping a choice is written
{name: gptq, bits: 4}, or just gptq. Every refusal is a RecipeError that starts with the path of the
option, says the bad value and what would be right.
"""

import difflib
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from compress.errors import RecipeError, inside
from compress.families.option_types import choice_of, is_leaf, misfit, option_hints, plain
from compress.families.options import Options, resolves_to
from compress.families.renamed import words_now

Registry = Mapping[str, type]
T = TypeVar("T")

NONE = "none"
"""How an option that may hold nothing is told so."""


@dataclass(frozen=True)
class Option:
    """One option of a tree of dataclasses: where it is, what it takes and what it is now."""

    path: tuple[str, ...]
    hint: Any
    value: object
    field: Field[Any]
    choices: tuple[str, ...]
    """Names that a choice may have; empty for a leaf."""
    closed: bool = False
    """Whether this is a choice whose own options were left out."""


def parse_leaf(hint: Any, value: object, path: str) -> Any:
    """`value` (of YAML, or the text of a flag) as the leaf type `hint`.

    Lists may be written as one comma-separated text; `none` is the empty list. A boolean is never read as a number, a
    number is as a choice of that name. A path may begin with ~, the user's home.

    Raises:
        RecipeError: the type cannot hold `value`.
    """
    given = value
    if isinstance(value, str) and get_origin(hint) is tuple:
        value = split_list(value)
    if get_origin(hint) is tuple and isinstance(value, Sequence) and list(value) == [NONE]:
        value = ()
    if isinstance(value, str) and value.lower() == NONE and _may_be_none(hint):
        return None
    if isinstance(hint, type) and issubclass(hint, Enum) and type(value) is int:
        value = str(value)  # a number to YAML, the name of a choice here: `value_bits: 4`
    try:
        if isinstance(value, bool):
            raise RecipeError(misfit(given, hint), option=path)
        leaf = TypeAdapter(hint, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
        return leaf.expanduser() if isinstance(leaf, Path) else leaf
    except ValidationError:
        raise RecipeError(misfit(given, hint), option=path) from None
    except RuntimeError as error:
        raise RecipeError(f"{given!r}: {error} Write the folder in full.", option=path) from error


def _may_be_none(hint: Any) -> bool:
    """Whether the word none means that nothing was given: not where an enum has a member of that name."""
    kinds = get_args(hint)
    enums = (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum))
    has_member = any(member.value == NONE for kind in enums for member in kind)
    return types.NoneType in kinds and not has_member


def split_list(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated text, without the empty ones.

    The name of a file that exists, perhaps with a weight (`a,b.txt:0.3`), is one part.
    """
    if "," in text and _is_file(re.sub(r":[\d.]+$", "", text)):
        return (text,)
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # too long to be a name, for one
        return False


def build(
    kind: type[T], values: object, path: str, registry: Registry, start: T | None = None
) -> T:
    """A `kind` from a mapping; what the mapping lacks comes from `start` or the defaults.

    Raises:
        RecipeError: an unknown key (the message lists what exists), a bad value, or what `kind`
            itself refuses.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(
            f"{values!r} is not a mapping of options such as `key: value`", option=path
        )
    known = option_hints(kind)
    if told := words_now(values, known):
        raise RecipeError(told, option=path)
    for key in values:
        if key not in known:
            raise RecipeError(f"no such option; {_exist(str(key), known)}", option=f"{path}.{key}")
    given = {}
    for key, value in values.items():
        default = getattr(start, key) if start is not None else None
        if default is None:
            default = _default(kind, key)
        given[key] = _read(known[key], value, f"{path}.{key}", registry, default)
    if start is not None:
        return _construct(lambda: replace(start, **given), path)  # type: ignore[type-var]
    return _construct(lambda: kind(**given), path)


def dump(options: object, registry: Registry) -> dict[str, Any]:
    """The plain mapping from which `build` makes an object that does the same; defaults are written out."""
    if isinstance(options, Options):
        options = options.resolved()
    mapping: dict[str, Any] = {}
    for name, hint in option_hints(type(options)).items():
        value = getattr(options, name)
        if is_leaf(hint) or value is None:
            mapping[name] = plain(value)
        else:
            mapping[name] = {"name": name_of(value, registry), **dump(value, registry)}
    return mapping


def name_of(options: object, registry: Registry) -> str:
    """The name under which the class of `options` is registered."""
    for name, kind in registry.items():
        if kind is type(options):
            return name
    raise RecipeError(f"{type(options).__name__}: not registered; there are {', '.join(registry)}")


def walk_options(
    options: object, registry: Registry, path: tuple[str, ...] = ()
) -> Iterator[Option]:
    """Every option of an options object and of the choices inside it, parents first, with its value or default."""
    hints = option_hints(type(options))
    for field in fields(options):  # type: ignore[arg-type]
        if field.name not in hints:
            continue
        here, hint, value = (*path, field.name), hints[field.name], getattr(options, field.name)
        if value is None and isinstance(options, Options):
            value = options.default_of(field.name)
        names = () if is_leaf(hint) else tuple(_offered(options, field, hint, registry))
        yield Option(here, hint, value, field, names)
        if names and value is not None:
            yield from walk_options(value, registry, here)


def own_options(kind: type, registry: Registry) -> Iterator[Option]:
    """The options of a class itself with its defaults: of a choice the names that there are, none imported."""
    hints = option_hints(kind)
    for field in fields(kind):
        if field.name not in hints:
            continue
        hint = hints[field.name]
        if is_leaf(hint):
            yield Option((field.name,), hint, _default(kind, field.name), field, ())
        else:
            yield Option((field.name,), hint, None, field, tuple(sorted(registry)), closed=True)


def choices(hint: Any, registry: Registry) -> dict[str, type]:
    """The registered classes of which a field of type `hint` may hold an object."""
    wanted = choice_of(hint)
    if wanted is None:
        return {}
    return {name: kind for name, kind in sorted(registry.items()) if issubclass(kind, wanted)}


def _offered(options: object, field: Field[Any], hint: Any, registry: Registry) -> Iterator[str]:
    """The choices for a field that `options` does not refuse in any case; none where it may stay empty."""
    if types.NoneType in get_args(hint) and "resolves_to" not in field.metadata:
        yield NONE
    for name, kind in choices(hint, registry).items():
        if not issubclass(kind, getattr(options, "refused_choices", ())):
            yield name


def closest(word: str, known: Iterable[str]) -> str:
    """ " (did you mean x?)" for the known word most like `word`, or nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _read(hint: Any, value: object, path: str, registry: Registry, default: object) -> Any:
    if is_leaf(hint):
        return parse_leaf(hint, value, path)
    if isinstance(value, hint):
        return value
    table = choices(hint, registry)
    if value == NONE and types.NoneType in get_args(hint):
        return None
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping):
        example = "{name: " + next(iter(table), "...") + ", ...}"
        raise RecipeError(
            f"{value!r} is neither a name nor a mapping such as {example}", option=path
        )
    name = value.get("name", name_of(default, registry) if default is not None else None)
    if not isinstance(name, str) or name not in table:
        raise RecipeError(f"there is no {name!r}; {_exist(str(name), table)}", option=path)
    kind = table[name]
    rest = {key: part for key, part in value.items() if key != "name"}
    return build(kind, rest, path, registry, default if type(default) is kind else None)


def _default(kind: type, name: str) -> object:
    field = next(field for field in fields(kind) if field.name == name)
    if field.default_factory is not MISSING:
        return field.default_factory()
    default = None if field.default is MISSING else field.default
    return resolves_to(field) if default is None else default


def _construct(make: Callable[[], T], path: str) -> T:
    """`make()`, with the path before the option that the class refuses, which it names by its own field."""
    try:
        with inside(path):
            return make()
    except RecipeError:
        raise
    except (ValueError, TypeError) as error:
        # A class of somebody else's, or a field without a default that the mapping lacks; dataclasses name it.
        raise RecipeError(str(error), option=path) from error


def _exist(word: str, known: Iterable[str]) -> str:
    names = sorted(known)
    return f"there are {', '.join(names)}{closest(word, names)}" if names else "there are none"
