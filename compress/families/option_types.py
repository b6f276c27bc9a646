"""Types of options: which values a field of an options dataclass takes, and how people are told of it."""

import types
from collections.abc import Mapping
from dataclasses import fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from compress.errors import RecipeError

_LEAVES = (int, float, str, Path, Enum, types.NoneType)
_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    types.NoneType: "none",
}


def option_hints(kind: type) -> Mapping[str, Any]:
    """Types of the fields of dataclass `kind`, by name, in their order."""
    return _hints(kind)


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in fields(kind) if field.init}


def is_leaf(hint: Any) -> bool:
    """Whether values of this type are written directly, not as a mapping of further options."""
    return choice_of(hint) is None


def choice_of(hint: Any) -> type | None:
    """The class of which a field of this type holds an object, or none (X | None); None for a leaf."""
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not types.NoneType]
    if len(kinds) == 1 and isinstance(kinds[0], type) and not issubclass(kinds[0], _LEAVES):
        return None if get_origin(hint) in (tuple, list) else kinds[0]
    return None


def describe(hint: Any) -> str:
    """A type in a user's words: "a whole number", "one of auto, float32"."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (Union, types.UnionType):
        return " or ".join(describe(argument) for argument in arguments)
    if origin in (tuple, list):
        return f"a list, each {describe(arguments[0])}"
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(str(member.value) for member in hint)}"
    return _NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def check_types(options: object) -> None:
    """Refuses an options object whose fields were filled from Python with values of other types.

    Raises:
        RecipeError: naming the field; nothing is coerced, so a path is a Path and a list a tuple.
    """
    for name, hint in option_hints(type(options)).items():
        value = getattr(options, name)
        if not is_leaf(hint):
            if not isinstance(value, hint):
                raise RecipeError(f"{value!r} is not a {describe(hint)}", option=name)
            continue
        try:
            _adapter(hint).validate_python(value)
        except ValidationError:
            raise RecipeError(misfit(value, hint), option=name) from None


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint, config=ConfigDict(strict=True))


def plain(value: Any) -> Any:
    """A leaf as YAML and JSON know it: text, number, none or a list of these."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [plain(part) for part in value]
    return value


def misfit(value: object, hint: Any) -> str:
    """The message that a value is none of a type's."""
    shown = str(plain(value)) if isinstance(value, Enum | Path) else repr(value)
    return f"{shown} does not fit; it takes {describe(hint)}"
