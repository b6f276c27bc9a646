"""Names of a sweep's points: what tells a point from the base recipe, as a folder's name.

A name depends on the point alone, not on the others, so that a sweep that grows finds its old folders again.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from compress.config.options import walk_options
from compress.config.recipe import Recipe
from compress.errors import RecipeError
from compress.families.base import METHODS
from compress.families.option_types import plain

LONGEST = 100
_GOOD = re.compile(r"[A-Za-z0-9][\w.+-]*")
_ENDINGS = (".partial", ".unfinished")
_TAKEN = ("originals", "report.html", "sweep.json", "sweep.yaml")
_DIGITS = 6


def check_name(name: str, where: str) -> None:
    """Raises RecipeError for what cannot be the name of a point's folder."""
    if not _GOOD.fullmatch(name) or name.endswith(_ENDINGS) or name in _TAKEN:
        raise RecipeError(
            f"{where}: {name!r} cannot be a folder's name; letters, digits, and then also . _ + -"
        )


def point_name(
    recipe: Recipe, settings: Mapping[tuple[str, ...], object], prefix: str | None
) -> str:
    """The method, then every setting in the order of the options: "eora-gptq-bits3-rank32".

    `settings` are options by path. A `prefix` takes the place of the method's name.
    """
    parts: list[str] = [recipe.method_name if prefix is None else prefix]
    others = []
    for option in walk_options(recipe, METHODS):
        if option.path not in settings or (option.path == ("method",) and prefix is None):
            continue
        inner = getattr(option.value, "name", None) if option.choices else plain(option.value)
        text = short(inner)
        if option.path[0] == "method":
            parts.append(text if option.choices else f"{option.path[-1]}{text}")
        else:
            others.append(f"{option.path[-1]}{text}")
    name = "-".join([*parts, *others])
    return name if len(name) <= LONGEST else f"{name[: LONGEST - _DIGITS - 1]}-{_digest(name)}"


def short(value: object) -> str:
    """A value as part of a name; where it has to be shortened, with a digest of all of it."""
    if value is None or value == []:
        return "none"
    text = "+".join(map(str, value)) if isinstance(value, list) else str(value)
    last = re.sub(r"[^\w.+-]+", "_", text.rstrip("/").rpartition("/")[2])[:40]
    return last if last == text and last else f"{last}_{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
