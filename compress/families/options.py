"""Options of methods: which have an effect beside which others, and what those resolve to that were not given."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import Field, fields, replace
from typing import Any, ClassVar, Self

from compress.errors import RecipeError
from compress.families.option_types import check_types, option_hints
from compress.families.renamed import words_now


class Options:
    """The options of a method: the fields of a frozen, keyword-only dataclass.

    An option that has an effect only beside certain others has the default None, "not given"; its metadata say what it
    resolves to where it has an effect: `field(default=None, metadata={"resolves_to": 32, "help": ...})`, or a function
    that makes it. Help and recipe.yaml show that value.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __new__(cls, *_: object, **given: object) -> Self:
        """Raises RecipeError naming the new name of an option that had another one."""
        if told := words_now(given, option_hints(cls)):
            raise RecipeError(told)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        """Reads enum options given by their value, `value_bits=4` say, and refuses options without effect.

        Raises RecipeError for a value that the enum lacks or the option's type does not hold, and for an option in
        `idle` that was given.
        """
        for entry in fields(self):
            kind = type(entry.metadata.get("resolves_to", entry.default))
            value = getattr(self, entry.name)
            if value is None or not issubclass(kind, enum.StrEnum) or isinstance(value, kind):
                continue
            try:
                object.__setattr__(self, entry.name, kind(str(value)))
            except ValueError:
                there = ", ".join(member.value for member in kind)
                raise RecipeError(f"unknown {value!r}; choose {there}", option=entry.name) from None
        check_types(self)
        for name, reason in self.idle().items():
            value = getattr(self, name)
            if value is not None:
                raise RecipeError(f"{value} has no effect {reason}", option=name)

    def idle(self) -> Mapping[str, str]:
        """Options that have no effect beside those that were given, by name, each with the reason.

        None of them may be given, whatever its value. The reason follows "has no effect" and says what to do.
        """
        return {}

    def default_of(self, name: str) -> object:
        """The value that an option resolves to if it was not given; None where the model decides, or nothing does."""
        return resolves_to(self.__dataclass_fields__[name])

    def resolved(self) -> Self:
        """The same method with every default written out, its base's too; options without effect stay None."""
        idle, found = self.idle(), {}
        for name in (entry.name for entry in fields(self)):
            value = getattr(self, name)
            if value is None and name not in idle:
                value = self.default_of(name)
            found[name] = value.resolved() if isinstance(value, Options) else value
        return replace(self, **found)


def resolves_to(entry: Field[Any]) -> object:
    """The value that an option has where it was not given, as its metadata say; None if they do not."""
    value = entry.metadata.get("resolves_to")
    return value() if callable(value) else value
